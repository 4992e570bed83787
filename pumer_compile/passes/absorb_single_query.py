"""Absorb single query: key and value projections go into a single query (weight absorption).

    q @ (x @ Wk)^T  =  (q @ Wk^T) @ x^T          p @ (x @ Wv)  =  (p @ x) @ Wv

Where a classifier reads one token, the last layer has one query (`eliminate`), and the left sides compute a key and a
value of every token for it. The right sides have the same result, but that sums are rounded in another order. What is
written as matrix products is found; a fused attention is left alone.

No reshape is written: onnxscript's optimizer folds reshape-matmul-reshape by size, and confuses batch with heads when
they are equal.

That a product reads the heads of a linear layer is told by running the views between the two on numbers, not by sizes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..analysis.axes import Size, same_size
from ..analysis.cost import SMALL_PRODUCTS
from ..analysis.dead_code import drop_dead, may_be_changed
from ..analysis.nodes import Emitter, values
from ..analysis.operators import HEAD_VIEWS, aten
from ..analysis.rules import node_arg, shape
from .manager import Pass, ReducedGraph, State


@dataclass(frozen=True)
class _Heads:
    """A product with the heads of a linear layer.

    Attributes:
        product: `[batch, heads, 1, tokens]` of a query and keys, or `[batch, heads, 1, head size]` of probabilities
            and values.
        linear: over `[batch, tokens, width]`.
        of_keys: which of the two.
    """

    product: fx.Node
    linear: fx.Node
    of_keys: bool

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        """Heads, head size, tokens, width."""
        right = shape(node_arg(self.product, 1))
        size, tokens = right[2:] if self.of_keys else right[:1:-1]
        return int(right[1]), int(size), int(tokens), int(shape(node_arg(self.linear, 0))[-1])

    def pays(self) -> bool:
        """Whether the other order is much less work."""
        heads, size, tokens, width = self.sizes
        return tokens * width * heads * size > SMALL_PRODUCTS * heads * width * (size + tokens)


def absorb_single_query(module: fx.GraphModule) -> int:
    """Reorder the products of attention with one query, in place.

    Args:
        module: whose nodes know their values (`meta["val"]`).

    Returns:
        How many products were reordered.
    """
    count, shared = 0, may_be_changed(module.graph)
    for node in list(module.graph.nodes):
        found = _heads(node)
        if found is None or not found.pays() or not _reads_heads(found):
            continue
        if not shared.isdisjoint(found.linear.all_input_nodes):
            continue  # they are read later than the layer reads them
        with module.graph.inserting_before(node):
            new = _keys_last(found) if found.of_keys else _values_last(found)
        node.replace_all_uses_with(new)
        count += 1
    if count:
        drop_dead(module.graph)
        module.recompile()
    return count


def _heads(node: fx.Node) -> _Heads | None:
    """A product of two values with heads of which the right one comes from a linear layer through views alone."""
    if node.target is not aten.matmul.default or not all(isinstance(x, fx.Node) and values(x) for x in node.args):
        return None
    left, source = node.args
    assert isinstance(left, fx.Node) and isinstance(source, fx.Node)
    right = shape(source)
    if len(shape(left)) != 4 or len(right) != 4 or shape(left)[1] != right[1] or shape(left)[2] != 1:
        return None
    while source.target in HEAD_VIEWS and len(source.users) == 1:
        before, *others = source.all_input_nodes
        if before is not source.args[0] or not all(_is_batch(size, right[0]) for size in others):
            return None
        source = before
    if source.target is not aten.linear.default or len(source.users) != 1 or len(shape(source)) != 3:
        return None
    states = source.args[0]
    if not isinstance(states, fx.Node) or not values(states) or values(source)[0].dtype != values(node)[0].dtype:
        return None
    batches = (shape(left)[0], shape(source)[0])
    known = all(isinstance(size, int) for size in (*shape(left)[1:], *right[1:], *shape(source)[1:]))
    if not known or not all(same_size(size, right[0]) for size in batches):
        return None
    tokens = shape(source)[1]
    return _Heads(node, source, of_keys=tokens == right[3] and shape(node)[3] == tokens)


def _is_batch(node: fx.Node, batch: Size) -> bool:
    """Whether a node is the size of an open batch."""
    value = node.meta.get("val")
    return isinstance(value, torch.SymInt) and same_size(value, batch)


def _reads_heads(found: _Heads) -> bool:
    """Whether the views between the layer and the product give keys as `[batch, heads, head size, tokens]`, or values
    as `[batch, heads, tokens, head size]`: each number of the layer's output is followed to its place."""
    heads, size, tokens, _ = found.sizes
    if (tokens, heads * size) != tuple(shape(found.linear)[1:]):
        return False
    batch = shape(found.linear)[0]
    batch = batch if isinstance(batch, int) else 3  # an open one: any number
    start = torch.arange(batch * tokens * heads * size, device="cpu").view(batch, tokens, heads * size)
    order = (0, 2, 3, 1) if found.of_keys else (0, 2, 1, 3)
    wanted = start.view(batch, tokens, heads, size).permute(order)
    right = found.product.args[1]
    assert isinstance(right, fx.Node)
    return torch.equal(_run(right, found.linear, start), wanted)


