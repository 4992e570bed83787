"""Narrow: how one operator gives a range of its result alone, and what it then takes of its inputs.

It follows from the axes that `rules.py` gives the operator, for the operators in `EXACT` (and pointwise ones) alone:
what a rule says of axes is enough to shorten a stream, and not always to take a part of it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.fx.node import map_aggregate

from ..errors import AxisError
from ..reducers import PublishedMaskedSoftmax
from .axes import ByPosition, Concat, Constraint, Dim, Literal, Reshape, Same, same_size
from .dead_code import draws_nothing
from .nodes import values
from .operators import ATTENTION, CATS, DROPOUT, PIECES, PRODUCTS, SOFTMAX, SQUEEZE, VIEWS, aten, is_mutable, overloads
from .rules import argument, int_arg, ints_arg, node_arg, rule_for, shape, wrap

_SOFTMAX = SOFTMAX | {aten.log_softmax.int}

EXACT = (
    PIECES
    | _SOFTMAX
    | SQUEEZE
    | DROPOUT
    | VIEWS
    | PRODUCTS.keys()
    | {ATTENTION, aten.einsum.default, aten.layer_norm.default, aten.rms_norm.default, aten.embedding.default}
    | {*overloads("to alias detach clone contiguous _to_copy masked_fill where __and__ __or__")}
    | {*overloads("zeros ones full new_zeros new_ones new_full zeros_like ones_like full_like")}
    | {*overloads("mean sum amax amin any all reshape")}
    | {aten.flatten.using_ints, aten.unflatten.int, aten.expand.default, aten.broadcast_to.default}
    | {aten.transpose.int, aten.mT.default, aten.permute.default, aten.t.default, aten.numpy_T.default}
    | {aten.movedim.int, aten.unsqueeze.default, aten.stack.default, *CATS}
    | {aten.select.int, aten.slice.Tensor}
) - {aten.to.other}
"""Operators (beside pointwise ones) whose rule says all that a range of their result depends on."""


class Range(NamedTuple):
    """Positions `start` to `stop - 1` of one dimension; a value is wanted there, and nowhere else."""

    dim: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        """How many positions."""
        return self.stop - self.start


@dataclass(frozen=True)
class Cut:
    """Stands in arguments for a range of a value."""

    node: fx.Node
    range: Range


@dataclass(frozen=True)
class Narrow:
    """How an operator gives a range of its result alone: its arguments, with a `Cut` for what it takes in part."""

    range: Range
    args: Any
    kwargs: Any


# --- what is read --------------------------------------------------------------------------------------------------


def sliced_range(node: fx.Node) -> Range | None:
    """The part of its first input that a `select` or `slice` reads; None where it is all of it, or not a number."""
    if node.target not in (aten.select.int, aten.slice.Tensor):
        return None
    x = node_arg(node, 0)
    dim = wrap(argument(node, 1, "dim", 0), len(shape(x)))
    read = positions(node)
    if not read or len(read) == shape(x)[dim]:
        return None
    return Range(dim, read[0], read[-1] + 1)


def positions(node: fx.Node) -> range:
    """What a `select` or `slice` reads along its dimension; none where a number is not known."""
    x = node_arg(node, 0)
    size = shape(x)[wrap(argument(node, 1, "dim", 0), len(shape(x)))]
    names = ("index",) if node.target is aten.select.int else ("start", "end", "step")
    given = [argument(node, 2 + i, name) for i, name in enumerate(names)]
    if not isinstance(size, int) or any(not isinstance(g, int | None) for g in given):
        return range(0)
    if node.target is aten.select.int:
        return range(given[0] % size, given[0] % size + 1)
    return range(size)[slice(*given)]


def leaves(arguments: Any) -> list[fx.Node | Cut]:
    """Values, and parts of values, among nested arguments."""
    found: list[fx.Node | Cut] = []
    map_aggregate(arguments, lambda leaf: found.append(leaf) if isinstance(leaf, fx.Node | Cut) else None)
    return found


# --- one operator --------------------------------------------------------------------------------------------------


def narrowing(node: fx.Node, wanted: Range) -> Narrow | None:
    """How an operator gives a range of its result; None where it must give all."""
    if node.op == "call_module":
        return _narrow_published(node, wanted)
    rule = rule_for(node)
    try:
        if rule is None or not _by_position(node, wanted):
            return None
        if sliced_range(node) is not None:
            return _narrow_slice(node, wanted)
        constraints = list(rule(node))
    except AxisError:  # a form that its rule does not know
        return None
    joined = next((c for c in constraints if isinstance(c, Concat)), None)
    if joined is not None and joined.result.index == wanted.dim:
        return _narrow_join(node, wanted, joined)
    return _narrow_along(node, wanted, constraints)


def _narrow_published(node: fx.Node, wanted: Range) -> Narrow | None:
    """Rows of the published softmax, which has to know the number of the first one; None of any other module."""
    if published_softmax(node) is None or wanted.dim != len(shape(node)) - 2:
        return None
    scores, *weights = node.args
    before = node.kwargs.get("first", 0)
    assert isinstance(scores, fx.Node) and isinstance(before, int)
    return Narrow(wanted, (Cut(scores, wanted), *weights), {"first": before + wanted.start})


def published_softmax(node: fx.Node) -> PublishedMaskedSoftmax | None:
    """The module that a node calls, where it is the published softmax."""
    if node.op != "call_module" or node.graph.owning_module is None:
        return None
    module = node.graph.owning_module.get_submodule(str(node.target))
    return module if isinstance(module, PublishedMaskedSoftmax) else None


def _by_position(node: fx.Node, wanted: Range) -> bool:
    """Whether a range of the result comes from ranges of the inputs, and says so in its rule."""
    target = node.target
    if not isinstance(target, torch._ops.OpOverload) or is_mutable(target):
        return False
    if target not in EXACT and torch.Tag.pointwise not in target.tags:
        return False
    if torch.Tag.nondeterministic_seeded in target.tags and not draws_nothing(node):
        return False
    if not all(values(x) or isinstance(x.meta.get("val"), torch.SymInt | int) for x in node.all_input_nodes):
        return False
    rank = len(shape(node))
    if target in _SOFTMAX:
        return wrap(int_arg(node, 1, "dim"), rank) != wanted.dim
    if target is aten.linear.default:
        return wanted.dim < rank - 1  # its weight and bias would be cut
    if target is ATTENTION and argument(node, 7, "enable_gqa", False):
        return wanted.dim == rank - 2
    return True


def _narrow_slice(node: fx.Node, wanted: Range) -> Narrow | None:
    """A slice of a slice, or along another dimension (half of each head, as rotary embeddings take)."""
    born = sliced_range(node)
    if node.target is not aten.slice.Tensor or born is None:
        return None
    if born.dim != wanted.dim:
        return Narrow(wanted, (Cut(node_arg(node, 0), wanted), *node.args[1:]), node.kwargs)
    if positions(node).step != 1:
        return None
    start = born.start + wanted.start
    cut = Cut(node_arg(node, 0), Range(wanted.dim, start, start + wanted.length))
    return Narrow(wanted, (cut, wanted.dim, 0, wanted.length), {})


def _narrow_join(node: fx.Node, wanted: Range, joined: Concat) -> Narrow | None:
    """Of values side by side, those that are wanted."""
    parts, start = [], 0
    for dim in joined.parts:
        size = shape(dim.node)[dim.index]
        if not isinstance(size, int) or values(dim.node)[0].dtype != values(node)[0].dtype:
            return None
        first, last = max(wanted.start - start, 0), min(wanted.stop - start, size)
        if first < last:
            whole = last - first == size
            parts.append(dim.node if whole else Cut(dim.node, Range(dim.index, first, last)))
        start += size
    return Narrow(wanted, (parts, wanted.dim), {})


def _narrow_along(node: fx.Node, wanted: Range, constraints: list[Constraint]) -> Narrow | None:
    """The same range of every input that has the axis, and literals of the axis's size."""
    result = Dim(node, wanted.dim)
    axis = _axis(result, constraints)
    if axis is None:
        return None
    taken = {dim.node: dim.index for dim in axis if dim.node is not node}
    several = len(taken) != len({(d.node, d.index) for d in axis if d.node is not node})
    twice = any(_count(node, x) > 1 for x in taken) and node.target in (*PRODUCTS, ATTENTION, aten.einsum.default)
    size = shape(next(iter(node.users)) if node.target in PIECES else node)[wanted.dim]
    differ = any(not same_size(shape(x)[i], size) for x, i in taken.items())
    if several or twice or differ:
        return None
    if node.target in SQUEEZE and wanted.length == 1 and _squeezes(node, taken):
        return None
    literals = [c for c in constraints if isinstance(c, Literal) and c.result == result]
    if not taken and not literals:
        return None
    args, kwargs = _cut_inputs((list(node.args), node.kwargs), taken, wanted)
    for literal in literals:
        args[literal.arg] = _with_size(args[literal.arg], literal.item, wanted.length)
    return Narrow(wanted, tuple(args), kwargs)


