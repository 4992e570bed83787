"""`method: fastervlm`: the image tokens that the vision tower's class token attends to (Zhang et al., 2024)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

from .about import About
from .base import ActsOn
from .image_budget import ImageBudget

if TYPE_CHECKING:
    from ..reducers import Reducer
    from ..rewrite.sites import Stream


class FasterVLM(ImageBudget):
    """Keeps the `budget` tokens of each image that get the most votes: from the class token of the vision tower, or
    from all its tokens where it has none.

    Args:
        semantics: `reference` and `stable` are the same: what is published keeps the picture's order, and of ties the
            lowest token number comes first.
        budget, positions, outputs: see `ImageBudget`; `compact` positions are the published ones.
    """

    about = About(
        does="keeps the image tokens with the most attention",
        reads="attention of the class token",
        use="the simplest by attention; where neighbours that say the same do no harm",
        paper="Zhang et al., FasterVLM, 2024",
        code="Theia-4869/FasterVLM, Apache-2.0",
        held="published vectors",
    )

    acts_on: ClassVar[ActsOn] = "tower"
    reads_tower = True

    method: Literal["fastervlm"] = "fastervlm"
    semantics: Literal["reference", "stable"] = "reference"

    def chooser(self, stream: Stream) -> Reducer:
        """See `ImageBudget.chooser`."""
        from ..reducers import VotesReducer

        return VotesReducer(stream.crops, self.budget, pinned=stream.pinned)
