"""What the rewriting walk emits at sites and attentions: reducers, the published softmax, sizes of merged tokens."""

from __future__ import annotations

import logging
from collections.abc import Callable

import torch
from torch import fx

from ..errors import LocateError
from ..plan import SitePlan, published_stands_still, stream_counts
from ..reducers import ApplyMap, PublishedMaskedSoftmax, SizeBias, StreamReducer, TokenWeights, UnitWeights
from ..reducers.vispruner import VisPruner
from . import postpone
from .attention_rows import attention_rows, for_each_query_head
from .axes import Dim, Tokens
from .graph import ancestors, describe, values
from .history import Epochs, Step
from .insert import Insertions, SiteInsertion, make_reducer
from .last_query import KeepForLastQuery
from .locate import NOT_KNOWN, Attention
from .rewrite import Rewriter
from .rules import aten, shape
from .visual import DropSeparators, SelectVisual, counted_anew

log = logging.getLogger("pumer_compile")

# Fields of `Reduction`.
TOKENS, WEIGHTS, MAP, KEPT, SOURCE, TARGET, ASSIGNED = range(7)


def actions_after(insertions: Insertions) -> dict[fx.Node, Callable[[Rewriter], None]]:
    """Actions by the captured node they follow."""
    found: dict[fx.Node, Callable[[Rewriter], None]] = {}
    for site in insertions.sites:
        if site.marks:
            continue
        assert site.attention.carrier is not None
        emitter = KeepForLastQuery if site.images else _Reduce
        found[site.attention.carrier] = emitter(insertions, site)
    return found


def actions_instead(insertions: Insertions) -> dict[fx.Node, Callable[[Rewriter], fx.Node | None]]:
    """Replacements by captured node."""
    found: dict[fx.Node, Callable[[Rewriter], fx.Node | None]] = {}
    for attention in insertions.softmaxes:
        found[attention.probabilities or attention.context] = _PublishedSoftmax(insertions, attention)
    for site in insertions.sites:
        for mark in site.marks:
            found[mark.node] = SelectVisual(insertions, site, mark)
            if mark.separated is not None:
                found[mark.separated] = DropSeparators(mark)
    if insertions.schedule.method == "vispruner":
        found |= counted_anew(insertions)
    if insertions.schedule.method == "tome":
        for attention in insertions.attentions:
            found[attention.probabilities or attention.context] = _ProportionalAttention(insertions, attention)
    return found


class _Emitter:
    """What the insertions share: the carried weights of a stream."""

    def __init__(self, insertions: Insertions, attention: Attention) -> None:
        self.insertions, self.attention = insertions, attention

    def ones(self, walk: Rewriter, length: int, like: fx.Node) -> fx.Node:
        """Weights of 1."""
        module = self.insertions.ones.setdefault(length, UnitWeights(length))
        return walk.call_module(f"reducer.ones.{length}", module, like)

    def weights(self, walk: Rewriter, stream: str, epoch: int, readers: list[Attention]) -> fx.Node | None:
        """Carried weights of a stream: those its last reducer gave, or else read from the first mask over it that
        `readers` have; None without a mask."""
        known = self.insertions.weights.get((stream, epoch))
        if known is not None or epoch > 0:
            return known
        for reader in readers:
            found = self._from_mask(walk, stream, reader)
            if found is not None:
                self.insertions.weights[stream, epoch] = found
                return found
        return None

    def _from_mask(self, walk: Rewriter, stream: str, reader: Attention) -> fx.Node | None:
        if NOT_KNOWN in reader.unusual and stream in reader.key_axis.streams:
            raise LocateError(
                f"Whether the attention {reader.described} hides padding cannot be told, because {reader.unusual}. "
                "Hide keys with a boolean mask (masked_fill, where), or add 0 and -inf; or use semantics `paper`, "
                "which knows no padding."
            )
        covering = [m for m in reader.masks if m.of_input and stream in _key_streams(walk, m.node)]
        if not covering:
            return None
        if len(covering) > 1:
            raise LocateError(
                f"The attention {reader.described} adds several masks ({', '.join(m.node.name for m in covering)}); "
                "which of them marks padding cannot be told. Join them into one before the attention."
            )
        (mask,) = covering
        rank = len(shape(mask.node))
        if rank != 4:
            raise LocateError(f"The mask of {describe(reader.context)} has {rank} dimensions, not 4.")
        axis, epochs = walk.annotation.axis(Dim(mask.node, 3)), walk.history.at(Dim(mask.node, 3))
        if mask.node not in walk.env or epochs.get(stream, 0) or not isinstance(axis, Tokens):
            return None
        # Other streams of this mask may be reduced already.
        start, stop = walk.history.span(axis, stream, epochs)
        name = f"reducer.weights.{stream}"
        return walk.call_module(name, TokenWeights(start, stop - start, mask.kind), walk.env[mask.node])


