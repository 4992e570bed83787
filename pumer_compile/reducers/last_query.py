"""The image tokens that the last word of a prompt looks at (FastV, ECCV 2024)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .merger import ModalityAwareMerger
from .ranking import descending_rank, one_hot, top
from .reducer import Comparison, Reduction, StreamReducer, decisions_of, relative_gap


class LastQueryPruner(nn.Module):
    """Keeps the tokens with the most attention from one query, mean over heads.

    They stay in their order; ties go to the lowest index. The mean is taken in float32 whatever the dtype.

    Args:
        keep: tokens to keep, at least 1.
    """

    def __init__(self, keep: int) -> None:
        super().__init__()
        self.keep = keep

    def forward(self, attention: Tensor) -> tuple[Tensor, Tensor]:
        """Indices of the kept tokens, ascending, `[batch, keep]` int64, and the scores, `[batch, tokens]` float32.

        Args:
            attention: of the query, after softmax, `[batch, heads, 1, tokens]`, any float.
        """
        scores = attention.float().mean((1, 2))
        kept = descending_rank(scores) < self.keep
        # Of those that tie at 1, the lowest index comes first.
        return top(kept.float(), self.keep), scores


class LastQueryReducer(StreamReducer):
    """Keeps the tokens of an image that `LastQueryPruner` chooses.

    Args:
        tokens: of the image, before.
        budget: of them to keep, 1..`tokens`.
    """

    def __init__(self, tokens: int, budget: int) -> None:
        super().__init__(tokens, None, ModalityAwareMerger(0), carried="ones")
        self.pruner: LastQueryPruner = LastQueryPruner(budget)  # type: ignore[assignment]  # with evidence of its own

    def forward(self, tokens: Tensor, attention: Tensor) -> Reduction:  # type: ignore[override]  # other evidence
        """Reduce the stream.

        Args:
            tokens: the image's part of the carrier, `[batch, before, width]`.
            attention: of the last query to it, after softmax, `[batch, heads, 1, before]`.
        """
        kept, scores = self.pruner(attention.detach())
        if self.forcing is not None:
            forced = self.forcing.decisions
            margin = _margin(scores, kept, forced.kept)
            differs = (kept != forced.kept).any(1)
            self.forcing.comparison = Comparison(
                decisions_of(kept, None), forced, differs, torch.where(differs, margin, 0.0)
            )
            kept = forced.kept
        assigned = one_hot(kept, self.tokens).float()
        return self._combine(tokens, torch.ones_like(tokens[:, :, 0]), assigned, decisions_of(kept, None))


def _margin(scores: Tensor, own: Tensor, forced: Tensor) -> Tensor:
    """How far the scores of two choices are apart, relative to them, `[batch]`.

    Choices are sets: the best token that only one of them has, and the worst that only the other has. What is no set in
    its order (a token twice, tokens swapped) is as far as can be.
    """
    mine, theirs = (one_hot(kept, scores.shape[1]).any(1) for kept in (own, forced))
    best = torch.where(mine & ~theirs, scores, -torch.inf).amax(1)
    worst = torch.where(theirs & ~mine, scores, torch.inf).amin(1)
    apart = relative_gap(best.unsqueeze(1), worst.unsqueeze(1), scores).squeeze(1)
    gap = torch.where(best > worst, apart, 0.0)
    return torch.where((forced[:, 1:] > forced[:, :-1]).all(1), gap, 1.0)
