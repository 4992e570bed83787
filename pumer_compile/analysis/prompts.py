"""Prompt: say plainly where images stand in a language model's prompt.

Models of LLaVA's kind look a prompt up in the word table, placeholders included, and scatter the projected image
features over the placeholders (`masked_scatter`). Where these stand is data; for one compiled prompt form it is fixed.
This pass reads it off the sample ids and writes it down as what it is: words, image, words, and so on, joined by a
`cat`. From there on the axes of the prompt follow by the ordinary rules. It also marks where the features leave the
vision tower for the projector, as streams of their own (`visual_tokens`), one for each block of placeholders.

Where several rows of the tower's output make one prompt (images, or the crops of one), or tokens are rearranged on the
way (`arrangement.py`), the tokens are brought into the prompt's order before the projector, which looks at each token
alone. Learned separators between them (the end of a picture's row) are kept until a reducer drops them.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx

from ..errors import AxisError
from ..plan import PromptPlace
from .arrangement import SEPARATOR, Arrangement, arrangement
from .attention import Parts
from .axes import ByPosition, Constraint, Dim, Same, Seed
from .constant_places import (
    Block,
    lookups_of_words,
    lower_constant_places,
    lower_other_lookups,
    masked_updates,
    same_tokens,
)
from .dead_code import with_writes
from .lineage import Lineage, lineage
from .nodes import (
    Emitter,
    after_attention,
    ancestors,
    attribute,
    constant_value,
    copied,
    depends_on_input,
    describe,
    keep_parameters,
    module_path,
    values,
)
from .operators import ATTENTION, JOINS, SOFTMAX, aten, overloads
from .rules import argument, rule, shape

ActsOn = Literal["tower", "rows", "layers"]
"""Where image tokens are to be reduced, and marked therefore: see `methods/base.py`."""
_SCATTER = aten.masked_scatter.default
_ATTENTION = SOFTMAX | {ATTENTION}
# What may stand between tower and prompt where tokens of several rows become one stream: each token by itself.
_BY_TOKEN = {
    *overloads(
        "linear gelu relu silu sigmoid tanh mul add div layer_norm rms_norm dropout contiguous clone to _to_copy"
    ),
    *overloads("pow rsqrt alias"),
}


def visual_tokens(features: Tensor, place: str = "prompt") -> Tensor:
    """A mark in the graph: these are the tokens that a vision tower gives, `[batch, tokens, width]`; `place` names
    their stream."""
    return features


def with_text(*parts: Tensor) -> Tensor:
    """The blocks of one image and the text between them, `[batch, tokens, width]`, side by side."""
    return torch.cat(parts, 1)


def with_separators(image: Tensor, whole: Tensor, place: str = "prompt") -> Tensor:
    """A mark in the graph: `whole`, `[batch, tokens, width]`, is `image` with learned separators between its tokens."""
    return whole


@rule(visual_tokens)
def _visual_tokens(node: fx.Node) -> list[Constraint]:
    (source,) = node.all_input_nodes
    return [
        Same(Dim(node, 0), Dim(source, 0)),
        Same(Dim(node, 2), Dim(source, 2)),
        ByPosition(Dim(source, 1)),
        Seed((Dim(node, 1),), f"image@{_place(node, 1)}"),
    ]


@rule(with_text)
def _with_text(node: fx.Node) -> list[Constraint]:
    parts = node.all_input_nodes
    same = [Same(Dim(node, dim), Dim(part, dim)) for part in parts for dim in (0, 2)]
    return [*same, *(ByPosition(Dim(part, 1)) for part in parts)]


@rule(with_separators)
def _with_separators(node: fx.Node) -> list[Constraint]:
    image, whole = node.args[:2]
    assert isinstance(image, fx.Node) and isinstance(whole, fx.Node)
    opaque = [ByPosition(Dim(source, i)) for source, dims in ((image, (1,)), (whole, (0, 1, 2))) for i in dims]
    same = [Same(Dim(node, 0), Dim(image, 0)), Same(Dim(node, 2), Dim(image, 2))]
    return [*same, *opaque, Seed((Dim(node, 1),), f"image@{_place(node, 2)}")]


def _place(node: fx.Node, argument: int) -> object:
    return node.args[argument] if len(node.args) > argument else "prompt"


@dataclass(frozen=True)
class Votes:
    """Where the votes for the rows of a prompt come from.

    Attributes:
        deciding: the attentions that are read.
        members: of each row of each prompt, the numbers of its tokens among those of all these attentions.
        by_class: whether the first token of each of them is a class token, which no row holds; it votes alone.
        own: for each attention, the number of the key that belongs to its first token.
    """

    deciding: tuple[Parts, ...]
    members: tuple[tuple[tuple[int, ...], ...], ...]
    by_class: bool
    own: tuple[int, ...]


@dataclass(frozen=True)
class Words:
    """The text of every prompt.

    Attributes:
        node: its embeddings, and those of the placeholders of images, `[batch, length, width]`.
        places: of words among them, without the two beside each image, which mark where it begins and ends.
    """

    node: fx.Node
    places: tuple[int, ...]


@dataclass(frozen=True)
class Tower:
    """The features that leave the vision tower, where each row of a prompt is one of its tokens.

    Attributes:
        features: `[rows, tokens of a row, width]`.
        order: of each marked token, its number among those of the prompt's rows (`row * tokens of a row + token`).
        count: tokens of all rows of one prompt.
    """

    features: fx.Node
    order: tuple[int, ...]
    count: int


@dataclass(frozen=True)
class Mark:
    """Image tokens of one block of every prompt, where they leave the vision tower, or enter the prompt.

    Attributes:
        node: the `visual_tokens` node, `[batch, tokens, width]`.
        features: what leaves the tower, `[rows, tokens of a row, width]`; or what enters the prompt.
        order: of each token, its number among those of the prompt's rows (`row * tokens of a row + token`); None where
            a prompt has one row, as it is.
        crops: places in the block of each row's tokens, in their order.
        separated: the `with_separators` node, if any.
        origin: for each place of it, the number of the token in `node`, or `SEPARATOR`.
        votes: for rows that enter the prompt.
        pinned: places of text within an image that stands in several blocks (marks at the ends of its lines); it stays.
        early: whether it begins at the token of text in front of the image. The votes are then those of its rows in the
            order of the tower, from that token on; and the last row is pinned.
        enters: whether these are the rows that enter the prompt, and no features that leave a tower.
        words: of rows that enter the prompt, the text around them; None where it is not looked up in one table.
        tower: of such rows, what they were in the tower; None where they are not one of its tokens each.
    """

    node: fx.Node
    features: fx.Node
    order: tuple[int, ...] | None
    crops: tuple[tuple[int, ...], ...]
    separated: fx.Node | None = None
    origin: tuple[int, ...] = ()
    votes: Votes | None = None
    pinned: tuple[int, ...] = ()
    early: bool = False
    enters: bool = False
    words: Words | None = None
    tower: Tower | None = None

    @property
    def prompted(self) -> fx.Node:
        """The block's tokens as the prompt has them, separators included."""
        return self.separated or self.node

    @property
    def place(self) -> str:
        """What the stream of those is called."""
        return str(_place(self.node, 1) if self.separated is None else _place(self.separated, 2))


