"""Heads: attention whose heads are folded into its batch, written with a dimension for them. Exact, on any graph.

`bmm(q, k)`, a softmax and `bmm(p, v)` over values `[batch * heads, tokens, size]` are the attention that every pass
knows, over `[batch, heads, tokens, size]`: the views that fold the heads go, and those that unfold them. How many heads
there are is read from the view that folded them; a batch of matrices that came about otherwise is left alone.
"""

from __future__ import annotations

import operator
from typing import Any

from torch import fx

from ..analysis.axes import Size, same_size
from ..analysis.dead_code import drop_dead
from ..analysis.nodes import Emitter, copied, values
from ..analysis.operators import MATMULS, SOFTMAX, VIEWS, aten, is_mutable, overloads
from ..analysis.rules import argument, int_arg, is_pointwise, node_arg, shape, wrap
from .manager import Pass, State

_VIEWS = VIEWS | {aten.reshape.default, aten.flatten.using_ints, aten.unflatten.int}
_UNBIND = frozenset(overloads("unbind"))


def unfold_heads(captured: fx.GraphModule) -> tuple[fx.GraphModule, int]:
    """A copy of a captured graph whose attentions have a dimension of heads, where they were folded into the batch, and
    how many those were; the graph itself where there is none."""
    if not any(_attention(node) for node in captured.graph.nodes):
        return captured, 0
    graph, count = copied(captured.graph), 0
    module = fx.GraphModule(captured, graph)
    for node in list(graph.nodes):
        found = _attention(node)
        if found is not None:
            _Unfolding(found[1]).write(found[0])
            count += 1
    drop_dead(graph)
    graph.lint()
    module.recompile()
    return module, count


def _attention(softmax: fx.Node) -> tuple[fx.Node, int] | None:
    """The product with the values behind a softmax of products, and how many heads are folded into their batch; None
    where none are."""
    if softmax.target not in SOFTMAX or len(shape(softmax)) != 3 or wrap(int_arg(softmax, 1), 3) != 2:
        return None
    scores, context = _scores(softmax.args[0]), _context(softmax)
    if scores is None or context is None:
        return None
    heads = _heads(_operands(scores)[0])
    return None if heads is None else (context, heads)


def _is_product(node: fx.Node) -> bool:
    known = node.target in MATMULS or (
        node.target is aten.baddbmm.default and not {"beta", "alpha"} & node.kwargs.keys() and len(node.args) == 3
    )
    return known and all(len(shape(x)) == 3 for x in (node, *_operands(node)))


def _operands(product: fx.Node) -> tuple[fx.Node, fx.Node]:
    first = 1 if product.target is aten.baddbmm.default else 0
    return node_arg(product, first), node_arg(product, first + 1)


def _passes(node: fx.Node) -> bool:
    """Whether an operator may stand between a product and the softmax: element by element, or a view of heads."""
    if node.target in _VIEWS:
        return _folds(node) is not None or _unfolds(node, shape(node)[1] if len(shape(node)) == 4 else 0)
    return is_pointwise(node) and not is_mutable(node.target)


def _scores(value: Any) -> fx.Node | None:
    """The product of three dimensions that scores come from."""
    if not isinstance(value, fx.Node) or value.op != "call_function" or not values(value):
        return None
    if _is_product(value):
        return value
    if not _passes(value):
        return None
    return next(filter(None, (_scores(x) for x in value.all_input_nodes if len(shape(x)) > 2)), None)


def _context(probabilities: fx.Node) -> fx.Node | None:
    """The product of three dimensions that probabilities go into."""
    for user in probabilities.users:
        if _is_product(user) and _operands(user)[0] is probabilities:
            return user
        if user.op == "call_function" and len(values(user)) == 1 and _passes(user):
            found = _context(user)
            if found is not None:
                return found
    return None


# --- views that fold heads --------------------------------------------------------------------------------------------


