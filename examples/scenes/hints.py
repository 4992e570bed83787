"""What a model learns beside the answers, while it trains only: what cells show, and what phrases pick out.

A small model that gets answers alone stays blind to shapes for a long time. These two losses say, from the scene's
description, what each image token should know after the third layer and what the last word of a phrase should know
after the fifth (of ViLT; `learners.py` says where else). Their heads are not part of the model that is saved. No loss
touches attention: where a model looks is its own.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from .data import NOT, owned
from .draw import CELL
from .scene import SIDE, VALUES

CELL_LAYER, PHRASE_LAYER = 2, 4
"""After which layers of ViLT the heads read."""
_COUNTS = [len(values) for values in VALUES.values()]
_PLACES = SIDE // CELL
_DISTANCE = 0.1
"""Shares of the side that weigh as much as an error of one."""


class Hints(nn.Module):
    """The heads, for tokens of a width."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.cells = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 1 + 2 + sum(_COUNTS)))
        self.phrases = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, 2 * _PLACES + sum(_COUNTS)))

    def cell_loss(self, cells: Tensor, owners: Tensor, attributes: Tensor, centres: Tensor) -> Tensor:
        """Of image tokens: is there an object, which attributes has it, how far is its centre?

        Args:
            cells: float [batch, 196, width].
            owners, attributes, centres: as in `data.Split`, of these pictures.
        """
        there = owned(owners)
        found, offsets, logits = self.cells(cells).float().split([1, 2, sum(_COUNTS)], dim=-1)
        loss = functional.binary_cross_entropy_with_logits(found.squeeze(-1), there.float())
        which = owners.long()[there]
        row = torch.arange(len(owners))[:, None].expand_as(owners)[there]
        loss = loss + _attribute_loss(logits[there], attributes[row, which])
        place = torch.arange(_PLACES * _PLACES)
        middle = (torch.stack([place % _PLACES, place // _PLACES], dim=1) + 0.5) / _PLACES
        away = centres[row, which] - middle.expand(len(owners), -1, -1)[there]
        return loss + functional.smooth_l1_loss(offsets[there], away / _DISTANCE)

    def phrase_loss(self, text: Tensor, mentions: Tensor, attributes: Tensor, centres: Tensor) -> Tensor:
        """Of the last words of phrases that pick out an object: which attributes has it, and where is it?

        Args:
            text: float [batch, questions, tokens, width].
            mentions: int64 [batch, questions, 2, 2], as in `data.Split`.
            attributes, centres: of these pictures.
        """
        told = mentions[..., 0] >= 0
        picture, question, _ = told.nonzero(as_tuple=True)
        token, thing = mentions[told].unbind(-1)
        columns, rows, logits = (
            self.phrases(text[picture, question, token]).float().split([_PLACES, _PLACES, sum(_COUNTS)], dim=-1)
        )
        place = (centres[picture, thing] * _PLACES).long().clamp(max=_PLACES - 1)
        loss = _attribute_loss(logits, attributes[picture, thing])
        return loss + 0.5 * sum(
            functional.cross_entropy(scores, place[:, axis]) for axis, scores in enumerate((columns, rows))
        )


def _attribute_loss(logits: Tensor, attributes: Tensor) -> Tensor:
    """Mean cross-entropy of the attributes; logits [n, values of all], attributes int64 [n, 4]."""
    parts = logits.split(_COUNTS, dim=-1)
    return torch.stack(
        [functional.cross_entropy(part, attributes[:, i], ignore_index=NOT) for i, part in enumerate(parts)]
    ).sum()
