"""Attention as transformers calls it where no token is padding, written out.

Then it gives no mask but `is_causal=True`, and leaves keys and values unrepeated where they have fewer heads. Which
token stands where is then not in the graph, and could not follow a reducer. Written out, the graph is that of a prompt
with a mask.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

aten = torch.ops.aten


def spell_out_causal(lowered: fx.GraphModule, mode: FakeTensorMode) -> None:
    """Write `is_causal=True` as the mask that it stands for, and `enable_gqa=True` beside it as repeated heads.

    Args:
        lowered: graph for the passes, changed in place.
        mode: of its fake tensors.
    """
    masks: dict[tuple[int, int], fx.Node] = {}
    for node in lowered.graph.find_nodes(op="call_function", target=aten.scaled_dot_product_attention.default):
        names = [a.name for a in node.target._schema.arguments]
        given = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        if not given.get("is_causal"):
            continue
        query, key, value = (given.pop(name) for name in ("query", "key", "value"))
        emit = _Emitter(lowered.graph, node, mode)
        lengths = _size(query, 2), _size(key, 2)
        if lengths not in masks:
            masks[lengths] = _triangle(emit, *lengths)
        given |= {"attn_mask": masks[lengths], "is_causal": False}
        if given.pop("enable_gqa", False):
            key, value = (_repeated(emit, heads, _size(query, 1)) for heads in (key, value))
        node.args, node.kwargs = (query, key, value), given
    lowered.graph.lint()
    lowered.recompile()


@dataclass(frozen=True)
class _Emitter:
    """Emits operators before a node, with a fake value, its module path and its source line."""

    graph: fx.Graph
    before: fx.Node
    mode: FakeTensorMode

    def __call__(self, target: Any, *arguments: Any, **more: Any) -> fx.Node:
        with self.graph.inserting_before(self.before):
            node = self.graph.call_function(target, arguments, more)
        node.meta = {k: v for k, v in self.before.meta.items() if k in ("nn_module_stack", "stack_trace")}
        with self.mode:
            node.meta["val"] = target(*fx.map_arg(arguments, lambda n: n.meta["val"]), **more)
        return node


def _size(node: fx.Node, index: int) -> int:
    return int(node.meta["val"].shape[index])


def _triangle(emit: _Emitter, queries: int, keys: int) -> fx.Node:
    """Which keys each query sees, `[1, 1, queries, keys]`: those at its place and before it."""
    device = emit.before.meta["val"].device

    def counted(length: int, shape: list[int]) -> fx.Node:
        return emit(aten.view.default, emit(aten.arange.default, length, device=device), shape)

    return emit(aten.le.Tensor, counted(keys, [1, 1, 1, keys]), counted(queries, [1, 1, queries, 1]))


def _repeated(emit: _Emitter, node: fx.Node, heads: int) -> fx.Node:
    """Each of the heads of `[batch, heads, tokens, size]` several times, side by side."""
    batch, own, tokens, size = (_size(node, i) for i in range(4))
    if own == heads:
        return node
    wider = emit(aten.expand.default, emit(aten.unsqueeze.default, node, 2), [batch, own, heads // own, tokens, size])
    return emit(aten.reshape.default, wider, [batch, heads, tokens, size])
