"""Carrier: the residual value after an attention's output projection, which is what a reducer reduces; or the one that
enters its layer.

In a pre-norm model it is the sum of branch and residual. In a post-norm model it is that sum normalised, whatever
operators the norm is written with: they look at each token alone, and nothing but they reads the sum.
"""

from __future__ import annotations

import operator
from collections.abc import Iterator

from torch import Tensor, fx

from .axes import same_size
from .dead_code import draws_nothing
from .nodes import ancestors, content_inputs, depends_on_input, values
from .operators import ADD, DROPOUT, KEEPS_VALUES, RESHAPES, aten
from .rules import argument, broadcast, is_pointwise, list_arg, shape, wrap

_PASSES = RESHAPES | {aten.squeeze.dim, aten.unsqueeze.default}
_LINEAR = {aten.linear.default, aten.addmm.default, aten.matmul.default, aten.mm.default}
_NORMS = {"layer_norm", "native_layer_norm", "rms_norm", "group_norm"}
_MOVES = {
    *("to", "_to_copy", "alias", "contiguous", "clone", "type_as", "detach", "dropout", "expand", "expand_as"),
    *("unsqueeze", "squeeze", "view", "reshape", "_unsafe_view", "flatten", "unflatten", "view_as", "reshape_as"),
}
_SUMS = {"add", "sub", "rsub", "maximum", "minimum"}
_KEEPS_SCALE = _MOVES | {"neg", "abs", "clamp", "clamp_min", "clamp_max"}
_STATISTICS = {"mean": 1, "sum": 1, "amax": 1, "amin": 1, "std": 1, "var": 2, "norm": 1, "linalg_vector_norm": 1}
"""Statistics of features, and the power of the features that they grow with."""
_TWO_STATISTICS = {"var_mean": (2, 1), "std_mean": (1, 1)}
_POWERS = {"square": 2.0, "sqrt": 0.5, "rsqrt": -0.5, "reciprocal": -1.0}
_LINEAR_IN_NORMS = _MOVES | {"add", "sub", "rsub", "neg", "mul", "div", "mean", "sum"}


def carrier_of(context: fx.Node) -> tuple[fx.Node | None, str]:
    """Follow an attention's output through its projection to the residual addition, and the norm behind it; the
    carrier, or None and why there is none."""
    found, why = _residual_addition(context)
    return (None, why) if found is None else (_after_norm(found[0]), "")


def entering_of(context: fx.Node) -> fx.Node | None:
    """The residual value that enters the layer of an attention: what its output is added to. Everything that the layer
    computes of it comes later. None where there is no such value, or the attention is not computed from it."""
    found, _ = _residual_addition(context)
    if found is None:
        return None
    add, branch = found
    node = next(x for x in add.all_input_nodes if x is not branch)
    while node.target in KEEPS_VALUES and _is_same(node):
        node = node.all_input_nodes[0]
    return node if node in ancestors(context) else None


def norm_behind(node: fx.Node) -> fx.Node | None:
    """The norm that alone reads a value, with its weight and bias; None where there is none."""
    found = _after_norm(node)
    return None if found is node else found


def _is_same(node: fx.Node) -> bool:
    """Whether a value is its input, which others may read as well."""
    if node.target in DROPOUT and not draws_nothing(node):
        return False
    (own,), (given,) = values(node), values(node.all_input_nodes[0])
    return own.dtype == given.dtype


def _residual_addition(context: fx.Node) -> tuple[tuple[fx.Node, fx.Node] | None, str]:
    """The addition of an attention's output to the residual, and which of its inputs the output is; or why there is
    none."""
    node, projected = context, False
    while True:
        users = [u for u in node.users if has_value(u)]
        residual = next((u for u in users if u.target in ADD and _is_residual(u, node)), None)
        if residual is not None and (projected or len(users) == 1):
            return (residual, node), ""
        normed = _next_value(node) if projected and len(users) > 1 else None
        if normed is not None:  # the branch is normalised before it is added (sandwich norms), written out
            node = normed[1]
            continue
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
    """The carrier: the addition, or the norm that alone reads it (post-norm), with its weight and bias.

    A norm is what scaling a token does not change: a function of each token alone, which multiplies the token with
    statistics of its features. Whatever it is written with, the power of the token that a value grows with is followed,
    and a norm has none left.
    """
    found, node, normed = add, add, False
    while (following := _next_value(node)) is not None:
        region, last = following
        if region[last] == 0:
            if normed:
                break  # a second norm, of what comes next
            normed = True
        elif region[last] != 1 or not all(_is_linear(x, region) for x in region if x is not node):
            break
        node = last
        found = node if normed else found
    return found


Region = dict[fx.Node, float]
"""What is computed from a token, and the power of the token that it grows with."""


def _next_value(start: fx.Node) -> tuple[Region, fx.Node] | None:
    """The first value of the same shape through which everything goes that is computed from `start`, each token alone,
    and what is on the way there (itself among it); None where there is none."""
    region: Region = {start: 1.0}
    waiting = set(_readers(start))
    while waiting:
        node = min(waiting)  # in the order of the graph
        waiting.remove(node)
        power = _power(node, region)
        if power is None:
            return None
        region[node] = power
        if not waiting and _like(node, start):
            return region, node
        waiting.update(_readers(node))
    return None


def _readers(node: fx.Node) -> Iterator[fx.Node]:
    """What computes with a value; outputs of an operator that nothing reads are none of it."""
    return (u for u in node.users if has_value(u) and (u.users or u.target is not operator.getitem))


