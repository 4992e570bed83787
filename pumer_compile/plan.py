"""The plan: token counts before and after every reducer, and what they save."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from torch import Tensor

from .errors import UsageError


@dataclass(frozen=True)
class SitePlan:
    """One site.

    Attributes:
        site: address, such as `cross_modal.2`.
        module: path of its attention module.
        before, after: tokens by stream.
        pruned, merged: tokens removed by stream.
        multiply_adds: of one sample from this site to the next (or the end), as (before, after) reduction.
        call: 1 and more where the model runs the layer again on other inputs (a second image).
    """

    site: str
    module: str
    before: dict[str, int]
    after: dict[str, int]
    pruned: dict[str, int]
    merged: dict[str, int]
    multiply_adds: tuple[int, int] = (0, 0)
    call: int = 0

    @property
    def name(self) -> str:
        """The address, and `@1` and so on where the layer runs again."""
        return self.site + (f"@{self.call}" if self.call else "")


@dataclass(frozen=True)
class PromptPlace:
    """Where an image stands in every prompt of a compiled model.

    Attributes:
        input: that holds the ids.
        placeholder: the id that fills the place.
        start, stop: first position, and the one after the last.
    """

    input: str
    placeholder: int
    start: int
    stop: int


@dataclass(frozen=True)
class Plan:
    """Sites in execution order and the multiply-adds of one sample, reducers included.

    Attributes:
        sites: where tokens are reduced.
        multiply_adds_before, multiply_adds_after: of the whole model.
        layers: tokens by stream after every attention node that has any, by its address, in execution order.
        prompts: where images stand in prompts.
    """

    sites: tuple[SitePlan, ...]
    multiply_adds_before: int
    multiply_adds_after: int
    layers: dict[str, dict[str, int]] = field(default_factory=dict)
    prompts: tuple[PromptPlace, ...] = ()

    @property
    def ratio(self) -> float:
        """How many times fewer multiply-adds."""
        return self.multiply_adds_before / self.multiply_adds_after

    def tokens(self) -> dict[str, dict[str, int]]:
        """Tokens by stream after every attention node, by its address."""
        return {site: dict(counts) for site, counts in self.layers.items()}

    def to_dict(self) -> dict[str, Any]:
        """`{"sites": [{site, module, before, after}], "multiply_adds": {before, after, ratio}}`."""
        prompts = {"prompts": [asdict(place) for place in self.prompts]} if self.prompts else {}
        return {
            **prompts,
            "sites": [{"site": s.name, "module": s.module, "before": s.before, "after": s.after} for s in self.sites],
            "multiply_adds": {
                "before": self.multiply_adds_before,
                "after": self.multiply_adds_after,
                "ratio": self.ratio,
            },
        }


def check_prompts(manifest: Mapping[str, Any], inputs: Mapping[str, Tensor]) -> None:
    """Whether images stand in these prompts where the artifact has them compiled in, and are cut as it has them.

    Raises:
        UsageError: elsewhere, in another number of places, or an input has other values than it was compiled for.
    """
    for name, values in (manifest.get("fixed_inputs") or {}).items():
        if name in inputs and inputs[name].tolist() != values:
            raise UsageError(
                f"The artifact was compiled for {name} {values}, which is written into it (images of another shape are "
                f"cut otherwise), and was given {inputs[name].tolist()}. Compile it for this shape."
            )
    for name in manifest.get("unpadded_inputs") or ():
        if name in inputs and not bool((inputs[name] == 1).all()):
            raise UsageError(
                f"The artifact was compiled with --no-padding, and {name} has padding (zeros). Compile it without, or "
                "give it samples of full length."
            )
    for name, value in (manifest.get("constant_inputs") or {}).items():
        if name in inputs and not bool((inputs[name] == value).all()):
            raise UsageError(
                f"The artifact was compiled without {name}, which is as good as {value} in every place, and was given "
                f"other values. Compile it with {name} among its inputs (--inputs)."
            )
    blocks: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for place in (manifest.get("plan") or {}).get("prompts", ()):
        blocks.setdefault((place["input"], place["placeholder"]), []).append((place["start"], place["stop"]))
    for (name, placeholder), places in blocks.items():
        if name in inputs:
            _check_places(name, inputs[name], placeholder, places)


def without_constants(manifest: Mapping[str, Any], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs without those that `check_prompts` found to say nothing."""
    return {name: tensor for name, tensor in inputs.items() if name not in (manifest.get("constant_inputs") or {})}


def _check_places(name: str, ids: Tensor, placeholder: int, places: list[tuple[int, int]]) -> None:
    found = ids == placeholder
    total = sum(stop - start for start, stop in places)
    there = all(bool(found[:, start:stop].all()) for start, stop in places)
    if not there or int(found.sum()) != total * ids.shape[0]:
        positions = " and ".join(f"{start} to {stop - 1}" for start, stop in places)
        raise UsageError(
            f"The artifact has the image at positions {positions} of every prompt, and these {name} do not have its "
            f"placeholders (id {placeholder}) just there. Compile it for prompts of this form."
        )
