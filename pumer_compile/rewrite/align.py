"""Align: values from before a reducer brought to the tokens after it, through the reducers' own maps."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import fx

from ..analysis.annotate import Annotation
from ..analysis.axes import Dim, Same, Tokens, same_size
from ..analysis.masks import broadcast_over_queries
from ..analysis.nodes import ancestors, content_inputs, describe, values
from ..analysis.operators import aten
from ..analysis.rules import shape
from ..errors import AxisError, SiteError
from ..reducers import AlignAxis
from ..reducers.align import AlignMode
from .epochs import Epochs

if TYPE_CHECKING:
    from .rewriter import Rewriter


@dataclass
class Aligner:
    """Aligns the values of a rewriter, each once.

    Attributes:
        count: of the alignments inserted.
    """

    count: int = 0
    _aligned: dict[tuple[Any, ...], fx.Node] = field(default_factory=dict)
    _maps: dict[tuple[str, int, int, bool], fx.Node] = field(default_factory=dict)
    _places: frozenset[fx.Node] | None = None

    def value(self, rewriter: Rewriter, node: fx.Node, source: fx.Node, targets: dict[int, Epochs]) -> fx.Node:
        """The newest value of `source`, brought to the target epochs of each dimension."""
        value = rewriter.env[source]
        rank = len(shape(source))
        if source in rewriter.sums:
            return self._sum(rewriter, node, source, targets)
        if rank > 2 and source in rewriter.masks and rank - 2 in targets and broadcast_over_queries(source):
            return self._alike(rewriter, node, source, targets)
        for index, target in sorted(targets.items()):
            key = (source, value, index, tuple(sorted(target.items())))
            if key not in self._aligned:
                self._aligned[key] = self._emit(rewriter, node, source, value, index, target)
            value = self._aligned[key]
        return value

    def _sum(self, rewriter: Rewriter, node: fx.Node, source: fx.Node, targets: dict[int, Epochs]) -> fx.Node:
        """A mask and a bias in one: each is aligned as what it is, and put together again."""
        key = (
            source,
            rewriter.env[source],
            "sum",
            *((i, *sorted(target.items())) for i, target in sorted(targets.items())),
        )
        if key not in self._aligned:
            inputs = {}
            for x in source.all_input_nodes:
                wanted = _input_targets(rewriter, source, x, targets)
                inputs[x] = self.value(rewriter, node, x, wanted) if wanted else rewriter.env[x]
            self._aligned[key] = rewriter.recomputed(source, inputs, targets)
        return self._aligned[key]

    def _alike(self, rewriter: Rewriter, node: fx.Node, source: fx.Node, targets: dict[int, Epochs]) -> fx.Node:
        """A mask whose rows are all the same: one row is aligned, and stretched over the queries that are left."""
        key = (
            source,
            rewriter.env[source],
            "alike",
            *((i, *sorted(target.items())) for i, target in sorted(targets.items())),
        )
        if key not in self._aligned:
            queries, rank = len(shape(source)) - 2, len(shape(source))
            value = rewriter.call(aten.slice.Tensor, rewriter.env[source], queries, 0, 1)
            for index, target in sorted(targets.items()):
                if index != queries:
                    value = self._emit(rewriter, node, source, value, index, target)
            changed = [s for s, epoch in targets[queries].items() if epoch]
            rows = rewriter.epochs.size(
                self.whole_streams(rewriter, Dim(source, queries), node, changed), targets[queries]
            )
            self._aligned[key] = rewriter.call(
                aten.expand.default, value, [rows if index == queries else -1 for index in range(rank)]
            )
        return self._aligned[key]

    def _emit(
        self, rewriter: Rewriter, node: fx.Node, source: fx.Node, value: fx.Node, index: int, target: Epochs
    ) -> fx.Node:
        dim = Dim(source, index)
        have = rewriter.epochs.at(dim)
        anew = self._counted_anew(rewriter, dim, have, target)
        if anew != have:  # the first places, whichever tokens were left there
            size = rewriter.epochs.size(rewriter.annotation.axis(dim), anew)
            value, have = rewriter.call(aten.slice.Tensor, value, index, 0, size), anew
            if all(have.get(s, 0) == target.get(s, 0) for s in rewriter.epochs.streams(dim)):
                return value
        kind = self.whole_streams(rewriter, dim, node, [s for s, epoch in target.items() if epoch != have.get(s, 0)])
        mode = self._mode(rewriter, node, source, kind, have, target)
        where = not _of_data(source)
        segments, maps = [], []
        for segment in kind.segments:
            old, new = (e.get(segment.stream or "", 0) for e in (have, target))
            segments.append((rewriter.epochs.length(segment, have), new != old))
            if new != old:
                maps.append(self._map(rewriter, segment.stream or "", old, new, where))
        self.count += 1
        module = AlignAxis(index, tuple(segments), mode, fold=self.fold(rewriter, source) or 1)
        return rewriter.call_module(f"reducer.align.{source.name}_{self.count}", module, value, *maps)

    def _counted_anew(self, rewriter: Rewriter, dim: Dim, have: Epochs, target: Epochs) -> Epochs:
        """The epochs of the last reducers on the way that count positions anew, for what is computed from a count of
        places alone; else those that it has."""
        lineage = {s: rewriter.epochs.lineage(s, e, have.get(s, 0)) for s, e in target.items() if e}
        if not any(step.recounts for steps in lineage.values() for step in steps):
            return have
        if self._places is None:
            self._places = computed_from_places(rewriter.annotation)
        if dim.node not in self._places:
            return have
        found = dict(have)
        for stream, steps in lineage.items():
            last = max((i for i, step in enumerate(steps) if step.recounts), default=-1)
            if last >= 0:
                following = steps[last + 1].parent if last + 1 < len(steps) else target[stream]
                found[stream] = following
        return found

    def whole_streams(self, rewriter: Rewriter, dim: Dim, node: fx.Node, streams: Collection[str]) -> Tokens:
        """The axis of a dimension that the maps of some streams can be applied to, for the use of `node`.

        Raises:
            AxisError: they are cut, the axis is flattened, or does not come after the batch.
        """
        source, kind = dim.node, rewriter.annotation.axis(dim)
        if isinstance(kind, Tokens) and self.takes_maps(rewriter, dim, streams):
            return kind
        raise AxisError(
            f"{describe(node)} needs {source.name} at the tokens after a reducer, but its axis {kind} "
            f"(dimension {dim.index} of {list(shape(source))}) cannot be aligned: every sample keeps other tokens, so "
            "it takes whole streams behind a dimension that is the batch or 1."
        )

    def takes_maps(self, rewriter: Rewriter, dim: Dim, streams: Collection[str]) -> bool:
        """Whether the maps of some streams can be applied to a dimension: it has them whole, and comes after the
        batch."""
        assert rewriter.batch is not None, "a reducer names the batch"
        kind = rewriter.annotation.axis(dim)
        whole = isinstance(kind, Tokens) and all(s.whole for s in kind.segments if s.stream in streams)
        return whole and dim.index > 0 and self.fold(rewriter, dim.node) is not None

    def fold(self, rewriter: Rewriter, source: fx.Node) -> int | None:
        """How many rows of a value belong to each sample (heads folded into the batch, say); None where its first
        dimension is not the batch."""
        assert rewriter.batch is not None
        batch, first = shape(rewriter.batch.node)[rewriter.batch.index], Dim(source, 0)
        if same_size(shape(source)[0], 1) or same_size(batch, 1) or rewriter.annotation.same(first, rewriter.batch):
            return 1
        return rewriter.annotation.folded(first, rewriter.batch)

    def _mode(
        self, rewriter: Rewriter, node: fx.Node, source: fx.Node, kind: Tokens, have: Epochs, target: Epochs
    ) -> AlignMode:
        dtype = values(source)[0].dtype
        if dtype == torch.bool:
            # A merged token counts as real where any of its parts is.
            return "all" if rewriter.masks.get(source) == "drop" else "any"
        if dtype.is_floating_point:
            return "log_mean_exp" if rewriter.masks.get(source) == "additive" else "mean"
        lineages = {s: rewriter.epochs.lineage(s, target.get(s, 0), have.get(s, 0)) for s in kind.streams}
        merged = [s for s, steps in lineages.items() if any(step.merged and step.place is None for step in steps)]
        if merged:
            raise SiteError(
                f"{describe(node)} needs the integers of {source.name} for {merged[0]} tokens that were "
                "merged; integers of merged tokens have no mean. Prune there instead of merging, or move the "
                "site."
            )
        return "gather"

    def _map(self, rewriter: Rewriter, stream: str, old: int, new: int, where: bool = False) -> fx.Node:
        """The map from one epoch of a stream to a later one, composed where it spans several reducers; of what says
        `where` tokens stand, and so who sees whom, that of their places, where a reducer tells these."""
        steps = rewriter.epochs.lineage(stream, new, old)
        where = where and any(step.place is not None for step in steps)
        key = (stream, old, new, where)
        if key not in self._maps:
            composed, *rest = [step.place if where and step.place is not None else step.map for step in steps]
            for map_ in rest:
                composed = rewriter.call(aten.matmul.default, map_, composed)
            self._maps[key] = composed
        return self._maps[key]


def _of_data(source: fx.Node) -> bool:
    """Whether a value is computed from floating-point inputs (pixels, say), and is no position and no mask of those."""
    before = ancestors(source) | {source}
    return any(n.op == "placeholder" and any(v.is_floating_point() for v in values(n)) for n in before)


def computed_from_places(annotation: Annotation) -> frozenset[fx.Node]:
    """What is computed from counts of places and nothing that is given: the same whatever tokens stand there, such as
    rotary angles."""
    found, constant = set[fx.Node](), set[fx.Node]()
    for node in next(iter(annotation.constraints)).graph.nodes:
        content = content_inputs(node)
        if node.target is aten.arange.default and isinstance(annotation.axis(Dim(node, 0)), Tokens):
            found.add(node)
        elif node.op in ("get_attr", "call_function") and all(x in found or x in constant for x in content):
            (constant if found.isdisjoint(content) else found).add(node)
    return frozenset(found)


def _input_targets(rewriter: Rewriter, source: fx.Node, x: fx.Node, targets: dict[int, Epochs]) -> dict[int, Epochs]:
    """The epochs that the dimensions of an input need, for those of what is computed from it to be at given ones."""
    found: dict[int, Epochs] = {}
    for constraint in rewriter.annotation.constraints.get(source, []):
        if isinstance(constraint, Same):
            for mine, other in ((constraint.a, constraint.b), (constraint.b, constraint.a)):
                if mine.node is source and mine.index in targets and other.node is x:
                    found[other.index] = targets[mine.index]
    return {index: target for index, target in found.items() if rewriter.epochs.behind(Dim(x, index), target)}
