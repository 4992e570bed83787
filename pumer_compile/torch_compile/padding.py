"""Padding texts to one length inside the compiled graph, so that one graph serves every shorter text.

Dynamo leaves the length of a text open once it has seen two, or with `dynamic=True`. What it traced is then run at the
length that all texts are padded to, and the padding itself becomes part of the graph.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import SymInt, Tensor, fx

from ..analysis import rules
from ..analysis.nodes import content_inputs, describe
from ..analysis.operators import JOINS, overloads
from ..errors import UsageError
from .lowering import Argument, DynamoGraph, Padding, open_size

_TABLE_LOOKUPS = {torch.nn.functional.embedding, torch.embedding}
_SAME_TOKENS = {"view", "reshape", "to", "long", "int", "clone", "contiguous"}


def plan_padding(graph: DynamoGraph, length: int, fill: int) -> Padding | None:
    """How to pad the texts of a graph: token ids with `fill`, masks, token types and positions with 0 (labels:
    `with_labels`).

    Args:
        graph: Dynamo's.
        length: tokens after padding.
        fill: token id.

    Returns:
        None where the text has that length in every call of this graph.

    Raises:
        UsageError: no text, no mask of it, a text that is longer, or one whose length Dynamo has fixed.
    """
    ids, size = _text(graph, length)
    together = [a for a in graph.inputs if len(a.shape) == 2 and _is_discrete(a) and _same(a.shape[-1], size)]
    symbol = open_size(size)  # of one length where these had several before
    padded = [a for a in graph.inputs if a in together or (_is_discrete(a) and _positions(a, symbol))]
    names = frozenset(a.name for a in ids)
    _check_mask(length, names, [a.name for a in padded])
    if not size <= length:  # on an open size this is a guard: Dynamo compiles again for a longer text
        raise UsageError(
            f"The text has {int(size)} tokens, more than text_length={length}. Truncate it, or raise text_length."
        )
    if symbol is not None:
        _check_only_text(graph, symbol, padded)
        _check_path(graph, symbol, length)
        values = {a.name: fill if a is ids[0] else 0 for a in padded}
        assert isinstance(size, SymInt)
        return Padding(length, values, symbol, names, seen=size.node.hint)
    if size != length:
        raise UsageError(
            f"text_length={length} cannot be had from this call: Dynamo fixed its {size} text tokens in the graph. "
            f"Compile with dynamic=True, or make the first call with {length} text tokens."
        )
    return None


def _text(graph: DynamoGraph, length: int) -> tuple[list[Argument], int | SymInt]:
    """The inputs that are looked up in a table, token ids (those with the largest table) first; their length."""
    tables = _looked_up(graph.module.graph)
    ids = [a for a in graph.inputs if a.node in tables and a.shape]
    ids.sort(key=lambda a: tables[a.node], reverse=True)
    if not ids or not all(_same(a.shape[-1], ids[0].shape[-1]) for a in ids):
        found = ", ".join(f"{a.name} [{', '.join(map(str, a.shape))}]" for a in graph.inputs)
        raise UsageError(
            f"text_length={length} pads one text. Looked for integer inputs of one length whose entries are looked up "
            f"in an embedding table; {len(ids)} are looked up, of the inputs {found}. Leave text_length out and pad "
            "the texts."
        )
    return ids, ids[0].shape[-1]


def _positions(argument: Argument, symbol: Any) -> bool:
    """Whether an input has one number for each text token. In this call a vector of the batch may have as many: what is
    not open under the same symbol is none."""
    return len(argument.shape) == 1 and symbol is not None and open_size(argument.shape[0]) == symbol


def _check_mask(length: int, ids: frozenset[str], padded: list[str]) -> None:
    if not set(padded) <= ids:
        return
    raise UsageError(
        f"text_length={length} pads texts, and then the model must be told which tokens are padding: no integer input "
        f"[batch, tokens] beside {', '.join(sorted(ids))} goes with the text. Pass the attention mask."
    )


def _check_only_text(graph: DynamoGraph, symbol: Any, padded: list[Argument]) -> None:
    """No other size may be the one that Dynamo calls the text's length."""
    for argument in graph.inputs:
        for index, size in enumerate(argument.shape):
            is_text = argument in padded and index == len(argument.shape) - 1
            expression = open_size(size)
            if not is_text and expression is not None and symbol in expression.free_symbols:
                raise UsageError(
                    f"Dimension {index} of {argument.name} and the text had the same size when Dynamo compiled, and it "
                    "took them for one size. Make the first call with sizes that differ (the batch, say)."
                )


def _check_path(graph: DynamoGraph, symbol: Any, length: int) -> None:
    """What the model decided by the text's length when it was traced must hold for the padded one."""
    environment = graph.mode.shape_env
    for guard in environment.guards if environment is not None else ():
        expression = guard.expr
        if expression.free_symbols == {symbol} and expression.subs({symbol: length}) == False:  # noqa: E712 (sympy)
            raise UsageError(
                f"The model takes another path for {length} text tokens than for the text of this call ({expression} "
                f"does not hold), so texts cannot be padded to text_length={length}."
            )