def _key_streams(walk: Rewriter, mask: fx.Node) -> tuple[str, ...]:
    """The streams along the last dimension of a mask."""
    axis = walk.annotation.axis(Dim(mask, len(shape(mask)) - 1))
    return axis.streams if isinstance(axis, Tokens) else ()


class _PublishedSoftmax(_Emitter):
    """Emits the published masked softmax in place of a softmax (or of a fused attention)."""

    def __call__(self, walk: Rewriter) -> fx.Node:
        attention = self.attention
        self._check()
        dim = attention.key_dim
        epochs = walk.history.at(dim)
        weights = {
            s.stream: self._weights(walk, s.stream, epochs.get(s.stream, 0))
            for s in attention.key_axis.segments
            if s.stream
        }
        present = []
        if any(weights.values()):
            # A stream without a mask, or learned tokens of no stream, are all real.
            like = walk.env[attention.query]
            for segment in attention.key_axis.segments:
                known = weights.get(segment.stream or "")
                present.append(known or self.ones(walk, walk.history.length(segment, epochs), like))
        module = PublishedMaskedSoftmax()
        name = f"published_softmax.{attention.name}"
        if not attention.fused:
            assert attention.scores is not None and attention.probabilities is not None
            walk.history.adopt_epochs(attention.probabilities, attention.scores)
            scores = walk.env[attention.scores]
        else:
            scores = scaled_scores(walk, attention)
        for bias in attention.biases:
            scores = walk.call(aten.add.Tensor, scores, self._aligned(walk, bias))
        exact = walk.call_module(name, module, scores, *present)
        # A reducer decides by what the softmax gives before it is rounded to the model's dtype.
        walk.probabilities[attention.context] = exact
        dtype = values(attention.query)[0].dtype
        probabilities = exact if dtype == torch.float32 else walk.call(aten.to.dtype, exact, dtype)
        if not attention.fused:
            return probabilities
        value = attention.context.args[2]
        assert isinstance(value, fx.Node)
        walk.history.adopt_epochs(attention.context, attention.query)
        return walk.call(aten.matmul.default, probabilities, for_each_query_head(walk, attention, value))

    def _aligned(self, walk: Rewriter, bias: fx.Node) -> fx.Node:
        """A bias at the epochs of queries and keys."""
        attention, rank, targets = self.attention, len(shape(bias)), dict[int, Epochs]()
        for index, dim in ((rank - 2, attention.query_dim), (rank - 1, attention.key_dim)):
            epochs = walk.history.at(dim)
            if index >= 0 and walk.history.behind(Dim(bias, index), epochs):
                targets[index] = epochs
        return walk.aligner.value(walk, attention.context, bias, targets)

    def _check(self) -> None:
        attention = self.attention
        by_query = [mask.node.name for mask in attention.masks if mask.by_query]
        why = attention.unusual or (f"its mask {by_query[0]} differs from query to query" if by_query else "")
        if why:
            raise LocateError(
                f"The attention {attention.described} cannot have the published softmax, because {why}. Use semantics "
                "`paper` or `safe`."
            )
        if len(shape(attention.query)) != 4:
            raise LocateError(
                f"The attention {attention.described} has queries of shape {list(shape(attention.query))}; the "
                "published softmax needs [batch, heads, tokens, head size]. Use semantics `paper` or `safe`."
            )

    def _weights(self, walk: Rewriter, stream: str, epoch: int) -> fx.Node | None:
        masked = any(stream in _key_streams(walk, mask.node) for mask in self.attention.masks)
        return self.weights(walk, stream, epoch, [self.attention]) if masked or epoch > 0 else None


