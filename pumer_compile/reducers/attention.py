"""Text rows of an attention whose probabilities are hidden in a fused operator."""

from __future__ import annotations

import torch
from torch import Tensor, nn


class TextRowsAttention(nn.Module):
    """Recomputes the attention of some query rows from queries and keys; the fused operator stays as it is.

    Args:
        scale: of the scores; None for `1 / sqrt(head_size)`.
        rows: first and last-but-one query row, to take the same rows of a mask.
    """

    def __init__(self, scale: float | None, rows: tuple[int, int]) -> None:
        super().__init__()
        self.scale, self.rows = scale, rows

    def forward(self, query: Tensor, key: Tensor, mask: Tensor | None = None) -> Tensor:
        """Probabilities, float32.

        Args:
            query: the wanted rows, `[batch, heads, rows, head_size]`.
            key: `[batch, heads, keys, head_size]`.
            mask: `[batch or 1, heads or 1, queries or 1, keys]`, boolean (true: attend) or additive.
        """
        scale = self.scale if self.scale is not None else query.shape[-1] ** -0.5
        scores = (query.float() @ key.float().transpose(-1, -2)) * scale
        if mask is not None:
            mask = mask if mask.shape[-2] == 1 else mask[..., self.rows[0] : self.rows[1], :]
            boolean = mask.dtype == torch.bool
            scores = scores.masked_fill(~mask, float("-inf")) if boolean else scores + mask.float()
        return scores.softmax(-1)
