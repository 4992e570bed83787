"""Insert: decide the reducer of every stream at every site; the rewriting walk puts it after the carrier."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass, field

from torch import fx, nn

from ..errors import LocateError, PlanError
from ..plan import SitePlan, image_counts, merge_count
from ..reducers import (
    ModalityAwareMerger,
    PublishedMaskedSoftmax,
    StreamReducer,
    TextInformedPruner,
    TextRowsAttention,
    TokenWeights,
    UnitWeights,
)
from ..reducers.reducer import Carried
from ..schedule import Schedule, Semantics, Site
from .annotate import Annotation
from .axes import Dim, Tokens
from .graph import describe
from .locate import Attention, choose
from .rewrite import Rewriter, Step
from .rules import aten, shape

log = logging.getLogger("pumer_compile")

Action = Callable[[Rewriter], None]


@dataclass
class SiteInsertion:
    """A site with the reducers of its streams."""

    attention: Attention
    plan: SitePlan
    reducers: dict[str, StreamReducer]


@dataclass
class Insertions:
    """What the rewriting walk does beside copying nodes.

    Attributes:
        sites: in execution order.
        softmaxes: attentions whose softmax becomes the published one (semantics `reference`).
        semantics: see `Schedule`.
        weights: node of the carried weights of each stream, as of now in the walk.
        decisions: nodes of `(kept, source, target)` by reducer name.
        ones: modules that give weights of 1, by length.
    """

    sites: list[SiteInsertion]
    softmaxes: list[Attention]
    semantics: Semantics
    weights: dict[str, fx.Node] = field(default_factory=dict)
    decisions: dict[str, tuple[fx.Node, fx.Node, fx.Node]] = field(default_factory=dict)
    ones: dict[int, UnitWeights] = field(default_factory=dict)

    def after(self) -> dict[fx.Node, Action]:
        """Actions by the captured node they follow."""
        return {s.attention.carrier: _Reduce(self, s) for s in self.sites if s.attention.carrier is not None}

    def instead(self) -> dict[fx.Node, Callable[[Rewriter], fx.Node]]:
        """Replacements by captured node."""
        return {a.probabilities or a.context: _PublishedSoftmax(self, a) for a in self.softmaxes}


def plan_insertions(annotation: Annotation, attentions: list[Attention], schedule: Schedule) -> Insertions:
    """Choose sites and build their reducers.

    Raises:
        LocateError: a site that does not exist or has no residual carrier.
        PlanError: budgets that a site cannot meet.
    """
    chosen = [(choose(attentions, site.at), site) for site in schedule.resolve()]
    chosen.sort(key=lambda pair: attentions.index(pair[0]))
    counts = dict(annotation.streams)
    sites = []
    for attention, site in chosen:
        _check_site(attention, site)
        if schedule.semantics == "reference" and _published_stands_still(site, counts):
            log.warning(
                "Site %s is left out: its share prunes none of %d image tokens, and there the published code "
                "merges nothing either.",
                site.at,
                counts["image"],
            )
            continue
        sites.append(_site(annotation, attention, site, schedule.semantics, counts))
        counts.update(sites[-1].plan.after)
    if not sites:
        raise PlanError("Every site of the schedule rounds to nothing pruned. Raise `prune`.")
    _check_masks(attentions[attentions.index(chosen[0][0]) :])
    softmaxes = _cross_modal_layers(attentions) if schedule.semantics == "reference" else []
    return Insertions(sites, softmaxes, schedule.semantics)


def _published_stands_still(site: Site, counts: dict[str, int]) -> bool:
    """The published code reduces a layer only where its share of image tokens to prune rounds to at least
    one. A site that asks for merging alone (`prune: 0`) is our extension, and merges."""
    share = site.prune
    return isinstance(share, float) and share > 0 and round(share * counts.get("image", 0)) == 0


def _check_masks(attentions: list[Attention]) -> None:
    """From the first site on, a mask that is not understood could not be aligned."""
    for attention in attentions:
        if "no known mask" in attention.unusual:
            raise LocateError(
                f"The attention {attention.site} ({attention.module}) cannot follow a reducer, because "
                f"{attention.unusual}: add a mask, or use masked_fill or where."
            )


def _check_site(attention: Attention, site: Site) -> None:
    if attention.carrier is None:
        raise LocateError(
            f"Site {site.at} ({attention.module}) has no residual value to reduce: {attention.no_carrier}."
        )
    if len(shape(attention.query)) != 4:
        raise LocateError(
            f"Site {site.at} ({attention.module}) has queries of shape {list(shape(attention.query))}; a reducer reads "
            "[batch, heads, tokens, head size]. Use a model whose attention keeps heads in a dimension of their own."
        )
    separate = attention.cross_modal and not (
        set(attention.query_axis.streams) == set(attention.key_axis.streams) == set(attention.streams)
    )
    if separate:
        raise LocateError(
            f"Site {site.at} ({attention.module}) is cross-attention from {attention.query_axis} to "
            f"{attention.key_axis}. Reducing is done where text and image tokens share one attention "
            "(self-attention over both); co-attention pairs are not reduced yet."
        )
    wanted = {"image": site.prune > 0 or site.merge.image > 0, "text": site.merge.text > 0}
    missing = [stream for stream, asked in wanted.items() if asked and stream not in attention.streams]
    if missing:
        raise PlanError(
            f"Site {site.at} has budgets for {' and '.join(missing)} tokens, but its attention is over "
            f"{attention.query_axis}."
        )
    if site.prune > 0 and "text" not in attention.streams:
        raise PlanError(
            f"Site {site.at} prunes image tokens by the attention of the text, but its attention is over "
            f"{attention.query_axis} alone. Merge there instead, or prune at a cross-modal site."
        )


def _site(
    annotation: Annotation, attention: Attention, site: Site, semantics: Semantics, counts: dict[str, int]
) -> SiteInsertion:
    before = {s: counts[s] for s in attention.streams}
    after, pruned, merged = dict(before), dict.fromkeys(before, 0), dict.fromkeys(before, 0)
    reducers: dict[str, StreamReducer] = {}
    for stream, tokens in before.items():
        learned = annotation.learned[stream] if semantics == "safe" else 0
        if stream == "image":
            keep, merge = image_counts(tokens, site, semantics, learned)
        elif stream == "text":
            keep = tokens
            merge = merge_count(site.at, stream, site.merge.text, tokens, tokens, max(1, learned))
        else:
            keep, merge = tokens, 0
        if keep - merge < tokens:
            reducers[stream] = make_reducer(stream, tokens, keep, merge, semantics, learned)
            after[stream], pruned[stream], merged[stream] = keep - merge, tokens - keep, merge
    if not reducers:
        raise PlanError(
            f"Site {site.at} would reduce nothing: its shares round to zero tokens of {before}. Raise them "
            "or leave the site out."
        )
    plan = SitePlan(attention.site, attention.module, before, after, pruned, merged)
    return SiteInsertion(attention, plan, reducers)


def make_reducer(
    stream: str, tokens: int, keep: int, merge: int, semantics: Semantics, learned: int = 0
) -> StreamReducer:
    """The reducer of one stream under given semantics.

    Args:
        stream: `image` or `text`.
        tokens, keep, merge: before, kept by the pruner, merged away by the merger.
        semantics: see `Schedule`.
        learned: leading learned tokens (class tokens); they stay under `safe`.
    """
    safe = semantics == "safe"
    pruner = None
    if keep < tokens:
        pruner = TextInformedPruner(keep, protected=learned if safe else 0, pads_vote=not safe)
    merger = ModalityAwareMerger(
        merge,
        similarity="dot" if semantics == "paper" else "cosine",
        protected=max(1, learned) if safe else 1,
        keep_padding_apart=safe,
    )
    carried: Carried = "sum" if safe else "ones" if semantics == "reference" and stream == "image" else "mean"
    return StreamReducer(tokens, pruner, merger, averaging="sizes" if safe else "plain", carried=carried)


def repeated_module(path: str) -> str:
    """The innermost repeated module that holds a module: `encoder.layer.2` of `encoder.layer.2.attention`."""
    parts = path.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[: last + 1])


def _cross_modal_layers(attentions: list[Attention]) -> list[Attention]:
    """Attentions in layers that hold a cross-modal attention."""
    layers = {repeated_module(a.module) for a in attentions if a.cross_modal}
    return [a for a in attentions if a.cross_modal or repeated_module(a.module) in layers - {""}]


class _Emitter:
    """What both kinds of insertion need: segments, and the carried weights of a stream."""

    def __init__(self, insertions: Insertions, attention: Attention) -> None:
        self.insertions, self.attention = insertions, attention

    def _ones(self, length: int) -> UnitWeights:
        return self.insertions.ones.setdefault(length, UnitWeights(length))

    def weights(self, walk: Rewriter, stream: str) -> fx.Node | None:
        """Carried weights of a stream, read first from this attention's mask; None without a mask."""
        known = self.insertions.weights.get(stream)
        if known is not None or not self.attention.masks:
            return known
        if len(self.attention.masks) > 1:
            names = ", ".join(m.node.name for m in self.attention.masks)
            raise LocateError(
                f"The attention {self.attention.site} ({self.attention.module}) adds several masks "
                f"({names}); which of them marks padding cannot be told."
            )
        (mask,) = self.attention.masks
        if len(shape(mask.node)) != 4:
            raise LocateError(
                f"The mask of {describe(self.attention.context)} has {len(shape(mask.node))} dimensions, not 4."
            )
        axis = walk.annotation.axis(Dim(mask.node, 3))
        if not isinstance(axis, Tokens) or stream not in axis.streams:
            return None
        # Read at the first use of the stream's mask, before any reducer of this stream; others may be reduced.
        start, stop = walk.span(axis, stream, walk.at(Dim(mask.node, 3)))
        node = walk.call_module(
            f"reducer.weights.{stream}", TokenWeights(start, stop - start, mask.kind), walk.env[mask.node]
        )
        self.insertions.weights[stream] = node
        return node


