"""Padding that the compiled graph puts behind the texts, taken from its outputs again.

Which dimension of an output holds the text's tokens is known from the annotation, and how many entries the call's own
output has there from Dynamo's symbolic sizes. Where the two do not say which entries are padding, the graph is refused.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Mapping
from typing import Any

import torch
from torch import SymFloat, SymInt, Tensor, fx

from ..analysis.annotate import Annotation
from ..analysis.axes import Dim, Tokens
from ..analysis.nodes import describe, values
from ..errors import CaptureError, UsageError
from ..rewrite.epochs import Epochs, EpochTable
from .follow_padding import follow_padding
from .lowering import Cut, DynamoGraph, Padding, open_size
from .places import Places

_LATER = "Leave text_length out and pad the texts outside of the model"


def padded_streams(lowered: fx.GraphModule, annotation: Annotation, padding: Padding) -> set[str]:
    """The streams whose last tokens are padding.

    Raises:
        UsageError: learned tokens follow the text's own in one.
    """
    own: dict[str, int] = {}
    for node in lowered.graph.find_nodes(op="placeholder"):
        if node.target in padding.ids:
            kind = annotation.axis(Dim(node, len(values(node)[0].shape) - 1))
            for segment in kind.segments if isinstance(kind, Tokens) else ():
                if segment.stream:
                    own[segment.stream] = segment.length
    for stream, length in own.items():
        if annotation.streams[stream] != annotation.learned[stream] + length:
            raise UsageError(
                f"text_length={padding.length} pads the end of the {stream} tokens, and learned tokens stand behind "
                f"them ({annotation.streams[stream]} in all). {_LATER}."
            )
    return set(own)


_ARITHMETIC = {
    getattr(operator, f"{prefix}{name}")
    for name in ("add", "sub", "mul", "truediv", "floordiv", "mod", "pow")
    for prefix in ("", "i")
} | {torch.add, torch.sub, torch.mul, torch.div, torch.pow}
_METHODS = {f"{name}{suffix}" for name in ("add", "sub", "mul", "div", "pow") for suffix in ("", "_")}


def check_numbers(graph: DynamoGraph) -> None:
    """The number of text tokens may give shapes and positions, and enter no other computation: padded, it is another.

    Raises:
        UsageError: it does; the message names the line.
    """
    for node in graph.module.graph.nodes:
        if node.target not in _ARITHMETIC and not (node.op == "call_method" and node.target in _METHODS):
            continue
        given = [a.meta.get("example_value") for a in node.all_input_nodes]
        if any(isinstance(v, Tensor) for v in given) and any(_follows(v, graph) for v in given):
            raise UsageError(
                f"{describe(node)} computes with the text's length, which text_length={_padding(graph).length} "
                f"changes. {_LATER}, or count its tokens by the attention mask."
            )


OutputPlaces = Mapping[tuple[int, int], Places]
"""Where padding is, by the number of an output and its dimension."""


def check_padding(graph: DynamoGraph, lowered: fx.GraphModule) -> OutputPlaces:
    """Nothing may read the padding of the texts; see `follow_padding.py`.

    Args:
        graph: Dynamo's, with its padding.
        lowered: the graph for the passes.

    Returns:
        Where the outputs of `lowered` have padding.

    Raises:
        UsageError: something reads it, or may; the message names it.
    """
    padding = _padding(graph)
    least = _shortest(graph)
    if least == padding.length:
        return {}
    graph.padding = dataclasses.replace(padding, length=least)
    try:
        short, _ = graph.lower()
    except CaptureError as error:
        raise UsageError(
            f"What text_length={padding.length} would change cannot be told: {str(error).rstrip('.')} (with a text of "
            f"{least} tokens). {_LATER}."
        ) from error
    finally:
        graph.padding = padding
    followed = follow_padding(lowered, short, padding, least)
    outputs = enumerate(_flat(lowered.graph))
    return {(n, d.index): places for n, output in outputs for d, places in followed.items() if d.node is output}


def _shortest(graph: DynamoGraph) -> int:
    """Tokens of the shortest text, at least 2, that this graph of Dynamo's serves; Dynamo compiles again for others."""
    padding, environment = _padding(graph), graph.mode.shape_env
    expressions = [guard.expr for guard in environment.guards] if environment is not None else []
    own = [e for e in expressions if e.free_symbols == {padding.symbol}]
    served = (n for n in range(2, padding.length) if all(e.subs({padding.symbol: n}) != False for e in own))  # noqa: E712
    return next(served, padding.length)


