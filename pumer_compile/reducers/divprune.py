"""Diversity alone (DivPrune, CVPR 2025): each kept token is as far as can be from those kept before it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from .crops import CropReducer
from .greedy import cosines, pick, repeated, row_at

Order = Literal["reference", "stable"]

# Below every distance.
TAKEN = -4.0
# Distances in `stable` are multiples of this: above what float32 rounds a cosine by.
GRID = 2.0**-16


class FarthestPoints(nn.Module):
    """Keeps `budget` tokens by farthest points: the max-min diversity problem, solved greedily.

    The distance of two tokens is 1 - cosine. The first is the token whose nearest neighbour is farthest; each further
    one is the token whose nearest kept token is farthest. Ties go to the lowest index. A kept token is not picked
    again; in the published code its distance is 0 up to rounding, so that where all others are as near as that
    (copies), it may come twice.

    `order`: `reference` compares distances as they are, as published. `stable` rounds them to multiples of 2^-16, so
    that between tokens that are alike but for rounding (an even surface) the index decides, in every runtime.

    Args:
        budget: tokens to keep, at least 1.
        order: `reference` or `stable`.
    """

    def __init__(self, budget: int, order: Order = "reference") -> None:
        super().__init__()
        self.budget, self.order = budget, order

    def forward(self, features: Tensor) -> Tensor:
        """Which tokens stay, `[n, tokens]`, bool, `min(budget, tokens)` in each row.

        Args:
            features: `[n, tokens, width]`, float32.
        """
        tokens = features.shape[1]
        if self.budget >= tokens:
            return torch.ones_like(features[:, :, 0], dtype=torch.bool)
        distance = 1 - cosines(features)
        if self.order == "stable":
            distance = (distance / GRID).round() * GRID
        own = torch.arange(tokens, device=features.device)
        nearest = torch.where(own == own.unsqueeze(1), -TAKEN, distance).amin(1)
        _, place, picked = pick(nearest)
        near = torch.where(picked, TAKEN, row_at(distance, place))
        (near,) = repeated(_step, self.budget - 1, [near], distance)
        return near == TAKEN


def _step(number: Tensor, near: Tensor, distance: Tensor) -> tuple[Tensor]:
    """Pick the token that is farthest, `near` being each token's distance to its nearest picked one."""
    _, place, picked = pick(near)
    return (torch.where(picked, TAKEN, torch.minimum(near, row_at(distance, place))),)


class DiverseReducer(CropReducer):
    """Keeps the tokens of each crop that `FarthestPoints` picks, in their order; see `CropReducer`."""

    # What a pick is worth depends on those before it: no score tells how near two choices are.
    judged = False

    def __init__(
        self, crops: Sequence[Sequence[int]], budget: int, *, order: Order = "reference", pinned: Sequence[int] = ()
    ) -> None:
        super().__init__(crops, budget, pinned=pinned)
        self.select = FarthestPoints(budget, order)

    def by_token(self, tokens: Tensor) -> tuple[Tensor]:
        """See `CropReducer`: the rows that enter the prompt."""
        return (tokens.float(),)

    def of_crop(self, features: Tensor) -> Tensor:
        """See `CropReducer`."""
        kept: Tensor = self.select(features)
        return kept
