"""Verify: the rewritten graph has the shapes the plan says, and nothing that must not be there."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ..analysis.axes import Dim, same_size
from ..analysis.nodes import describe, values
from ..analysis.operators import aten
from ..analysis.propagate import ModuleRuns, propagate
from ..errors import VerifyError
from ..rewrite.rewriter import Rewriter
from ..rewrite.token_outputs import check_outputs
from .manager import Pass, ReducedGraph, State

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


def verify(module: fx.GraphModule, rewriter: Rewriter, runs: ModuleRuns | None = None) -> int:
    """Check the rewritten graph against the rewriter that made it, and record fake values on its nodes.

    Returns:
        How many values past a reducer were checked.

    Raises:
        VerifyError: a shape differs from the plan, or a forbidden
            operator.
    """
    for node in module.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and node.target.overloadpacket in FORBIDDEN:
            raise VerifyError(f"{describe(node)} has a data-dependent shape or exports to wrong values.")
    inputs = {str(n.target): values(n)[0] for n in rewriter.source.graph.nodes if n.op == "placeholder" and values(n)}
    found = propagate(module, inputs, runs)
    for node, value in found.items():
        if isinstance(value, Tensor):
            node.meta["val"] = value
    return _check_shapes(module, rewriter, found)


def _check_shapes(module: fx.GraphModule, rewriter: Rewriter, found: dict[fx.Node, Any]) -> int:
    live = set(module.graph.nodes)
    checked = 0
    for captured, new in rewriter.env.items():
        value = found.get(new)
        if new not in live or not isinstance(value, Tensor):
            continue
        expected = rewriter.epochs.expected_shape(captured)
        agree = len(expected) == value.dim() and all(
            same_size(a, b) for a, b in zip(expected, value.shape, strict=True)
        )
        if not agree:
            raise VerifyError(
                f"{describe(captured)} has shape {list(value.shape)} after reduction, and the plan says "
                f"{expected}. This is a defect of a rule in analysis/rules.py."
            )
        checked += any(rewriter.epochs.at(Dim(captured, i)) for i in range(value.dim()))
    return checked


class Verify(Pass):
    """Checks the reduced graph, and the outputs that a schedule refuses."""

    name = "verify"
    requires = (Rewriter, ReducedGraph)
    ensures = (ModuleRuns,)

    def run(self, state: State) -> int:
        """See `Pass`; counts values past a reducer."""
        if state.method.outputs == "refused":
            check_outputs(state.rewriter)
        state.add(runs := ModuleRuns())
        return verify(state.reduced, state.rewriter, runs)
