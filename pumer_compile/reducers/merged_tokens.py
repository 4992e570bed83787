"""What becomes of tokens that are kept, and of those that others are merged into (VisionZip, CVPR 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .ranking import descending_rank, leading


class Made(NamedTuple):
    """See `Choice` and `Reduction`."""

    assigned: Tensor
    map: Tensor
    rows: Tensor
    added: Tensor | None
    place: Tensor


@dataclass(frozen=True)
class MergedTokens:
    """The tokens of several crops after the others were merged, and the class token of each crop beside them.

    Attributes:
        crops: places of each in the stream.
        tokens: in the stream before.
        after: and afterwards.
        classes: class tokens, one for each crop, or none.
        published: crop by crop stand its class token, the dominant tokens, the merged ones, and a merged token is its
            target plus the mean of those that joined; otherwise all stand in raster order, and it is the mean of all.
    """

    crops: Sequence[Sequence[int]]
    tokens: int
    after: int
    classes: int
    published: bool

    def made(self, dominant: Tensor, targets: Tensor, joined: Tensor, class_feature: Tensor | None) -> Made:
        """Rows that make the new tokens.

        Args:
            dominant: those that stay as they are, `[batch, before]` bool.
            targets: rows that select what others are merged into, `[batch, targets, before]`, float32.
            joined: ones where a token is merged into a target, `[batch, targets, before]`, float32.
            class_feature: see `Signal`; None without class tokens.
        """
        chosen = leading(descending_rank(-self._order(dominant, targets)), self.after).float()
        stands, classes = chosen[:, :, : self.tokens], chosen[:, :, self.tokens :]
        merged = (stands @ targets.transpose(1, 2)) @ joined
        assigned, count = stands + merged, merged.sum(-1, keepdim=True)
        means = assigned / (1 + count)
        rows = stands + merged / count.clamp(min=1) if self.published else means
        if class_feature is None:
            return Made(assigned, means, rows, None, stands)
        whole, first = self._of_classes(dominant.device)
        # A class token looks at its whole crop, and stands at the beginning of it.
        map_ = means + classes @ whole
        return Made(assigned, map_, rows, classes @ class_feature.float(), stands + classes @ first)

    def _order(self, dominant: Tensor, targets: Tensor) -> Tensor:
        """By what the tokens are brought into order, class tokens last, `[batch, before + classes]`; what goes comes
        after all others."""
        place, count = torch.arange(self.tokens, device=dominant.device).float(), self.tokens
        first = [min(crop) - 0.5 for crop in self.crops[: self.classes]]
        if self.published:
            of = {place: number for number, crop in enumerate(self.crops) for place in crop}
            crop = torch.tensor([of.get(i, 0) for i in range(count)]).to(place)
            place = 3 * count * crop + place + torch.where(dominant, 1.0, 1.0 + count)
            first = [3.0 * count * number for number in range(self.classes)]
        stays = dominant | (targets.sum(1) > 0)
        own = torch.where(stays, place, 2.0**25)
        return torch.cat((own, torch.tensor(first).to(own).expand(len(own), -1)), 1) if first else own

    def _of_classes(self, device: torch.device) -> tuple[Tensor, Tensor]:
        """The mean over each crop, and its first token, `[crops, before]`, float32."""
        place = torch.arange(self.tokens)
        whole = torch.stack([torch.isin(place, torch.tensor(crop)) / len(crop) for crop in self.crops])
        first = torch.stack([place == min(crop) for crop in self.crops])
        return whole.to(device), first.float().to(device)
