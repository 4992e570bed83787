"""The one inserter: the reducers of a site, after its carrier or in place of its marks, whatever the method."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import TYPE_CHECKING

from torch import fx

from ..analysis.axes import Dim, Tokens
from ..analysis.marks import Mark
from ..analysis.nodes import describe
from ..analysis.operators import aten
from ..analysis.rules import shape
from ..errors import LocateError
from ..plan import SitePlan
from ..reducers import ApplyMap, Reducer, Reduction, Signal, WithSeparators
from . import sink_projections
from .carried_weights import CarriedWeights
from .epochs import Epochs, Step
from .rewriter import Rewriter
from .signals import Place, has_class_token, read_signal
from .sites import Action, LocatedGraph, Site, Stream

if TYPE_CHECKING:
    from ..methods.base import Method


class InsertReducer:
    """Inserts the reducers of one site: token axis, plan, signals, call, join, step.

    Args:
        method: whose reducers.
        graph: captured.
        site: where.
        carried: weights of all streams, shared by the sites.
    """

    def __init__(self, method: Method, graph: LocatedGraph, site: Site, carried: CarriedWeights) -> None:
        self.method, self.graph, self.site, self.carried = method, graph, site, carried
        self.applied = ApplyMap()
        self.read: dict[str, fx.Node] = {}

    def after(self) -> dict[fx.Node, Action]:
        """What follows a captured node: the carrier gives way to the reduced one."""
        return {} if self.site.after is None else {self.site.after: self._carrier}

    def instead(self) -> dict[fx.Node, Action]:
        """What takes the place of captured nodes: of marks, and of separators between their tokens."""
        found: dict[fx.Node, Action] = {}
        for mark in self.site.instead:
            found[mark.node] = partial(self._mark, mark)
            if mark.separated is not None:
                found[mark.separated] = partial(_drop_separators, mark)
        return found

    # --- after a carrier ----------------------------------------------------------------------------------------------

    def _carrier(self, rewriter: Rewriter) -> fx.Node | None:
        attention, carrier = self.site.attention, self.site.after
        assert attention is not None and carrier is not None
        dim, axis = self._token_dim(rewriter, carrier)
        place = self._place(rewriter, Dim(carrier, dim))
        rewriter.follow_batch(Dim(carrier, 1 - dim))
        made = self._made(place, self._streams(place))
        if not made:
            return None
        reducers = {s: reducer for s, reducer in made.items() if s in axis.streams}
        signals = {s: self._signals(place, s, reducer) for s, reducer in made.items()}
        linears = self._postponed(rewriter, dim, {s: r.tokens_after for s, r in reducers.items()})
        parts = [] if linears else self._parts(rewriter, rewriter.env[carrier], dim)
        of_stream = dict(parts)
        results = {s: self._call(rewriter, s, r, of_stream.get(s), signals[s]) for s, r in made.items()}
        if linears:
            maps = {s: rewriter.field(results[s], Reduction, "map") for s in reducers}
            new = sink_projections.reduced_sum(
                rewriter, carrier, linears, lambda x: self._mapped(rewriter, x, dim, maps)
            )
        else:
            reduced = {s: rewriter.field(results[s], Reduction, "tokens") for s in reducers}
            new = self._joined(rewriter, [reduced.get(name, part) for name, part in parts], dim)
        epochs = {s: self._step(place, s, made[s], results[s], signals[s]) for s in made}
        rewriter.epochs.bump(Dim(carrier, dim), {s: epoch for s, epoch in epochs.items() if s in axis.streams})
        if attention.cross_modal:
            for stream, epoch in epochs.items():
                rewriter.reduce_later_uses(attention.context, stream, place.epoch(stream), epoch)
        return new

    def _postponed(self, rewriter: Rewriter, dim: int, after: dict[str, int]) -> dict[fx.Node, fx.Node]:
        """See `sink_projections`; what stands between two layers is read whole, to compute ahead."""
        carrier = self.site.after
        assert carrier is not None
        if self.site.enters:
            return {}
        return sink_projections.projections(rewriter, carrier, dim, after)

    def _token_dim(self, rewriter: Rewriter, carrier: fx.Node) -> tuple[int, Tokens]:
        axes = rewriter.annotation.axes(carrier)
        dims = [(i, a) for i, a in enumerate(axes) if isinstance(a, Tokens)]
        if len(axes) != 3 or len(dims) != 1 or dims[0][0] > 1:
            raise LocateError(
                f"The carrier of {self.site.described}, {describe(carrier)}, has axes "
                f"({', '.join(map(str, axes))}); expected [batch, tokens, width] or [tokens, batch, width]."
            )
        return dims[0]

    def _parts(self, rewriter: Rewriter, value: fx.Node, dim: int) -> list[tuple[str, fx.Node]]:
        """A value with the carrier's tokens by stream, batch first."""
        assert self.site.after is not None
        parts = rewriter.pieces(self.site.after, dim, value)
        if dim == 0:
            # A tower that runs with its tokens in front; reducers take the batch there.
            parts = [(name, rewriter.call(aten.transpose.int, part, 0, 1)) for name, part in parts]
        return parts

    def _joined(self, rewriter: Rewriter, parts: list[fx.Node], dim: int) -> fx.Node:
        """What `_parts` parted."""
        if dim == 0:
            parts = [rewriter.call(aten.contiguous.default, rewriter.call(aten.transpose.int, x, 0, 1)) for x in parts]
        return rewriter.call(aten.cat.default, parts, dim) if len(parts) > 1 else parts[0]

    def _mapped(self, rewriter: Rewriter, value: fx.Node, dim: int, maps: dict[str, fx.Node]) -> fx.Node:
        """A value with the carrier's tokens, reduced by the maps of some streams."""
        parts = []
        for stream, part in self._parts(rewriter, value, dim):
            name = f"reducer.{self.site.name}.{stream}_map"
            map_ = maps.get(stream)
            parts.append(part if map_ is None else rewriter.call_module(name, self.applied, part, map_))
        return self._joined(rewriter, parts, dim)

    def _streams(self, place: Place) -> list[Stream]:
        attention, annotation = place.attention, self.graph.annotation
        axes = (attention.query_axis, attention.key_axis)
        segments = {s.stream: s for axis in axes for s in axis.segments if s.stream}
        return [
            Stream(
                stream,
                annotation.modality[stream],
                place.rewriter.epochs.length(segments[stream], place.epochs),
                annotation.learned[stream],
                pinned=self.graph.pinned(stream),
            )
            for stream in self.site.streams
        ]

    # --- in place of a mark -------------------------------------------------------------------------------------------

    def _mark(self, mark: Mark, rewriter: Rewriter) -> fx.Node | None:
        (tokens,) = mark.node.all_input_nodes
        dim = Dim(mark.node, 1)
        place = dataclasses.replace(self._place(rewriter, dim), mark=mark)
        rewriter.follow_batch(Dim(mark.node, 0))
        name, annotation = _only_stream(rewriter, mark.node), self.graph.annotation
        count = sum(map(len, mark.crops)) + len(mark.pinned)
        row = max(map(len, mark.crops)) if mark.enters else int(shape(mark.features)[1])
        attention = self.site.attention
        class_token = attention is not None and has_class_token(self.graph, attention, mark)
        modality, learned = annotation.modality[name], annotation.learned[name]
        stream = Stream(
            name,
            modality,
            count,
            learned,
            mark.crops,
            row,
            mark.pinned,
            class_token,
            by_class=class_token if mark.votes is None else mark.votes.by_class,
            early=mark.early,
        )
        made = self._made(place, [stream])
        if not made:
            return None
        reducer = made[name]
        signals = self._signals(place, name, reducer)
        result = self._call(rewriter, name, reducer, rewriter.env[tokens], signals)
        rewriter.epochs.bump(dim, {name: self._step(place, name, reducer, result, signals)})
        return rewriter.field(result, Reduction, "tokens")

    # --- both ---------------------------------------------------------------------------------------------------------

    def _place(self, rewriter: Rewriter, dim: Dim) -> Place:
        keys = self.site.epoch_dim
        epochs: Epochs = {**(rewriter.epochs.at(keys) if keys else {}), **rewriter.epochs.at(dim)}
        return Place(rewriter, self.graph, self.site, epochs, self.carried, read=self.read)

    def _made(self, place: Place, streams: Sequence[Stream]) -> dict[str, Reducer]:
        """The reducers of some streams, entered into the plan of the site."""
        site, table = self.site, place.rewriter.epochs
        names = site.streams or [stream.name for stream in streams]
        site.passed = {self.graph.modality(s): len(table.lineage(s, place.epoch(s))) for s in names}
        made = self.method.reducers(site, streams)
        if not made:
            return {}
        site.reducers.update(made)
        before = {s.name: s.tokens for s in streams}
        counts = {s: (r.tokens_after, r.tokens - r.keep, r.merge) for s, r in made.items()}
        after, pruned, merged = ({s: counts.get(s, (n, 0, 0))[i] for s, n in before.items()} for i in range(3))
        plan = site.plan or SitePlan(site.address, site.module, {}, {}, {}, {}, call=site.call)
        site.plan = dataclasses.replace(
            plan,
            before={**plan.before, **before},
            after={**plan.after, **after},
            pruned={**plan.pruned, **pruned},
            merged={**plan.merged, **merged},
        )
        return made

    @staticmethod
    def _signals(place: Place, stream: str, reducer: Reducer) -> dict[Signal, fx.Node | None]:
        return {signal: read_signal(signal, place, stream) for signal in reducer.reads}

    def _call(
        self,
        rewriter: Rewriter,
        stream: str,
        reducer: Reducer,
        tokens: fx.Node | None,
        signals: dict[Signal, fx.Node | None],
    ) -> fx.Node:
        name = f"reducer.{self.site.name}.{stream}"
        return rewriter.call_module(name, reducer, tokens, *signals.values())

    def _step(
        self, place: Place, stream: str, reducer: Reducer, result: fx.Node, signals: dict[Signal, fx.Node | None]
    ) -> int:
        """Enter a reducer into the table of epochs; gives the epoch it makes."""
        rewriter = place.rewriter
        map_, assigned = (rewriter.field(result, Reduction, name) for name in ("map", "assigned"))
        merged, in_order = reducer.merge > 0, reducer.keeps_order and not reducer.merge
        stands = rewriter.field(result, Reduction, "place") if reducer.tells_place else None
        parent, after = place.epoch(stream), reducer.tokens_after
        anew = self.site.recounts
        covers = not reducer.prunes
        step = Step(parent, map_, assigned, after, merged, reducer.first_stays, in_order, stands, anew, covers)
        epoch = rewriter.epochs.add_step(stream, step)
        # Means of ones are ones, and need not be carried.
        if signals.get(Signal.WEIGHTS) is not None or reducer.carried == "sum":
            self.carried.keep(stream, epoch, rewriter.field(result, Reduction, "weights"))
        return epoch


