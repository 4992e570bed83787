"""What the controls share: choices that no data makes, in a prompt or in the image stream of a fusion model."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field

from ..errors import LocateError, PlanError
from .base import Marking, Method
from .image_budget import ImageBudget
from .proposing import Ask, Outline, at_depths

if TYPE_CHECKING:
    from ..reducers import Reducer
    from ..rewrite.sites import LocatedGraph, Replacements, Site, Stream


class Control(ImageBudget):
    """Keeps `budget` tokens of each image without looking at it.

    Args:
        at: of a model without a prompt: the attention after which its image is reduced, such as `cross_modal.2`. The
            learned tokens that lead it (a class token) stay, and count in no budget.
    """

    at: Annotated[str, Field(pattern=r"^[a-z_]+\.\d+$")] | None = None

    control = True

    @classmethod
    def proposals(cls, outline: Outline, ask: Ask) -> Iterator[Method]:
        """See `Method.proposals`: of a model without a prompt at the first place of the paper."""
        image = outline.streams.get("image", 0) - outline.learned
        if outline.fuses and image > 1:
            at = ask.one_of("at", outline.informed, at_depths(outline.informed)[0])
            budget = ask.count("budget", 1, image - 1, image // 3)
            yield cls(at=at, budget=cls.near(budget, image), outputs="refused")
        elif outline.crops > 1:
            budget = ask.count("budget", 1, outline.crops - 1, outline.crops // 3)
            yield from cls.in_either_order(budget=cls.near(budget, outline.crops))

    @classmethod
    def near(cls, budget: int, tokens: int) -> int:
        """The largest budget up to one that an image of so many tokens can have."""
        return min(max(1, budget), tokens)

    @property
    def marks(self) -> Marking | None:
        """See `Method.marks`."""
        return super().marks if self.at is None else None

    @property
    def addresses(self) -> tuple[str, ...]:
        """See `Method.addresses`."""
        return () if self.at is None else (self.at,)

    def canonical(self) -> dict[str, Any]:
        """See `Method.canonical`."""
        return {key: value for key, value in super().canonical().items() if value is not None}

    def find_sites(self, graph: LocatedGraph) -> list[Site]:
        """See `Method.find_sites`: the rows that enter a prompt, or the attention that it names."""
        from ..rewrite.sites import Site

        if self.at is None:
            return super().find_sites(graph)
        found = []
        for attention in graph.choose(self.at):
            graph.check_reducible(attention)
            graph.check_whole(attention)
            graph.check_masks(attention)
            images = tuple(s for s in attention.streams if graph.modality(s) == "image")
            if not images:
                raise LocateError(
                    f"Site {attention.described} has no image tokens: its attention is from {attention.query_axis} to "
                    f"{attention.key_axis}. `method: {self.method}` reduces those."
                )
            found.append(Site(attention, after=attention.carrier, streams=images))
        return found

    def reducer(self, site: Site, stream: Stream) -> Reducer | None:
        """See `Method.reducer`."""
        if self.at is None:
            return super().reducer(site, stream)
        image = tuple(range(stream.learned, stream.tokens))
        if self.budget > len(image):
            raise PlanError(
                f"A budget of {self.budget} is more than the {len(image)} tokens of {stream.name} at {self.at}. Choose "
                "a smaller one."
            )
        return self.chooser(replace(stream, crops=(image,), pinned=tuple(range(stream.learned))))

    def chooser(self, stream: Stream) -> Reducer:
        """See `ImageBudget.chooser`."""
        from ..reducers.fixed import FixedReducer

        return FixedReducer(stream.tokens, [*self.groups(stream), *([place] for place in stream.pinned)])

    def groups(self, stream: Stream) -> list[list[int]]:
        """The places that make each new token, but the pinned ones.

        Raises:
            PlanError: there are none for this budget.
        """
        raise NotImplementedError

    def replacements(self, graph: LocatedGraph, sites: Sequence[Site]) -> Replacements:
        """See `Method.replacements`."""
        return super().replacements(graph, sites) if self.at is None else {}
