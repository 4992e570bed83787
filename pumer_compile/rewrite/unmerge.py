"""Un-merge: values from after a reducer brought back to the places before it, for what goes by these places.

A grid of patches that is convolved, boxes that are counted from where a patch stands, a slice without the class token:
each needs a token for every old place. Where tokens were merged and none was pruned, every old place has one, the token
that its own went into; a product with the reducers' one-hot maps, `[batch, before, after]`, puts it there.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from torch import fx

from ..analysis.axes import ByPosition, Causal, Constraint, Dim, Reshape, Select, Slice
from ..analysis.nodes import values
from ..analysis.operators import aten
from ..reducers import AlignAxis
from ..reducers.align import AlignMode

if TYPE_CHECKING:
    from .rewriter import Rewriter


@dataclass
class Unmerger:
    """Brings the values of a rewriter back to their old places, each once.

    Attributes:
        count: of the values that were brought back.
    """

    count: int = 0
    _brought: dict[tuple[fx.Node, fx.Node, int], fx.Node] = field(default_factory=dict)

    def wanted(self, rewriter: Rewriter, constraints: list[Constraint]) -> dict[fx.Node, list[int]]:
        """The inputs of an operator, and their dimensions, that must be at their old places and can be."""
        found: dict[fx.Node, list[int]] = {}
        for dim in (dim for constraint in constraints for dim in by_position(rewriter, constraint)):
            streams = [stream for stream, epoch in rewriter.epochs.at(dim).items() if epoch]
            known = dim.index in found.get(dim.node, ()) or len(values(dim.node)) != 1
            if known or pruned(rewriter, dim) or not rewriter.aligner.takes_maps(rewriter, dim, streams):
                continue
            found.setdefault(dim.node, []).append(dim.index)
        return found

    def value(self, rewriter: Rewriter, node: fx.Node, source: fx.Node, dims: list[int]) -> fx.Node:
        """The newest value of `source` for the use of `node`, some of its dimensions at their old places."""
        value = rewriter.env[source]
        for index in dims:
            key = (source, value, index)
            if key not in self._brought:
                segments, maps = old_places(rewriter, Dim(source, index), node)
                self.count += 1
                fold = rewriter.aligner.fold(rewriter, source) or 1
                module = AlignAxis(index, segments, _mode(rewriter, source), fold)
                name = f"reducer.unmerge.{source.name}_{self.count}"
                self._brought[key] = rewriter.call_module(name, module, value, *maps)
            value = self._brought[key]
        return value


def by_position(rewriter: Rewriter, constraint: Constraint) -> tuple[Dim, ...]:
    """The dimensions that an operator takes by position, and that a reducer has changed so that it cannot."""
    at = rewriter.epochs.at
    match constraint:
        case ByPosition(source) if at(source):
            return (source,)
        case Causal(source) if not all(rewriter.in_order(source, stream) for stream in at(source)):
            return (source,)
        case Select(source, index) if at(source) and rewriter.moved_to(source, index, first_token=True) is None:
            return (source,)
        case Slice(source, result, start, stop) if at(source) and not rewriter.first_token(source, start, stop):
            ends = [rewriter.moved_to(source, position) for position in (start, stop)]
            return (source,) if None in ends or any(rewriter.cut(result, s) for s, e in at(source).items() if e) else ()
        case Reshape(sources, results):
            changed = {stream for source in sources for stream, epoch in at(source).items() if epoch}
            lost = {stream for stream in changed if rewriter.holder(results, stream) is None}
            return tuple(source for source in sources if any(at(source).get(stream) for stream in lost))
        case _:
            return ()


def pruned(rewriter: Rewriter, dim: Dim) -> bool:
    """Whether tokens were pruned of a dimension, which leaves old places without one."""
    return not all(
        step.covers
        for stream, epoch in rewriter.epochs.at(dim).items()
        for step in rewriter.epochs.lineage(stream, epoch)
    )


def why_not(rewriter: Rewriter, *dims: Dim) -> str:
    """A sentence for the error where tokens are taken by position and cannot be brought back; '' where none helps."""
    if not any(pruned(rewriter, dim) for dim in dims):
        return ""
    return (
        " Tokens that are merged alone are brought back to their old places; those that were pruned have none, so "
        "merging without `prune` is another way."
    )


def old_places(rewriter: Rewriter, dim: Dim, node: fx.Node) -> tuple[tuple[tuple[int, bool], ...], list[fx.Node]]:
    """What brings a dimension back to its old places: lengths of the reduced segments and whether each was reduced; and
    for each that was, the token of every old place, `[batch, before, after]`.

    Args:
        rewriter: of the reduced graph.
        dim: captured.
        node: that needs it, for messages.

    Raises:
        AxisError: the axis is cut or flattened, or does not come after the batch.
    """
    epochs = rewriter.epochs.at(dim)
    kind = rewriter.aligner.whole_streams(rewriter, dim, node, [s for s, epoch in epochs.items() if epoch])
    segments, maps = [], []
    for segment in kind.segments:
        stream = segment.stream or ""
        steps = rewriter.epochs.lineage(stream, epochs.get(stream, 0))
        segments.append((rewriter.epochs.length(segment, epochs), bool(steps)))
        if steps:
            assigned = steps[0].assigned
            for step in steps[1:]:
                assigned = rewriter.call(aten.matmul.default, step.assigned, assigned)
            maps.append(rewriter.call(aten.transpose.int, assigned, 1, 2))
    return tuple(segments), maps


def _mode(rewriter: Rewriter, source: fx.Node) -> AlignMode:
    dtype = values(source)[0].dtype
    if dtype == torch.bool:
        return "any"
    if not dtype.is_floating_point and not dtype.is_complex:
        return "gather"
    # Features are finite; a product would make NaN of what a mask hides.
    return "restore" if source in rewriter.masks or source in rewriter.sums else "mean"