def _drop_separators(mark: Mark, rewriter: Rewriter) -> fx.Node:
    """Leave out the separators between image tokens, as the published code does: its budget is of image tokens."""
    separated = mark.separated
    assert separated is not None
    image = separated.args[0]
    assert isinstance(image, fx.Node)
    inner, outer = (_only_stream(rewriter, node) for node in (mark.node, separated))
    (step,) = rewriter.epochs.steps[inner]
    separators = WithSeparators(mark.origin)
    map_ = rewriter.call_module(f"reducer.separators.{outer}", separators, step.map)
    assigned, stands = map_, None
    if step.place is not None:
        assigned = rewriter.call_module(f"reducer.separators.{outer}_assigned", separators, step.assigned)
        stands = rewriter.call_module(f"reducer.separators.{outer}_place", separators, step.place)
    dropped = Step(0, map_, assigned, step.after, step.merged, False, step.in_order, stands)
    epoch = rewriter.epochs.add_step(outer, dropped)
    rewriter.epochs.bump(Dim(separated, 1), {outer: epoch})
    return rewriter.env[image]


def _only_stream(rewriter: Rewriter, node: fx.Node) -> str:
    """The stream whose tokens are dimension 1 of a mark."""
    axis = rewriter.annotation.axis(Dim(node, 1))
    assert isinstance(axis, Tokens)
    (segment,) = axis.segments
    return str(segment.stream)