@dataclass(frozen=True)
class Prompt:
    """A graph without the scatter into its prompt: text, image, text joined by `cat`.

    Attributes:
        module: a copy of the captured graph; parameters are shared.
        marks: where image tokens leave the tower, for each block of a prompt.
        places: where the images stand, for those whose placeholder is an id.
        blocks: where each mark's block stands.
    """

    module: fx.GraphModule
    marks: list[Mark]
    places: list[PromptPlace]
    blocks: list[Block] = field(default_factory=list)


def lower_masked_scatter(
    captured: fx.GraphModule,
    inputs: Mapping[str, Tensor],
    acts_on: ActsOn = "tower",
    *,
    votes: bool = True,
    early: bool = False,
) -> Prompt | None:
    """The graph with each scatter into a prompt lowered to a `cat`; None where nothing is scattered into one.

    Args:
        captured: pre-decomposition ATen graph; it is not changed.
        inputs: the sample inputs, whose placeholder ids say where images stand.
        acts_on: mark the features where they leave the vision tower; or the rows that are scattered, whatever they are
            made of (crop by crop, without the separators between them, or for `layers` as they are).
        votes: find the attention of the tower that decides over rows.
        early: of a tower without a class token: begin the mark of an image of one crop at the token of text in front of
            it (`Mark.early`).

    Raises:
        AxisError: the placeholders stand elsewhere in another row, or do not fit the features; or more than moving
            happens to features between projector and prompt.
    """
    if not any(node.target is _SCATTER for node in captured.graph.nodes):
        return None
    graph = copied(captured.graph)
    module = fx.GraphModule(captured, graph)
    keep_parameters(captured, module)
    prompt = Prompt(module, [], [])
    words: set[fx.Node] = set()
    updates = masked_updates(graph)
    for node in [n for n in graph.nodes if n.target is _SCATTER]:
        behind = ancestors(node)
        if node in updates and behind & {mark.node for mark in prompt.marks}:
            continue  # it adds to an image that is in the prompt already
        if node in updates and after_attention(node.args[0]):
            raise AxisError(
                f"{describe(node)} adds image features to places of a prompt that layers have read before an image was "
                "there; an image is reduced as it enters the prompt, in front of the first layer."
            )
        words |= lookups_of_words(node.args[0])
        needed = any(n.target in _ATTENTION for n in behind)  # the output of a tower
        if not votes:
            needed = any(n.op == "placeholder" and values(n)[0].is_floating_point() for n in behind)
        if needed:
            scatter = _Scatter(prompt, node, inputs, updates=node in updates)
            scatter.early = early and not updates  # later layers add to an image as it stands
            scatter.lower(acts_on, votes)
    graph.eliminate_dead_code()
    names = [mark.place for mark in prompt.marks]
    images = dict(zip(prompt.blocks, names, strict=True))
    lower_constant_places(graph, images, [mark.node for mark in prompt.marks], inputs, updates)
    lower_other_lookups(graph, images, words)
    graph.eliminate_dead_code()
    if acts_on == "rows":
        text = _words(prompt, words)
        prompt.marks[:] = [replace(mark, words=text) for mark in prompt.marks]
    if acts_on != "layers":
        again = [node for node in graph.nodes if node.target is same_tokens]
        text_nodes = [mark.words.node for mark in prompt.marks if mark.words is not None]
        _hoist(graph, [*(mark.prompted for mark in prompt.marks), *again, *text_nodes])
    graph.lint()
    module.recompile()
    return prompt if prompt.marks else None


