"""Attention as transformers calls it where no token is padding, written out.

Then it gives no mask but `is_causal=True`, and leaves keys and values unrepeated where they have fewer heads. Which
token stands where is then not in the graph, and could not follow a reducer. Written out, the graph is that of a prompt
with a mask.
"""

from __future__ import annotations

import torch
from torch import fx
from torch._subclasses.fake_tensor import FakeTensorMode

from ..analysis.nodes import Emitter

aten = torch.ops.aten


def materialize_causal_mask(lowered: fx.GraphModule, mode: FakeTensorMode) -> None:
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
        emit = Emitter(node, mode)
        lengths = _size(query, 2), _size(key, 2)
        with lowered.graph.inserting_before(node):
            if lengths not in masks:
                masks[lengths] = _triangle(emit, *lengths)
            given |= {"attn_mask": masks[lengths], "is_causal": False}
            if given.pop("enable_gqa", False):
                key, value = (_repeated(emit, heads, _size(query, 1)) for heads in (key, value))
        node.args, node.kwargs = (query, key, value), given
    lowered.graph.lint()
    lowered.recompile()


def _size(node: fx.Node, index: int) -> int:
    return int(node.meta["val"].shape[index])


def _triangle(emit: Emitter, queries: int, keys: int) -> fx.Node:
    """Which keys each query sees, `[1, 1, queries, keys]`: those at its place and before it."""
    device = emit.origin.meta["val"].device

    def counted(length: int, shape: list[int]) -> fx.Node:
        return emit(aten.view.default, emit(aten.arange.default, length, device=device), shape)

    return emit(aten.le.Tensor, counted(keys, [1, 1, 1, keys]), counted(queries, [1, 1, queries, 1]))


def _repeated(emit: Emitter, node: fx.Node, heads: int) -> fx.Node:
    """Each of the heads of `[batch, heads, tokens, size]` several times, side by side."""
    batch, own, tokens, size = (_size(node, i) for i in range(4))
    if own == heads:
        return node
    wider = emit(aten.expand.default, emit(aten.unsqueeze.default, node, 2), [batch, own, heads // own, tokens, size])
    return emit(aten.reshape.default, wider, [batch, heads, tokens, size])
