"""The few of many tokens that are unlike each other, found by removing duplicates in steps (VisPruner, ICCV 2025).

How many a step removes depends on sizes alone, so that all steps are one loop in a graph.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from .greedy import repeated
from .ranking import descending_rank

STEP = 8
"""Duplicates removed in one step, at most."""

# Below every cosine, also when it is added to one.
NONE = -4.0


def removals(length: int, wanted: int) -> list[tuple[int, int]]:
    """The steps from `length` to `wanted` tokens: how many there are before each, and how many it removes."""
    steps = []
    while length > wanted:
        remove = min(STEP, length - wanted, (length + 1) // 2)
        steps.append((length, remove))
        length -= remove
    return steps


def distinct_published(similarity: Tensor, place: Tensor, steps: list[tuple[int, int]]) -> Tensor:
    """The tokens that no step removes, `[batch, tokens]`, bool.

    `similarity` is `[batch, tokens, tokens]`, float32; `place` is where each token stands in the list, `[batch,
    tokens]`, float32, negative for those outside it.
    """
    earlier = _smaller(torch.arange(place.shape[1], device=place.device))
    # What a step removes, and how many even ones it leaves.
    counts = torch.tensor([[remove, (length + 1) // 2 - remove] for length, remove in steps]).to(place)

    def step(number: Tensor, place: Tensor, similarity: Tensor, earlier: Tensor, counts: Tensor) -> tuple[Tensor]:
        remove, left = _of_step(counts, number).unbind()
        half = (place * 0.5).floor()
        listed = place >= 0
        even, odd = listed & (place == 2 * half), listed & (place > 2 * half)
        rank = descending_rank(torch.where(even, _best(similarity, odd), NONE), earlier)
        # The even ones have the ranks from 0; those removed get places below 0.
        return (torch.where(even, rank - remove, torch.where(odd, half + left, -1.0)),)

    (place,) = repeated(step, len(steps), [place], similarity, earlier, counts)
    return place >= 0


def distinct_stable(similarity: Tensor, place: Tensor, steps: list[tuple[int, int]]) -> Tensor:
    """The same in a fixed order; of `place` only the sign is read."""
    tokens = place.shape[1]
    order = torch.arange(tokens, device=place.device) * leap(tokens) % tokens
    precedes, follows = _smaller(order), _smaller(-order)
    similarity = torch.where(precedes, similarity, NONE)
    counts = torch.tensor([[remove] for _, remove in steps]).to(place)

    def step(number: Tensor, listed: Tensor, similarity: Tensor, follows: Tensor, counts: Tensor) -> tuple[Tensor]:
        # The first of the order has none to look at: it is beaten by all others, and stays.
        rank = descending_rank(torch.where(listed, _best(similarity, listed), NONE), follows)
        return (listed & (rank >= _of_step(counts, number)),)

    (listed,) = repeated(step, len(steps), [place >= 0], similarity, follows, counts)
    return listed


def _of_step(counts: Tensor, number: Tensor) -> Tensor:
    """The row of a step in a table of all."""
    steps = torch.arange(counts.shape[0], device=counts.device)
    return torch.where((steps == number).unsqueeze(-1), counts, 0.0).sum(0)


def leap(tokens: int) -> int:
    """The step near the golden section that visits all tokens, modulo their number."""
    return next(n for n in range(round(tokens * (math.sqrt(5) - 1) / 2), 2 * tokens + 2) if math.gcd(n, tokens) == 1)


def _best(similarity: Tensor, to: Tensor) -> Tensor:
    """Largest similarity of every token to one where `to` (`[batch, tokens]`, bool) is true; `[batch, tokens]`."""
    return (similarity + torch.where(to, 0.0, NONE).unsqueeze(1)).amax(-1)


def _smaller(order: Tensor) -> Tensor:
    """Where the column's number is smaller than the row's: `[n]` to `[n, n]`, bool."""
    return order < order.unsqueeze(-1)