def _words(prompt: Prompt, lookups: set[fx.Node]) -> Words | None:
    """The text of a prompt; None where it is not looked up in one table."""
    there = set(prompt.module.graph.nodes)
    found = [node for node in lookups if node in there and values(node)[0].dim() == 3]
    if len(found) != 1:
        return None
    beside = {place for start, stop in prompt.blocks for place in range(start - 1, stop + 1)}
    return Words(found[0], tuple(p for p in range(int(values(found[0])[0].shape[1])) if p not in beside))


def _hoist(graph: fx.Graph, marks: list[fx.Node]) -> None:
    """Let everything that the marks need come before everything else: positions in a prompt may be counted before the
    image is looked at, and have to be counted over what is left of it."""
    early = with_writes(graph, set(marks).union(*(ancestors(mark) for mark in marks)))
    nodes = list(graph.nodes)
    first = next((n for n in nodes if n.op == "call_function" and n not in early), None)
    if first is None:
        return
    for node in nodes[nodes.index(first) :]:
        if node in early:
            first.prepend(node)


@dataclass
class Image:
    """An image of a prompt.

    Attributes:
        blocks: where it stands.
        rows: of those that are scattered into one prompt.
        owners: of its tokens (`Lineage.owners`).
    """

    blocks: list[Block]
    rows: list[int]
    owners: set[int]

    @property
    def span(self) -> Block:
        """From its first place in the prompt to its last."""
        return self.blocks[0][0], self.blocks[-1][1]

    @property
    def length(self) -> int:
        """Of the span."""
        return self.span[1] - self.span[0]

    @property
    def places(self) -> tuple[int, ...]:
        """Of its rows within the span."""
        return tuple(place - self.span[0] for block in self.blocks for place in range(*block))

    @property
    def pinned(self) -> tuple[int, ...]:
        """Of the text between them."""
        own = set(self.places)
        return tuple(place for place in range(self.length) if place not in own)


def voting(node: fx.Node, batch: int, image: Image, found: Lineage) -> tuple[tuple[tuple[int, ...], ...], Votes]:
    """Places of an image that are reduced together (of one tile or frame), and whose votes they get.

    Args:
        node: for messages.
        batch: prompts.
        image: of each of them.
        found: what its rows are made of.

    Raises:
        AxisError: it is another in another prompt.
    """
    owners, share = found.owners(), len(found.members) // batch
    held = {token for row in found.members for token in row}
    by_class = all(token not in held for token, place in enumerate(found.places()) if place == 0)
    kinds, members = [], []
    for prompt in range(batch):
        own = {p: found.members[prompt * share + r] for p, r in zip(image.places, image.rows, strict=True)}
        real = {place: tokens for place, tokens in own.items() if tokens}
        kinds.append(_together([*real], [{owners[token] for token in tokens} for tokens in real.values()]))
        some = next(iter(real.values()))
        members.append(tuple(real.get(place, some) for place in range(image.length)))
    if len(set(kinds)) > 1:
        raise AxisError(
            f"{describe(node)} has images of another shape, or another number of them, in another prompt of the batch. "
            "Compile for a batch of one, or for prompts of one form."
        )
    return kinds[0], Votes(found.deciding, tuple(members), by_class, found.own)


