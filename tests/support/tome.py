"""ToMe written by hand, one sample at a time: merging between attention and MLP, proportional attention."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor, nn

from tests.support.helpers import combine, groups, match


class Tome:
    """One sample's tokens of one stream with their sizes.

    Args:
        x: `[tokens, width]`.
        real: 1 is a real token, 0 is padding, which is masked in every attention.
        learned: leading tokens that stay.
        in_order: tokens stay in their old order.
    """

    def __init__(self, x: Tensor, real: Sequence[float], learned: int, in_order: bool = False) -> None:
        self.x, self.sizes, self.learned, self.in_order = x, list(real), learned, in_order

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """Proportional attention, `[heads, tokens, head size]` each: every key counts as often as its size, padding not
        at all. Gives `[tokens, width]`."""
        return proportional(query, key, value, self.sizes)

    def merge(self, key: Tensor, count: int) -> list[list[int]]:
        """Merge away `count` tokens by the mean of their keys over heads; a size-weighted mean."""
        keys = key.detach().double().mean(0).numpy()
        real = [size > 0 for size in self.sizes]
        members = groups(len(self.x), match(keys, count, protected=self.learned, real=real), self.in_order)
        self.x = combine(self.x, members, self.sizes).to(self.x.dtype)
        self.sizes = [sum(self.sizes[i] for i in group) for group in members]
        return members

    def vit_layer(self, layer: nn.Module, count: int) -> None:
        """A layer of transformers' ViT, with `count` tokens merged away after its attention."""
        heads = layer.attention.num_attention_heads
        normed = layer.layernorm_before(self.x)
        attention = layer.attention
        query, key, value = (
            linear(normed).unflatten(-1, (heads, -1)).transpose(0, 1)
            for linear in (attention.q_proj, attention.k_proj, attention.v_proj)
        )
        self.x = self.x + attention.o_proj(self.attend(query, key, value))
        if count:
            self.merge(key, count)
        self.x = self.x + layer.mlp(layer.layernorm_after(self.x))


def proportional(query: Tensor, key: Tensor, value: Tensor, sizes: Sequence[float]) -> Tensor:
    """Attention whose keys count as often as they have tokens; loops over heads and queries, in float64."""
    rows = []
    for q, k, v in zip(query.double(), key.double(), value.double(), strict=True):
        scores = (q @ k.T).numpy() / math.sqrt(q.shape[1])
        weights = np.exp(scores - scores.max(1, keepdims=True)) * np.array(sizes)
        rows.append(torch.from_numpy(weights / weights.sum(1, keepdims=True)) @ v)
    return torch.stack(rows, 1).flatten(1).float()
