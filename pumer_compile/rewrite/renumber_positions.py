"""Positions along a prompt that a selection has made shorter."""

from __future__ import annotations

from functools import partial

import torch
from torch import Tensor, fx

from ..analysis.axes import Dim, Tokens
from ..analysis.masks import HIDES
from ..analysis.nodes import ancestors, attribute, describe, values, with_numbers
from ..analysis.operators import ADD, MOVES, aten, overloads
from ..errors import UsageError
from .carried_weights import CarriedWeights
from .rewriter import Rewriter
from .sites import LocatedGraph, Replacements


def renumbered_positions(graph: LocatedGraph, *, compact: bool) -> Replacements:
    """Positions along a prompt, made out of nothing but its length: counted over the tokens that are left.

    Where they stay original (not `compact`) only those are that are compared with each other and nothing else, as in a
    causal mask, which comes out the same either way; of others (rotary angles, distances within a window) the selection
    takes those that are left.

    Raises:
        UsageError: positions are to be renumbered, and the caller gives them, they are constants, or there are none.
    """
    if compact:
        check_counted(graph)
    streams = set(graph.prompt_images())
    counts = [
        node
        for node in graph.annotation.constraints
        if node.target is aten.arange.default and streams & set(_streams(graph, node, 0))
    ]
    if not compact:
        return {node: partial(_count, node) for node in _compared_alone(graph, counts)}
    if graph.prompt_layers() and len(_compared_alone(graph, counts)) == len(counts):
        raise UsageError(
            "`positions: compact` counts positions anew over the tokens that are left, and no position that is counted "
            "along the prompt was found in this model (its tokens get theirs otherwise, by a learned table say), so it "
            "would change nothing. Choose `positions: original`."
        )
    return {node: partial(_count, node) for node in counts}


def check_counted(graph: LocatedGraph) -> None:
    """Positions can be counted anew: the graph counts them itself.

    Raises:
        UsageError: the caller gives them, or they are constants.
    """
    streams = set(graph.prompt_images())
    _check_not_constant(graph, streams)
    _check_not_given(graph, streams)


def _compared_alone(graph: LocatedGraph, counts: list[fx.Node]) -> list[fx.Node]:
    """Those that are compared with each other and nothing else."""
    compared = {node: _comparisons(graph, node) for node in counts}
    found = {node: nodes for node, nodes in compared.items() if nodes is not None}
    while True:
        others = set(counts) - set(found)
        mixed = [node for node, nodes in found.items() if any(others & ancestors(user) for user in nodes)]
        if not mixed:
            return list(found)
        for node in mixed:
            del found[node]


def _check_not_constant(graph: LocatedGraph, streams: set[str]) -> None:
    whole = graph.attentions[0].context.graph
    for node in whole.find_nodes(op="get_attr"):
        value = with_numbers(attribute(node))
        if not isinstance(value, Tensor) or isinstance(value, torch.nn.Parameter):
            continue
        if any(streams & set(_streams(graph, node, i)) for i in range(value.dim())) and _says_where(node, value):
            unread = [str(n.target) for n in whole.find_nodes(op="placeholder") if not n.users]
            of = f" (its {' and '.join(unread)} are written into the graph)" if unread else ""
            raise UsageError(
                "`positions: compact` counts positions anew over the tokens that are left, and here they are "
                f"constants, counted over the sample's whole prompt{of}: {describe(node)}. Choose `positions: "
                "original`."
            )


def _says_where(node: fx.Node, value: Tensor) -> bool:
    """Whether a constant with a number for each token says where it stands, and is no mask."""
    if value.dtype == torch.bool:
        return False
    if value.is_floating_point():  # cosines and sines of angles, or embeddings
        return not bool(((value == 0) | (value == 1) | (value <= HIDES)).all())
    return _becomes_angle(node) or _is_looked_up(node)


def _is_looked_up(node: fx.Node) -> bool:
    """Whether integers are the rows of a table that are read."""
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        for user in current.users:
            if user.target is aten.embedding.default:
                return True
            if not any(v.is_floating_point() for v in values(user)) and user not in seen:
                seen.add(user)
                pending.append(user)
    return False


def _check_not_given(graph: LocatedGraph, streams: set[str]) -> None:
    for node in graph.attentions[0].context.graph.find_nodes(op="placeholder"):
        tensors = [value for value in values(node) if not value.is_floating_point()]
        along = any(streams & set(_streams(graph, node, i)) for value in tensors for i in range(value.dim()))
        if along and ("position" in str(node.target) or _becomes_angle(node)):
            raise UsageError(
                "`positions: compact` counts positions anew over the tokens that are left, and here they are given, in "
                f"the input {node.target}, counted over the whole prompt. Leave that input out, or choose "
                "`positions: original` (transformers' `generate` always gives them)."
            )


def _becomes_angle(node: fx.Node) -> bool:
    """Whether the numbers of an input themselves are taken the cosine or sine of (rotary positions)."""
    pending, seen = [node], {node}
    while pending:
        for user in pending.pop().users:
            if user.target in (aten.cos.default, aten.sin.default):
                return True
            if user.target not in (aten.embedding.default, aten.cumsum.default) and user not in seen:
                seen.add(user)
                pending.append(user)
    return False


def _count(node: fx.Node, rewriter: Rewriter, carried: CarriedWeights) -> fx.Node:
    dim = Dim(node, 0)
    kind = rewriter.annotation.axis(dim)
    assert isinstance(kind, Tokens)
    epochs = {s: len(rewriter.epochs.steps.get(s, ())) for s in kind.streams}
    rewriter.epochs.bump(dim, epochs)
    size = rewriter.epochs.size(kind, epochs)
    new = rewriter.graph.node_copy(node, lambda n: rewriter.env[n])
    new.args = (size, *new.args[1:])
    return new


def _streams(graph: LocatedGraph, node: fx.Node, index: int) -> tuple[str, ...]:
    kind = graph.annotation.axis(Dim(node, index))
    return kind.streams if isinstance(kind, Tokens) else ()


_COMPARES = frozenset(overloads("eq ne lt le gt ge"))
_SHAPES = frozenset(overloads("new_ones new_zeros ones_like zeros_like"))
"""What asks for a shape alone."""


def _comparisons(graph: LocatedGraph, node: fx.Node) -> list[fx.Node] | None:
    """Where numbers are compared, if they are only compared, or look tokens up (those of a padding mask), moved about
    as they are; else None."""
    pending, seen, found = [node], {node}, []
    while pending:
        for user in pending.pop().users:
            if user.target in _COMPARES:
                found.append(user)
            elif user.target in _SHAPES or user in seen or _looks_tokens_up(graph, user, seen):
                continue
            elif user.target not in MOVES and not (user.target in ADD and user.args[1] == 0):
                return None
            else:
                seen.add(user)
                pending.append(user)
    return found


def _looks_tokens_up(graph: LocatedGraph, node: fx.Node, numbers: set[fx.Node]) -> bool:
    """Whether such numbers are places among the tokens of what is indexed."""
    if node.target is not aten.index.Tensor or node.args[0] in numbers:
        return False
    source, places = node.args[:2]
    assert isinstance(source, fx.Node) and isinstance(places, list | tuple)
    return all(bool(_streams(graph, source, i)) for i, place in enumerate(places) if place in numbers)
