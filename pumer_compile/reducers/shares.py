"""A budget shared out in whole tokens over parts of unequal length."""

from __future__ import annotations

import torch
from torch import Tensor

from .ranking import descending_rank


def shared_out(wanted: Tensor, order: Tensor, lengths: Tensor, budget: int) -> Tensor:
    """Whole tokens of each part, no more than it has, together the budget.

    A part gets what it wants, rounded down, as far as it has as many. What is left goes round by round one each to the
    parts with room, as far as it goes round, and the last ones by `order`.

    Args:
        wanted: of each part, `[batch, parts]`, at least 0, together at most the budget; float32.
        order: the largest first; of ties the first part. `[batch, parts]`, float32, above -1e9.
        lengths: of each part, `[parts]`, float32; together at least the budget.
        budget: to be shared out.

    Returns:
        `[batch, parts]`, whole numbers in float32.
    """
    share = torch.minimum(wanted.floor(), lengths)
    room = lengths - share
    rounds = torch.arange(1, budget + 1, device=wanted.device).to(wanted)
    given = torch.minimum(rounds.unsqueeze(-1), room.unsqueeze(1)).sum(-1)
    full = (given <= budget - share.sum(-1, keepdim=True)).float().sum(-1, keepdim=True)
    share = share + torch.minimum(full, room)
    rank = descending_rank(torch.where(room > full, order, -1e9))
    return share + (rank < budget - share.sum(-1, keepdim=True)).float()
