"""Which of the tokens that are left others are merged into (VisionZip, CVPR 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

import torch
from torch import Tensor


@dataclass(frozen=True)
class MergeTargets:
    """Targets among the tokens of several crops that stand one behind the other.

    Attributes:
        lengths: tokens of each crop.
        rest: how many of them are left, whichever these are.
        counts: how many of those are targets.
    """

    lengths: Sequence[int]
    rest: Sequence[int]
    counts: Sequence[int]

    def every_nth(self, left: Tensor) -> Tensor:
        """As published: places 0, n, 2n ... of what is left of a crop, and n the largest that goes.

        Args:
            left: what is left, `[batch, tokens]` bool.

        Returns:
            rows that select the targets, `[batch, targets, tokens]` bool.
        """
        starts = accumulate(self.rest, initial=0)
        spans = zip(starts, self.rest, self.counts, strict=False)
        found = [start + i * max(1, rest // count) for start, rest, count in spans for i in range(count)]
        return _numbered(left, torch.tensor(found).to(left.device).float())

    def evenly_spread(self, left: Tensor) -> Tensor:
        """The first that are left at or behind places spread evenly over a crop, no one twice: which others are left
        does not matter.

        Args:
            left: what is left, `[batch, tokens]` bool.

        Returns:
            rows that select the targets, `[batch, targets, tokens]` bool.
        """
        spread, latest, crop = [], [], []
        start = before = 0
        for number, (length, rest, count) in enumerate(zip(self.lengths, self.rest, self.counts, strict=True)):
            spread += [start + i * length // count for i in range(count)]
            latest += [before + rest - count + i for i in range(count)]
            crop += [number] * count
            start, before = start + length, before + rest
        device = left.device
        place, index = torch.arange(left.shape[1], device=device), torch.arange(len(spread), device=device)
        of = torch.tensor(crop).to(device)
        earlier = (of == of.unsqueeze(-1)) & (index <= index.unsqueeze(-1))
        number_there = left.float() @ (place.unsqueeze(-1) < torch.tensor(spread).to(device)).float()
        # Each is behind the one before it, and leaves enough behind it.
        free = torch.where(earlier, (number_there - index).unsqueeze(1), -float(left.shape[1])).amax(-1) + index
        return _numbered(left, torch.minimum(free, torch.tensor(latest).to(free)))

    def same_crop(self, crops: Sequence[Sequence[int]], tokens: int) -> Tensor:
        """Whether a target and a token are of one crop, `[targets, tokens]` bool.

        Args:
            crops: places of each crop's tokens.
            tokens: how many there are, with those of no crop.
        """
        of = {place: number for number, crop in enumerate(sorted(crops, key=len)) for place in crop}
        mine = [number for number, count in enumerate(self.counts) for _ in range(count)]
        return torch.tensor(mine).unsqueeze(-1) == torch.tensor([of.get(place, -1) for place in range(tokens)])


def _numbered(left: Tensor, wanted: Tensor) -> Tensor:
    """Rows that select those of what is left with these numbers, `[targets]` or `[batch, targets]`."""
    number = (left.long().cumsum(-1) - 1).float()
    return (number.unsqueeze(1) == wanted.unsqueeze(-1)) & left.unsqueeze(1)