def _like(node: fx.Node, start: fx.Node) -> bool:
    sizes, wanted = shape(node), shape(start)
    return len(values(node)) == 1 and len(sizes) == len(wanted) and all(map(same_size, sizes, wanted))


def _power(node: fx.Node, region: Region) -> float | None:
    """The power of a token that a value grows with; None of what is not computed for each token alone, from parameters
    alike for all tokens, or is no such power."""
    others = [x for x in content_inputs(node) if x not in region]
    if any(depends_on_input(x) or not _alike_for_tokens(x) for x in others):
        return None
    name = _name(node)
    first = node.args[0] if node.args else None
    own = region.get(first) if isinstance(first, fx.Node) else None
    given = [region[x] for x in node.args if isinstance(x, fx.Node) and x in region]
    if node.target is operator.getitem and isinstance(first, fx.Node):
        pair = _TWO_STATISTICS.get(_name(first))
        return own if pair is None or own is None else own * pair[int(node.args[1] != 0)]
    if name == "einsum":
        return _einsum_power(node, region)
    if name in ("mul", "div", *_SUMS) and not _aligned(node, region):
        return None
    if name == "mul":
        return sum(given)
    if name == "div":
        second = node.args[1]
        return (own or 0.0) - (region.get(second, 0.0) if isinstance(second, fx.Node) else 0.0)
    if name in _SUMS:
        return given[0] if len(set(given)) == 1 else None
    if own is None or (len(given) != 1 and name not in _MOVES):
        return None
    assert isinstance(first, fx.Node)
    if name in _NORMS:
        return 0.0 if _normalises_features(node) else None
    if name in _STATISTICS or name in _TWO_STATISTICS:
        return own * _STATISTICS.get(name, 1) if _over_features(node, name) else None
    if name in _POWERS or name == "pow":
        power = _POWERS.get(name, node.args[1] if len(node.args) > 1 else None)
        return own * power if isinstance(power, int | float) else None
    rank = len(shape(next(iter(region))))
    return own if name in _KEEPS_SCALE and _keeps_tokens(first, node, rank) else None


def _name(node: fx.Node) -> str:
    """The name of an operator, without the underscore that says it works in place."""
    packet = getattr(node.target, "overloadpacket", None)
    return str(packet.__name__).removesuffix("_") if packet is not None else ""


def _einsum_power(node: fx.Node, region: Region) -> float | None:
    """Of products that keep each token apart: `btd,btd->bt`, `btd,d->btd`."""
    operands: list[fx.Node] = list_arg(node, 1)
    left, _, right = str(node.args[0]).replace(" ", "").partition("->")
    letters = left.split(",")
    token = max(letters, key=len)
    if "." in left or len(set(token)) != len(token) or right not in (token, token[:-1]):
        return None
    for own, x in zip(letters, operands, strict=True):
        if own not in ((token, token[:-1]) if x in region else (token[-1],)):
            return None
    return sum(region.get(x, 0.0) for x in operands)


def _aligned(node: fx.Node, region: Region) -> bool:
    """Whether an operator meets each token with what is computed from itself: no dimension is shifted."""
    inputs = [x for x in node.all_input_nodes if x in region]
    return all(
        len(shape(x)) == len(shape(node)) and all(map(same_size, shape(x)[:-1], shape(node)[:-1])) for x in inputs
    )


def _normalises_features(node: fx.Node) -> bool:
    """Whether a norm is of the last dimension alone."""
    if _name(node) == "group_norm":
        return len(shape(node)) == 2
    return len(list_arg(node, 1)) == 1


def _over_features(node: fx.Node, name: str) -> bool:
    """Whether a statistic is over the last dimension alone."""
    position = 2 if name in ("norm", "linalg_vector_norm") else 1
    asked, rank = argument(node, position, "dim"), len(shape(node.all_input_nodes[0]))
    if isinstance(asked, bool) or not isinstance(asked, int | list | tuple):
        return False
    return [wrap(d, rank) for d in ([asked] if isinstance(asked, int) else asked)] == [rank - 1]


def _keeps_tokens(x: fx.Node, node: fx.Node, rank: int) -> bool:
    """Whether a moved value has the same tokens in the same order: statistics, rows of features that stay whole, or
    groups of them (`rank`: dimensions of tokens and features)."""
    before, after = shape(x), shape(node)
    sizes, result = ([size for size in v if not same_size(size, 1)] for v in (before, after))
    if len(sizes) == len(result) and all(map(same_size, sizes, result)):
        return True
    lead = min(len(before), len(after)) - 1
    if len(before) == len(after) or lead >= rank - 1:
        same = all(map(same_size, before[:lead], after[:lead]))
        if same and (len(before) != len(after) or _name(node) in ("expand", "expand_as")):
            return True  # features in groups, or a statistic for each feature
    return same_size(before[-1], after[-1])


def _alike_for_tokens(value: fx.Node) -> bool:
    return bool(values(value)) and all(same_size(size, 1) for size in shape(value)[:-1])


def _is_linear(node: fx.Node, region: Region) -> bool:
    """Whether a value is a multiple of another one, moved: a mean of tokens comes through it."""
    if _name(node) == "einsum":
        return sum(x in region for x in list_arg(node, 1)) == 1
    if _name(node) not in _LINEAR_IN_NORMS:
        return False
    factors = [x for x in node.args[:2] if isinstance(x, fx.Node) and x in region]
    return (
        _name(node) not in ("mul", "div") or factors == [node.args[0]] or (_name(node) == "mul" and len(factors) == 1)
    )
