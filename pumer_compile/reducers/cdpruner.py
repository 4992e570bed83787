"""Conditional diversity (CDPruner, NeurIPS 2025): tokens that are relevant to the text and unlike each other, by a
determinantal point process."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from .greedy import cosines, pick, repeated, row_at

Order = Literal["reference", "stable"]

TAKEN = -torch.inf
LOWEST = -3e38
# Gains in `stable` are compared in multiples of this: above what float32 leaves of one that is spanned by kept tokens.
GRID = 2.0**-16


class Determinantal(nn.Module):
    """Keeps the tokens with the largest determinant of their kernel, found greedily: a pivoted Cholesky decomposition.

    The kernel of two tokens is `(1 - weight) cosine + weight relevance_i cosine relevance_j`. A token's gain is what
    the determinant grows by with it: what is left of its diagonal entry. Each step picks the largest gain (ties to
    the lowest index) and takes its row of the decomposition off the others'.

    A budget above the rank of the features leaves no gain but rounding. The published code then divides by roots of
    that; `reference` does too, without NaN. `stable` compares gains in multiples of 2^-16: what is left there is
    none, and the lowest indices follow.

    Args:
        budget: tokens to keep, at least 1. weight: of the relevance, 0..1; 1 is the paper's. epsilon: what OpenVINO
            adds to squares before their root, and below which it skips a projection; 0 in the paper's. order:
            `reference` or `stable`.
    """

    def __init__(self, budget: int, weight: float = 1.0, epsilon: float = 0.0, order: Order = "reference") -> None:
        super().__init__()
        self.budget, self.weight, self.epsilon, self.order = budget, weight, epsilon, order

    def forward(self, features: Tensor, relevance: Tensor, budget: int | None = None) -> Tensor:
        """Which tokens stay, `[n, tokens]`, bool, `min(budget, tokens)` in each row.

        Args:
            features: `[n, tokens, width]`, float32.
            relevance: `[n, tokens]`, float32, about 0..1.
            budget: in place of its own.
        """
        count, tokens, _ = features.shape
        budget = self.budget if budget is None else budget
        if budget >= tokens:
            return torch.ones_like(relevance, dtype=torch.bool)
        similarity = cosines(features, self.epsilon)
        conditional = relevance.unsqueeze(-1) * similarity * relevance.unsqueeze(-2)
        kernel = conditional if self.weight == 1 else (1 - self.weight) * similarity + self.weight * conditional
        own = torch.arange(tokens, device=features.device)
        gain = torch.where(own == own.unsqueeze(1), kernel, 0.0).sum(-1)
        rows = torch.zeros_like(relevance).unsqueeze(-1).expand(count, tokens, budget)
        gain, _ = repeated(self._step, budget, [gain, rows], kernel)
        return gain == TAKEN

    def _step(self, number: Tensor, gain: Tensor, rows: Tensor, kernel: Tensor) -> tuple[Tensor, Tensor]:
        """Pick a token; `rows` are the decomposition so far, `[n, tokens, budget]`, zeros where none is yet."""
        seen = (gain / GRID).round() * GRID if self.order == "stable" else gain
        best, place, picked = pick(seen)
        own = torch.where(picked, gain, TAKEN).amax(-1, keepdim=True)
        share = row_at(rows, place)
        if self.epsilon:
            share = torch.where(share.abs() < self.epsilon, 0.0, share)
        left = row_at(kernel, place) - (rows @ share.unsqueeze(-1)).squeeze(-1)
        row = torch.where(best > -self.epsilon, left / (own + self.epsilon).clamp(min=1e-30).sqrt(), 0.0)
        after = gain - row * row
        after = torch.where(after > LOWEST, after, LOWEST)  # also where it is no number
        taken = picked | (gain == TAKEN)
        slot = torch.arange(rows.shape[2], device=rows.device)
        return torch.where(taken, TAKEN, after), torch.where(slot == number, row.unsqueeze(-1), rows)


def halved(tokens: int, budget: int) -> list[tuple[int, int, int]]:
    """Start, stop and budget of each half of an image, as OpenVINO parts them.

    Each half takes what the other has no tokens for.
    """
    middle = tokens // 2
    first = min(budget // 2, middle)
    first = max(first, budget - (tokens - middle))
    return [(0, middle, first), (middle, tokens, budget - first)]
