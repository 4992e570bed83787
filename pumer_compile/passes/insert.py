"""Insert: choose the sites of a schedule, check that they can be reduced, and say which reducers they get; the walk
puts them in (`emit.py`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from torch import fx, nn

from ..errors import LocateError, PlanError
from ..plan import SitePlan
from ..reducers import ModalityAwareMerger, StreamReducer, TextInformedPruner, UnitWeights
from ..reducers.reducer import Carried
from ..schedule import Schedule, Site
from .annotate import Annotation
from .axes import Dim, Tokens
from .graph import ancestors, describe
from .locate import NOT_KNOWN, Attention, choose
from .prompt import Mark
from .rewrite import Rewriter, inside
from .rules import shape

Action = Callable[[Rewriter], None]


@dataclass
class SiteInsertion:
    """A site, with what the walk makes of it.

    Attributes:
        attention: which node.
        site: its budgets.
        plan: token counts, once the walk has passed it; None where it was left out.
        reducers: by stream.
        passed: how many reducers each modality had passed before.
        marks: of `vispruner`: where the features that it gives leave the tower, for each block of a prompt.
        votes: of `vispruner`: the attention that decides, `[rows, tokens]`, once the walk has it.
        images: of `fastv`: the streams of images that it reduces.
    """

    attention: Attention
    site: Site
    plan: SitePlan | None = None
    passed: dict[str, int] = field(default_factory=dict)
    reducers: dict[str, StreamReducer] = field(default_factory=dict)
    marks: tuple[Mark, ...] = ()
    votes: fx.Node | None = None
    images: tuple[str, ...] = ()


@dataclass
class Insertions:
    """What the rewriting walk does beside copying nodes.

    Attributes:
        schedule: what is asked for.
        annotation: axes of the captured graph.
        attentions: every attention, in execution order.
        sites: in execution order.
        softmaxes: attentions whose softmax becomes the published one (semantics `reference`).
        weights: node of the carried weights of each stream at each epoch.
        ones: modules that give weights of 1, by length.
    """

    schedule: Schedule
    annotation: Annotation
    attentions: list[Attention]
    sites: list[SiteInsertion]
    softmaxes: list[Attention]
    weights: dict[tuple[str, int], fx.Node] = field(default_factory=dict)
    ones: dict[int, UnitWeights] = field(default_factory=dict)

    @property
    def done(self) -> list[tuple[SiteInsertion, SitePlan]]:
        """Sites that the walk reduced, with their plans, in execution order."""
        return [(site, site.plan) for site in self.sites if site.plan is not None]


def plan_insertions(
    annotation: Annotation, attentions: list[Attention], schedule: Schedule, marks: Sequence[Mark] = ()
) -> Insertions:
    """Choose the sites.

    Args:
        annotation: axes of the captured graph.
        attentions: every attention, in execution order.
        schedule: what is asked for.
        marks: where a vision tower's features leave for a prompt.

    Raises:
        LocateError: a site that does not exist, has no residual carrier or cannot be followed.
        PlanError: budgets for tokens that a site does not have.
    """
    if schedule.method in ("vispruner", "fastv"):
        _check_marks(marks, schedule)
        if schedule.method == "vispruner":
            sites = visual_sites(attentions, marks)
        else:
            sites = [last_query_site(annotation, attentions, schedule, marks)]
        return Insertions(schedule, annotation, attentions, sites, [])
    chosen = [(attention, site) for site in schedule.resolve() for attention in choose(attentions, site.at)]
    chosen.sort(key=lambda pair: attentions.index(pair[0]))
    for attention, site in chosen:
        check_site(annotation, attention, site)
    _check_masks(attentions[attentions.index(chosen[0][0]) :])
    _check_order(annotation, attentions, chosen)
    published = schedule.method == "pumer" and schedule.semantics == "reference"
    softmaxes = attentions_in(attentions, cross_modal_layers(attentions)) if published else []
    sites = [SiteInsertion(attention, site) for attention, site in chosen]
    return Insertions(schedule, annotation, attentions, sites, softmaxes)


def _check_marks(marks: Sequence[Mark], schedule: Schedule) -> None:
    if not marks:
        raise LocateError(
            f"`method: {schedule.method}` keeps image tokens of a prompt, and nothing is scattered into one: looked "
            "for masked_scatter of a vision tower's features and found none. For models whose text and image meet in "
            "attention use `method: pumer`."
        )


def visual_sites(attentions: list[Attention], marks: Sequence[Mark]) -> list[SiteInsertion]:
    """The last attention of the tower before each mark: the layer whose output is used.

    Raises:
        LocateError: no tower attention gives its features.
    """
    found: dict[fx.Node, SiteInsertion] = {}
    for mark in marks:
        before = ancestors(mark.node)
        tower = [a for a in attentions if a.context in before]
        if not tower:
            raise LocateError(f"No attention over image tokens was found before {describe(mark.node)}.")
        last = tower[-1]
        site = found.setdefault(last.context, SiteInsertion(last, Site(at=last.site)))
        site.marks = (*site.marks, mark)
    return list(found.values())


def last_query_site(
    annotation: Annotation, attentions: list[Attention], schedule: Schedule, marks: Sequence[Mark]
) -> SiteInsertion:
    """The attention of the last language layer that sees every token, with all the images in its prompt.

    Raises:
        LocateError: no attention over a prompt with its images, or one that cannot be reduced.
        PlanError: there is no such layer, or none after it.
    """
    axes = [annotation.axis(Dim(mark.prompted, 1)) for mark in marks]
    images = tuple(s for axis in axes if isinstance(axis, Tokens) for s in axis.streams)
    layers = [a for a in attentions if {*images, "text"} <= set(a.query_axis.streams) & set(a.key_axis.streams)]
    if not layers:
        raise LocateError(
            "`method: fastv` reads the attention of a language model, and none was found whose queries and keys are "
            f"the words of a prompt with {' and '.join(images) or 'its image'} among them."
        )
    wanted = schedule.layer or 0
    if wanted >= len(layers):
        few = f"choose 1 to {len(layers) - 1}" if len(layers) > 1 else "there is none to choose"
        raise PlanError(
            f"`layer: {wanted}` lets the first {wanted} language layers see every token and the others fewer, and this "
            f"model has {len(layers)}: {few}."
        )
    attention = layers[wanted - 1]
    _check_prompt(annotation, attention, images)
    _check_masks(attentions[attentions.index(attention) :])
    return SiteInsertion(attention, Site(at=attention.site), images=images)


def _check_prompt(annotation: Annotation, attention: Attention, images: tuple[str, ...]) -> None:
    _check_reducible(annotation, attention)
    *_, last = attention.query_axis.segments
    if last.stream != "text":
        raise LocateError(
            f"The prompt {attention.query_axis} ends with an image, and `method: fastv` keeps the image tokens that "
            "its last word looks at. Compile it for a prompt that ends with a word."
        )
    cut = [s for s in attention.query_axis.segments if s.stream in images and not s.whole]
    if cut:
        raise LocateError(
            f"The prompt {attention.query_axis} has {cut[0].length} tokens of {cut[0].stream} apart from the others; "
            "an image is reduced whole."
        )


def _check_reducible(annotation: Annotation, attention: Attention) -> None:
    if attention.carrier is None:
        raise LocateError(f"Site {attention.described} has no residual value to reduce: {attention.no_carrier}.")
    if len(shape(attention.query)) != 4:
        raise LocateError(
            f"Site {attention.described} has queries of shape {list(shape(attention.query))}; a reducer reads "
            "[batch, heads, tokens, head size]. Use a model whose attention keeps heads in a dimension of their own."
        )
    carrier = attention.carrier
    batches = [Dim(carrier, i) for i, axis in enumerate(annotation.axes(carrier)[:2]) if not isinstance(axis, Tokens)]
    first, second = (any(annotation.same(Dim(attention.query, i), b) for b in batches) for i in (0, 1))
    if second and not first:
        raise LocateError(
            f"Site {attention.described} has queries of shape {list(shape(attention.query))} with the heads before the "
            "batch; a reducer reads [batch, heads, tokens, head size]. Exchange the two in the model."
        )


def modalities(annotation: Annotation, axis: Tokens) -> set[str]:
    """The modalities of an axis."""
    return {annotation.modality[stream] for stream in axis.streams}


def _check_masks(attentions: list[Attention]) -> None:
    """From the first site on, a mask that is not understood could not be aligned."""
    for attention in attentions:
        if NOT_KNOWN in attention.unusual:
            raise LocateError(
                f"The attention {attention.described} cannot follow a reducer, because "
                f"{attention.unusual}. Hide keys with a boolean mask (masked_fill, where), or add 0 and -inf."
            )


def _check_order(annotation: Annotation, attentions: list[Attention], chosen: list[tuple[Attention, Site]]) -> None:
    """Words that may see only those before them cannot merge: a word would see what comes after it."""
    for site, budgets in chosen:
        words = {stream for stream in site.streams if annotation.modality[stream] == "text"}
        if budgets.merge.text == 0:
            continue
        for attention in attentions[attentions.index(site) :]:
            mask = next((mask for mask in attention.masks if mask.by_query), None)
            over = words & set(attention.query_axis.streams) & set(attention.key_axis.streams)
            if mask is not None and over:
                raise LocateError(
                    f"Site {site.described} merges text tokens, but the mask {mask.node.name} of the attention "
                    f"{attention.described} differs from query to query, as a causal mask does, and merged tokens have "
                    "no order. Set `merge: {text: 0}`; the image may be reduced."
                )


def check_site(annotation: Annotation, attention: Attention, site: Site) -> None:
    """Whether a site has what its budgets need.

    Raises:
        LocateError: no carrier, no heads of their own, image-to-text attention.
        PlanError: a budget for tokens that it does not have.
    """
    if not attention.query_axis.streams:
        raise LocateError(
            f"Site {attention.described} is attention of learned queries, {attention.query_axis}, to "
            f"{attention.key_axis}: there is no stream of tokens to carry on. Choose a site before it."
        )
    _check_reducible(annotation, attention)
    parts = [s for axis in (attention.query_axis, attention.key_axis) for s in axis.segments if not s.whole]
    if parts:
        raise LocateError(
            f"Site {attention.described} is attention from {attention.query_axis} to {attention.key_axis}, where "
            f"{parts[0].length} of the {annotation.streams[parts[0].stream or '']} {parts[0].stream} tokens stand "
            "apart (learned queries, say); a reducer takes a stream whole."
        )
    queries, keys = modalities(annotation, attention.query_axis), modalities(annotation, attention.key_axis)
    if attention.cross_modal and "text" not in queries and "image" not in keys:
        raise LocateError(
            f"Site {attention.described} is cross-attention from {attention.query_axis} to {attention.key_axis}: "
            "image-to-text attention, which has no text-to-image map to prune by. In a co-attention pair reduce at the "
            "text layer's attention (even layers); it reduces the image for both."
        )
    wanted = {"image": site.prune > 0 or site.merge.image > 0, "text": site.merge.text > 0}
    missing = [stream for stream, asked in wanted.items() if asked and stream not in queries | keys]
    if missing:
        raise PlanError(
            f"Site {site.at} has budgets for {' and '.join(missing)} tokens, but its attention is over "
            f"{attention.query_axis}."
        )
    if wanted["image"] and "image" not in keys:
        raise PlanError(
            f"Site {site.at} has budgets for image tokens, but its keys are {attention.key_axis}, and an image is "
            "matched by its keys. Choose a site that attends to the image."
        )
    if site.prune > 0 and "text" not in queries:
        raise PlanError(
            f"Site {site.at} prunes image tokens by the attention of the text, but its attention is over "
            f"{attention.query_axis} alone. Merge there instead, or prune at a cross-modal site."
        )


def repeated_module(path: str) -> str:
    """The innermost repeated module that holds a module: `encoder.layer.2` of `encoder.layer.2.attention`."""
    parts = path.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[: last + 1])


def cross_modal_layers(attentions: list[Attention]) -> frozenset[str]:
    """The repeated modules that hold a cross-modal attention; '' (the whole model) for one outside of any."""
    return frozenset(repeated_module(a.module) for a in attentions if a.cross_modal)


def attentions_in(attentions: list[Attention], layers: frozenset[str]) -> list[Attention]:
    """The attentions inside given modules, and the cross-modal ones."""
    named = layers - {""}
    return [a for a in attentions if a.cross_modal or any(inside(repeated_module(a.module), x) for x in named)]


def make_reducer(
    modality: str, tokens: int, keep: int, merge: int, schedule: Schedule, learned: int = 0
) -> StreamReducer:
    """The reducer of one stream.

    Args:
        modality: `image` or `text`.
        tokens, keep, merge: before, kept by the pruner, merged away by the merger.
        schedule: its method and semantics.
        learned: leading learned tokens (class tokens); they stay under `safe`, and with ToMe.
    """
    if schedule.method == "tome":
        merger = ModalityAwareMerger(merge, protected=learned, keep_padding_apart=True)
        return StreamReducer(tokens, None, merger, averaging="sizes", carried="sum")
    safe = schedule.semantics == "safe"
    pruner = None
    if keep < tokens:
        pruner = TextInformedPruner(keep, protected=learned if safe else 0, pads_vote=not safe)
    merger = ModalityAwareMerger(
        merge,
        similarity="dot" if schedule.semantics == "paper" else "cosine",
        protected=max(1, learned) if safe else 1,
        keep_padding_apart=safe,
    )
    ones = schedule.semantics == "reference" and modality == "image"
    carried: Carried = "sum" if safe else "ones" if ones else "mean"
    return StreamReducer(tokens, pruner, merger, averaging="sizes" if safe else "plain", carried=carried)


def reducers_of(module: nn.Module) -> dict[str, StreamReducer]:
    """Reducers inside a module by path."""
    return {name: m for name, m in module.named_modules() if isinstance(m, StreamReducer)}
