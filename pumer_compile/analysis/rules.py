"""The rule table: how each operator carries axes.

A rule takes a node and yields constraints (`axes.py`). To add one, write a function under
`@rule(overload, ...)`: say which dimensions of inputs and output are the same axis, and which literals are
sizes. Dimensions that a rule does not mention are new and index no tokens; an input dimension that indexes
tokens and is not mentioned is an error.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NoReturn

import torch
from torch import fx

from ..errors import AxisError
from .axes import (
    ByPosition,
    Concat,
    Constraint,
    Dim,
    Literal,
    Reduce,
    Repeat,
    Reshape,
    Same,
    Seed,
    Select,
    Size,
    Slice,
    Summed,
    reshape_groups,
    same_size,
)
from .nodes import describe, values
from .operators import CATS, aten, overloads

Rule = Callable[[fx.Node], Iterable[Constraint]]
_RULES: dict[Any, Rule] = {}


def rule(*targets: Any) -> Callable[[Rule], Rule]:
    """Register a function as the rule of operator overloads."""

    def register(function: Rule) -> Rule:
        for target in targets:
            if target in _RULES:
                raise ValueError(f"{target} has a rule already")
            _RULES[target] = function
        return function

    return register


def rule_for(node: fx.Node) -> Rule | None:
    """The rule of a node; placeholders, attributes and outputs need none."""
    if node.op != "call_function":
        return None
    found = _RULES.get(node.target)
    if found is None and isinstance(node.target, torch._ops.OpOverload) and torch.Tag.pointwise in node.target.tags:
        # PyTorch itself tags operators that act on each element alone.
        return pointwise
    return found


# --- helpers ------------------------------------------------------------------------------------------------


def shape(node: fx.Node, output: int = 0) -> tuple[Size, ...]:
    return tuple(values(node)[output].shape)


def argument(node: fx.Node, position: int, name: str = "", default: Any = None) -> Any:
    return node.args[position] if len(node.args) > position else node.kwargs.get(name, default)


def node_arg(node: fx.Node, position: int, name: str = "") -> fx.Node:
    """An argument that must be a value of the graph."""
    found = argument(node, position, name)
    return found if isinstance(found, fx.Node) else _unexpected(node, position, found, "a value of the graph")


def int_arg(node: fx.Node, position: int, name: str = "", default: int | None = None) -> int:
    """An argument that must be a literal integer."""
    found = argument(node, position, name, default)
    return found if isinstance(found, int) else _unexpected(node, position, found, "a literal integer")


def list_arg(node: fx.Node, position: int, name: str = "", default: Any = None) -> list[Any]:
    """An argument that must be a list: of sizes, indices or values of the graph."""
    found = argument(node, position, name, default)
    return list(found) if isinstance(found, list | tuple) else _unexpected(node, position, found, "a list")


def ints_arg(node: fx.Node, position: int, name: str = "", default: Any = None) -> list[int]:
    """An argument that must be a literal integer or a list of them."""
    found = argument(node, position, name, default)
    return [found] if isinstance(found, int) else list_arg(node, position, name, default)


def _unexpected(node: fx.Node, position: int, found: object, wanted: str) -> NoReturn:
    raise AxisError(
        f"Argument {position} of {describe(node)} is {found!r}; its rule in analysis/rules.py expects {wanted}."
    )


def tensors(node: fx.Node) -> Iterator[fx.Node]:
    """Tensor inputs, list elements included."""
    return (n for n in node.all_input_nodes if values(n))


def keep_dims(x: fx.Node, node: fx.Node, pairs: Iterable[tuple[int, int]]) -> Iterator[Constraint]:
    """Same axis for each `(dimension of x, dimension of node)`."""
    return (Same(Dim(x, i), Dim(node, j)) for i, j in pairs)


def broadcast(x: fx.Node, node: fx.Node, skip_last: int = 0) -> Iterator[Constraint]:
    """Same axes, aligned at the right, where `x` is not stretched; without the `skip_last` last ones."""
    source, result = shape(x), shape(node)
    offset = len(result) - len(source)
    for i in range(len(source) - skip_last):
        if same_size(source[i], result[i + offset]):
            yield Same(Dim(x, i), Dim(node, i + offset))
        else:  # one token stretched over many
            yield Reduce(Dim(x, i))


def wrap(dim: int, rank: int) -> int:
    return dim % rank if rank else 0


def size_literals(node: fx.Node, arg: int, sizes: Any) -> Iterator[Constraint]:
    """Literals in a list of sizes that says the shape of the result."""
    for item, size in enumerate(sizes):
        if isinstance(size, fx.Node) or (isinstance(size, int) and size != -1):
            yield Literal(Dim(node, item), arg, item)


# --- elementwise --------------------------------------------------------------------------------------------


@rule(
    *overloads("to alias detach detach_ clone contiguous lift_fresh_copy lift_fresh dropout feature_dropout"),
    *overloads("_to_copy __and__ __or__ type_as zeros_like ones_like full_like empty_like log_sigmoid"),
    *overloads("masked_fill masked_fill_ where expand_as copy_ floor_divide"),
)
def pointwise(node: fx.Node) -> Iterator[Constraint]:
    """Each element on its own; inputs broadcast."""
    for x in tensors(node):
        yield from broadcast(x, node)


@rule(aten.view_as_complex.default, aten.view_as_real.default)
def complex_view(node: fx.Node) -> Iterator[Constraint]:
    """Pairs of numbers along the last dimension as complex ones, or the other way round."""
    x = node_arg(node, 0)
    yield from keep_dims(x, node, ((i, i) for i in range(min(len(shape(x)), len(shape(node))))))
    if len(shape(x)) > len(shape(node)):
        yield ByPosition(Dim(x, len(shape(x)) - 1))


@rule(aten.isin.Tensor_Tensor)
def isin(node: fx.Node) -> Iterator[Constraint]:
    """Whether each element is among those of a set, which has no order."""
    elements, members = node_arg(node, 0), node_arg(node, 1)
    yield from broadcast(elements, node)
    yield from (Reduce(Dim(members, i)) for i in range(len(shape(members))))


@rule(aten.softmax.int, aten._softmax.default, aten.log_softmax.int, aten.cumsum.default)
def along_one_axis(node: fx.Node) -> Iterator[Constraint]:
    """Normalises (or accumulates) along a dimension that stays."""
    (x,) = tensors(node)
    yield from broadcast(x, node)
    if node.target is aten.cumsum.default and shape(x):
        yield ByPosition(Dim(x, wrap(int_arg(node, 1), len(shape(x)))))


@rule(aten.layer_norm.default, aten.rms_norm.default, aten.native_layer_norm.default)
def normalisation(node: fx.Node) -> Iterator[Constraint]:
    """Normalises the last dimensions, which are features."""
    x, normalised = node_arg(node, 0), list_arg(node, 1)
    rank = len(shape(x))
    yield from keep_dims(x, node, ((i, i) for i in range(rank)))
    yield from (ByPosition(Dim(x, rank - 1 - i)) for i in range(len(normalised)))


# --- constants ----------------------------------------------------------------------------------------------


@rule(*overloads("zeros ones full empty new_zeros new_ones new_full new_empty"))
def filled(node: fx.Node) -> Iterator[Constraint]:
    """A constant of a literal shape."""
    arg = 1 if "new_" in str(node.target) else 0
    for x in tensors(node):  # `new_*` take only dtype and device from it
        yield from (Reduce(Dim(x, i)) for i in range(len(shape(x))))
    yield from size_literals(node, arg, list_arg(node, arg))


@rule(aten.arange.default, aten.arange.start, aten.arange.start_step)
def arange(node: fx.Node) -> Iterator[Constraint]:
    """Positions 0..n-1: n may be a number of tokens. Other ranges keep their literals."""
    if node.target is aten.arange.default and isinstance(node.args[0], int):
        yield Literal(Dim(node, 0), 0)


# --- shapes -------------------------------------------------------------------------------------------------


@rule(*overloads("view reshape _unsafe_view"))
def view(node: fx.Node) -> Iterator[Constraint]:
    yield from _reshaped(node_arg(node, 0), node)
    yield from size_literals(node, 1, list_arg(node, 1))


@rule(*overloads("view_as reshape_as"))
def view_as(node: fx.Node) -> Iterator[Constraint]:
    """Takes the shape of another value, and none of its tokens."""
    x, other = node_arg(node, 0), node_arg(node, 1)
    yield from _reshaped(x, node)
    yield from (Reduce(Dim(other, i)) for i in range(len(shape(other))))


@rule(aten.flatten.using_ints, aten.unflatten.int)
def flatten(node: fx.Node) -> Iterator[Constraint]:
    x = node_arg(node, 0)
    yield from _reshaped(x, node)
    if node.target is aten.unflatten.int:
        first = wrap(int_arg(node, 1), len(shape(x)))
        for item, size in enumerate(list_arg(node, 2)):
            if isinstance(size, fx.Node) or (isinstance(size, int) and size != -1):
                yield Literal(Dim(node, first + item), 2, item)


def _reshaped(x: fx.Node, node: fx.Node) -> Iterator[Constraint]:
    for sources, results in reshape_groups(shape(x), shape(node)):
        yield Reshape(tuple(Dim(x, i) for i in sources), tuple(Dim(node, j) for j in results))


@rule(aten.transpose.int)
def transpose(node: fx.Node) -> Iterator[Constraint]:
    x = node_arg(node, 0)
    order = list(range(len(shape(x))))
    a, b = wrap(int_arg(node, 1), len(order)), wrap(int_arg(node, 2), len(order))
    if order:  # PyTorch takes a number here
        order[a], order[b] = order[b], order[a]
    yield from keep_dims(x, node, ((i, j) for j, i in enumerate(order)))


@rule(aten.mT.default)
def matrix_transpose(node: fx.Node) -> Iterator[Constraint]:
    x = node_arg(node, 0)
    rank = len(shape(x))
    order = [*range(rank - 2), rank - 1, rank - 2]
    yield from keep_dims(x, node, ((i, j) for j, i in enumerate(order)))


@rule(aten.permute.default)
def permute(node: fx.Node) -> Iterator[Constraint]:
    x, order = node_arg(node, 0), list_arg(node, 1)
    yield from keep_dims(x, node, ((wrap(i, len(order)), j) for j, i in enumerate(order)))


@rule(aten.t.default, aten.numpy_T.default)
def reverse(node: fx.Node) -> Iterator[Constraint]:
    x = node_arg(node, 0)
    rank = len(shape(x))
    yield from keep_dims(x, node, ((i, rank - 1 - i) for i in range(rank)))


@rule(aten.movedim.int)
def movedim(node: fx.Node) -> Iterator[Constraint]:
    x = node_arg(node, 0)
    rank = len(shape(x))
    source, target = wrap(int_arg(node, 1), rank), wrap(int_arg(node, 2), rank)
    order = [i for i in range(rank) if i != source]
    order.insert(target, source)
    yield from keep_dims(x, node, ((i, j) for j, i in enumerate(order)))


@rule(aten.unsqueeze.default)
def unsqueeze(node: fx.Node) -> Iterator[Constraint]:
    x = node_arg(node, 0)
    rank = len(shape(x))
    new = wrap(int_arg(node, 1), rank + 1)
    yield from keep_dims(x, node, ((i, i + (i >= new)) for i in range(rank)))


@rule(aten.squeeze.dim, aten.squeeze.dims, aten.squeeze.default)
def squeeze(node: fx.Node) -> Iterator[Constraint]:
    x = node_arg(node, 0)
    sizes = shape(x)
    dims = {wrap(d, len(sizes)) for d in ints_arg(node, 1, "dim", list(range(len(sizes))))}
    kept = [i for i, size in enumerate(sizes) if not (i in dims and same_size(size, 1))]
    yield from keep_dims(x, node, ((i, j) for j, i in enumerate(kept)))
    yield from (Reduce(Dim(x, i)) for i in range(len(sizes)) if i not in kept)


@rule(aten.expand.default, aten.broadcast_to.default)
def expand(node: fx.Node) -> Iterator[Constraint]:
    yield from broadcast(node_arg(node, 0), node)
    yield from size_literals(node, 1, list_arg(node, 1))


@rule(aten.repeat.default)
def repeat(node: fx.Node) -> Iterator[Constraint]:
    x, repeats = node_arg(node, 0), list_arg(node, 1)
    offset = len(repeats) - len(shape(x))
    for i in range(len(shape(x))):
        times = repeats[i + offset]
        if times == 1:
            yield Same(Dim(x, i), Dim(node, i + offset))
        else:
            yield repeated(Dim(x, i), Dim(node, i + offset), times, in_place=False)


def repeated(source: Dim, result: Dim, times: object, *, in_place: bool) -> Constraint:
    """A dimension several times."""
    if isinstance(times, int) and times > 1:
        return Repeat(source, result, times, in_place)
    return ByPosition(source)


# --- joining and cutting ------------------------------------------------------------------------------------


@rule(*CATS)
def cat(node: fx.Node) -> Iterator[Constraint]:
    rank = len(shape(node))
    # `cat` skips an empty vector whatever the shape of the others: a cache before its first keys.
    parts: list[fx.Node] = [p for p in list_arg(node, 0) if len(shape(p)) == rank]
    dim = wrap(int_arg(node, 1, "dim", 0), rank)
    yield Concat(Dim(node, dim), tuple(Dim(p, dim) for p in parts))
    for part in parts:
        yield from keep_dims(part, node, ((i, i) for i in range(rank) if i != dim))


@rule(aten.stack.default)
def stack(node: fx.Node) -> Iterator[Constraint]:
    parts: list[fx.Node] = list_arg(node, 0)
    rank = len(shape(node))
    new = wrap(int_arg(node, 1, "dim", 0), rank)
    for part in parts:
        yield from keep_dims(part, node, ((i, i + (i >= new)) for i in range(rank - 1)))


@rule(aten.slice.Tensor)
def slice_(node: fx.Node) -> Iterator[Constraint]:
    x = node_arg(node, 0)
    rank = len(shape(x))
    dim = wrap(int_arg(node, 1, "dim", 0), rank)
    yield from keep_dims(x, node, ((i, i) for i in range(rank) if i != dim))
    size, cut = shape(x)[dim], shape(node)[dim]
    if same_size(size, cut):
        yield Same(Dim(x, dim), Dim(node, dim))
        return
    start, stop = argument(node, 2, "start") or 0, argument(node, 3, "end")
    plain = argument(node, 4, "step", 1) == 1 and (start or stop is not None)
    if not plain or not isinstance(size, int) or not isinstance(start, int) or not isinstance(cut, int):
        yield ByPosition(Dim(x, dim))
        return
    if cut == 0:
        yield Reduce(Dim(x, dim))
        return
    first = max(size + start, 0) if start < 0 else start
    yield Slice(Dim(x, dim), Dim(node, dim), first, first + cut, 2, 3)


@rule(aten.narrow.default)
def narrow(node: fx.Node) -> Iterator[Constraint]:
    x, dim = node_arg(node, 0), wrap(int_arg(node, 1), len(shape(node)))
    yield from keep_dims(x, node, ((i, i) for i in range(len(shape(x))) if i != dim))
    whole = same_size(shape(x)[dim], shape(node)[dim])
    if whole:
        yield Same(Dim(x, dim), Dim(node, dim))
        yield Literal(Dim(node, dim), 3)
    else:
        yield ByPosition(Dim(x, dim))


@rule(aten.select.int)
def select(node: fx.Node) -> Iterator[Constraint]:
    x, index = node_arg(node, 0), argument(node, 2)
    rank = len(shape(x))
    dim = wrap(int_arg(node, 1), rank)
    yield from keep_dims(x, node, ((i, i - (i > dim)) for i in range(rank) if i != dim))
    size = shape(x)[dim]
    if isinstance(size, int) and isinstance(index, int):
        yield Select(Dim(x, dim), index % size, 2)
    else:
        yield ByPosition(Dim(x, dim))


@rule(*overloads("split split_with_sizes chunk unbind"))
def pieces(node: fx.Node) -> Iterator[Constraint]:
    """Several outputs; the dimension that is divided must not be reduced."""
    x = node_arg(node, 0)
    rank = len(shape(x))
    unbinds = "unbind" in str(node.target)
    dim = wrap(int_arg(node, 1 if unbinds else 2, "dim", 0), rank)
    for output in range(len(values(node))):
        for i in range(rank):
            if i != dim:
                yield Same(Dim(x, i), Dim(node, i - (unbinds and i > dim), output))
    yield ByPosition(Dim(x, dim))


@rule(operator.getitem)
def getitem(node: fx.Node) -> Iterator[Constraint]:
    if values(node):
        x, output = node_arg(node, 0), int_arg(node, 1)
        yield from (Same(Dim(x, i, output), Dim(node, i)) for i in range(len(shape(node))))


# --- lookups ------------------------------------------------------------------------------------------------


@rule(aten.embedding.default)
def embedding(node: fx.Node) -> Iterator[Constraint]:
    """Integer ids that come straight from an input are text."""
    weight, ids = node_arg(node, 0), node_arg(node, 1)
    rank = len(shape(ids))
    yield from keep_dims(ids, node, ((i, i) for i in range(rank)))
    yield Same(Dim(weight, 1), Dim(node, rank))
    if rank and straight_from_input(ids):
        yield Seed((Dim(ids, rank - 1),), "text")


_UNCHANGED = {*overloads("to clone contiguous alias detach view reshape _to_copy"), aten.slice.Tensor}


def straight_from_input(node: fx.Node) -> bool:
    """Whether a value is an input (`source_input`)."""
    return source_input(node) is not None


def source_input(node: fx.Node) -> fx.Node | None:
    """The input that a value is, whole or cut, under another shape or dtype; some of its numbers may be replaced by one
    number (placeholders of images, before words are looked up). None where it is computed."""
    while node.op == "call_function":
        if node.target in _UNCHANGED or node.target is aten.masked_fill.Scalar or fills_with_number(node):
            node = node_arg(node, 0)
        elif node.target in (aten.where.ScalarSelf, aten.where.ScalarOther):
            node = node_arg(node, 2 if node.target is aten.where.ScalarSelf else 1)
        else:
            break
    return node if node.op == "placeholder" else None


def fills_with_number(node: fx.Node) -> bool:
    """Whether `x[mask] = number` is written, with a mask of the shape of `x`."""
    if node.target not in overloads("index_put index_put_"):
        return False
    x, places, value = node_arg(node, 0), list_arg(node, 1), argument(node, 2)
    mask = places[0] if len(places) == 1 else None
    if not isinstance(mask, fx.Node) or not isinstance(value, fx.Node) or argument(node, 3, "accumulate", False):
        return False
    return values(mask)[0].dtype == torch.bool and len(shape(mask)) == len(shape(x)) and not shape(value)


@rule(aten.gather.default)
def gather(node: fx.Node) -> Iterator[Constraint]:
    x, index = node_arg(node, 0), node_arg(node, 2)
    dim = wrap(int_arg(node, 1), len(shape(x)))
    yield from keep_dims(index, node, ((i, i) for i in range(len(shape(node)))))
    for i, (a, b) in enumerate(zip(shape(x), shape(node), strict=True)):
        yield Same(Dim(x, i), Dim(node, i)) if i != dim and same_size(a, b) else ByPosition(Dim(x, i))


@rule(aten.index_select.default)
def index_select(node: fx.Node) -> Iterator[Constraint]:
    x, index = node_arg(node, 0), node_arg(node, 2)
    rank = len(shape(x))
    dim = wrap(int_arg(node, 1), rank)
    yield from keep_dims(x, node, ((i, i) for i in range(rank) if i != dim))
    yield from (Same(Dim(index, k), Dim(node, dim)) for k in range(len(shape(index))))  # a number is one place
    yield from (ByPosition(Dim(x, d)) for d in range(rank) if d == dim)


@rule(aten.index.Tensor)
def index(node: fx.Node) -> Iterator[Constraint]:
    """`x[i, j]` with broadcast indices. An index that counts 0..n-1 over a whole dimension keeps its axis."""
    x = node_arg(node, 0)
    indices: list[fx.Node | None] = list_arg(node, 1)
    indexed = {d: i for d, i in enumerate(indices) if i is not None}
    first, last = min(indexed, default=0), max(indexed, default=-1)
    masks = [i for i in indexed.values() if values(i)[0].dtype in (torch.bool, torch.uint8)]
    if not indexed or len(indexed) != last + 1 - first or (masks and len(indexed) > 1):
        yield from (ByPosition(Dim(n, d)) for n in (x, *indexed.values()) for d in range(len(shape(n))))
        return
    if masks:
        yield from _masked(node, x, masks[0], first)
        return
    rank = max(len(shape(i)) for i in indexed.values())
    yield from keep_dims(x, node, ((d, d) for d in range(first)))
    after = range(last + 1, len(shape(x)))
    yield from keep_dims(x, node, ((d, d - len(indexed) + rank) for d in after))
    for d, i in indexed.items():
        offset = first + rank - len(shape(i))
        for k, size in enumerate(shape(i)):
            if same_size(size, shape(node)[k + offset]):
                yield Same(Dim(i, k), Dim(node, k + offset))
        counted = _counts_whole(i, shape(x)[d])
        keeps = counted is not None and same_size(shape(x)[d], shape(node)[counted + offset])
        yield Same(Dim(x, d), Dim(node, (counted or 0) + offset)) if keeps else ByPosition(Dim(x, d))


def _masked(node: fx.Node, x: fx.Node, mask: fx.Node, first: int) -> Iterator[Constraint]:
    """`x[mask]`: of the dimensions that the mask has, one comes out, as long as the data says."""
    own = len(shape(mask))
    yield from (ByPosition(Dim(mask, k)) for k in range(own))
    for d in range(len(shape(x))):
        inside = first <= d < first + own
        yield ByPosition(Dim(x, d)) if inside else Same(Dim(x, d), Dim(node, d if d < first else d - own + 1))


def _counts_whole(node: fx.Node, size: Size) -> int | None:
    """The dimension along which an index counts 0..size-1, or None."""
    wide = [k for k, s in enumerate(shape(node)) if not same_size(s, 1)]
    if len(wide) > 1:
        return None
    position = wide[0] if wide else max(0, len(shape(node)) - 1)
    while node.op == "call_function" and node.target is not aten.arange.default:
        adds_zero = node.target is aten.add.Tensor and node.args[1] == 0
        if not (adds_zero or node.target in (aten.unsqueeze.default, aten.to.dtype, aten.view.default)):
            return None
        node = node_arg(node, 0)
    counts = node.target is aten.arange.default and len(shape(node)) == 1 and same_size(shape(node)[0], size)
    return position if counts else None


# --- reductions ---------------------------------------------------------------------------------------------


@rule(*overloads("mean amax amin any all"), aten.max.default, aten.min.default)
def reduction(node: fx.Node) -> Iterator[Constraint]:
    yield from _reduced(node, lambda dim: Reduce(dim))


@rule(*overloads("sum"))
def total(node: fx.Node) -> Iterator[Constraint]:
    yield from _reduced(node, lambda dim: Summed(dim))


@rule(*overloads("argmax argmin"), aten.max.dim, aten.min.dim)
def arg_reduction(node: fx.Node) -> Iterator[Constraint]:
    """Gives positions, which change their meaning when tokens are reduced."""
    yield from _reduced(node, lambda dim: ByPosition(dim))


def _reduced(node: fx.Node, gone: Callable[[Dim], Constraint]) -> Iterator[Constraint]:
    x = node_arg(node, 0)
    rank = len(shape(x))
    asked = argument(node, 1, "dim")
    if isinstance(asked, torch.dtype | bool) or asked is None or asked == []:
        asked = list(range(rank))
    dims = {wrap(d, rank) for d in ([asked] if isinstance(asked, int) else asked)}
    keeps = len(shape(node)) == rank
    position = 0
    for i in range(rank):
        if i in dims:
            yield gone(Dim(x, i))
        else:
            yield from (Same(Dim(x, i), Dim(node, position, o)) for o in range(len(values(node))))
        position += keeps or i not in dims


# --- products -----------------------------------------------------------------------------------------------


@rule(aten.linear.default)
def linear(node: fx.Node) -> Iterator[Constraint]:
    x, weight = node_arg(node, 0), node_arg(node, 1)
    rank = len(shape(x))
    yield from keep_dims(x, node, ((i, i) for i in range(rank - 1)))
    yield Same(Dim(x, rank - 1), Dim(weight, len(shape(weight)) - 1), aligns=False)
    if len(shape(weight)) == 2:
        yield Same(Dim(weight, 0), Dim(node, rank - 1))
    if rank == 3 and straight_from_input(x):
        # A feature matrix, one row for each region or patch of an image.
        yield Seed((Dim(x, 1),), "image")


@rule(aten.matmul.default, aten.bmm.default, aten.mm.default)
def matmul(node: fx.Node) -> Iterator[Constraint]:
    a, b = node_arg(node, 0), node_arg(node, 1)
    rank_a, rank_b, rank = len(shape(a)), len(shape(b)), len(shape(node))
    inner = Dim(b, rank_b - 2 if rank_b > 1 else 0)
    yield Same(Dim(a, rank_a - 1), inner, aligns=False)
    if rank_a > 1:
        yield Same(Dim(a, rank_a - 2), Dim(node, rank - (2 if rank_b > 1 else 1)))
    if rank_b > 1:
        yield Same(Dim(b, rank_b - 1), Dim(node, rank - 1))
    for x, own in ((a, rank_a), (b, rank_b)):
        for i in range(own - 2):
            j = i + rank - own
            if same_size(shape(x)[i], shape(node)[j]):
                yield Same(Dim(x, i), Dim(node, j))


@rule(aten.addmm.default, aten.baddbmm.default)
def addmm(node: fx.Node) -> Iterator[Constraint]:
    bias, a, b = (node_arg(node, i) for i in range(3))
    rank = len(shape(node))
    yield from broadcast(bias, node)
    yield from keep_dims(a, node, ((i, i) for i in range(rank - 1)))
    yield Same(Dim(a, rank - 1), Dim(b, rank - 2), aligns=False)
    yield Same(Dim(b, rank - 1), Dim(node, rank - 1))
    yield from keep_dims(b, node, ((i, i) for i in range(rank - 2)))


@rule(aten.einsum.default)
def einsum(node: fx.Node) -> Iterator[Constraint]:
    equation: str = argument(node, 0)
    operands: list[fx.Node] = list_arg(node, 1)
    left, _, right = equation.replace(" ", "").partition("->")
    if "." in equation or not right:
        yield from (ByPosition(Dim(x, i)) for x in operands for i in range(len(shape(x))))
        return
    first: dict[str, Dim] = {letter: Dim(node, i) for i, letter in enumerate(right)}
    for x, letters in zip(operands, left.split(","), strict=True):
        for i, letter in enumerate(letters):
            if letter in first:
                yield Same(Dim(x, i), first[letter], aligns=letter in right)
            else:
                first[letter] = Dim(x, i)
                yield Reduce(Dim(x, i))


@rule(aten.scaled_dot_product_attention.default)
def sdpa(node: fx.Node) -> Iterator[Constraint]:
    q, k, v = (node_arg(node, i) for i in range(3))
    mask = argument(node, 3, "attn_mask")
    rank = len(shape(node))
    if argument(node, 5, "is_causal", False):
        # The triangle goes by position, and reduced tokens are not in their old order.
        yield from (ByPosition(Dim(x, rank - 2)) for x in (q, k))
    yield from broadcast(q, node, skip_last=1)
    yield Same(Dim(q, rank - 1), Dim(k, rank - 1), aligns=False)
    yield Same(Dim(k, rank - 2), Dim(v, rank - 2), aligns=False)
    yield Same(Dim(v, rank - 1), Dim(node, rank - 1))
    for x in (k, v):
        yield from (Same(Dim(x, i), Dim(node, i)) for i in range(rank - 2) if same_size(shape(x)[i], shape(node)[i]))
    if mask is not None:
        own = len(shape(mask))
        for i, against in ((own - 1, Dim(k, rank - 2)), (own - 2, Dim(q, rank - 2))):
            if same_size(shape(mask)[i], shape(against.node)[against.index]):
                yield Same(Dim(mask, i), against)
        for i in range(own - 2):
            j = i + rank - own
            if same_size(shape(mask)[i], shape(node)[j]):
                yield Same(Dim(mask, i), Dim(node, j))


@rule(aten.conv2d.default, aten.conv2d.padding)
def conv2d(node: fx.Node) -> Iterator[Constraint]:
    """A convolution makes a grid; flattened, its cells are image tokens."""
    x, weight = node_arg(node, 0), node_arg(node, 1)
    yield Same(Dim(x, 0), Dim(node, 0))
    yield Same(Dim(weight, 0), Dim(node, 1))
    yield from (ByPosition(Dim(x, i)) for i in (1, 2, 3))
    yield Seed((Dim(node, 2), Dim(node, 3)), "image")


@rule(aten.sym_size.int)
def sym_size(node: fx.Node) -> Iterator[Constraint]:
    x, dim = node_arg(node, 0), int_arg(node, 1)
    rank = len(shape(x))
    yield from (ByPosition(Dim(x, i)) if i == wrap(dim, rank) else Reduce(Dim(x, i)) for i in range(rank))


def is_pointwise(node: fx.Node) -> bool:
    """Whether an operator works on each element alone."""
    rule = rule_for(node)
    return rule is not None and rule.__name__ == "pointwise"