def _run(node: fx.Node, source: fx.Node, value: Tensor) -> Tensor:
    """What views make of a value of their source; other nodes among their arguments are the batch."""
    if node is source:
        return value
    before, *rest = node.args
    assert isinstance(before, fx.Node) and callable(node.target)
    sizes = fx.map_arg(rest, lambda n: len(value))
    result: Tensor = node.target(_run(before, source, value), *sizes, **node.kwargs)
    return result


def _keys_last(found: _Heads) -> fx.Node:
    """Scores of a query that was multiplied with the weights of keys."""
    emit, (heads, size, _, width) = Emitter(found.product), found.sizes
    states, weight, bias = _parts(found)
    query = emit(aten.squeeze.dim, found.product.args[0], 2)
    by_head = emit(aten.view.default, weight, [heads, size, width])
    rows = emit(aten.bmm.default, emit(aten.transpose.int, query, 0, 1), by_head)
    scores = emit(aten.bmm.default, emit(aten.transpose.int, rows, 0, 1), emit(aten.transpose.int, states, 1, 2))
    if bias is not None:
        by_key = emit(aten.mul.Tensor, query, emit(aten.view.default, bias, [heads, size]))
        scores = emit(aten.add.Tensor, scores, emit(aten.sum.dim_IntList, by_key, [-1], True))
    return emit(aten.unsqueeze.default, scores, 2)


def _values_last(found: _Heads) -> fx.Node:
    """A mean of states, multiplied with the weights of values."""
    emit, (heads, size, _, width) = Emitter(found.product), found.sizes
    states, weight, bias = _parts(found)
    probabilities = emit(aten.squeeze.dim, found.product.args[0], 2)
    means = emit(aten.transpose.int, emit(aten.bmm.default, probabilities, states), 0, 1)
    by_head = emit(aten.transpose.int, emit(aten.view.default, weight, [heads, size, width]), 1, 2)
    context = emit(aten.transpose.int, emit(aten.bmm.default, means, by_head), 0, 1)
    if bias is not None:
        total = emit(aten.sum.dim_IntList, probabilities, [-1], True)  # 1, but for what the published softmax gives
        shift = emit(aten.mul.Tensor, total, emit(aten.view.default, bias, [heads, size]))
        context = emit(aten.add.Tensor, context, shift)
    # Contiguous, as a product is: a `view` of it must not fail.
    return emit(aten.contiguous.default, emit(aten.unsqueeze.default, context, 2))


def _parts(found: _Heads) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    """What the linear layer reads, its weight and its bias."""
    states, weight, *rest = found.linear.args
    bias = rest[0] if rest else found.linear.kwargs.get("bias")
    assert isinstance(states, fx.Node) and isinstance(weight, fx.Node) and (bias is None or isinstance(bias, fx.Node))
    return states, weight, bias


class AbsorbSingleQuery(Pass):
    """Reorders the products of attention with one query."""

    name = "absorb_single_query"
    requires = (ReducedGraph,)
    optional = True

    def run(self, state: State) -> int:
        """See `Pass`; counts products."""
        return absorb_single_query(state.reduced)
