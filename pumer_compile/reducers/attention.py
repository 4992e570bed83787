"""Attention beside the model's own: text rows of a fused one, and scores that know the sizes of merged tokens."""

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


class SizeBias(nn.Module):
    """Proportional attention (ToMe, section 3.3): a key that stands for s tokens counts s times, `scores + log(s)`."""

    def forward(self, scores: Tensor | None, like: Tensor, *sizes: Tensor) -> Tensor:
        """Scores, or a mask to add to them, with the logarithm of the sizes.

        Args:
            scores: `[batch, heads, queries, keys]` or `[batch x heads, queries, keys]`, or a boolean mask (true:
                attend); None without a mask.
            like: the queries, whose dtype the result has.
            sizes: `[batch, n]` each, side by side along the keys; below 1 (padding, which a mask hides) counts as 1.
        """
        bias = torch.cat(sizes, 1).float().clamp(min=1).log().unsqueeze(1)
        if like.dim() == 3:
            bias = bias.repeat_interleave(like.shape[0] // bias.shape[0], 0)
        else:
            bias = bias.unsqueeze(1)
        if scores is None:
            return bias.to(like.dtype)
        if scores.dtype == torch.bool:
            return torch.where(scores, bias, float("-inf")).to(like.dtype)
        return (scores.to(bias.dtype if scores.dtype != torch.float64 else scores.dtype) + bias).to(like.dtype)
