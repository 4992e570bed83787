"""Choices that no data makes: the controls that a method has to beat."""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from .base import Choice, Decisions, Reducer
from .ranking import one_hot


class FixedReducer(Reducer):
    """Makes each new token of a fixed group of old ones: their plain mean, or one token as it is.

    Args:
        tokens: before.
        groups: the places of each new token's old ones, ascending; a place may be in none. The new tokens stand in the
            order of their first ones.
    """

    tells_place = True

    def __init__(self, tokens: int, groups: Sequence[Sequence[int]]) -> None:
        groups = sorted(tuple(group) for group in groups)
        kept = sorted(place for group in groups for place in group)
        super().__init__(tokens, len(kept), len(kept) - len(groups))
        number = {place: i for i, place in enumerate(kept)}
        self.groups = groups
        self.kept = kept
        self.pairs = [(number[place], number[group[0]]) for group in groups for place in group[1:]]
        self.keeps_order = True
        self.first_stays = groups[0] == (0,)

    def choose(self, tokens: Tensor) -> Choice:
        """See `Reducer`; the same for all samples."""
        batch, device = tokens.shape[0], tokens.device
        own = (self.kept, [source for source, _ in self.pairs], [target for _, target in self.pairs])
        decisions = Decisions(*(torch.tensor(x, dtype=torch.int64).to(device).expand(batch, -1) for x in own))
        sizes = [len(group) for group in self.groups]
        assigned = sum(
            one_hot(torch.tensor([group[min(i, len(group) - 1)] for group in self.groups]), self.tokens).float()
            * torch.tensor([[1.0 if i < size else 0.0] for size in sizes])
            for i in range(max(sizes))
        )
        assert isinstance(assigned, Tensor)
        first = one_hot(torch.tensor([group[0] for group in self.groups]), self.tokens).float()
        rows, place = (x.to(device).expand(batch, -1, -1) for x in (assigned, first))
        return Choice(decisions, rows, torch.ones_like(tokens[:, :, 0]), place=place)

    def margin(self, own: Choice, among: Choice, forced: Decisions) -> Tensor:
        """See `Reducer`; nothing is nearly tied."""
        return torch.ones_like(own.weights[:, 0], dtype=torch.float32)

    def follow(self, forced: Decisions, own: Choice, among: Choice) -> Choice:
        """See `Reducer`; there is nothing else to follow."""
        return replace(own, decisions=forced)


def random_places(length: int, count: int, seed: int, crop: int) -> list[int]:
    """`count` of `length` places, ascending: the same for a seed on every machine, others for another crop."""
    drawn = random.Random(f"{seed} {crop}")
    order = sorted((drawn.random(), place) for place in range(length))
    return sorted(place for _, place in order[:count])


def even_places(length: int, count: int) -> list[int]:
    """`count` of `length` places at equal distances: the middles of `count` equal parts."""
    return [int((i + 0.5) * length / count) for i in range(count)]


def pooled_grid(rows: int, columns: int, count: int) -> tuple[int, int] | None:
    """Rows and columns of the grid of `count` cells that a grid is pooled to: as near to its own shape as can be; None
    where there is none that is no larger on either side."""
    fits = [(a, count // a) for a in range(1, min(rows, count) + 1) if count % a == 0 and count // a <= columns]
    return min(fits, key=lambda fit: abs(math.log(fit[0] * columns / (fit[1] * rows))), default=None)


def cells(rows: int, columns: int, to: tuple[int, int]) -> list[list[int]]:
    """The places, in raster order, of each cell of a coarser grid: every place in one."""
    found: dict[tuple[int, int], list[int]] = {}
    for place in range(rows * columns):
        row, column = divmod(place, columns)
        found.setdefault((row * to[0] // rows, column * to[1] // columns), []).append(place)
    return [found[cell] for cell in sorted(found)]
