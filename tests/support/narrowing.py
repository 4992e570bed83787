"""Graphs without their dead tokens beside the graphs as captured."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx

from pumer_compile import Program, Reduced, reduce

aten = torch.ops.aten


def compared(captured: Program, batch: int | None = None) -> Reduced:
    """The program without its dead tokens, after its outputs were compared on the captured inputs and, where the batch
    is open, on another number of samples."""
    with pytest.MonkeyPatch.context() as patch:
        # It has tests of its own.
        patch.setattr("pumer_compile.passes.absorb_single_query.absorb_single_query", lambda module: 0)
        result = reduce(captured, "lossless")
    same(captured, result.module, dict(captured.inputs))
    if batch is not None:
        same(captured, result.module, {n: t[[i % len(t) for i in range(batch)]] for n, t in captured.inputs.items()})
    return result


def copy_of(captured: Program) -> fx.GraphModule:
    """A copy that a pass may change; parameters are shared."""
    graph = fx.Graph()
    env: dict[fx.Node, fx.Node] = {}
    for node in captured.module.graph.nodes:
        env[node] = graph.node_copy(node, env.__getitem__)
    graph.set_codegen(captured.module.graph._codegen)
    return fx.GraphModule(captured.module, graph)


def same(captured: Program, module: fx.GraphModule, inputs: dict[str, Tensor]) -> None:
    with torch.no_grad():
        expected, found = captured.module(**inputs), module(**inputs)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)


def rows(module: fx.GraphModule, target: Any = aten.linear.default, dim: int = 1) -> list[int]:
    """The size of a dimension of every result of an operator."""
    return [int(n.meta["val"].shape[dim]) for n in module.graph.nodes if n.target == target]


def last_layer(n: int, queries: int, width: int, heads: int = 0) -> int:
    """Multiply-adds of a layer of which some tokens are read; with `heads`, of one whose attention is written out, so
    that keys and values need not be computed for one query (`absorb_single_query`)."""
    rest = 2 * queries * width**2 + 4 * queries * width**2
    few = queries * width * (width + heads * n)
    if heads and n * width**2 > 2 * few:
        return rest + 2 * few
    return rest + 2 * n * width**2 + 2 * queries * n * width