def _folds(node: fx.Node) -> fx.Node | None:
    """The value `[batch, heads, a, b]` that a view folds to `[batch * heads, a, b]`; None where it does not."""
    if node.target not in _VIEWS:
        return None
    source = node_arg(node, 0)
    before, after = shape(source), shape(node)
    fits = len(before) == 4 and len(after) == 3 and isinstance(before[1], int) and _alike(before[2:], after[1:])
    return source if fits and same_size(before[0] * before[1], after[0]) else None


def _unfolds(node: fx.Node, heads: Size) -> bool:
    """Whether a view makes `[batch, heads, a, b]` of `[batch * heads, a, b]`."""
    if node.target not in _VIEWS or not isinstance(heads, int):
        return False
    before, after = shape(node_arg(node, 0)), shape(node)
    fits = len(before) == 3 and len(after) == 4 and same_size(after[1], heads) and _alike(before[1:], after[2:])
    return fits and same_size(after[0] * after[1], before[0])


def _folds_apart(node: fx.Node) -> tuple[fx.Node, int] | None:
    """Of `[tokens, batch, width]`, viewed as `[tokens, batch * heads, size]` and turned around, the value and how many
    heads there are; None of anything else."""
    if not _turns(node, 0, 1):
        return None
    view = node_arg(node, 0)
    source = node_arg(view, 0) if view.target in _VIEWS else None
    if source is None or len(shape(source)) != 3 or len(shape(view)) != 3:
        return None
    (tokens, batch, width), (kept, folded, size) = shape(source), shape(view)
    if not (isinstance(width, int) and isinstance(size, int) and same_size(tokens, kept)) or width % size:
        return None
    heads = width // size
    return (source, heads) if heads > 1 and same_size(batch * heads, folded) else None


def _turns(node: fx.Node, first: int, second: int) -> bool:
    """Whether a value of three dimensions has two of them exchanged."""
    if node.target is aten.transpose.int and len(shape(node)) == 3:
        return {wrap(int_arg(node, 1), 3), wrap(int_arg(node, 2), 3)} == {first, second}
    order = [0, 1, 2]
    order[first], order[second] = second, first
    return (
        node.target is aten.permute.default
        and [wrap(d, 3) for d in argument(node, 1) if len(shape(node)) == 3] == order
    )


def _part(node: fx.Node) -> tuple[fx.Node, int] | None:
    """Of one of the parts `[batch * heads, a, b]` of a view that folds `[parts, batch, heads, a, b]`, that value and
    the number of the part."""
    if node.target is operator.getitem:
        parts, index = node_arg(node, 0), node.args[1]
        if parts.target not in _UNBIND or argument(parts, 1, "dim", 0) != 0:
            return None
    elif node.target is aten.select.int and argument(node, 1) == 0:
        parts, index = node, node.args[2]
    else:
        return None
    view = node_arg(parts, 0)
    source = node_arg(view, 0) if view.target in _VIEWS else None
    if source is None or len(shape(source)) != 5 or len(shape(view)) != 4 or not isinstance(index, int):
        return None
    before, after = shape(source), shape(view)
    fits = _alike([before[0], *before[3:]], [after[0], *after[2:]]) and isinstance(before[2], int)
    return (source, index) if fits and same_size(before[1] * before[2], after[1]) else None


def _heads(query: fx.Node) -> int | None:
    """How many heads are folded into the batch of a query."""
    while query.op == "call_function":
        source, apart, part = _folds(query), _folds_apart(query), _part(query)
        found = shape(source)[1] if source is not None else apart[1] if apart else shape(part[0])[2] if part else None
        if found is not None:
            return found if isinstance(found, int) and found > 1 else None
        carries = [x for x in query.all_input_nodes if values(x) and len(shape(x)) == 3]
        passes = is_pointwise(query) or _turns(query, 1, 2)
        if not passes or is_mutable(query.target) or not carries:
            return None
        query = carries[0]
    return None


def _alike(a: Any, b: Any) -> bool:
    return all(same_size(x, y) for x, y in zip(a, b, strict=True))


# --- writing ----------------------------------------------------------------------------------------------------------