def output_cuts(
    graph: DynamoGraph,
    lowered: fx.GraphModule,
    annotation: Annotation,
    table: EpochTable | None,
    streams: set[str],
    places: OutputPlaces,
    *,
    restored: bool = False,
) -> dict[int, list[Cut]]:
    """The padding in each output of a graph, by the output's number.

    Args:
        graph: Dynamo's, with its padding.
        lowered: the graph for the passes.
        annotation: its axes.
        table: of its reducers; None where there are none.
        streams: from `padded_streams`.
        places: from `check_padding`, of the first graph for the passes.
        restored: whether outputs have an entry for each original token, whatever was reduced.

    Raises:
        UsageError: an output whose size follows the text's, and whose padding cannot be told.
    """
    found: dict[int, list[Cut]] = {}
    shown = _flat(graph.module.graph)
    for number, (ours, theirs) in enumerate(zip(_flat(lowered.graph), shown, strict=True)):
        size = theirs.meta.get("example_value") if isinstance(theirs, fx.Node) else theirs
        if isinstance(size, SymInt | SymFloat) and _follows(size, graph):
            raise UsageError(
                f"The function returns a number ({size.node.expr}) that follows the text's length, which "
                f"text_length={_padding(graph).length} fixes. Compute it outside of the compiled function."
            )
        if not isinstance(size, Tensor) or not isinstance(ours, fx.Node):
            continue
        for index, length in enumerate(size.shape):
            if not _follows(length, graph):
                continue
            dim = Dim(ours, index)
            epochs = {} if restored or table is None else table.at(dim)
            cut = _cut(graph, annotation, table, dim, epochs, streams, length)
            if cut is not None:
                _check_cut(graph, annotation, dim, streams, places.get((number, index)))
                found.setdefault(number, []).append(cut)
    return found


def _cut(
    graph: DynamoGraph,
    annotation: Annotation,
    table: EpochTable | None,
    dim: Dim,
    epochs: Epochs,
    streams: set[str],
    length: int | SymInt,
) -> Cut | None:
    kind = annotation.axis(dim)
    texts = [s for s in kind.segments if s.stream in streams] if isinstance(kind, Tokens) else []
    if any(epochs.get(s.stream or "", 0) for s in texts):
        return None  # reduced: as many entries as tokens are left, whatever the text's length
    # One entry more for each token more: the sizes of both lengths differ by just the padding.
    padding = _padding(graph)
    if len(texts) != 1 or open_size(length).diff(padding.symbol) != 1:
        raise UsageError(
            f"The output {describe(dim.node)} has {open_size(length)} entries in dimension {dim.index}, where "
            f"{padding.symbol} is the text's length, and they index {kind}: which of them come from the padding of "
            f"text_length={padding.length} cannot be told. Return it with the tokens in a dimension of their own, or "
            "leave text_length out."
        )
    assert isinstance(kind, Tokens)
    stop = 0
    for segment in kind.segments:
        stop += table.length(segment, epochs) if table is not None else segment.length
        if segment in texts:
            break
    return Cut(dim.index, stop)


def _check_cut(
    graph: DynamoGraph, annotation: Annotation, dim: Dim, streams: set[str], followed: Places | None
) -> None:
    """What is cut from an output must be the padding that was followed to it, at the end of the text's tokens."""
    kind = annotation.axis(dim)
    if followed is None or followed.alike or not isinstance(kind, Tokens):
        return
    stop = 0
    for segment in kind.segments:
        stop += segment.length
        if segment.stream in streams:
            break
    missing = [i for i, number in enumerate(followed.numbers) if number < 0]
    if missing != list(range(stop - len(missing), stop)):
        raise UsageError(
            f"The output {describe(dim.node)} has padding of text_length={_padding(graph).length} between its tokens, "
            f"in dimension {dim.index}. {_LATER}."
        )


def _padding(graph: DynamoGraph) -> Padding:
    assert graph.padding is not None
    return graph.padding


def _follows(size: Any, graph: DynamoGraph) -> bool:
    """Whether a number that Dynamo traced depends on the text's length."""
    return isinstance(size, SymInt | SymFloat) and _padding(graph).symbol in size.node.expr.free_symbols


def _flat(graph: fx.Graph) -> list[Any]:
    returned: Any = graph.output_node().args[0]
    return list(torch.utils._pytree.tree_leaves(returned))