class _PublishedSoftmax(_Emitter):
    """Emits the published masked softmax in place of a softmax (or of a fused attention)."""

    def __call__(self, walk: Rewriter) -> fx.Node:
        attention = self.attention
        if attention.unusual:
            raise LocateError(
                f"The attention {attention.site} ({attention.module}) cannot have the published softmax, because "
                f"{attention.unusual}. Use semantics `paper` or `safe`."
            )
        weights = [self.weights(walk, s) for s in attention.key_axis.streams]
        if len(shape(attention.query)) != 4:
            raise LocateError(
                f"The attention {attention.site} ({attention.module}) has queries of shape "
                f"{list(shape(attention.query))}; the published softmax needs [batch, heads, tokens, head size]. Use "
                "semantics `paper` or `safe`."
            )
        # A stream without a mask is all real tokens.
        epochs = walk.at(Dim(attention.query, 2))
        lengths = {s.stream: walk.length(s, epochs) for s in attention.key_axis.segments}
        present = [
            w or walk.call_module(f"reducer.ones.{lengths[s]}", self._ones(lengths[s]), walk.env[attention.query])
            for s, w in zip(attention.key_axis.streams, weights, strict=True)
            if any(weights)
        ]
        module = PublishedMaskedSoftmax(diagonal=attention.query_axis == attention.key_axis)
        name = f"reducer.softmax.{attention.site.replace('.', '_')}"
        if not attention.fused:
            assert attention.scores is not None and attention.probabilities is not None
            walk.adopt_epochs(attention.probabilities, attention.scores)
            return walk.call_module(name, module, walk.env[attention.scores], *present)
        scores = scaled_scores(walk, attention)
        probabilities = walk.call_module(name, module, scores, *present)
        walk.probabilities[attention.context] = probabilities
        value = attention.context.args[2]
        assert isinstance(value, fx.Node)
        walk.adopt_epochs(attention.context, attention.query)
        return walk.call(aten.matmul.default, probabilities, walk.env[value])


