"""Carrier: the residual value after an attention's output projection, which is what a reducer reduces.

In a pre-norm model it is the sum of branch and residual. In a post-norm model it is that sum normalised, whatever
operators the norm is written with: they look at each token alone, and nothing but they reads the sum.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

from torch import Tensor, fx

from .axes import same_size
from .masks import ADD, KEEPS_VALUES, RESHAPES, is_pointwise
from .nodes import depends_on_input, values
from .rules import argument, aten, broadcast, list_arg, overloads, shape, wrap

_PASSES = RESHAPES | {aten.squeeze.dim, aten.unsqueeze.default}
_LINEAR = {aten.linear.default, aten.addmm.default, aten.matmul.default, aten.mm.default}
_NORMS = frozenset({aten.layer_norm.default, aten.rms_norm.default})
_LENGTHS = frozenset({aten.linalg_vector_norm.default, *overloads("norm")})
_STATISTICS = _LENGTHS | {*overloads("mean sum var std var_mean std_mean")}
_QUOTIENTS = frozenset(overloads("div"))
_PRODUCTS = _QUOTIENTS | {*overloads("mul")}
_LINEAR_IN_NORMS = (
    _PRODUCTS | KEEPS_VALUES | {*overloads("add sub rsub neg to _to_copy alias contiguous clone type_as")}
)
_IN_NORMS = (
    _LINEAR_IN_NORMS
    | {*overloads("pow square sqrt rsqrt reciprocal clamp clamp_min maximum expand expand_as unsqueeze squeeze")}
    | {operator.getitem}
)
"""What a norm over features is written with."""


def carrier_of(context: fx.Node) -> tuple[fx.Node | None, str]:
    """Follow an attention's output through its projection to the residual addition, and the norm behind it; the
    carrier, or None and why there is none."""
    node, projected = context, False
    while True:
        users = [u for u in node.users if has_value(u)]
        residual = next((u for u in users if u.target in ADD and _is_residual(u, node)), None)
        if residual is not None and (projected or len(users) == 1):
            return _after_norm(residual), ""
        if len(users) != 1:
            return None, f"{node.name} has {len(users)} uses and none of them is a residual addition"
        (user,) = users
        if _projects(user, node):
            projected = True
        elif user.target not in _PASSES and not (user.op == "call_function" and is_pointwise(user)):
            return None, f"{user.name} ({user.target}) stands between the attention and a residual addition"
        node = user


def has_value(node: fx.Node) -> bool:
    """Whether a node gives a tensor that others compute with."""
    return any(isinstance(v, Tensor) for v in values(node))


def _projects(user: fx.Node, node: fx.Node) -> bool:
    """Whether a value is multiplied by a matrix that depends on no input."""
    if user.target is aten.einsum.default:
        return all(x is node or not depends_on_input(x) for x in list_arg(user, 1))
    return user.target in _LINEAR and user.args[user.target is aten.addmm.default] is node


def _is_residual(add: fx.Node, branch: fx.Node) -> bool:
    others: Iterator[fx.Node] = (n for n in add.all_input_nodes if n is not branch)
    return any(
        shape(other) == shape(branch) and len(list(broadcast(other, add))) == len(shape(add)) for other in others
    )


def _after_norm(add: fx.Node) -> fx.Node:
    """The carrier: the addition, or the norm that alone reads it (post-norm), with its weight and bias."""
    found, node, normed = add, add, False
    while (following := _next_value(node)) is not None:
        region, last = following
        if not region.isdisjoint(_statistics(region)) or last.target in _NORMS:
            if normed:
                break  # a second norm, of what comes next
            normed = last.target in _NORMS or _rescales(last, region)
        elif not _is_linear(last, node):
            break
        node = last
        found = node if normed else found
    return found


def _next_value(start: fx.Node) -> tuple[set[fx.Node], fx.Node] | None:
    """The first value of the same shape through which everything goes that is computed from `start`, by operators that
    norms are made of, and what is on the way there; None where there is none."""
    region, waiting = {start}, {u for u in start.users if has_value(u)}
    while waiting:
        node = min(waiting)  # in the order of the graph
        waiting.remove(node)
        if not _by_token(node, region):
            return None
        if not waiting and shape(node) == shape(start):
            return region, node
        region.add(node)
        waiting.update(u for u in node.users if has_value(u))
    return None


def _by_token(node: fx.Node, region: set[fx.Node]) -> bool:
    """Whether a value is computed for each token, from the region and parameters alike for all tokens, as in a norm."""
    others = [x for x in node.all_input_nodes if x not in region]
    if any(depends_on_input(x) or not _alike_for_tokens(x) for x in others):
        return False
    if node.target in _NORMS:
        return len(list_arg(node, 1)) == 1
    if node.target in _STATISTICS:
        asked = argument(node, 2 if node.target in _LENGTHS else 1, "dim")
        dims, rank = [asked] if isinstance(asked, int) else asked, len(shape(node.all_input_nodes[0]))
        return isinstance(dims, list | tuple) and [wrap(d, rank) for d in dims] == [rank - 1]
    return node.target in _IN_NORMS


def _alike_for_tokens(value: fx.Node) -> bool:
    return bool(values(value)) and all(same_size(size, 1) for size in shape(value)[:-1])


def _statistics(region: set[fx.Node]) -> set[fx.Node]:
    return {node for node in region if node.target in _STATISTICS}


def _rescales(node: fx.Node, region: set[fx.Node]) -> bool:
    """Whether a value is the product or quotient of two that are both computed from the tokens; else only their mean
    is taken away."""
    return node.target in _PRODUCTS and all(x in region for x in node.args[:2])


def _is_linear(node: fx.Node, source: fx.Node) -> bool:
    """Whether a value is a multiple of another one, moved: a mean of tokens comes through it."""
    given = [x for x in node.args[:2] if x is source]
    return (
        node.target in _LINEAR_IN_NORMS
        and len(given) == 1
        and (node.target not in _QUOTIENTS or node.args[0] is source)
    )
