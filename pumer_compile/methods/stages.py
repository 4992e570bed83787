"""`method: stages`: several methods in one schedule, one after the other: a tower's tokens, then those inside the
language model."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import BeforeValidator, Field, SerializeAsAny, field_validator

from ..added_inputs import AddedInput
from ..errors import PlanError, ScheduleError
from .about import About
from .base import Marking, Method, TokenOutputs

if TYPE_CHECKING:
    from ..reducers import Reducer
    from ..rewrite.sites import LocatedGraph, Replacements, Site, Stream


def _read(stage: Any) -> Any:
    return Method(**stage) if isinstance(stage, Mapping) else stage


class Stages(Method):
    """One method after the other: at most one that acts before the language model, then those that act inside it.

    Args:
        stages: schedules in the order in which they act, each with its `method` and its keys.
        outputs: `reduced` by default; stages have none of their own.
    """

    about = About(
        does="several of these, one after the other",
        reads="what its stages read",
        use="a tower's tokens first, and fewer inside the language model",
    )

    needs_prompt = True
    wants = "two methods of your choice"
    cache_lengths: ClassVar[Literal["uniform", "by_layer"]] = "by_layer"

    method: Literal["stages"] = "stages"
    semantics: Literal["reference"] = "reference"
    outputs: TokenOutputs = "reduced"
    stages: Annotated[
        tuple[SerializeAsAny[Annotated[Method, BeforeValidator(_read)]], ...],
        Field(description="the schedules of the methods, such as [{method: vispruner, budget: 64}, ...]"),
    ]

    @field_validator("stages")
    @classmethod
    def _in_order(cls, stages: tuple[Method, ...]) -> tuple[Method, ...]:
        if len(stages) < 2:
            raise ValueError("`stages` is for two methods and more; write a single one as a schedule of its own")
        for stage in stages:
            if stage.marks is None or isinstance(stage, Stages):
                raise ValueError(f"`method: {stage.method}` reduces no image inside a prompt, and is no stage")
            if "outputs" in stage.model_fields_set and stage.outputs != "reduced":
                raise ValueError("`outputs` is of the whole schedule: write it beside `stages`")
        for earlier, later in itertools.pairwise(stages):
            if later.acts_on != "layers":
                raise ValueError(
                    f"`method: {later.method}` acts before the language model, and cannot follow `method: "
                    f"{earlier.method}`; it comes first, and alone there"
                )
        if any(stage.renumbers_layers for stage in stages) and not all(stage.renumbers for stage in stages):
            kept = next(stage for stage in stages if not stage.renumbers)
            raise ValueError(
                f"`method: {kept.method}` leaves tokens at their original positions, and a stage inside the language "
                "model counts them anew: choose the same `positions` for all"
            )
        return stages

    @property
    def renumbers(self) -> bool:
        """See `Method.renumbers`: what the first stage leaves is what later ones begin with."""
        return self.stages[0].renumbers

    @property
    def renumbers_layers(self) -> bool:
        """See `Method.renumbers_layers`."""
        return any(stage.renumbers_layers for stage in self.stages)

    @property
    def adds(self) -> dict[str, AddedInput]:
        """See `Method.adds`: what the stages add."""
        return {name: added for stage in self.stages for name, added in stage.adds.items()}

    @property
    def marks(self) -> Marking | None:
        """See `Method.marks`."""
        return self.stages[0].marks

    def canonical(self) -> dict[str, Any]:
        """See `Method.canonical`."""
        return {**super().canonical(), "stages": [stage.canonical() for stage in self.stages]}

    def find_sites(self, graph: LocatedGraph) -> list[Site]:
        """See `Method.find_sites`: those of every stage.

        Raises:
            PlanError: one comes before that of an earlier stage.
        """
        found: list[Site] = []
        for stage in self.stages:
            sites = stage.find_sites(graph)
            if found and any(mark.pinned for mark in graph.marks):
                raise PlanError(
                    "An image of this prompt has tokens among its own that stay whatever is chosen (text between its "
                    "lines, say), whose places are not known once a stage has reduced it. Choose one of the methods."
                )
            for site in sites:
                site.method = stage
                last = found[-1] if found else None
                if last is not None and graph.place_of(site) <= graph.place_of(last):
                    raise ScheduleError(
                        f"`stages` are out of order: `method: {stage.method}` reduces after {site.described}, and the "
                        f"stage before it after {last.described}."
                    )
                found.append(site)
        return found

    def reducers(self, site: Site, streams: Sequence[Stream]) -> dict[str, Reducer]:
        """See `Method.reducers`."""
        assert site.method is not None
        return site.method.reducers(site, streams)

    def replacements(self, graph: LocatedGraph, sites: Sequence[Site]) -> Replacements:
        """See `Method.replacements`: those of every stage; of two for one node, the first stage's."""
        found: Replacements = {}
        for stage in reversed(self.stages):
            found |= stage.replacements(graph, [site for site in sites if site.method is stage])
        return found
