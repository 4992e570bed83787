"""Verify: the rewritten graph has the shapes the plan says, and nothing that must not be there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ..analysis.axes import Dim, same_size
from ..analysis.nodes import describe, values
from ..analysis.propagate import propagate
from ..analysis.rules import aten
from ..errors import VerifyError
from ..rewrite.rewriter import Rewriter

FORBIDDEN = {
    packet
    for packet in (
        aten.nonzero,
        aten.masked_select,
        aten.unique_consecutive,
        aten._unique2,
        aten.scatter_reduce,
        aten.scatter_add,
    )
}
"""Data-dependent shapes, and scatters that export to wrong values without an error."""


def verify(module: fx.GraphModule, walk: Rewriter) -> int:
    """Check the rewritten graph against the walk that made it, and record fake values on its nodes.

    Returns:
        How many values past a reducer were checked.

    Raises:
        VerifyError: a shape differs from the plan, or a forbidden
            operator.
    """
    for node in module.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target.overloadpacket in FORBIDDEN:
            raise VerifyError(f"{describe(node)} has a data-dependent shape or exports to wrong values.")
    inputs = {str(n.target): values(n)[0] for n in walk.source.graph.nodes if n.op == "placeholder" and values(n)}
    found, _ = propagate(module, inputs)
    for node, value in found.items():
        if isinstance(value, Tensor):
            node.meta["val"] = value
    return _check_shapes(module, walk, found)


def _check_shapes(module: fx.GraphModule, walk: Rewriter, found: dict[fx.Node, Any]) -> int:
    live = set(module.graph.nodes)
    checked = 0
    for captured, new in walk.env.items():
        value = found.get(new)
        if new not in live or not isinstance(value, Tensor):
            continue
        expected = walk.history.expected_shape(captured)
        agree = len(expected) == value.dim() and all(
            same_size(a, b) for a, b in zip(expected, value.shape, strict=True)
        )
        if not agree:
            raise VerifyError(
                f"{describe(captured)} has shape {list(value.shape)} after reduction, and the plan says "
                f"{expected}. This is a defect of a rule in passes/rules.py."
            )
        checked += any(walk.history.at(Dim(captured, i)) for i in range(value.dim()))
    return checked
