"""The image tokens that the class token of the vision tower attends to (FasterVLM, Zhang et al. 2024)."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from .base import Signal
from .crops import CropReducer
from .ranking import descending_rank


class VotesReducer(CropReducer):
    """Keeps the tokens of each crop that get the most votes, in their order; ties go to the lowest index.

    Args:
        crops, budget, pinned: see `CropReducer`.
    """

    reads = (Signal.CLASS_TOKEN,)

    def by_token(self, tokens: Tensor, **signals: Any) -> tuple[Tensor, ...]:
        """The votes alone."""
        return (signals["class_token"].float(),)

    def of_crop(self, *parts: Tensor) -> Tensor:
        """See `CropReducer`."""
        (votes,) = parts
        return descending_rank(votes) < self.budget

    def scores(self, *parts: Tensor) -> Tensor:
        """The votes."""
        (votes,) = parts
        return votes