def made_of(rows: fx.Node, width: int, *, needed: bool) -> Lineage | None:
    """What rows of a prompt are made of; None where no attention comes before them, or where that is not `needed` and
    not found: then a block of a prompt is an image.

    Raises:
        AxisError: it is not found.
    """
    try:
        return lineage(rows, width)
    except AxisError:
        if needed:
            raise
        return None


class _Scatter:
    """One `masked_scatter` of image features into words."""

    def __init__(self, prompt: Prompt, node: fx.Node, inputs: Mapping[str, Tensor], *, updates: bool) -> None:
        self.prompt, self.node, self.inputs, self.updates = prompt, node, inputs, updates
        words, mask, source = node.args
        assert isinstance(words, fx.Node) and isinstance(mask, fx.Node) and isinstance(source, fx.Node)
        self.words, self.mask, self.source = words, mask, source
        self.batch, self.length, self.width = values(words)[0].shape
        self.emit = Emitter(node)
        # An output of the model, say.
        self.others = [user for user in source.users if user is not node]
        self.tower: tuple[fx.Node, Arrangement] | None = None
        self.early = False

    def lower(self, acts_on: ActsOn, votes: bool) -> None:
        """Mark the image; see `lower_masked_scatter`."""
        blocks = self._blocks()
        if acts_on == "tower":
            self._lower_features(blocks)
            return
        found = made_of(self.source, int(self.width), needed=votes)
        if votes:
            self._check_members(found)
        if acts_on == "rows":
            with contextlib.suppress(AxisError):
                arranged = arrangement(self.node, self.source, self.batch)
                self.tower = _tower_output(self.node, arranged.projected)[0], arranged
        self._mark_images(blocks, found, votes=votes, by_crop=acts_on == "rows")

    def _lower_features(self, blocks: list[Block]) -> None:
        """Mark the features: where they leave their tower, if each row of the prompt is one of its tokens (the
        published place); or else the rows that enter the prompt, with the tokens that they are made of."""
        found, why = None, None
        try:
            found = lineage(self.source, int(self.width))
        except AxisError as error:
            why = error
        # What adds to rows of the prompt is behind that place.
        if found is None or (not self.updates and all(len(tokens) < 2 for tokens in found.members)):
            marks = len(self.prompt.marks)
            try:
                return self._where_published(blocks)
            except AxisError as published:
                if found is None or not all(found.members):
                    raise why or published from published
                del self.prompt.marks[marks:]
        self._check_members(found)
        self._mark_images(blocks, found, votes=True, by_crop=True)

    def _check_members(self, found: Lineage | None) -> None:
        """Rows that are made of the same tokens get the same votes: nothing would decide between them."""
        if found is None:
            raise AxisError(
                f"{describe(self.node)} scatters rows into the prompt, and no attention of a vision tower was found "
                "that tells them apart. `method: fastv` reads the language model's own attention."
            )
        share = len(found.members) // int(self.batch)
        for prompt in range(int(self.batch)):
            rows = found.members[prompt * share : (prompt + 1) * share]
            again = next((place for place, row in enumerate(rows) if row and row in rows[:place]), None)
            if again is not None:
                raise AxisError(
                    f"{describe(self.node)} has the same tokens of the vision tower at several places of the prompt "
                    f"(rows {rows.index(rows[again])} and {again} of the image), and no vote would decide between "
                    "them. `method: fastv` reduces the rows of the prompt."
                )

    def _where_published(self, blocks: list[Block]) -> None:
        found = arrangement(self.node, self.source, self.batch)
        graph = self.prompt.module.graph
        with graph.inserting_before(self.source.next):  # others may read it before the scatter does
            images = self._single_image(found) if len(blocks) == 1 and found.in_place else self._arranged(found, blocks)
            if self.others:
                self._replace_source(images)
        with graph.inserting_before(self.node):
            self._join(images, blocks)
        self.prompt.blocks.extend(blocks)
        graph.erase_node(self.node)

    def _images(self, blocks: list[Block], found: Lineage | None) -> list[Image]:
        """The images of a prompt: a block each; or several blocks that one image is cut into, line by line."""
        images: list[Image] = []
        done = 0
        for start, stop in blocks:
            rows = range(done, done + stop - start)
            owners = self._owners(found, rows)
            done += stop - start
            if images and found is not None and images[-1].owners & owners:
                images[-1].blocks.append((start, stop))
                images[-1].rows.extend(rows)
                images[-1].owners |= owners
            else:
                images.append(Image([(start, stop)], [*rows], owners))
        return images

    def _owners(self, found: Lineage | None, rows: Iterable[int]) -> set[int]:
        if found is None:
            return set()
        owners = found.owners()
        return {owners[token] for row in rows for token in found.members[row]}

    def _mark_images(self, blocks: list[Block], found: Lineage | None, *, votes: bool, by_crop: bool) -> None:
        """Mark the rows of every image: by crop or as a whole, with the tokens that vote for them or without."""
        images, marked, spans = self._images(blocks, found), [], list[Block]()
        with self.prompt.module.graph.inserting_before(self.node):
            whole = self.emit(aten.reshape.default, self.source, [self.batch, -1, self.width])
            for image in images:
                rows = self._span(whole, image)
                crops, members = ((image.places,), None) if found is None else self._voting(image, found)
                spans.append(image.span)
                if not by_crop:
                    crops = (image.places,)
                elif found is not None and self._may_begin_early(image, blocks, crops, found, members):
                    marked.append(self._from_text(image, rows, members))
                    spans[-1] = image.span[0] - 1, image.span[1]
                    continue
                elif separators := self._separators(image, found):
                    marked.append(self._without_separators(image, rows, separators, crops, members if votes else None))
                    continue
                mark = self.emit(visual_tokens, rows, f"prompt{self._suffix()}")
                about: dict[str, Any] = {"votes": members if votes else None, "tower": self._in_tower(image)}
                self.prompt.marks.append(Mark(mark, rows, None, crops, pinned=image.pinned, enters=True, **about))
                marked.append(mark)
            self._join(marked, spans)
        self.prompt.blocks.extend(spans)
        self.prompt.module.graph.erase_node(self.node)

    def _may_begin_early(
        self, image: Image, blocks: list[Block], crops: tuple[tuple[int, ...], ...], found: Lineage, votes: Votes | None
    ) -> bool:
        """Whether a mark is to begin at the text in front of an image, and can."""
        start, behind = image.span[0], {stop for _, stop in blocks}
        whole = crops == (image.places,) and not image.pinned and not self._separators(image, found)
        return self.early and votes is not None and not votes.by_class and whole and start > 0 and start not in behind

    def _from_text(self, image: Image, rows: fx.Node, votes: Votes | None) -> fx.Node:
        """Mark the rows of an image from the text in front of it on (`Mark.early`)."""
        assert votes is not None
        start = image.span[0]
        front = self.emit(aten.slice.Tensor, self.words, 1, start - 1, start)
        rows = self.emit(with_text, front, rows)
        mark = self.emit(visual_tokens, rows, f"prompt{self._suffix()}")
        members = tuple((*sorted(prompt), prompt[-1]) for prompt in votes.members)
        about: dict[str, Any] = {"votes": replace(votes, members=members), "early": True, "enters": True}
        crop = tuple(range(image.length))
        self.prompt.marks.append(Mark(mark, rows, None, (crop,), pinned=(image.length,), **about))
        return mark

    def _separators(self, image: Image, found: Lineage | None) -> list[int]:
        """Places of an image's span that hold rows which are made of no token (learned marks at the ends of lines)."""
        if found is None:
            return []
        return [p for p, row in zip(image.places, image.rows, strict=True) if not found.members[row]]

    def _without_separators(
        self,
        image: Image,
        rows: fx.Node,
        separators: list[int],
        crops: tuple[tuple[int, ...], ...],
        votes: Votes | None,
    ) -> fx.Node:
        """Mark the rows of an image without the separators, which a reducer drops."""
        suffix = self._suffix()
        order = [place for place in range(image.length) if place not in set(separators)]
        number = {place: i for i, place in enumerate(order)}
        own = self.emit(aten.index_select.default, rows, 1, self._constant(torch.tensor(order)))
        mark = self.emit(visual_tokens, own, f"crops{suffix}")
        whole = self.emit(with_separators, mark, rows, f"prompt{suffix}")
        if votes is not None:
            members = tuple(tuple(prompt[place] for place in order) for prompt in votes.members)
            votes = replace(votes, members=members)
        among = tuple(tuple(number[place] for place in crop) for crop in crops)
        pinned = tuple(number[place] for place in image.pinned)
        origin = tuple(number.get(place, SEPARATOR) for place in range(image.length))
        tower = self._in_tower(image, order)
        self.prompt.marks.append(Mark(mark, own, None, among, whole, origin, votes, pinned, enters=True, tower=tower))
        return whole

    def _in_tower(self, image: Image, places: Sequence[int] | None = None) -> Tower | None:
        """What the rows at some places of an image were in the tower; None where one of them is not one token."""
        if self.tower is None:
            return None
        features, found = self.tower
        number = dict(zip(image.places, image.rows, strict=True))
        order = [int(found.origin[number[p]]) if p in number else SEPARATOR for p in places or range(image.length)]
        count = found.rows * int(values(features)[0].shape[1])
        fits = values(features)[0].shape[0] == found.rows * self.batch and found.tokens * found.rows == count
        return Tower(features, tuple(order), count) if fits and SEPARATOR not in order else None

    def _voting(self, image: Image, found: Lineage) -> tuple[tuple[tuple[int, ...], ...], Votes]:
        return voting(self.node, int(self.batch), image, found)

    def _span(self, whole: fx.Node, image: Image) -> fx.Node:
        """An image's rows, with the text between its blocks."""
        parts, done = [], image.rows[0]
        for number, (start, stop) in enumerate(image.blocks):
            if number:
                parts.append(self.emit(aten.slice.Tensor, self.words, 1, image.blocks[number - 1][1], start))
            parts.append(self.emit(aten.slice.Tensor, whole, 1, done, done + stop - start))
            done += stop - start
        return self.emit(with_text, *parts) if len(parts) > 1 else parts[0]

    def _blocks(self) -> list[Block]:
        """Where the image stands, in every prompt alike.

        Raises:
            AxisError: that is open, or its features do not fit there.
        """
        given = values(self.source)[0]
        if not all(isinstance(size, int) for size in (self.batch, self.length, *given.shape)):
            raise AxisError(
                f"{describe(self.node)} scatters image features whose number depends on data; a prompt of one form has "
                "a fixed number of them. Let the model keep all features of an image, with none chosen by a mask, or "
                "compile a part without it (--component, --outputs)."
            )
        filled = constant_value(self.mask, self.inputs)
        if filled is None:
            raise AxisError(f"{describe(self.node)} fills places whose number is open; an image needs a fixed place.")
        blocks = _blocks(self.node, filled)
        places = sum(stop - start for start, stop in blocks)
        if given.numel() != self.batch * places * self.width:
            raise AxisError(
                f"{describe(self.node)} fills {places} placeholders in each prompt, and the image features "
                f"{tuple(given.shape)} do not fit them."
            )
        known = _placeholder(self.mask)
        if known is not None:
            self.prompt.places.extend(PromptPlace(*known, start, stop) for start, stop in blocks)
        return blocks

    def _suffix(self) -> str:
        """Blocks side by side (in an output of the model) must not be taken for one stream."""
        number = len(self.prompt.marks)
        return f"_{number + 1}" if number else ""

    def _join(self, images: list[fx.Node], blocks: list[Block]) -> None:
        """Words and images side by side, in place of the scatter."""
        parts, position = [], 0
        for image, (start, stop) in zip(images, blocks, strict=True):
            if position < start:
                parts.append(self.emit(aten.slice.Tensor, self.words, 1, position, start))
            parts.append(image)
            position = stop
        if position < self.length:
            parts.append(self.emit(aten.slice.Tensor, self.words, 1, position, self.length))
        self.node.replace_all_uses_with(self.emit(aten.cat.default, parts, 1))

    def _replace_source(self, images: list[fx.Node]) -> None:
        """Let everything else that reads the source see the same tokens, without the batch taken apart."""
        whole = self.emit(aten.cat.default, images, 1) if len(images) > 1 else images[0]
        shape = [-1, self.width] if values(self.source)[0].dim() == 2 else [self.batch, -1, self.width]
        rows = self.emit(aten.view.default, whole, shape) if len(shape) == 2 else whole
        for user in self.others:
            user.replace_input_with(self.source, rows)

    # --- one row for each prompt, as it is ----------------------------------------------------------------------

    def _single_image(self, found: Arrangement) -> list[fx.Node]:
        features, user = _tower_output(self.node, found.projected)
        _check_published(features)
        behind = ancestors(self.source) | {self.source}
        with self.prompt.module.graph.inserting_after(features):
            mark = Emitter(user)(visual_tokens, features)
        for reader in [u for u in features.users if u is not mark and u in behind]:
            reader.replace_input_with(features, mark)
        self.prompt.marks.append(Mark(mark, features, None, (tuple(range(found.tokens)),)))
        return [self._cast(found.projected)]

    def _cast(self, image: fx.Node) -> fx.Node:
        dtype = values(self.source)[0].dtype
        return image if values(image)[0].dtype == dtype else self.emit(aten.to.dtype, image, dtype)

    # --- tokens of several rows, or rearranged ------------------------------------------------------------------

    def _arranged(self, found: Arrangement, blocks: list[Block]) -> list[fx.Node]:
        features, _ = _tower_output(self.node, found.projected)
        _check_published(features)
        projector = _projector_nodes(self.node, features, found.projected)
        images, done = [], 0
        seen: set[int] = set()
        for start, stop in blocks:
            origin = found.origin[done : done + stop - start]
            rows = set((origin[origin != SEPARATOR] // found.tokens).tolist())
            if seen & rows:
                raise AxisError(
                    f"{describe(self.node)} puts the tokens of one image into several blocks of the prompt (up to "
                    f"position {stop}), with words between. An image is reduced as a whole: give it one block."
                )
            seen |= rows
            images.append(self._block(found, features, projector, origin, done))
            done += stop - start
        return images

    def _block(
        self, found: Arrangement, features: fx.Node, projector: list[fx.Node], origin: Tensor, offset: int
    ) -> fx.Node:
        """The image of one block: its tokens in order, through the projector, and its separators."""
        order = origin[origin != SEPARATOR]
        if len(order) == 0:
            raise AxisError(f"{describe(self.node)} fills a block of the prompt with separators alone.")
        own = self.emit(aten.reshape.default, features, [self.batch, found.rows * found.tokens, -1])
        suffix = self._suffix()
        place = f"crops{suffix}" if len(order) < len(origin) else f"prompt{suffix}"
        mark = self.emit(visual_tokens, self.emit(aten.index_select.default, own, 1, self._constant(order)), place)
        image = self._cast(self._project(projector, features, mark, len(order)))
        rows = (order // found.tokens).tolist()
        by_token = order.argsort().tolist()
        crops = tuple(tuple(p for p in by_token if rows[p] == row) for row in dict.fromkeys(rows))
        if len(order) == len(origin):
            self.prompt.marks.append(Mark(mark, features, tuple(order.tolist()), crops))
            return image
        whole = self.emit(aten.reshape.default, self.source, [self.batch, -1, self.width])
        whole = self.emit(aten.slice.Tensor, whole, 1, offset, offset + len(origin))
        separated = self.emit(with_separators, image, whole, f"prompt{suffix}")
        numbers = (origin != SEPARATOR).cumsum(0) - 1
        among = tuple(torch.where(origin == SEPARATOR, SEPARATOR, numbers).tolist())
        self.prompt.marks.append(Mark(mark, features, tuple(order.tolist()), crops, separated, among))
        return separated

    def _project(self, projector: list[fx.Node], features: fx.Node, mark: fx.Node, tokens: int) -> fx.Node:
        """The projector once more, for the tokens of one block."""
        copies = {features: mark}
        for node in projector:
            # Keywords stay as they are; values follow the new shape.
            copies[node] = self.emit(
                node.target, *fx.map_arg(node.args, lambda n: copies.get(n, n)), **dict(node.kwargs)
            )
            copies[node].meta.update({k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")})
            shape = values(copies[node])[0].shape
            if list(shape[:2]) != [self.batch, tokens]:
                raise _not_by_token(self.node, node)
        return copies[projector[-1]] if projector else mark

    def _constant(self, numbers: Tensor) -> fx.Node:
        module = self.prompt.module
        name = f"_prompt_order_{len(self.prompt.marks)}"
        numbers = numbers.to(values(self.words)[0].device)
        module.register_buffer(name, numbers, persistent=False)
        node = module.graph.get_attr(name)
        mode = values(self.words)[0].fake_mode  # type: ignore[attr-defined]  # of a fake tensor
        node.meta["val"] = mode.from_tensor(numbers, static_shapes=True)
        return node


def _placeholder(mask: fx.Node) -> tuple[str, int] | None:
    """The input whose ids a mask compares, and with which id."""
    for node in ancestors(mask) | {mask}:
        if node.target is aten.eq.Scalar and isinstance(node.args[0], fx.Node) and isinstance(node.args[1], int):
            if node.args[0].op == "placeholder":
                return str(node.args[0].target), node.args[1]
    return None


def _blocks(scatter: fx.Node, mask: Tensor) -> list[Block]:
    """First and last-but-one place of every run of placeholders."""
    rows = mask.flatten(2).any(-1) if mask.dim() > 2 else mask
    if not bool((rows == rows[0]).all()):
        raise AxisError(
            f"{describe(scatter)} puts the image at other places in another prompt of the batch. One compiled prompt "
            "form has it at one place: pad the prompts in front, or compile for a batch of one."
        )
    found = rows[0].nonzero().flatten().tolist()
    if not found:
        raise AxisError(
            f"{describe(scatter)} finds no image placeholder in the sample prompt. Give inputs whose ids hold them, as "
            "the model's processor makes them."
        )
    filled = set(found)
    starts = [place for place in found if place - 1 not in filled]
    stops = [place + 1 for place in found if place + 1 not in filled]
    return list(zip(starts, stops, strict=True))


def _tower_output(scatter: fx.Node, projected: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The features that leave the tower, and the first learned operator outside of it, which takes them."""
    behind = ancestors(projected) | {projected}
    order = [n for n in projected.graph.nodes if n in behind]
    last = [n for n in order if n.target in _ATTENTION][-1]
    tower = _common([module_path(n) for n in ancestors(last) if _learned(n)])
    after = {last}
    for node in order:
        if node is last or not after & set(node.all_input_nodes):
            continue
        after.add(node)
        path = module_path(node)
        if _learned(node) and not (path == tower or path.startswith(f"{tower}.")):
            features = next(n for n in node.all_input_nodes if n in after)
            if values(features)[0].dim() != 3:
                raise AxisError(
                    f"{describe(node)} takes the features of the vision tower {tower} as "
                    f"{tuple(values(features)[0].shape)}; [images, tokens, width] is expected."
                )
            return features, node
    raise AxisError(
        f"{describe(scatter)} scatters the output of the vision tower {tower or '(the whole model)'} with no projector "
        "between; where its features leave is not found."
    )


def _together(places: Sequence[int], owners: Sequence[set[int]]) -> tuple[tuple[int, ...], ...]:
    """Places whose rows are of one tile or frame: they share an owner, or a row that has the owners of both (a mean of
    windows that are attended to one by one)."""
    groups: list[tuple[set[int], list[int]]] = []
    for place, own in zip(places, owners, strict=True):
        joined = [group for group in groups if group[0] & own]
        groups = [group for group in groups if not group[0] & own]
        groups.append((own.union(*(g[0] for g in joined)), [*(p for g in joined for p in g[1]), place]))
    return tuple(sorted(tuple(sorted(group[1])) for group in groups))


def _check_published(features: fx.Node) -> None:
    """What leaves the tower must be tokens of its last attention, without a class token.

    Raises:
        AxisError: several layers side by side, say.
    """
    behind = ancestors(features) | {features}
    last = [n for n in features.graph.nodes if n in behind and n.target in _ATTENTION][-1]
    tokens, node = values(last)[0].shape[-2], features
    while values(node)[0].shape[1] != tokens:
        if node.target is not aten.slice.Tensor or node.args[1] != 1 or not isinstance(node.args[0], fx.Node):
            raise AxisError(
                f"{describe(features)} gives features in which the tokens of {describe(last)} are not found."
            )
        node = node.args[0]
    if node is features and any(_leads_with_learned(n) for n in behind if n.target in JOINS):
        raise AxisError(f"{describe(features)} gives the class token of the vision tower to the prompt.")


def _leads_with_learned(join: fx.Node) -> bool:
    """Whether a class token is joined to tokens."""
    parts = join.args[0]
    if not isinstance(parts, list | tuple) or argument(join, 1, "dim", 0) != 1 or len(parts) < 2:
        return False
    first, *rest = (part for part in parts if isinstance(part, fx.Node))
    return len(shape(first)) == 3 and not depends_on_input(first) and any(map(depends_on_input, rest))


def _projector_nodes(scatter: fx.Node, features: fx.Node, projected: fx.Node) -> list[fx.Node]:
    """The projector: what makes `projected` of `features`, in order, each token by itself."""
    behind = ancestors(projected) | {projected}
    after, chain = {features}, []
    for node in projected.graph.nodes:
        if node in behind and after & set(node.all_input_nodes):
            if not _by_token(node, after) or values(node)[0].shape[:2] != values(features)[0].shape[:2]:
                raise _not_by_token(scatter, node)
            after.add(node)
            chain.append(node)
    return chain


def _by_token(node: fx.Node, features: set[fx.Node]) -> bool:
    """Whether an operator does the same to every token and mixes none."""
    if node.target not in _BY_TOKEN:
        return False
    if node.target in overloads("layer_norm rms_norm"):
        return len(node.args[1]) == 1  # type: ignore[arg-type]  # the normalized shape
    tables = [values(n)[0].shape for n in node.all_input_nodes if n not in features]
    return node.target in overloads("linear") or all(len(shape) < 2 or shape[-2] == 1 for shape in tables)


def _not_by_token(scatter: fx.Node, node: fx.Node) -> AxisError:
    return AxisError(
        f"{describe(node)} stands between the vision tower and {describe(scatter)}, where the tokens of several images "
        "or crops meet; it is not known to look at each token by itself. `method: fastv` reduces the tokens behind it."
    )


def _learned(node: fx.Node) -> bool:
    """Whether an operator reads a parameter itself."""
    return node.op == "call_function" and any(
        n.op == "get_attr" and isinstance(attribute(n), torch.nn.Parameter) for n in node.all_input_nodes
    )


def _common(paths: list[str]) -> str:
    """The longest module path that all paths lie in."""
    split = [path.split(".") for path in paths]
    shared = []
    for names in zip(*split, strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return ".".join(shared)
