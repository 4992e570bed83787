"""Merging the tokens of one tower by hand: lists of which old tokens went into which new one, and loops over them.

Nothing here comes from the package. A test replaces the `forward` of a tower's layers, which merge by `Merged.shrink`,
and takes what is left back to the old places by `Merged.spread`.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from tests.support.helpers import combine, groups, match

METHODS: dict[str, dict[str, str]] = {"tome": {"method": "tome"}, "safe": {"method": "pumer", "semantics": "safe"}}
"""The schedules that `Merged` knows, by name."""


class Merged:
    """The tokens of a tower in one forward pass.

    Args:
        method: a key of `METHODS`.
        sizes: 1 for each token and 0 for padding, `[samples or frames of them][tokens]`.
        learned: class tokens that lead them.
        wrong: the merge of this number, counted from 0, takes its second best target for its last pair.
    """

    def __init__(self, method: str, sizes: list[list[float]], learned: int = 0, wrong: int | None = None) -> None:
        self.method, self.learned, self.wrong = method, learned, wrong
        self.sizes = sizes
        self.steps: list[tuple[list[list[list[int]]], list[list[float]]]] = []
        self.counts = [len(sizes[0])]

    def bias(self) -> Tensor:
        """Logarithms of the sizes, `[batch, 1, 1, tokens]`: only ToMe counts a merged token as many; nobody padding."""

        def log(size: float) -> float:
            return -1e30 if size == 0 else math.log(size) if self.method == "tome" else 0.0

        return torch.tensor([[log(size) for size in sample] for sample in self.sizes]).double()[:, None, None]

    def shrink(self, carrier: Tensor, keys: Tensor, count: int) -> Tensor:
        """`carrier [batch, tokens, width]` with `count` tokens merged away, matched by `keys [batch, heads, tokens,
        size]`."""
        protected = self.learned if self.method == "tome" else max(1, self.learned)
        wrongly, found = self.wrong == len(self.steps), []
        for own, sizes in zip(keys.mean(1).double().numpy(), self.sizes, strict=True):
            pairs = match(own, count, protected=protected, real=[size > 0 for size in sizes])
            if wrongly:
                source, target = pairs[-1]
                pairs[-1] = (source, target + 2 if target + 2 < len(own) else target - 2)
            found.append(groups(len(own), pairs, in_order=self.method == "safe"))
        self.steps.append((found, self.sizes))
        self.sizes = [
            [sum(sizes[i] for i in group) for group in members]
            for members, sizes in zip(found, self.sizes, strict=True)
        ]
        self.counts.append(len(self.sizes[0]))
        return self.bring(carrier)

    def bring(self, value: Tensor) -> Tensor:
        """`[batch, tokens, width]` of whatever number of tokens, at those that are left."""
        for found, sizes in self.steps[self.counts.index(value.shape[1]) :]:
            rows = zip(value, found, sizes, strict=True)
            value = torch.stack([combine(tokens, members, counted) for tokens, members, counted in rows])
        return value

    def spread(self, value: Tensor) -> Tensor:
        """What is left, `[batch, tokens, width]`, once for every old place: the token that its own went into."""
        for found, _ in reversed(self.steps):
            samples = []
            for tokens, members in zip(value, found, strict=True):
                place = {old: new for new, group in enumerate(members) for old in group}
                samples.append(torch.stack([tokens[place[old]] for old in range(len(place))]))
            value = torch.stack(samples)
        return value


def heads(layer: nn.Module, x: Tensor, number: int) -> Tensor:
    """`[batch, heads, tokens, size]` of a projection."""
    found: Tensor = layer(x).unflatten(-1, (number, -1)).transpose(1, 2)
    return found


def attended(attention: Any, x: Tensor, bias: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """What an attention with projections of their own gives of `x`, that reads itself or a `context`; and its keys."""
    number = next(getattr(attention, n) for n in ("num_heads", "num_attention_heads") if hasattr(attention, n))
    query, key, value = (
        next(getattr(attention, n) for n in names if hasattr(attention, n))
        for names in (("q_proj", "query"), ("k_proj", "key"), ("v_proj", "value"))
    )
    outputs = [getattr(attention, n) for n in ("out_proj", "o_proj") if hasattr(attention, n)]
    read = x if context is None else context
    queries, keys, values = heads(query, x, number), heads(key, read, number), heads(value, read, number)
    probabilities = (queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1]) + bias).softmax(-1)
    found = (probabilities @ values).transpose(1, 2).flatten(2)
    return (outputs[0](found) if outputs else found), keys