def scaled_scores(walk: Rewriter, attention: Attention) -> fx.Node:
    """Scores of a fused attention, computed beside it."""
    assert attention.key is not None
    head_size = shape(attention.query)[-1]
    scale = attention.context.kwargs.get("scale")
    factor = float(scale) if isinstance(scale, int | float) else float(head_size) ** -0.5
    keys = walk.call(aten.transpose.int, for_each_query_head(walk, attention, attention.key), -2, -1)
    product = walk.call(aten.matmul.default, walk.env[attention.query], keys)
    return walk.call(aten.mul.Tensor, product, factor)


class _ProportionalAttention(_Emitter):
    """Adds the logarithm of merged tokens' sizes to an attention's scores (ToMe, section 3.3)."""

    def __call__(self, walk: Rewriter) -> fx.Node | None:
        attention = self.attention
        epochs = walk.history.at(attention.key_dim)
        sizes = [
            self.insertions.weights.get((s.stream or "", epochs.get(s.stream or "", 0)))
            for s in attention.key_axis.segments
        ]
        if not any(epochs.values()):
            return None
        if "causal" in attention.unusual:
            raise LocateError(
                f"The attention {attention.described} cannot weigh merged tokens by their sizes: {attention.unusual}."
            )
        present = [
            size if size is not None else self.ones(walk, walk.history.length(s, epochs), walk.env[attention.query])
            for s, size in zip(attention.key_axis.segments, sizes, strict=True)
        ]
        softmax = attention.probabilities or attention.context
        position = 3 if attention.fused else 0
        walk.visit(softmax)
        new = walk.env[softmax]
        given = new.args[position] if len(new.args) > position else new.kwargs.get("attn_mask")
        with walk.graph.inserting_before(new):
            name = f"reducer.sizes.{attention.name}"
            scores = given if isinstance(given, fx.Node) else None
            biased = walk.call_module(name, SizeBias(), scores, walk.env[attention.query], *present)
        if attention.fused:
            new.kwargs = {**new.kwargs, "attn_mask": biased}
            new.args = (*new.args[:3], biased, *new.args[4:]) if len(new.args) > 3 else new.args
            if len(new.args) > 3:
                new.kwargs = {k: v for k, v in new.kwargs.items() if k != "attn_mask"}
        else:
            new.args = (biased, *new.args[1:])
        return new


