"""`method: fastervlm`: the image tokens that the vision tower's class token attends to (Zhang et al., 2024)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

from pydantic import Field

from ..errors import PlanError
from .base import ActsOn, Method, TokenOutputs

if TYPE_CHECKING:
    from ..reducers import Reducer
    from ..rewrite.sites import LocatedGraph, Replacements, Site, Stream

log = logging.getLogger("pumer_compile")


class FasterVLM(Method):
    """Keeps the `budget` tokens of each image that get the most votes: from the class token of the vision tower, or
    from all its tokens where it has none.

    Args:
        semantics: one: what is published keeps the picture's order, and leaves ties open.
        budget: tokens to keep of each image (of each crop or tile of one).
        positions: of the tokens that are left: `compact` (renumbered, as published) or `original` (where they stood in
            the whole prompt).
        outputs: `reduced` by default: logits have an entry for each token that is left.
    """

    needs_prompt = True
    acts_on: ClassVar[ActsOn] = "tower"
    reads_tower = True
    before_prompt = True

    method: Literal["fastervlm"] = "fastervlm"
    semantics: Literal["reference", "stable"] = "reference"
    outputs: TokenOutputs = "reduced"
    budget: Annotated[int, Field(ge=1, strict=True, description="the image tokens to keep, such as 64")]
    positions: Literal["compact", "original"] = "compact"

    def canonical(self) -> dict[str, Any]:
        """See `Method.canonical`."""
        return {**super().canonical(), "budget": self.budget, "positions": self.positions}

    def find_sites(self, graph: LocatedGraph) -> list[Site]:
        """See `Method.find_sites`: where features leave the vision tower, read by its last attention before that."""
        from ..rewrite.sites import Site

        return [Site(attention, instead=marks) for attention, marks in graph.towers()]

    def reducer(self, site: Site, stream: Stream) -> Reducer | None:
        """See `Method.reducer`."""
        from ..reducers import VotesReducer

        if self.budget > stream.row:
            raise PlanError(
                f"A budget of {self.budget} is more than the {stream.row} tokens that the vision tower gives. Choose a "
                "smaller one, or `none`."
            )
        if self.budget >= max(map(len, stream.crops)):
            log.warning("A budget of %d keeps every token of an image: nothing of it is pruned.", self.budget)
        return VotesReducer(stream.crops, self.budget, pinned=stream.pinned)

    def replacements(self, graph: LocatedGraph, sites: Sequence[Site]) -> Replacements:
        """See `Method.replacements`: positions along the prompt."""
        from ..rewrite.renumber_positions import renumbered_positions

        return renumbered_positions(graph, compact=self.positions == "compact")
