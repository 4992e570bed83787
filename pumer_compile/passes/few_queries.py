"""Few queries: keys and values are not computed for attention that has few queries.

    q @ (x @ Wk)^T  =  (q @ Wk^T) @ x^T          p @ (x @ Wv)  =  (p @ x) @ Wv

Where a classifier reads one token, the last layer has one query (`eliminate`), and the left sides compute a key and a
value of every token for it. The right sides have the same result, but that sums are rounded in another order, for as
many multiply-adds as there are queries. What is written as matrix products is found; a fused attention is left alone.

That a product reads the heads of a linear layer is told by running the views between the two on numbers, not by sizes.
Sizes must be numbers: with an open batch nothing is reordered.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, fx

from .eliminate import drop_dead, may_be_changed
from .graph import Emitter, values
from .rules import aten, shape

WORTH = 2
"""How many times fewer multiply-adds it must be: small products run at half the speed of large ones."""
_VIEWS = frozenset(
    {aten.view.default, aten.reshape.default, aten.transpose.int, aten.permute.default, aten.contiguous.default}
)


@dataclass(frozen=True)
class _Heads:
    """A product with the heads of a linear layer.

    Attributes:
        product: `[batch, heads, queries, tokens]` of queries and keys, or `[batch, heads, queries, head size]` of
            probabilities and values.
        linear: over `[batch, tokens, width]`.
        of_keys: which of the two.
    """

    product: fx.Node
    linear: fx.Node
    of_keys: bool

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """Batch, heads, queries, head size, tokens, width."""
        left, right = (shape(x) for x in self.product.args)  # type: ignore[arg-type]  # both are nodes
        size, tokens = right[2:] if self.of_keys else right[:1:-1]
        return tuple(map(int, (*left[:3], size, tokens, shape(self.linear.args[0])[-1])))  # type: ignore[arg-type, return-value]

    def pays(self) -> bool:
        """Whether the other order is much less work."""
        _, heads, queries, size, tokens, width = self.sizes
        before = tokens * width * heads * size
        return before > WORTH * queries * heads * width * (size + tokens)


def few_queries(module: fx.GraphModule) -> int:
    """Reorder the products of attention with few queries, in place.

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
    if len(shape(left)) != 4 or len(right) != 4:
        return None
    while source.target in _VIEWS and len(source.users) == 1 and source.all_input_nodes == [source.args[0]]:
        source = source.all_input_nodes[0]
    if source.target is not aten.linear.default or len(source.users) != 1 or len(shape(source)) != 3:
        return None
    states = source.args[0]
    if not isinstance(states, fx.Node) or not values(states):
        return None
    known = all(isinstance(size, int) for size in (*shape(left), *right, *shape(source)))
    if not known or values(source)[0].dtype != values(node)[0].dtype:
        return None
    tokens = shape(source)[1]
    return _Heads(node, source, of_keys=tokens == right[3] and shape(node)[3] == tokens)


def _reads_heads(found: _Heads) -> bool:
    """Whether the views between the layer and the product give keys as `[batch, heads, head size, tokens]`, or values
    as `[batch, heads, tokens, head size]`: each number of the layer's output is followed to its place."""
    batch, heads, _, size, tokens, _ = found.sizes
    if (batch, tokens, heads * size) != tuple(shape(found.linear)):
        return False
    start = torch.arange(batch * tokens * heads * size, device="cpu").view(batch, tokens, heads * size)
    order = (0, 2, 3, 1) if found.of_keys else (0, 2, 1, 3)
    wanted = start.view(batch, tokens, heads, size).permute(order)
    right = found.product.args[1]
    assert isinstance(right, fx.Node)
    return torch.equal(_run(right, found.linear, start), wanted)


def _run(node: fx.Node, source: fx.Node, value: Tensor) -> Tensor:
    """What views make of a value of their source."""
    if node is source:
        return value
    before, *rest = node.args
    assert isinstance(before, fx.Node) and callable(node.target)
    result: Tensor = node.target(_run(before, source, value), *rest, **node.kwargs)
    return result


def _keys_last(found: _Heads) -> fx.Node:
    """Scores of queries that were multiplied with the weights of keys."""
    emit, (batch, heads, queries, size, tokens, _) = Emitter(found.product), found.sizes
    states, weight, bias = _parts(found)
    query = found.product.args[0]
    assert isinstance(query, fx.Node)
    by_head = emit(aten.view.default, weight, [heads, size, -1])
    rows = emit(aten.bmm.default, _fold(emit, query, found), by_head)
    rows = emit(aten.view.default, rows, [heads, batch, queries, -1])
    rows = emit(aten.reshape.default, emit(aten.permute.default, rows, [1, 0, 2, 3]), [batch, heads * queries, -1])
    scores = emit(aten.bmm.default, rows, emit(aten.transpose.int, states, 1, 2))
    scores = emit(aten.view.default, scores, [batch, heads, queries, tokens])
    if bias is None:
        return scores
    shift = emit(aten.matmul.default, query, emit(aten.view.default, bias, [1, heads, size, 1]))
    return emit(aten.add.Tensor, scores, shift)


def _values_last(found: _Heads) -> fx.Node:
    """Means of states, multiplied with the weights of values."""
    emit, (batch, heads, queries, size, tokens, width) = Emitter(found.product), found.sizes
    states, weight, bias = _parts(found)
    probabilities = found.product.args[0]
    rows = emit(aten.reshape.default, probabilities, [batch, heads * queries, tokens])
    means = emit(aten.view.default, emit(aten.bmm.default, rows, states), [batch, heads, queries, width])
    by_head = emit(aten.transpose.int, emit(aten.view.default, weight, [heads, size, width]), 1, 2)
    context = emit(aten.bmm.default, _fold(emit, means, found), by_head)
    context = emit(aten.view.default, context, [heads, batch, queries, size])
    # What follows may view it as it may view a product.
    context = emit(aten.contiguous.default, emit(aten.permute.default, context, [1, 0, 2, 3]))
    if bias is None:
        return context
    total = emit(aten.sum.dim_IntList, probabilities, [-1], True)  # 1, but for what the published softmax gives
    shift = emit(aten.mul.Tensor, total, emit(aten.view.default, bias, [1, heads, 1, size]))
    return emit(aten.add.Tensor, context, shift)


def _parts(found: _Heads) -> tuple[fx.Node, fx.Node, fx.Node | None]:
    """What the linear layer reads, its weight and its bias."""
    states, weight, *rest = found.linear.args
    bias = rest[0] if rest else found.linear.kwargs.get("bias")
    assert isinstance(states, fx.Node) and isinstance(weight, fx.Node) and (bias is None or isinstance(bias, fx.Node))
    return states, weight, bias


def _fold(emit: Emitter, value: fx.Node, found: _Heads) -> fx.Node:
    """`[batch, heads, queries, n]` to `[heads, batch x queries, n]`: one product for each head."""
    batch, heads, queries, *_ = found.sizes
    return emit(aten.reshape.default, emit(aten.permute.default, value, [1, 0, 2, 3]), [heads, batch * queries, -1])
