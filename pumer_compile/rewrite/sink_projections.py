"""Postpone: what works on each token by itself is computed after a reducer where that is less work.

    map @ (linear(context) + residual)  =  linear(map @ context) + map @ residual

The rows of a reducer's map sum to 1, so that a bias comes through unchanged. In a pre-norm layer the carrier is such a
sum, and its output projection then works on the tokens that are left. Equal, but that sums are rounded in another
order. Where a norm comes before the carrier (post-norm), or dropout draws random numbers, nothing is postponed.
"""

from __future__ import annotations

from collections.abc import Callable

from torch import fx

from ..analysis.axes import Dim, Tokens
from ..analysis.cost import pays
from ..analysis.dead_code import draws_nothing, may_be_changed
from ..analysis.nodes import values
from ..analysis.operators import aten, overloads
from ..analysis.rules import node_arg, shape
from .rewriter import Rewriter

_SAME = frozenset(overloads("to alias contiguous"))
_DROPOUT = frozenset(overloads("dropout"))


def projections(rewriter: Rewriter, carrier: fx.Node, dim: int, reduced: dict[str, int]) -> dict[fx.Node, fx.Node]:
    """The captured linear layers that pay to be computed after a carrier's reducers, by the addend that they are.

    Args:
        rewriter: which has passed the carrier.
        carrier: captured.
        dim: its token dimension.
        reduced: tokens behind the reducers, by stream.
    """
    axis, epochs = rewriter.annotation.axis(Dim(carrier, dim)), rewriter.epochs.at(Dim(carrier, dim))
    assert isinstance(axis, Tokens)
    before = {s.stream: rewriter.epochs.length(s, epochs) for s in axis.segments}
    total = sum(rewriter.epochs.length(s, epochs) for s in axis.segments)
    maps = sum(after * before[stream] for stream, after in reduced.items())
    fewer = sum(before[stream] - after for stream, after in reduced.items())
    found, shared = {}, may_be_changed(rewriter.source.graph)
    for addend in _addends(carrier):
        linear = _projection(addend, dim)
        if linear is None or rewriter.epochs.at(Dim(node_arg(linear, 0), dim)) != epochs:
            continue
        if not shared.isdisjoint(linear.all_input_nodes):
            continue  # they would be read later than they are
        given, made = int(shape(node_arg(linear, 0))[-1]), int(shape(linear)[-1])
        copied = given * total if len(axis.segments) > 1 else 0
        if pays(fewer * given * made, maps * given, copied):
            found[addend] = linear
    return found


def reduced_sum(
    rewriter: Rewriter, carrier: fx.Node, linears: dict[fx.Node, fx.Node], reduce: Callable[[fx.Node], fx.Node]
) -> fx.Node:
    """A reduced carrier, as the sum of its reduced addends.

    Args:
        rewriter: which has passed the carrier.
        carrier: captured.
        linears: what `projections` gave.
        reduce: applies the reducers' maps to a new value with the carrier's tokens.
    """
    new = rewriter.env[carrier]
    parts: dict[fx.Node, fx.Node] = {}
    for addend, value in zip(_addends(carrier), new.all_input_nodes, strict=True):
        linear = linears.get(addend)
        parts[value] = reduce(value) if linear is None else _with_input(rewriter, rewriter.env[linear], reduce)
    return rewriter.graph.node_copy(new, parts.__getitem__)


def _with_input(rewriter: Rewriter, linear: fx.Node, reduce: Callable[[fx.Node], fx.Node]) -> fx.Node:
    """A copy of a new node that reads its first input reduced."""
    given = linear.args[0]
    assert isinstance(given, fx.Node)
    reduced = reduce(given)
    return rewriter.graph.node_copy(linear, lambda n: reduced if n is given else n)


def _addends(carrier: fx.Node) -> list[fx.Node]:
    """What a carrier is the plain sum of; none where it is no sum, or some of it is broadcast or converted."""
    if carrier.target is not aten.add.Tensor or carrier.kwargs:
        return []
    parts = [x for x in carrier.args if isinstance(x, fx.Node)]
    like = values(carrier)[0]
    whole = all(shape(x) == like.shape and values(x)[0].dtype == like.dtype for x in parts)
    return parts if whole and len(parts) == 2 and parts[0] is not parts[1] else []


def _projection(addend: fx.Node, dim: int) -> fx.Node | None:
    """The linear layer over tokens that an addend is and nothing else reads, behind operators that change nothing."""
    node = addend
    while len(node.users) == 1 and node.target is not aten.linear.default:
        same = node.target in _SAME and values(node)[0].dtype == values(node_arg(node, 0))[0].dtype
        if not same and not (node.target in _DROPOUT and draws_nothing(node)):
            return None
        node = node_arg(node, 0)
    return node if len(node.users) == 1 and dim < len(shape(node)) - 1 else None
