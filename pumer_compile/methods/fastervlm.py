"""`method: fastervlm`: the image tokens that the vision tower's class token attends to (Zhang et al., 2024)."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar, Literal

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

    acts_on: ClassVar[ActsOn] = "tower"
    reads_tower = True

    method: Literal["fastervlm"] = "fastervlm"
    semantics: Literal["reference", "stable"] = "reference"

    def chooser(self, stream: Stream) -> Reducer:
        """See `ImageBudget.chooser`."""
        from ..reducers import VotesReducer

        return VotesReducer(stream.crops, self.budget, pinned=stream.pinned)
