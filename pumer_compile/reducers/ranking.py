"""Ordering by counting, and selection by comparing.

`topk`, `argmax` and `sort` break ties differently in each runtime, TensorRT limits the K of `topk`, and a
stable sort does not export. Counting how many scores beat each score gives the same order everywhere, ties to
the lowest index, from comparisons and sums alone. It costs n * n comparisons, which is nothing beside the
layer it stands in.
"""

from __future__ import annotations

import torch
from torch import Tensor


def descending_rank(scores: Tensor) -> Tensor:
    """Position of every score in descending order, ties to the lowest index.

    Args:
        scores: `[batch, n]`, float.

    Returns:
        `[batch, n]`, int64: a permutation of 0..n-1.
    """
    index = torch.arange(scores.shape[-1], device=scores.device)
    mine, other = scores.unsqueeze(-1), scores.unsqueeze(-2)
    beaten_by = (other > mine) | ((other == mine) & (index < index.unsqueeze(-1)))
    return beaten_by.sum(-1)


def top(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest scores in descending order, ties to the lowest index.

    Args:
        scores: `[batch, n]`, float.
        count: how many, 0..n.

    Returns:
        `[batch, count]`, int64.
    """
    rank = descending_rank(scores)
    wanted = torch.arange(count, device=scores.device).unsqueeze(-1)
    index = torch.arange(scores.shape[-1], device=scores.device)
    return ((rank.unsqueeze(-2) == wanted) * index).sum(-1)


def first_argmax(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Largest value of the last axis and its lowest index.

    Args:
        scores: `[..., n]`, float.

    Returns:
        values `[...]` and indices `[...]` (int64).
    """
    best = scores.amax(-1)
    index = torch.arange(scores.shape[-1], device=scores.device)
    candidates = torch.where(scores == best.unsqueeze(-1), index, scores.shape[-1] - 1)
    return best, candidates.amin(-1)


def one_hot(indices: Tensor, size: int) -> Tensor:
    """Rows that select: `[..., k]` int64 -> `[..., k, size]` bool."""
    return indices.unsqueeze(-1) == torch.arange(size, device=indices.device)


def identity(rows: int, columns: int, device: torch.device) -> Tensor:
    """Ones on the diagonal: `[rows, columns]`, float32.

    `torch.eye` exports with indices in the smallest integer that holds them, and TensorRT takes no int16.
    """
    return one_hot(torch.arange(rows, device=device), columns).float()
