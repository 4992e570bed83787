"""Marks: which nodes of a graph hold the image tokens of a prompt, and what is known of them.

A mark is an identity in the graph: where the features leave the vision tower for the projector, or rows enter the
prompt, as streams of their own (`visual_tokens`), one for each block of placeholders; with separators (the end of a
picture's row) that are kept until a reducer drops them, or text between the blocks of one image.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, fx

from ..plan import PromptPlace
from .attention import Parts
from .axes import ByPosition, Constraint, Dim, Same, Seed
from .constant_places import Block
from .rules import rule

ActsOn = Literal["tower", "rows", "layers"]
"""Where image tokens are to be reduced, and marked therefore: see `methods/base.py`."""


def visual_tokens(features: Tensor, place: str = "prompt") -> Tensor:
    """A mark in the graph: these are the tokens that a vision tower gives, `[batch, tokens, width]`; `place` names
    their stream."""
    return features


def with_text(*parts: Tensor) -> Tensor:
    """The blocks of one image and the text between them, `[batch, tokens, width]`, side by side."""
    return torch.cat(parts, 1)


def heard_tokens(sound: Tensor, words: Tensor) -> Tensor:
    """A mark in the graph: `sound`, `[batch, tokens, width]`, stands in a prompt in the place of as many `words`. It is
    no image, and stays as words do."""
    return sound


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


@rule(heard_tokens)
def _heard_tokens(node: fx.Node) -> list[Constraint]:
    sound, words = node.all_input_nodes
    given = [Same(Dim(node, dim), Dim(sound, dim)) for dim in (0, 2)]
    return [*given, *(Same(Dim(node, dim), Dim(words, dim)) for dim in range(3)), ByPosition(Dim(sound, 1))]


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
        places: where the images (and sound) stand, for those whose placeholder is an id.
        blocks: where each mark's block stands.
        sound: where what was heard stands, which is not marked.
    """

    module: fx.GraphModule
    marks: list[Mark]
    places: list[PromptPlace]
    blocks: list[Block] = field(default_factory=list)
    sound: list[Block] = field(default_factory=list)
