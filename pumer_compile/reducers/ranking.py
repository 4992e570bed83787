"""Ordering by counting, and selection by comparing.

`topk`, `argmax` and `sort` break ties differently in each runtime, TensorRT limits the K of `topk`, and a
stable sort does not export. Counting how many scores beat each score gives the same order everywhere, ties to
the lowest index, from comparisons and sums alone. It costs n * n comparisons, which is nothing beside the
layer it stands in.
"""

from __future__ import annotations

import torch
from torch import Tensor


def descending_rank(scores: Tensor, first: Tensor | None = None) -> Tensor:
    """Position of every score in descending order.

    Args:
        scores: `[batch, n]`, float.
        first: where the column's score comes before an equal one of the row, `[n, n]` bool; None for the lowest index.

    Returns:
        `[batch, n]`, a permutation of 0..n-1 in float32, in which runtimes count fastest (exact below 2 ** 24).
    """
    if first is None:
        index = torch.arange(scores.shape[-1], device=scores.device)
        first = index < index.unsqueeze(-1)
    mine, other = scores.unsqueeze(-1), scores.unsqueeze(-2)
    return ((other > mine) | ((other == mine) & first)).float().sum(-1)


def by_place(rank: Tensor, count: int) -> Tensor:
    """Ranks among which the first `count` stand in the order of their indices.

    Args:
        rank: from `descending_rank`, `[batch, n]`.
        count: how many, 0..n.

    Returns:
        `[batch, n]`, a permutation of 0..n-1 in float32.
    """
    first = rank < count
    return torch.where(first, (first.long().cumsum(-1) - 1).to(rank.dtype), rank)


def ranked(rank: Tensor, places: Tensor) -> Tensor:
    """Rows that select what stands at given places.

    Args:
        rank: from `descending_rank`, `[batch, n]`.
        places: `[k]`, int64.

    Returns:
        `[batch, k, n]`, bool.
    """
    return rank.unsqueeze(-2) == places.to(rank.dtype).unsqueeze(-1)


def leading(rank: Tensor, count: int) -> Tensor:
    """Rows that select the first `count` places, in order.

    Args:
        rank: from `descending_rank`, `[batch, n]`.
        count: how many, 0..n.

    Returns:
        `[batch, count, n]`, bool.
    """
    return ranked(rank, torch.arange(count, device=rank.device))


def picked(rows: Tensor, values: Tensor) -> Tensor:
    """What each row selects.

    As a product in float32: sums of int64 are slow in every runtime. With a matrix of one column: onnxruntime 1.31
    multiplies a transposed value by a vector wrongly.

    Args:
        rows: `[..., k, n]` bool, with one true value each.
        values: `[n]` or `[..., n]`, whole numbers below 2 ** 24, where float32 is exact.

    Returns:
        `[..., k]`, float32.
    """
    return (rows.float() @ values.float().unsqueeze(-1)).squeeze(-1)


def indices(rows: Tensor) -> Tensor:
    """The index that each row selects: `[..., k, n]` bool -> `[..., k]` int64."""
    return picked(rows, torch.arange(rows.shape[-1], device=rows.device)).long()


def top(scores: Tensor, count: int) -> Tensor:
    """Indices of the `count` largest scores in descending order, ties to the lowest index.

    Args:
        scores: `[batch, n]`, float.
        count: how many, 0..n.

    Returns:
        `[batch, count]`, int64.
    """
    return indices(leading(descending_rank(scores), count))


def first_largest(scores: Tensor) -> tuple[Tensor, Tensor]:
    """Largest value of the last axis, and where it stands first.

    Args:
        scores: `[..., n]`, float.

    Returns:
        values `[..., 1]`, and `[..., n]` bool with one true value in each row.
    """
    best = scores.amax(-1, keepdim=True)
    index = torch.arange(scores.shape[-1], device=scores.device, dtype=torch.float32)
    found = torch.where(scores == best, index, scores.shape[-1] - 1.0).amin(-1, keepdim=True)
    return best, found == index


def one_hot(indices: Tensor, size: int) -> Tensor:
    """Rows that select: `[..., k]` int64 -> `[..., k, size]` bool."""
    return indices.unsqueeze(-1) == torch.arange(size, device=indices.device)


def identity(rows: int, columns: int, device: torch.device) -> Tensor:
    """Ones on the diagonal: `[rows, columns]`, float32.

    `torch.eye` exports with indices in the smallest integer that holds them, and TensorRT takes no int16.
    """
    return one_hot(torch.arange(rows, device=device), columns).float()
