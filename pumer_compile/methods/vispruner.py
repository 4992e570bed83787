"""`method: vispruner`: image tokens by visual cues alone, before the projector (Zhang et al., ICCV 2025)."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from ..errors import PlanError
from .base import Method, TokenOutputs

if TYPE_CHECKING:
    from ..reducers import Reducer
    from ..rewrite.sites import LocatedGraph, Replacements, Site, Stream

log = logging.getLogger("pumer_compile")


class VisPruner(Method):
    """Keeps `budget` tokens of each image: those that the class token attends to, and of the others a diverse few.

    Args:
        semantics: `reference`, the default, is what the published code computes; the result of `stable` does not depend
            on the order of nearly equal similarities.
        budget: tokens to keep of each image; all of them is the published selection too, with nothing pruned.
        important: share of them kept for the attention they get; the others are kept for being unlike each other.
        positions: of the tokens that are left: `compact` (renumbered, as published) or `original` (where they stood in
            the whole prompt).
        outputs: `reduced` by default: logits have an entry for each token that is left.
    """

    needs_prompt = True
    reads_tower = True
    before_prompt = True

    method: Literal["vispruner"] = "vispruner"
    semantics: Literal["reference", "stable"] = "reference"
    outputs: TokenOutputs = "reduced"
    budget: Annotated[int, Field(ge=1, strict=True, description="the image tokens to keep, such as 64")]
    important: Annotated[float, Field(ge=0, le=1)] = 0.5
    positions: Literal["compact", "original"] = "compact"

    def canonical(self) -> dict[str, Any]:
        """See `Method.canonical`."""
        keys = {"budget": self.budget, "important": self.important, "positions": self.positions}
        return {**super().canonical(), **keys}

    def find_sites(self, graph: LocatedGraph) -> list[Site]:
        """See `Method.find_sites`: where features leave the vision tower, read by its last attention before that."""
        from ..rewrite.sites import Site

        return [Site(attention, instead=marks) for attention, marks in graph.towers()]

    def reducer(self, site: Site, stream: Stream) -> Reducer | None:
        """See `Method.reducer`."""
        from ..reducers import VisualReducer

        if self.budget > stream.row:
            raise PlanError(
                f"A budget of {self.budget} is more than the {stream.row} tokens that the vision tower gives. Choose a "
                "smaller one, or `none`."
            )
        if self.budget >= max(map(len, stream.crops)):
            log.warning("A budget of %d keeps every token of an image: nothing of it is pruned.", self.budget)
        return VisualReducer(stream.crops, self.budget, self.important, order=self.semantics, pinned=stream.pinned)

    def replacements(self, graph: LocatedGraph, sites: Sequence[Site]) -> Replacements:
        """See `Method.replacements`: positions along the prompt."""
        from ..rewrite.renumber_positions import renumbered_positions

        return renumbered_positions(graph, compact=self.positions == "compact")