def _same(a: int | SymInt, b: int | SymInt) -> bool:
    """Whether two sizes are the same; where both are open, that they are becomes a guard."""
    both_open = open_size(a) is not None and open_size(b) is not None
    both_fixed = open_size(a) is None and open_size(b) is None
    return (both_open or both_fixed) and bool(a == b)


def _is_discrete(argument: Argument) -> bool:
    """Whether an input holds integers or truth values."""
    return not (argument.value.is_floating_point() or argument.value.is_complex())


def _looked_up(graph: fx.Graph) -> dict[fx.Node, int]:
    """Placeholders of integers whose entries are looked up in an embedding table, and the rows of that table."""
    found: dict[fx.Node, int] = {}
    for node in graph.nodes:
        if node.op == "call_function" and node.target in _TABLE_LOOKUPS:
            operands = [a for a in (*node.args, *node.kwargs.values()) if isinstance(a, fx.Node)]
            rows = max((int(a.meta["example_value"].shape[0]) for a in operands if _is_table(a)), default=0)
            for origin in map(_origin, operands):
                if origin.op == "placeholder" and not _is_table(origin):
                    found[origin] = max(rows, found.get(origin, 0))
    return found


def _is_table(node: fx.Node) -> bool:
    value = node.meta.get("example_value")
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 2


def _origin(node: fx.Node) -> fx.Node:
    while node.op == "call_method" and node.target in _SAME_TOKENS and isinstance(node.args[0], fx.Node):
        node = node.args[0]
    return node


# --- labels ---------------------------------------------------------------------------------------------------------

# Their arguments: scores, target, weights of classes, reduction, the target to ignore.
_LOSSES = set(overloads("cross_entropy_loss nll_loss nll_loss2d nll_loss_nd"))
_IGNORE = 4
_MOVES = {
    *overloads("slice select view reshape _unsafe_view flatten unflatten unsqueeze squeeze transpose permute t"),
    *overloads("to _to_copy contiguous clone alias detach pad constant_pad_nd masked_fill masked_fill_ index_put_"),
}
"""They give the entries of their first argument, or constants."""


def with_labels(padding: Padding, lowered: fx.GraphModule) -> Padding:
    """The padding with labels padded by what their loss ignores, so that its mean is over the call's own tokens.

    Args:
        padding: of the texts.
        lowered: the graph for the passes, whose placeholders have the names of the inputs.

    Raises:
        UsageError: labels that cannot be told apart or followed; no mask beside ids and labels.
    """
    ignored: dict[str, int] = {}
    for loss in (n for n in lowered.graph.nodes if n.target in _LOSSES):
        value = rules.argument(loss, _IGNORE, "ignore_index", -100)
        for name in _origins(loss.args[1], padding, loss):
            if name in padding.ids:
                raise UsageError(
                    f"text_length={padding.length} pads {name} with a token, and {describe(loss)} would take it for a "
                    "label. Give the labels as an input of their own (`labels=ids.clone()`), with -100 where there is "
                    "nothing to learn."
                )
            if ignored.setdefault(name, value) != value:
                raise UsageError(
                    f"{name} goes to two losses that ignore different labels ({ignored[name]} and {value}), so "
                    f"text_length={padding.length} cannot pad it. Give both one ignore_index."
                )
    _check_mask(padding.length, padding.ids, [name for name in padding.fill if name not in ignored])
    return dataclasses.replace(padding, fill={**padding.fill, **ignored})


def _origins(target: Any, padding: Padding, loss: fx.Node) -> Iterator[str]:
    """The padded inputs whose entries a loss takes for labels."""
    stack, seen = [target], set[fx.Node]()
    while stack:
        node = stack.pop()
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        if node.target in padding.fill:
            yield str(node.target)
        elif node.target in overloads("where"):
            stack += node.args[1:]
        elif node.target in JOINS:
            parts: Any = node.args[0]
            stack += parts
        elif node.target in _MOVES:
            stack.append(node.args[0])
        elif found := _reached(node, padding):
            raise UsageError(
                f"text_length={padding.length} pads {found}, which becomes the labels of {describe(loss)} by "
                f"{describe(node)}: what its padding turns into there cannot be told. Prepare the labels outside of "
                "the model, with -100 where there is nothing to learn."
            )


def _reached(node: fx.Node, padding: Padding) -> str:
    """A padded input whose entries a value is computed from, or ''."""
    stack, seen = [node], set[fx.Node]()
    while stack:
        current = stack.pop()
        if current.target in padding.fill:
            return str(current.target)
        if current not in seen:
            seen.add(current)
            stack += content_inputs(current)
    return ""