class _Unfolding:
    """One attention, written with a dimension of heads."""

    def __init__(self, heads: int) -> None:
        self.heads = heads
        self.lifted: dict[fx.Node, fx.Node] = {}

    def write(self, context: fx.Node) -> None:
        """Write all up to the product with the values anew, and give it to what reads it."""
        self._lift(context)
        for node, new in list(self.lifted.items()):
            self._give(node, new)

    def _give(self, node: fx.Node, new: fx.Node) -> None:
        """What reads a value with folded heads reads that with a dimension for them."""
        if not (_is_product(node) or node.target in SOFTMAX or is_pointwise(node)):
            return
        self._skip_views(node, new)
        others = [u for u in node.users if u not in self.lifted and u is not new and (u.users or u.op == "output")]
        if others:
            with node.graph.inserting_before(new.next):
                folded = Emitter(node)(aten.reshape.default, new, [-1, *shape(node)[1:]])
            for user in others:
                user.replace_input_with(node, folded)

    def _skip_views(self, node: fx.Node, new: fx.Node) -> None:
        for user in list(node.users):
            if user is not new and _unfolds(user, self.heads):
                user.replace_all_uses_with(new)

    def _lift(self, node: fx.Node) -> fx.Node:
        """A value `[batch * heads, a, b]` as `[batch, heads, a, b]`."""
        if node not in self.lifted:
            with node.graph.inserting_before(node.next):
                self.lifted[node] = self._lifted(Emitter(node), node)
        return self.lifted[node]

    def _lifted(self, emit: Emitter, node: fx.Node) -> fx.Node:
        if _folds(node) is not None and same_size(shape(node_arg(node, 0))[1], self.heads):
            self._lift_before(node_arg(node, 0))
            return node_arg(node, 0)  # another one now, where that was a view
        if _is_product(node):
            product = emit(aten.matmul.default, *map(self._lift, _operands(node)))
            if node.target in MATMULS:
                return product
            return emit(aten.add.Tensor, self._operand(node_arg(node, 0), node), product)
        if node.target in SOFTMAX:
            return emit(node.target, self._lift(node_arg(node, 0)), 3, *node.args[2:], **node.kwargs)
        if _turns(node, 1, 2):
            return emit(aten.transpose.int, self._lift(node_arg(node, 0)), 2, 3)
        if is_pointwise(node) and not is_mutable(node.target):
            arguments, options = fx.map_arg((node.args, node.kwargs), lambda x: self._operand(x, node))
            return emit(node.target, *arguments, **options)
        return self._lifted_leaf(emit, node)

    def _lifted_leaf(self, emit: Emitter, node: fx.Node) -> fx.Node:
        apart, part = _folds_apart(node), _part(node)
        if apart is not None and apart[1] == self.heads:
            source, size = apart[0], shape(node)[2]
            split = emit(aten.reshape.default, source, [shape(source)[0], -1, self.heads, size])
            return emit(aten.permute.default, split, [1, 2, 0, 3])
        if part is not None and same_size(shape(part[0])[2], self.heads):
            return emit(aten.select.int, part[0], 0, part[1])
        return emit(aten.reshape.default, node, [-1, self.heads, *shape(node)[1:]])

    def _lift_before(self, value: fx.Node) -> None:
        """Lift what is unfolded before a value `[batch, heads, a, b]` and folded again behind it, as for a mask."""
        if _unfolds(value, self.heads):
            folded = node_arg(value, 0)
            self._skip_views(folded, self._lift(folded))
        elif value.op == "call_function" and is_pointwise(value) and not is_mutable(value.target):
            for x in [x for x in value.all_input_nodes if values(x) and len(shape(x)) == 4]:
                self._lift_before(x)

    def _operand(self, x: fx.Node, of: fx.Node) -> fx.Node:
        """An input of an operator, lifted where it is not the same for all rows of the batch."""
        if not values(x) or len(shape(x)) < 3 or not same_size(shape(x)[0], shape(of)[0]):
            return x
        return self._lift(x)


class UnfoldHeads(Pass):
    """Gives attention with heads in its batch a dimension for them."""

    name = "heads"
    optional = True

    def run(self, state: State) -> int:
        """See `Pass`; counts attentions."""
        state.captured, matches = unfold_heads(state.captured)
        return matches