def _cut_inputs(arguments: Any, taken: dict[fx.Node, int], wanted: Range) -> Any:
    def cut(leaf: Any) -> Any:
        in_part = isinstance(leaf, fx.Node) and leaf in taken
        return Cut(leaf, wanted._replace(dim=taken[leaf])) if in_part else leaf

    args, kwargs = map_aggregate(arguments, cut)
    return list(args), kwargs


def _axis(result: Dim, constraints: list[Constraint]) -> set[Dim] | None:
    """The dimensions of one operator that are one axis with a dimension of its result; None where it works along it in
    another way than position by position."""
    pairs = [{c.a, c.b} for c in constraints if isinstance(c, Same)]
    for c in (c for c in constraints if isinstance(c, Reshape)):
        sides = [{d for d in side if not same_size(shape(d.node)[d.index], 1)} for side in (c.sources, c.results)]
        if all(len(side) == 1 for side in sides):
            pairs.append(sides[0] | sides[1])
        elif result in c.results:
            return None
    # The outputs of an operator that divides are wanted alike.
    pairs = [{d._replace(output=0) for d in pair} for pair in pairs]
    axis, grown = {result}, True
    while grown:
        larger = axis.union(*(pair for pair in pairs if pair & axis))
        axis, grown = larger, len(larger) > len(axis)
    return None if any(isinstance(c, ByPosition) and c.source in axis for c in constraints) else axis


def _count(node: fx.Node, x: fx.Node) -> int:
    """How often a value is among the arguments."""
    return sum(leaf is x for leaf in leaves((node.args, node.kwargs)))


def _squeezes(node: fx.Node, taken: dict[fx.Node, int]) -> bool:
    """Whether a `squeeze` would take the dimension away that now is 1."""
    ((x, index),) = taken.items()
    rank = len(shape(x))
    return index in {wrap(d, rank) for d in ints_arg(node, 1, "dim", list(range(rank)))}


def _with_size(given: Any, item: int | None, size: int) -> Any:
    if item is None:
        return size
    sizes = list(given)
    sizes[item] = size
    return sizes