class _Reduce(_Emitter):
    """Emits the reducers of a site after its carrier."""

    def __init__(self, insertions: Insertions, site: SiteInsertion) -> None:
        super().__init__(insertions, site.attention)
        self.site = site
        self.epochs: Epochs = {}
        self.applied = ApplyMap()

    def __call__(self, walk: Rewriter) -> None:
        attention, carrier = self.attention, self.attention.carrier
        assert carrier is not None
        dim, axis = self._token_dim(walk, carrier)
        self.epochs = {**walk.history.at(attention.key_dim), **walk.history.at(Dim(carrier, dim))}
        walk.batch = walk.batch or Dim(carrier, 1 - dim)
        if not self._plan(walk):
            return
        # Algorithm 1 knows no mask: semantics `paper` carries none.
        carries, modality = self.insertions.schedule.semantics != "paper", walk.annotation.modality
        readers = self._readers()
        votes = any(reducer.pruner is not None for reducer in self.site.reducers.values())
        read = {s for s in attention.streams if s in self.site.reducers or (votes and modality[s] == "text")}
        weights = {
            s: self.weights(walk, s, self._epoch(s), readers) if carries and s in read else None
            for s in attention.streams
        }
        reduced = {s: r.tokens_after for s, r in self.site.reducers.items() if s in axis.streams}
        linears = postpone.projections(walk, carrier, dim, reduced)
        pieces = {} if linears else self._pieces(walk, walk.env[carrier], dim)
        results = {s: self._reduce(walk, s, pieces.get(s), weights) for s in self.site.reducers}
        if linears:
            maps = {s: results[s][MAP] for s in reduced}
            walk.env[carrier] = postpone.reduced_sum(
                walk, carrier, linears, lambda value: self._mapped(walk, value, dim, maps)
            )
        else:
            new = [results[name][TOKENS] if name in results else piece for name, piece in pieces.items()]
            walk.env[carrier] = self._joined(walk, new, dim)
        made = {s: self._step(walk, s, result, weights[s]) for s, result in results.items()}
        walk.history.bump(Dim(carrier, dim), {s: epoch for s, epoch in made.items() if s in axis.streams})
        if attention.cross_modal:
            for stream, epoch in made.items():
                walk.promise(attention.context, stream, self._epoch(stream), epoch)

    def _pieces(self, walk: Rewriter, value: fx.Node, dim: int) -> dict[str, fx.Node]:
        """A value with the carrier's tokens by stream, batch first."""
        carrier = self.attention.carrier
        assert carrier is not None
        pieces = walk.pieces(carrier, dim, value)
        if dim == 0:
            # A tower that runs with its tokens in front; reducers take the batch there.
            pieces = {name: walk.call(aten.transpose.int, piece, 0, 1) for name, piece in pieces.items()}
        return pieces

    def _joined(self, walk: Rewriter, pieces: list[fx.Node], dim: int) -> fx.Node:
        """What `_pieces` parted."""
        if dim == 0:
            pieces = [walk.call(aten.contiguous.default, walk.call(aten.transpose.int, x, 0, 1)) for x in pieces]
        return walk.call(aten.cat.default, pieces, dim) if len(pieces) > 1 else pieces[0]

    def _mapped(self, walk: Rewriter, value: fx.Node, dim: int, maps: dict[str, fx.Node]) -> fx.Node:
        """A value with the carrier's tokens, reduced by the maps of some streams."""
        pieces = self._pieces(walk, value, dim)
        for stream, map_ in maps.items():
            name = f"reducer.{self.attention.name}.{stream}_map"
            pieces[stream] = walk.call_module(name, self.applied, pieces[stream], map_)
        return self._joined(walk, list(pieces.values()), dim)

    def _epoch(self, stream: str) -> int:
        return self.epochs.get(stream, 0)

    def _plan(self, walk: Rewriter) -> bool:
        """Token counts and reducers of this site; False where the published code does nothing at it."""
        attention, schedule, annotation = self.attention, self.insertions.schedule, walk.annotation
        segments = {s.stream: s for a in (attention.query_axis, attention.key_axis) for s in a.segments if s.stream}
        before = {stream: walk.history.length(segments[stream], self.epochs) for stream in attention.streams}
        modality = {s: annotation.modality[s] for s in before}
        self.site.passed = {modality[s]: len(walk.history.lineage(s, self._epoch(s))) for s in before}
        images = [n for s, n in before.items() if annotation.modality[s] == "image"]
        if schedule.semantics == "reference" and any(published_stands_still(self.site.site, n) for n in images):
            log.warning(
                "Site %s is left out: its share prunes none of %d image tokens, and there the published code "
                "merges nothing either.",
                attention.site,
                images[0],
            )
            return False
        counts = stream_counts(self.site.site, schedule, before, modality, annotation.learned)
        for stream, (keep, merge) in counts.items():
            learned = annotation.learned[stream]
            self.site.reducers[stream] = make_reducer(modality[stream], before[stream], keep, merge, schedule, learned)
        self.site.plan = SitePlan(
            attention.site,
            attention.module,
            before,
            {s: counts[s][0] - counts[s][1] if s in counts else n for s, n in before.items()},
            {s: n - counts[s][0] if s in counts else 0 for s, n in before.items()},
            {s: counts[s][1] if s in counts else 0 for s in before},
            call=attention.call,
        )
        return True

    def _token_dim(self, walk: Rewriter, carrier: fx.Node) -> tuple[int, Tokens]:
        axes = walk.annotation.axes(carrier)
        dims = [(i, a) for i, a in enumerate(axes) if isinstance(a, Tokens)]
        if len(axes) != 3 or len(dims) != 1 or dims[0][0] > 1:
            raise LocateError(
                f"The carrier of {self.attention.site}, {describe(carrier)}, has axes "
                f"({', '.join(map(str, axes))}); expected [batch, tokens, width] or [tokens, batch, width]."
            )
        return dims[0]

    def _readers(self) -> list[Attention]:
        """Attentions whose masks tell real tokens from padding: this one, then those before it, the nearest first."""
        position = self.insertions.attentions.index(self.attention)
        return [self.attention, *reversed(self.insertions.attentions[:position])]

    def _text_to_image(self, walk: Rewriter, stream: str) -> fx.Node:
        """Text-to-image attention, `[batch, heads, text, image]`."""
        site = self.attention
        text = next(s for s in site.query_axis.streams if walk.annotation.modality[s] == "text")
        rows = walk.history.span(site.query_axis, text, self.epochs)
        key_range = walk.history.span(site.key_axis, stream, self.epochs)
        source = attention_rows(walk, site, rows, f"reducer.{site.name}.attention.{stream}")
        return walk.call(aten.slice.Tensor, source, 3, *key_range)

    def _keys(self, walk: Rewriter, stream: str) -> fx.Node:
        """Keys of a stream, `[batch, heads, tokens, head_size]`: this site's, or the nearest self-attention's."""
        site = self.attention
        if stream not in site.key_axis.streams or walk.history.at(site.key_dim).get(stream, 0) != self._epoch(stream):
            site = self._nearest_self_attention(walk, stream)
        span = walk.history.span(site.key_axis, stream, walk.history.at(site.key_dim))
        if site.key is not None:
            return walk.call(aten.slice.Tensor, walk.env[site.key], 2, *span)
        assert site.key_transposed is not None
        cut = walk.call(aten.slice.Tensor, walk.env[site.key_transposed], 3, *span)
        return walk.call(aten.transpose.int, cut, 2, 3)

    def _nearest_self_attention(self, walk: Rewriter, stream: str) -> Attention:
        before = ancestors(self.attention.context)
        position = self.insertions.attentions.index(self.attention)
        for attention in reversed(self.insertions.attentions[:position]):
            reads = stream in attention.query_axis.streams and stream in attention.key_axis.streams
            if reads and attention.context in before:
                if walk.history.at(attention.key_dim).get(stream, 0) == self._epoch(stream):
                    return attention
                break
        raise LocateError(
            f"Site {self.attention.described} merges {stream} tokens, but there is no self-attention over the "
            f"{stream} before it whose keys tell which are similar. Set `merge: {{{stream}: 0}}` there."
        )

    def _reduce(
        self, walk: Rewriter, stream: str, tokens: fx.Node | None, weights: dict[str, fx.Node | None]
    ) -> list[fx.Node]:
        reducer = self.site.reducers[stream]
        arguments: list[fx.Node | None] = [tokens, self._keys(walk, stream), weights[stream]]
        if reducer.pruner is not None:
            text = next((s for s in self.attention.query_axis.streams if walk.annotation.modality[s] == "text"), "")
            arguments += [self._text_to_image(walk, stream), weights.get(text)]
        result = walk.call_module(f"reducer.{self.attention.name}.{stream}", reducer, *arguments)
        return [walk.item(result, i) for i in range(ASSIGNED + 1)]

    def _step(self, walk: Rewriter, stream: str, outputs: list[fx.Node], weights: fx.Node | None) -> int:
        """Enter a reducer of a stream with these weights (None: ones) into the walk; gives the epoch it makes."""
        reducer = self.site.reducers[stream]
        step = Step(
            self._epoch(stream),
            outputs[MAP],
            outputs[ASSIGNED],
            reducer.tokens_after,
            reducer.merger.merge > 0,
            self._first_stays(reducer),
        )
        epoch = walk.history.add_step(stream, step)
        # Means of ones are ones, and need not be carried.
        if weights is not None or reducer.carried == "sum":
            self.insertions.weights[stream, epoch] = outputs[WEIGHTS]
        return epoch

    def _first_stays(self, reducer: StreamReducer) -> bool:
        """Whether token 0 is token 0 afterwards. The published code takes whatever comes first, and so does
        `reference`; elsewhere a pruner that sorts by saliency moves it unless it is protected."""
        pruner = reducer.pruner
        assert not isinstance(pruner, VisPruner)  # which has an emitter of its own
        if reducer.merger.merge > 0 and reducer.merger.protected == 0:
            return False
        return pruner is None or pruner.protected > 0 or self.insertions.schedule.semantics == "reference"
