"""The image tokens that the last word of a prompt looks at (FastV, ECCV 2024)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .base import Choice, Decisions, Reducer, Signal, kept_alone, set_margin
from .ranking import descending_rank, one_hot, top


class LastQueryPruner(nn.Module):
    """Keeps the tokens with the most attention from one query, mean over heads.

    They stay in their order; ties go to the lowest index. The mean is taken in float32 whatever the dtype.

    Args:
        keep: tokens to keep, at least 1; pinned ones not counted.
        pinned: tokens that stay whatever they get.
    """

    def __init__(self, keep: int, pinned: Sequence[int] = ()) -> None:
        super().__init__()
        self.keep, self.pinned = keep + len(pinned), list(pinned)

    def forward(self, attention: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of the kept tokens, ascending, `[batch, keep]` int64, and the scores, `[batch, tokens]` float32.

        Args:
            attention: of the query, after softmax, `[batch, heads, 1, tokens]`, any float.
        """
        scores = attention.float().mean((1, 2))
        if self.pinned:
            pinned = [2.0 if place in self.pinned else 0.0 for place in range(scores.shape[1])]
            scores = scores + torch.tensor(pinned).to(scores.device)  # attention is at most 1
        kept = descending_rank(scores) < self.keep
        # Of those that tie at 1, the lowest index comes first.
        return top(kept.float(), self.keep), scores


class LastQueryReducer(Reducer):
    """Keeps the tokens of an image that `LastQueryPruner` chooses.

    Args:
        tokens: of the image, before.
        budget: of them to keep, 1..`tokens`; pinned ones not counted.
        pinned: places of tokens among them that stay whatever they get.
    """

    reads: tuple[Signal, ...] = (Signal.LAST_QUERY,)
    keeps_order = True

    def __init__(self, tokens: int, budget: int, pinned: Sequence[int] = ()) -> None:
        super().__init__(tokens, budget + len(pinned))
        self.pruner = LastQueryPruner(budget, pinned)

    @property
    def prunes(self) -> bool:
        """See `Reducer`; of several images one may be kept whole."""
        return True

    def choose(self, tokens: Tensor, last_query: Tensor) -> Choice:
        """See `Reducer` and `Signal`; the tokens are the image's part of the carrier."""
        return self._chosen(last_query)

    def _chosen(self, attention: Tensor) -> Choice:
        kept, scores = self.pruner(attention.detach())
        weights = torch.ones_like(scores)
        return Choice(kept_alone(kept), one_hot(kept, self.tokens).float(), weights, scores)

    def margin(self, own: Choice, among: Choice, forced: Decisions) -> Tensor:
        """See `Reducer`."""
        return set_margin(own.evidence, own.decisions.kept, forced.kept)


class NextQueryReducer(LastQueryReducer):
    """The same by the attention of the next layer, from the tokens before it (PyramidDrop, CVPR 2025)."""

    reads: tuple[Signal, ...] = (Signal.NEXT_QUERY,)

    def choose(self, tokens: Tensor, next_query: Tensor) -> Choice:
        """See `Reducer` and `Signal`."""
        return self._chosen(next_query)
