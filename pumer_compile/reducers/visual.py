"""A stream reduced by visual cues alone: `VisPruner` with the interface of every reducer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .base import Signal
from .crops import CropReducer
from .vispruner import Order, VisPruner


class VisualReducer(CropReducer):
    """Keeps the tokens that `VisPruner` selects, in their order.

    Args:
        crops, budget, pinned: see `CropReducer`.
        important, order: see `VisPruner`.
    """

    reads = (Signal.CLASS_TOKEN,)
    # A selection of hundreds of steps has no score by which a differing one could be called nearly tied.
    judged = False

    def __init__(
        self,
        crops: Sequence[Sequence[int]],
        budget: int,
        important: float,
        *,
        order: Order = "reference",
        pinned: Sequence[int] = (),
    ) -> None:
        super().__init__(crops, budget, pinned=pinned)
        self.pruner = VisPruner(budget, important, order=order)

    def of_crop(self, features: Tensor, attention: Tensor) -> Tensor:
        """See `CropReducer`; the tokens are the features that leave the vision tower."""
        return self.pruner.keeps(features, attention)


class MemberVotes(nn.Module):
    """What each row of a prompt gets of the votes for the tokens that it is made of, or has of their keys: the mean.

    Args:
        members: of each row of each prompt, the numbers of its tokens; at least one.
    """

    def __init__(self, members: Sequence[Sequence[Sequence[int]]]) -> None:
        super().__init__()
        most = max(len(tokens) for rows in members for tokens in rows)
        self.shape = [len(members), len(members[0]), most]
        padded = [[*tokens, *[tokens[0]] * (most - len(tokens))] for rows in members for tokens in rows]
        self.index = [token for tokens in padded for token in tokens]
        shares = [[1 / len(tokens)] * len(tokens) + [0.0] * (most - len(tokens)) for rows in members for tokens in rows]
        even = all(len(tokens) == most for rows in members for tokens in rows)
        self.shares = None if even else [share for row in shares for share in row]

    def forward(self, votes: Tensor) -> Tensor:
        """`[tokens, ...]` to `[batch, rows, ...]`."""
        rest = votes.shape[1:]
        own = votes.index_select(0, torch.tensor(self.index).to(votes.device)).view([*self.shape, *rest])
        if self.shares is None:
            return own.mean(2)
        return (own * torch.tensor(self.shares).to(votes).view([*self.shape, *[1] * len(rest)])).sum(2)


class WithSeparators(nn.Module):
    """The map of a stream, from that of its image tokens, where separators that are dropped stand between these.

    Args:
        origin: for every token with separators, its number among the image tokens; -1 for a separator.
    """

    def __init__(self, origin: Sequence[int]) -> None:
        super().__init__()
        tokens = max(origin) + 1
        self.columns = [tokens if number < 0 else number for number in origin]

    def forward(self, selected: Tensor) -> Tensor:
        """`[batch, after, image tokens]` to `[batch, after, tokens with separators]`."""
        columns = torch.tensor(self.columns).to(selected.device)
        return torch.nn.functional.pad(selected, (0, 1)).index_select(2, columns)
