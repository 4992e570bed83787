"""Sites: where a reducer is inserted; and the questions that a method asks of a graph to find them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from torch import Tensor, fx

from ..analysis.annotate import Annotation
from ..analysis.attention import NOT_KNOWN, Attention, Parts, attention_parts, choose, tower_attention
from ..analysis.axes import Dim, Segment, Tokens
from ..analysis.carrier import norm_behind
from ..analysis.marks import Mark
from ..analysis.masks import hidden
from ..analysis.nodes import ancestors, describe, module_path, values
from ..analysis.rules import shape
from ..errors import LocateError

if TYPE_CHECKING:
    from ..methods.base import Method
    from ..methods.budgets import SiteBudget
    from ..plan import SitePlan
    from ..reducers import Reducer
    from .carried_weights import CarriedWeights
    from .rewriter import Rewriter

Replacement = Callable[["Rewriter", "CarriedWeights"], fx.Node | None]
"""Writes something else in place of a captured node; None: the node itself after all."""
Replacements = dict[fx.Node, Replacement]
Action = Callable[["Rewriter"], fx.Node | None]
"""Writes what follows a captured node, or takes its place; None: nothing."""


@dataclass(frozen=True)
class Stream:
    """Tokens of one stream at a site, before its reducer.

    Attributes:
        name: of the stream.
        modality: `image`, `text` or a name that the user gave.
        tokens: how many.
        learned: how many of these lead and are learned (class tokens).
        crops: of image tokens that leave a tower: places of each crop's tokens in the stream, in raster order.
        row: and how many tokens the tower gives for one crop.
        pinned: places of tokens among an image's that stay (text at the ends of its lines).
        class_token: whether the tower has a class token for each crop, which leaves it beside these tokens.
        by_class: whether votes are those of class tokens, and not of all tokens of the tower.
        early: whether the tokens begin with one of text in front of the image (`Mark.early`).
    """

    name: str
    modality: str
    tokens: int
    learned: int = 0
    crops: tuple[tuple[int, ...], ...] = ()
    row: int = 0
    pinned: tuple[int, ...] = ()
    class_token: bool = False
    by_class: bool = False
    early: bool = False

    @property
    def rows(self) -> int:
        """How many may go."""
        return self.tokens - len(self.pinned)


@dataclass
class Site:
    """Where reducers are inserted: `after` a carrier, or `instead` of marks.

    Attributes:
        attention: that the signals are read from; None where none is read (the rows of a prompt by themselves).
        after: the residual value that is reduced: the carrier of the attention, or what enters its layer; None where
            marks are.
        instead: where image tokens leave the tower, for each block of a prompt.
        streams: that may be reduced.
        budget: of the schedule, where it has one for each site.
        keys: whose keys or rows are read, where these are not the attention's.
        recounts: whether positions are counted anew behind it, where it stands between two layers.
        keep: tokens of each stream to leave, or the share of those before `first`, where it is one of several stages.
        first: the first stage of these.
        plan: token counts, once the rewriter has passed it; None where it was left out.
        reducers: by stream.
        passed: how many reducers each modality had passed before.
        method: whose site it is, where a schedule has several.
    """

    attention: Attention | None
    after: fx.Node | None = None
    instead: tuple[Mark, ...] = ()
    streams: tuple[str, ...] = ()
    budget: SiteBudget | None = None
    keys: Attention | None = None
    recounts: bool = False
    keep: float = 0
    first: Site | None = None
    plan: SitePlan | None = None
    reducers: dict[str, Reducer] = field(default_factory=dict)
    passed: dict[str, int] = field(default_factory=dict)
    method: Method | None = None

    @property
    def enters(self) -> bool:
        """Whether it stands before the layer of its attention."""
        return self.after is not None and self.attention is not None and self.after is not self.attention.carrier

    @property
    def name(self) -> str:
        """For the modules that are inserted, such as `vision_2`, or `before_cross_modal_2` of what stands in front of
        that; `prompt` for rows of a prompt."""
        if self.attention is None:
            return "prompt"
        return f"before_{self.attention.name}" if self.enters else self.attention.name

    @property
    def address(self) -> str:
        """For users: that of its attention, or `prompt`."""
        return "prompt" if self.attention is None else self.attention.address

    @property
    def module(self) -> str:
        """Path of the module that it stands in."""
        return module_path(self.instead[0].features) if self.attention is None else self.attention.module

    @property
    def call(self) -> int:
        """How many times its layer ran before, on other inputs."""
        return 0 if self.attention is None else self.attention.call

    @property
    def described(self) -> str:
        """For messages."""
        return "prompt (rows that enter it)" if self.attention is None else self.attention.described

    @property
    def opens(self) -> fx.Node | None:
        """The captured node with which what it saves begins."""
        if self.after is not None:
            return self.after
        return self.instead[0].node if self.attention is None else self.attention.carrier

    @property
    def epoch_dim(self) -> Dim | None:
        """The dimension whose epochs its signals are at."""
        return None if self.attention is None else self.attention.key_dim


@dataclass
class Insertions:
    """What the rewriter does beside copying nodes.

    Attributes:
        sites: in execution order.
        after: what follows a captured node.
        instead: what takes the place of one.
    """

    sites: list[Site]
    after: dict[fx.Node, Action]
    instead: dict[fx.Node, Action]

    @property
    def done(self) -> list[tuple[Site, SitePlan]]:
        """Sites that were reduced, with their plans, in execution order."""
        return [(site, site.plan) for site in self.sites if site.plan is not None]


@dataclass(frozen=True)
class LocatedGraph:
    """A captured graph with its axes and attentions, as methods ask for it.

    Attributes:
        annotation: axes of every value.
        attentions: in execution order.
        marks: where image tokens leave the vision tower, or enter the prompt.
        inputs: the sample.
    """

    annotation: Annotation
    attentions: list[Attention]
    marks: tuple[Mark, ...] = ()
    inputs: Mapping[str, Tensor] = field(default_factory=dict)

    # --- looking ------------------------------------------------------------------------------------------------------

    def choose(self, address: str) -> list[Attention]:
        """The attention of an address such as `cross_modal.2`: one node, or one for each time its layer runs.

        Raises:
            LocateError: there is none; the message lists what there is.
        """
        return choose(self.attentions, address)

    def attentions_from(self, first: Attention) -> list[Attention]:
        """An attention and those after it."""
        return self.attentions[self.attentions.index(first) :]

    def modality(self, stream: str) -> str:
        """The modality of a stream."""
        return self.annotation.modality[stream]

    def modalities(self, axis: Tokens) -> set[str]:
        """The modalities of an axis."""
        return {self.annotation.modality[stream] for stream in axis.streams}

    def prompt_images(self) -> tuple[str, ...]:
        """The streams of the images in a prompt."""
        axes = [self.annotation.axis(Dim(mark.prompted, 1)) for mark in self.marks]
        return tuple(s for axis in axes if isinstance(axis, Tokens) for s in axis.streams)

    def pinned(self, stream: str) -> tuple[int, ...]:
        """Places of what stays among the tokens of an image in a prompt."""
        for mark in self.marks:
            axis = self.annotation.axis(Dim(mark.prompted, 1))
            if isinstance(axis, Tokens) and stream in axis.streams:
                return mark.pinned
        return ()

    def behind(self, axis: Tokens, stream: str) -> list[Segment]:
        """The text behind an image on an axis."""
        segments = list(axis.segments)
        last = max(i for i, segment in enumerate(segments) if segment.stream == stream)
        return [s for s in segments[last + 1 :] if s.stream and self.modality(s.stream) == "text"]

    def prompt_layers(self) -> list[Attention]:
        """The attentions of a language model over a prompt with all its images."""
        images, found = set(self.prompt_images()), []
        for attention in self.attentions:
            both = set(attention.query_axis.streams) & set(attention.key_axis.streams)
            # The prompt's words need not be the first text (a query transformer may read the instruction before).
            if images <= both and any(self.modality(stream) == "text" for stream in both):
                found.append(attention)
        return found

    def reading_layers(self) -> list[Attention]:
        """The attentions of a language model to images that stand in no prompt, and are read by cross-attention."""
        wanted = set(self.prompt_images())
        return [
            a
            for a in self.attentions
            if wanted and wanted <= set(a.key_axis.streams) and not wanted & set(a.query_axis.streams)
        ]

    def hidden_from_last(self, attention: Attention, streams: tuple[str, ...]) -> tuple[str, ...]:
        """Of some streams of keys, those that the last query of the sample does not see whole."""
        found: dict[str, None] = {}
        for mask in attention.masks:
            hides = hidden(mask, self.inputs) if mask.by_query else None
            for stream in streams if hides is not None else ():
                start = attention.key_axis.offset(stream)
                length = sum(s.length for s in attention.key_axis.segments if s.stream == stream)
                assert hides is not None
                if bool(hides[..., -1, start : start + length].any()):
                    found[stream] = None
        return tuple(found)

    def place_of(self, site: Site) -> int:
        """A number that grows from site to site in execution order."""
        order = {node: number for number, node in enumerate(self.attentions[0].context.graph.nodes)}
        return -1 if site.after is None else order[site.after]

    def rows(self) -> list[Site]:
        """The rows of a prompt: one site without an attention, for all its images."""
        return [Site(None, instead=self.marks)]

    def towers(self) -> list[tuple[Attention, tuple[Mark, ...]]]:
        """The last attention of each tower before its marks, which makes the features that leave it.

        Raises:
            LocateError: no attention gives the features of a mark.
        """
        found: dict[fx.Node, tuple[Attention, tuple[Mark, ...]]] = {}
        for mark in self.marks:
            if mark.votes is not None:
                last = self._deciding(mark.votes.deciding[-1])
                found[last.context] = (last, (*(found[last.context][1] if last.context in found else ()), mark))
                continue
            before = ancestors(mark.node)
            tower = [a for a in self.attentions if a.context in before]
            if not tower:
                raise LocateError(f"No attention over image tokens was found before {describe(mark.node)}.")
            last = tower[-1]
            marks = found[last.context][1] if last.context in found else ()
            found[last.context] = (last, (*marks, mark))
        return list(found.values())

    def last_norm(self, value: fx.Node) -> tuple[fx.Node, fx.Node]:
        """What leaves the last layer of the language model, and the norm that follows it: the model's last.

        Args:
            value: residual, between two layers of it.

        Raises:
            LocateError: no norm follows.
        """
        layers = self.prompt_layers()
        sizes, axes = shape(value), self.annotation.axes(value)
        later = [layers[-1].context]
        found = {later[0]}
        for node in value.graph.nodes:
            if not found.isdisjoint(node.all_input_nodes):
                found.add(node)
                later.append(node)
        for node in reversed(later):
            if values(node) and shape(node) == sizes and self.annotation.axes(node) == axes:
                norm = norm_behind(node)
                if norm is not None:
                    return node, norm
        raise LocateError(
            f"Tokens are compared as the model's last norm leaves them, and none was found: looked behind the last "
            f"language layer, {layers[-1].described}, for a norm of each token of {axes[1]}."
        )

    def _deciding(self, parts: Parts) -> Attention:
        """The attention that decides over the rows of a prompt."""
        located = next((a for a in self.attentions if a.context is parts.context), None)
        return located or tower_attention(parts, len(attention_parts(parts.context)) - 1)

    # --- checks -------------------------------------------------------------------------------------------------------

    def check_masks(self, first: Attention) -> None:
        """From the first site on, a mask that is not understood could not be aligned.

        Raises:
            LocateError: there is one.
        """
        for attention in self.attentions_from(first):
            if NOT_KNOWN in attention.unusual:
                raise LocateError(
                    f"The attention {attention.described} cannot follow a reducer, because "
                    f"{attention.unusual}. Hide keys with a boolean mask (masked_fill, where), or add 0 and -inf."
                )

    def check_whole(self, attention: Attention) -> None:
        """Queries and keys must be whole streams.

        Raises:
            LocateError: a part of one stands apart.
        """
        parts = [s for axis in (attention.query_axis, attention.key_axis) for s in axis.segments if not s.whole]
        if parts:
            raise LocateError(
                f"Site {attention.described} is attention from {attention.query_axis} to {attention.key_axis}, where "
                f"{parts[0].length} of the {self.annotation.streams[parts[0].stream or '']} {parts[0].stream} tokens "
                "stand apart (learned queries, say); a reducer takes a stream whole."
            )

    def check_reducible(self, attention: Attention) -> None:
        """A site needs a residual value, and queries `[batch, heads, tokens, head size]`.

        Raises:
            LocateError: it has not.
        """
        if attention.carrier is None:
            raise LocateError(f"Site {attention.described} has no residual value to reduce: {attention.no_carrier}.")
        if len(shape(attention.query)) != 4:
            raise LocateError(
                f"Site {attention.described} has queries of shape {list(shape(attention.query))}; a reducer reads "
                "[batch, heads, tokens, head size]. Use a model whose attention keeps heads in a dimension of their "
                "own."
            )
        annotation, carrier = self.annotation, attention.carrier
        axes = enumerate(annotation.axes(carrier)[:2])
        batches = [Dim(carrier, i) for i, axis in axes if not isinstance(axis, Tokens)]
        first, second = (any(annotation.same(Dim(attention.query, i), b) for b in batches) for i in (0, 1))
        if second and not first:
            raise LocateError(
                f"Site {attention.described} has queries of shape {list(shape(attention.query))} with the heads before "
                "the batch; a reducer reads [batch, heads, tokens, head size]. Exchange the two in the model."
            )


def repeated_module(path: str) -> str:
    """The innermost repeated module that holds a module: `encoder.layer.2` of `encoder.layer.2.attention`."""
    parts = path.split(".")
    last = max((i for i, part in enumerate(parts) if part.isdigit()), default=-1)
    return ".".join(parts[: last + 1])


def cross_modal_layers(attentions: list[Attention]) -> frozenset[str]:
    """The repeated modules that hold a cross-modal attention; '' (the whole model) for one outside of any."""
    return frozenset(repeated_module(a.module) for a in attentions if a.cross_modal)