def scaled_scores(walk: Rewriter, attention: Attention) -> fx.Node:
    """Scores of a fused attention, computed beside it."""
    assert attention.key is not None
    head_size = shape(attention.query)[-1]
    scale = attention.context.kwargs.get("scale")
    factor = float(scale) if isinstance(scale, int | float) else float(head_size) ** -0.5
    keys = walk.call(aten.transpose.int, walk.env[attention.key], -2, -1)
    product = walk.call(aten.matmul.default, walk.env[attention.query], keys)
    return walk.call(aten.mul.Tensor, product, factor)


class _Reduce(_Emitter):
    """Emits the reducers of a site after its carrier."""

    def __init__(self, insertions: Insertions, site: SiteInsertion) -> None:
        super().__init__(insertions, site.attention)
        self.site = site

    def __call__(self, walk: Rewriter) -> None:
        carrier = self.attention.carrier
        assert carrier is not None
        dim, axis = self._token_dim(walk, carrier)
        pieces = walk.pieces(carrier, dim)
        # Algorithm 1 knows no mask: semantics `paper` carries none.
        carries = self.insertions.semantics != "paper"
        weights = {s: self.weights(walk, s) if carries else None for s in axis.streams}
        attention = self._attention(walk) if "image" in self.site.reducers else None
        results = {s: self._reduce(walk, s, pieces[s], weights, attention) for s in self.site.reducers}
        new = [results.get(name, piece) for name, piece in pieces.items()]
        walk.env[carrier] = walk.call(aten.cat.default, new, dim) if len(new) > 1 else new[0]
        walk.bump(Dim(carrier, dim), tuple(results))

    def _token_dim(self, walk: Rewriter, carrier: fx.Node) -> tuple[int, Tokens]:
        axes = walk.annotation.axes(carrier)
        dims = [(i, a) for i, a in enumerate(axes) if isinstance(a, Tokens)]
        if len(axes) != 3 or len(dims) != 1 or dims[0][0] != 1:
            raise LocateError(
                f"The carrier of {self.attention.site}, {describe(carrier)}, has axes "
                f"({', '.join(map(str, axes))}); expected [batch, tokens, width]."
            )
        return dims[0]

    def _attention(self, walk: Rewriter) -> fx.Node | None:
        """Text-to-image attention, `[batch, heads, text, image]`."""
        site = self.attention
        if "text" not in site.streams:
            return None
        epochs = walk.at(Dim(site.query, 2))
        key_range = walk.span(site.key_axis, "image", epochs)
        rows = walk.span(site.query_axis, "text", epochs)
        written_out = walk.probabilities.get(site.context)
        source = written_out if site.fused else walk.env[site.probabilities or site.context]
        if source is None:
            query = walk.call(aten.slice.Tensor, walk.env[site.query], 2, *rows)
            assert site.key is not None
            if site.unusual:
                raise LocateError(f"Site {site.site} ({site.module}) cannot be reduced, because {site.unusual}.")
            mask = [walk.used.get((site.context, m.node), walk.env[m.node]) for m in site.masks]
            scale = site.context.kwargs.get("scale")
            module = TextRowsAttention(scale if isinstance(scale, float) else None, rows)
            name = f"reducer.{site.site.replace('.', '_')}.attention"
            source = walk.call_module(name, module, query, walk.env[site.key], *mask)
        else:
            source = walk.call(aten.slice.Tensor, source, 2, *rows)
        return walk.call(aten.slice.Tensor, source, 3, *key_range)

    def _keys(self, walk: Rewriter, stream: str) -> fx.Node:
        site = self.attention
        span = walk.span(site.key_axis, stream, walk.at(Dim(site.query, 2)))
        if site.key is not None:
            return walk.call(aten.slice.Tensor, walk.env[site.key], 2, *span)
        assert site.key_transposed is not None
        cut = walk.call(aten.slice.Tensor, walk.env[site.key_transposed], 3, *span)
        return walk.call(aten.transpose.int, cut, 2, 3)

    def _first_stays(self, reducer: StreamReducer) -> bool:
        """Whether token 0 is token 0 afterwards. The published code takes whatever comes first, and so does
        `reference`; elsewhere a pruner that sorts by saliency moves it unless it is protected."""
        pruner = reducer.pruner
        return pruner is None or pruner.protected > 0 or self.insertions.semantics == "reference"

    def _reduce(
        self,
        walk: Rewriter,
        stream: str,
        tokens: fx.Node,
        weights: dict[str, fx.Node | None],
        attention: fx.Node | None,
    ) -> fx.Node:
        reducer = self.site.reducers[stream]
        name = f"reducer.{self.attention.site.replace('.', '_')}.{stream}"
        arguments: list[fx.Node | None] = [tokens, self._keys(walk, stream), weights[stream]]
        if reducer.pruner is not None:
            arguments += [attention, weights.get("text")]
        result = walk.call_module(name, reducer, *arguments)
        outputs = [walk.item(result, i) for i in range(6)]
        self.insertions.weights[stream] = outputs[1]
        self.insertions.decisions[name] = (outputs[3], outputs[4], outputs[5])
        merged = reducer.merger.merge > 0
        walk.steps.setdefault(stream, []).append(
            Step(outputs[2], reducer.tokens_after, merged, self._first_stays(reducer))
        )
        return outputs[0]


def reducers_of(module: nn.Module) -> dict[str, StreamReducer]:
    """Reducers inside a module by path."""
    return {name: m for name, m in module.named_modules() if isinstance(m, StreamReducer)}
