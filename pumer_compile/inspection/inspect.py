"""Does a model fit: what is in it, which methods apply to it, a schedule to begin with; or why not."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ..capture.capture import Program
from ..errors import PumerError
from ..methods import METHODS
from ..methods.base import Method
from ..methods.proposing import Outline, Usual
from ..reduce import Analysed
from .outline import Found, look
from .suggest import Suggestion, first_that_fits, suggest


@dataclass(frozen=True)
class Verdict:
    """A method and a model.

    Attributes:
        method: its name.
        schedule: one that the graph takes; None where it takes none.
        reason: why not; '' where it does.
        control: whether the method looks at nothing.
    """

    method: str
    schedule: Method | None
    reason: str
    control: bool = False


@dataclass(frozen=True)
class Inspection:
    """What there is to know of a model before it is compiled.

    Attributes:
        inputs: shapes by name.
        outline: streams, sites, prompt.
        attentions: address, module, and what queries and keys index, in execution order.
        prompts: where images stand in prompts.
        verdicts: of every method.
        suggestion: None where there is none.
        why_not: then.
    """

    inputs: dict[str, list[int]]
    outline: Outline
    attentions: tuple[Mapping[str, str], ...] = ()
    prompts: tuple[Mapping[str, Any], ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    suggestion: Suggestion | None = None
    why_not: str = ""

    @property
    def fits(self) -> bool:
        """Whether anything can be reduced."""
        return any(verdict.schedule is not None and not verdict.control for verdict in self.verdicts)

    def package(self) -> str:
        """What a package of it, reduced as suggested, holds; in words."""
        if self.suggestion is None:
            return ""
        schedule, plan = self.suggestion.schedule, self.suggestion.reduced.plan
        if not schedule.needs_prompt:
            inputs = ", ".join(f"{name} {shape}" for name, shape in self.inputs.items())
            return f"one model (.onnx, .engine or .xml) that takes {inputs} and gives what this model gives"
        if schedule.before_prompt:
            tokens = " and ".join(str(count) for site in plan.sites for count in site.after.values())
            parts = f"a vision part that gives {tokens} image tokens, and the language model for prompts with these"
        else:
            parts = "the vision part as it is, and a language model that drops image tokens between its layers"
        caches = "of one length" if schedule.cache_lengths == "uniform" else "each of its own length"
        return f"{parts}; caches of keys and values are {caches}"

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        suggestion = None
        if self.suggestion is not None:
            plan = self.suggestion.reduced.plan.to_dict()
            suggestion = {"schedule": _keys(self.suggestion.schedule), "why": self.suggestion.why, "plan": plan}
        return {
            "fits": self.fits,
            "why_not": self.why_not,
            "inputs": self.inputs,
            "outline": asdict(self.outline),
            "attentions": [dict(attention) for attention in self.attentions],
            "prompts": [dict(prompt) for prompt in self.prompts],
            "methods": [
                {"method": v.method, "schedule": v.schedule and _keys(v.schedule), "reason": v.reason}
                for v in self.verdicts
            ],
            "suggestion": suggestion,
            "package": self.package(),
        }


def inspect_program(program: Program, progress: Callable[[str], None] = lambda text: None) -> Inspection:
    """Look at a captured program. Methods are asked for schedules of their own, and each is tried on the graph.

    Args:
        program: captured; its weights are not read.
        progress: told what is going on.
    """
    analysed = Analysed(program)
    progress("looking for tokens and attention")
    found = look(analysed)
    verdicts = []
    for number, (name, kind) in enumerate(METHODS.items(), start=1):
        progress(f"trying {name} ({number} of {len(METHODS)})")
        verdicts.append(_verdict(name, kind, analysed, found))
    progress("suggesting a schedule")
    suggestion, why_not = None, ""
    try:
        suggestion = suggest(analysed, found.outline)
    except PumerError as error:
        why_not = str(error)
    attentions = tuple(
        {"address": a.address, "module": a.module, "queries": str(a.query_axis), "keys": str(a.key_axis)}
        for a in found.attentions
        if a.call == 0
    )
    inputs = {name: list(tensor.shape) for name, tensor in program.inputs.items()}
    prompts = tuple(asdict(place) for place in found.prompts)
    return Inspection(inputs, found.outline, attentions, prompts, tuple(verdicts), suggestion, why_not)


def _verdict(name: str, kind: type[Method], analysed: Analysed, found: Found) -> Verdict:
    """Try the schedules that a method proposes."""
    proposals = list(kind.proposals(found.outline, Usual()))
    if not proposals:
        reason = str(found.errors[0]) if found.errors and not found.outline.streams else f"it wants {kind.wants}"
        return Verdict(name, None, reason, kind.control)
    schedule, error = first_that_fits(analysed, proposals)
    return Verdict(name, schedule, "" if error is None else str(error), kind.control)


def short(reason: str) -> str:
    """The first sentence of a reason, without the node that it names."""
    text = re.sub(r" \(node [^()]*\)", "", reason)
    return re.split(r"(?<=[a-z0-9\])`])[.;:] ", text)[0].rstrip(".")


def _keys(schedule: Method) -> dict[str, Any]:
    return schedule.model_dump(mode="json", exclude_none=True)
