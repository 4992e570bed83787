"""Align: values from before a reducer brought to the tokens after it, through the reducers' own maps."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..analysis.axes import Dim, Same, Tokens, same_size
from ..analysis.masks import alike_for_queries
from ..analysis.nodes import describe, values
from ..analysis.rules import aten, shape
from ..errors import AxisError, SiteError
from ..reducers import AlignAxis
from ..reducers.align import AlignMode
from .epochs import Epochs

if TYPE_CHECKING:
    from .rewriter import Rewriter


@dataclass
class Aligner:
    """Aligns the values of a walk, each once.

    Attributes:
        count: of the alignments inserted.
    """

    count: int = 0
    _aligned: dict[tuple[Any, ...], fx.Node] = field(default_factory=dict)
    _maps: dict[tuple[str, int, int], fx.Node] = field(default_factory=dict)

    def value(self, walk: Rewriter, node: fx.Node, source: fx.Node, targets: dict[int, Epochs]) -> fx.Node:
        """The newest value of `source`, brought to the target epochs of each dimension."""
        value = walk.env[source]
        rank = len(shape(source))
        if source in walk.sums:
            return self._sum(walk, node, source, targets)
        if rank > 2 and source in walk.masks and rank - 2 in targets and alike_for_queries(source):
            return self._alike(walk, node, source, targets)
        for index, target in sorted(targets.items()):
            key = (source, value, index, tuple(sorted(target.items())))
            if key not in self._aligned:
                self._aligned[key] = self._emit(walk, node, source, value, index, target)
            value = self._aligned[key]
        return value

    def _sum(self, walk: Rewriter, node: fx.Node, source: fx.Node, targets: dict[int, Epochs]) -> fx.Node:
        """A mask and a bias in one: each is aligned as what it is, and put together again."""
        key = (
            source,
            walk.env[source],
            "sum",
            *((i, *sorted(target.items())) for i, target in sorted(targets.items())),
        )
        if key not in self._aligned:
            inputs = {}
            for x in source.all_input_nodes:
                wanted = _input_targets(walk, source, x, targets)
                inputs[x] = self.value(walk, node, x, wanted) if wanted else walk.env[x]
            self._aligned[key] = walk.recomputed(source, inputs, targets)
        return self._aligned[key]

    def _alike(self, walk: Rewriter, node: fx.Node, source: fx.Node, targets: dict[int, Epochs]) -> fx.Node:
        """A mask whose rows are all the same: one row is aligned, and stretched over the queries that are left."""
        key = (
            source,
            walk.env[source],
            "alike",
            *((i, *sorted(target.items())) for i, target in sorted(targets.items())),
        )
        if key not in self._aligned:
            queries, rank = len(shape(source)) - 2, len(shape(source))
            value = walk.call(aten.slice.Tensor, walk.env[source], queries, 0, 1)
            for index, target in sorted(targets.items()):
                if index != queries:
                    value = self._emit(walk, node, source, value, index, target)
            changed = [s for s, epoch in targets[queries].items() if epoch]
            rows = walk.history.size(self.whole_streams(walk, Dim(source, queries), node, changed), targets[queries])
            self._aligned[key] = walk.call(
                aten.expand.default, value, [rows if index == queries else -1 for index in range(rank)]
            )
        return self._aligned[key]

    def _emit(
        self, walk: Rewriter, node: fx.Node, source: fx.Node, value: fx.Node, index: int, target: Epochs
    ) -> fx.Node:
        dim = Dim(source, index)
        have = walk.history.at(dim)
        kind = self.whole_streams(walk, dim, node, [s for s, epoch in target.items() if epoch != have.get(s, 0)])
        pieces, maps = [], []
        for segment in kind.segments:
            old, new = (e.get(segment.stream or "", 0) for e in (have, target))
            pieces.append((walk.history.length(segment, have), new != old))
            if new != old:
                maps.append(self._map(walk, segment.stream or "", old, new))
        mode = self._mode(walk, node, source, kind, have, target)
        self.count += 1
        module = AlignAxis(index, tuple(pieces), mode, fold=self._fold(walk, source) or 1)
        return walk.call_module(f"reducer.align.{source.name}_{self.count}", module, value, *maps)

    def whole_streams(self, walk: Rewriter, dim: Dim, node: fx.Node, streams: Collection[str]) -> Tokens:
        """The axis of a dimension that the maps of some streams can be applied to, for the use of `node`.

        Raises:
            AxisError: they are cut, the axis is flattened, or does not come after the batch.
        """
        source, kind = dim.node, walk.annotation.axis(dim)
        assert walk.batch is not None, "a reducer names the batch"
        whole = isinstance(kind, Tokens) and all(s.whole for s in kind.segments if s.stream in streams)
        if isinstance(kind, Tokens) and whole and dim.index > 0 and self._fold(walk, source) is not None:
            return kind
        raise AxisError(
            f"{describe(node)} needs {source.name} at the tokens after a reducer, but its axis {kind} "
            f"(dimension {dim.index} of {list(shape(source))}) cannot be aligned: every sample keeps other tokens, so "
            "it takes whole streams behind a dimension that is the batch or 1."
        )

    def _fold(self, walk: Rewriter, source: fx.Node) -> int | None:
        """How many rows of a value belong to each sample (heads folded into the batch, say); None where its first
        dimension is not the batch."""
        assert walk.batch is not None
        batch, first = shape(walk.batch.node)[walk.batch.index], Dim(source, 0)
        if same_size(shape(source)[0], 1) or same_size(batch, 1) or walk.annotation.same(first, walk.batch):
            return 1
        return walk.annotation.folded(first, walk.batch)

    def _mode(
        self, walk: Rewriter, node: fx.Node, source: fx.Node, kind: Tokens, have: Epochs, target: Epochs
    ) -> AlignMode:
        dtype = values(source)[0].dtype
        if dtype == torch.bool:
            # A merged token counts as real where any of its parts is.
            return "all" if walk.masks.get(source) == "drop" else "any"
        if dtype.is_floating_point:
            return "log_mean_exp" if walk.masks.get(source) == "additive" else "mean"
        merged = [
            s
            for s in kind.streams
            if any(step.merged for step in walk.history.lineage(s, target.get(s, 0), have.get(s, 0)))
        ]
        if merged:
            raise SiteError(
                f"{describe(node)} needs the integers of {source.name} for {merged[0]} tokens that were "
                "merged; integers of merged tokens have no mean. Prune there instead of merging, or move the "
                "site."
            )
        return "gather"

    def _map(self, walk: Rewriter, stream: str, old: int, new: int) -> fx.Node:
        """The map from one epoch of a stream to a later one, composed where it spans several reducers."""
        key = (stream, old, new)
        if key not in self._maps:
            first, *rest = walk.history.lineage(stream, new, old)
            composed = first.map
            for step in rest:
                composed = walk.call(aten.matmul.default, step.map, composed)
            self._maps[key] = composed
        return self._maps[key]


def _input_targets(walk: Rewriter, source: fx.Node, x: fx.Node, targets: dict[int, Epochs]) -> dict[int, Epochs]:
    """The epochs that the dimensions of an input need, for those of what is computed from it to be at given ones."""
    found: dict[int, Epochs] = {}
    for constraint in walk.annotation.constraints.get(source, []):
        if isinstance(constraint, Same):
            for mine, other in ((constraint.a, constraint.b), (constraint.b, constraint.a)):
                if mine.node is source and mine.index in targets and other.node is x:
                    found[other.index] = targets[mine.index]
    return {index: target for index, target in found.items() if walk.history.behind(Dim(x, index), target)}
