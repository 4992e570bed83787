"""Dead code: what nothing reads, and what must stay because it is changed in place or draws random numbers."""

from __future__ import annotations

import operator

import torch
from torch import fx

from .nodes import ancestors
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
            stack.extend(node.all_input_nodes if may_alias(node) else [])
            stack.extend(user for user in node.users if may_alias(user))
    return found


def with_writes(graph: fx.Graph, nodes: set[fx.Node]) -> set[fx.Node]:
    """Nodes that are moved together, with all that writes into what they read in place, and what reads that before."""
    found, writes = set(nodes), [node for node in graph.nodes if is_mutable(node.target)]
    order = {node: number for number, node in enumerate(graph.nodes)} if writes else {}
    memories = {node: memory(node.all_input_nodes[0]) for node in writes}
    grown = True
    while grown:
        grown = False
        for node in (n for n in writes if n not in found and memories[n] & found):
            before = {user for shared in memories[node] for user in shared.users if order[user] < order[node]}
            found |= {node}.union(before, *(ancestors(n) for n in (node, *before)))
            grown = True
    return found


def memory(node: fx.Node) -> set[fx.Node]:
    """Nodes that may share memory with one."""
    found: set[fx.Node] = set()
    stack = [node]
    while stack:
        node = stack.pop()
        if node not in found:
            found.add(node)
            stack.extend(_shares(node))
            stack.extend(user for user in node.users if node in _shares(user))
    return found


def _shares(node: fx.Node) -> list[fx.Node]:
    """Inputs whose memory the result of an operator may have; what is written into one is copied."""
    inputs = node.all_input_nodes if may_alias(node) else []
    return inputs[:1] if is_mutable(node.target) else inputs


def may_alias(node: fx.Node) -> bool:
    """Whether the result of an operator may be its input, or a view of it."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.target is operator.getitem
    returns = node.target._schema.returns
    return any(r.alias_info for r in returns) or node.target.overloadpacket.__name__ in MAY_ALIAS
