"""Padding texts to one length inside the compiled graph, so that one graph serves every shorter text.

Dynamo leaves the length of a text open once it has seen two, or with `dynamic=True`. What it traced is then run at the
length that all texts are padded to, and the padding itself becomes part of the graph.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import SymInt, Tensor, fx

from .backend_graph import Argument, DynamoGraph, Padding, open_size
from .errors import UsageError

_TABLE_LOOKUPS = {torch.nn.functional.embedding, torch.embedding}
_SAME_TOKENS = {"view", "reshape", "to", "long", "int", "clone", "contiguous"}


def plan_padding(graph: DynamoGraph, length: int, fill: int) -> Padding | None:
    """How to pad the texts of a graph: token ids with `fill`, masks and token types with 0.

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
    padded = [a for a in graph.inputs if len(a.shape) == 2 and _counts(a) and _same(a.shape[-1], size)]
    if all(a in ids for a in padded):
        raise UsageError(
            f"text_length={length} pads texts, and then the model must be told which tokens are padding: no integer "
            f"input [batch, tokens] beside {', '.join(a.name for a in ids)} goes with the text. Pass the attention "
            "mask."
        )
    symbol = open_size(size)
    if not size <= length:  # on an open size this is a guard: Dynamo compiles again for a longer text
        raise UsageError(
            f"The text has {int(size)} tokens, more than text_length={length}. Truncate it, or raise text_length."
        )
    if symbol is not None:
        _check_only_text(graph, symbol, padded)
        _check_path(graph, symbol, length)
        return Padding(length, {a.name: fill if a is ids[0] else 0 for a in padded}, symbol)
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


def _counts(argument: Argument) -> bool:
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
