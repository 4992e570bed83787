"""Dead code: what nothing reads, and what must stay because it is changed in place or draws random numbers."""

from __future__ import annotations

import operator

import torch
from torch import fx

from .operators import ATTENTION, DROPOUT, MAY_ALIAS, is_mutable
from .rules import argument


def drop_dead(graph: fx.Graph) -> None:
    """Remove nodes that nothing reads, a fused attention without dropout among them (which fx keeps, because with
    dropout it would draw random numbers)."""
    graph.eliminate_dead_code(is_impure_node=lambda node: node.is_impure() and not draws_nothing(node))


def draws_nothing(node: fx.Node) -> bool:
    """Whether an operator that may draw random numbers does not."""
    if node.target is ATTENTION:
        return bool(argument(node, 4, "dropout_p", 0.0) == 0.0)
    if node.target in DROPOUT:
        return bool(argument(node, 2, "train") is False or argument(node, 1, "p") == 0.0)
    return False


def may_be_changed(graph: fx.Graph) -> set[fx.Node]:
    """Values that share memory with one that is changed in place; they are left as they are."""
    found: set[fx.Node] = set()
    stack = [x for node in graph.nodes if is_mutable(node.target) for x in (node, *node.all_input_nodes)]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(node.all_input_nodes if _may_alias(node) else [])
            stack.extend(user for user in node.users if _may_alias(user))
    return found


def _may_alias(node: fx.Node) -> bool:
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.target is operator.getitem
    returns = node.target._schema.returns
    return any(r.alias_info for r in returns) or node.target.overloadpacket.__name__ in MAY_ALIAS
