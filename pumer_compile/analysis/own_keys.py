"""Own keys: where the queries of an attention stand among its keys.

Attention that a token gets is said by its key. In self-attention queries and keys are the same tokens; latents that read a
picture and one another (a resampler) are the last of many keys; in cross-attention they are none of them.
"""

from __future__ import annotations

from torch import fx

from .attention import Parts
from .nodes import values
from .operators import ATTENTION, CATS, JOINS, MATMULS, SOFTMAX, overloads
from .rules import argument, wrap

_MIXES = frozenset({ATTENTION, *SOFTMAX, *overloads("conv1d conv2d conv3d embedding")})


def own_keys(parts: Parts) -> int | None:
    """The number of the key that belongs to the first query; None where queries are no keys."""
    given = parts.key if parts.key is not None else parts.key_transposed
    assert given is not None
    dim = -2 if parts.key is not None else -1
    queries, keys = int(values(parts.query)[0].shape[-2]), int(values(given)[0].shape[dim])
    asked, read = _token_by_token(parts.query), _token_by_token(given)
    if queries == keys and asked & read:
        return 0
    for join in (node for node in read if node.target in CATS):
        first, along = 0, wrap(argument(join, 1, "dim", 0), values(join)[0].dim())
        if values(join)[0].shape[along] != keys:
            continue
        for part in join.args[0]:  # type: ignore[union-attr]  # what is joined
            assert isinstance(part, fx.Node)
            size = int(values(part)[0].shape[along])
            if size == queries and asked & _token_by_token(part):
                return first
            first += size
    return None


def _token_by_token(node: fx.Node) -> set[fx.Node]:
    """The values whose tokens a value holds, each by itself: what it is made of back to where tokens meet."""
    found, stack = {node}, [node]
    while stack:
        current = stack.pop()
        if current.target in _MIXES or _meets(current):
            continue
        for source in current.all_input_nodes:
            if source.op == "call_function" and source not in found and values(source):
                found.add(source)
                stack.append(source)
    return found


def _meets(node: fx.Node) -> bool:
    """Whether tokens of several values come together: a product of two of them, or a join that is none of features."""
    if node.target in MATMULS:
        return all(isinstance(n, fx.Node) and n.op == "call_function" for n in node.args[:2])
    if node.target not in JOINS:
        return False
    rank = values(node)[0].dim()
    return wrap(argument(node, 1, "dim", 0), rank) != rank - 1
