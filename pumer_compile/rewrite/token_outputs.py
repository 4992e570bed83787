"""Outputs with one entry for each token: refused, given as they are after reduction, or restored."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import fx

from ..analysis.axes import Dim, Fixed
from ..analysis.nodes import describe, values
from ..analysis.operators import aten
from ..analysis.outputs import output_nodes
from ..analysis.rules import shape
from ..errors import OutputsError
from ..reducers import AlignAxis, UnitWeights
from ..reducers.align import AlignMode
from .rewriter import Rewriter
from .unmerge import old_places


def reduced_dims(rewriter: Rewriter, node: fx.Node) -> list[Dim]:
    """The dimensions of a captured value that a reducer has shortened."""
    dims = [Dim(node, index) for index in range(len(shape(node)) if values(node) else 0)]
    return [dim for dim in dims if any(rewriter.epochs.at(dim).values())]


def check_outputs(rewriter: Rewriter) -> None:
    """Refuse outputs with one entry for each token of a reduced stream.

    Raises:
        OutputsError: there is one.
    """
    outputs = output_nodes(rewriter.source)
    token_level = {name: dims for name, node in outputs.items() if (dims := reduced_dims(rewriter, node))}
    if not token_level:
        return
    name, dims = next(iter(token_level.items()))
    kind = rewriter.annotation.axis(dims[0])
    streams = () if isinstance(kind, Fixed) else kind.streams
    others = [other for other in outputs if other not in token_level]
    keep = (
        f"Keep only the others (capture(..., outputs={others}), or --outputs {','.join(others)}), or say "
        if others
        else "Say "
    )
    raise OutputsError(
        f"The output {name}, {describe(outputs[name])}, has one entry for each token of {kind}, and "
        f"{', '.join(streams)} tokens are reduced: its entries would no longer be the model's. {keep}in the schedule "
        "what to give instead: `outputs: restored` (every position gets the token it was merged into) or `outputs: "
        "reduced` (one entry for each token that is left)."
    )


def restoring(captured: fx.GraphModule) -> dict[fx.Node, Callable[[Rewriter], fx.Node | None]]:
    """The replacement of the output node that restores what it returns."""
    return {captured.graph.output_node(): _restore}


def _restore(rewriter: Rewriter) -> fx.Node:
    """Each original position receives the token it was merged into; pruned ones get zeros, and `<name>.kept` says
    which positions those are not, `[batch, tokens]` bool."""
    named: dict[str, fx.Node] = {}
    flags: dict[str, fx.Node] = {}
    for position, (name, node) in enumerate(output_nodes(rewriter.source).items()):
        value = rewriter.env[node]
        for number, dim in enumerate(reduced_dims(rewriter, node)):
            segments, maps = old_places(rewriter, dim, rewriter.source.graph.output_node())
            scope = f"reducer.restore.output_{position}_{dim.index}"
            value = rewriter.call_module(f"{scope}.tokens", AlignAxis(dim.index, segments, _mode(node)), value, *maps)
            ones = rewriter.call_module(f"{scope}.ones", UnitWeights(sum(n for n, _ in segments)), maps[0])
            there = rewriter.call_module(f"{scope}.kept", AlignAxis(1, segments, "mean"), ones, *maps)
            flags[f"{name}.kept" + (f"_{dim.index}" if number else "")] = rewriter.call(aten.gt.Scalar, there, 0.5)
        named[name] = value
    named.update(flags)
    rewriter.name_outputs(list(named))
    result: fx.Node = rewriter.graph.output(tuple(named.values()))
    return result


def _mode(node: fx.Node) -> AlignMode:
    dtype = values(node)[0].dtype
    return "any" if dtype == torch.bool else "restore" if dtype.is_floating_point else "gather"
