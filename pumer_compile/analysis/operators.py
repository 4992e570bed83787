"""Families of ATen operators, by name: the one place that says what a softmax, a product, a cast or a view is."""

from __future__ import annotations

from typing import Any

import torch

aten = torch.ops.aten


def overloads(packets: str) -> list[Any]:
    """Every overload of space-separated ATen operators; unknown names are errors."""
    return [getattr(p, o) for name in packets.split() for p in [getattr(aten, name)] for o in p.overloads()]


ATTENTION = aten.scaled_dot_product_attention.default
"""Fused attention."""
SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default})
DROPOUT = frozenset(overloads("dropout feature_dropout"))
PRODUCTS = {
    aten.linear.default: 0,
    aten.matmul.default: 0,
    aten.bmm.default: 0,
    aten.mm.default: 0,
    aten.addmm.default: 1,
    aten.baddbmm.default: 1,
}
"""Matrix products, and which argument's last dimension is summed over."""
PIECES = frozenset(overloads("split split_with_sizes chunk unbind"))
"""What gives several values, each a part of its input."""
