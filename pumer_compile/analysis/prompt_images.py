"""The images of a prompt: where they stand, which rows are theirs, what these are made of and who votes for them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor, fx

from ..errors import AxisError
from .constant_places import Block
from .lineage import Lineage, lineage
from .marks import Votes
from .nodes import ancestors, describe
from .operators import aten


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


def _together(places: Sequence[int], owners: Sequence[set[int]]) -> tuple[tuple[int, ...], ...]:
    """Places whose rows are of one tile or frame: they share an owner, or a row that has the owners of both (a mean of
    windows that are attended to one by one)."""
    groups: list[tuple[set[int], list[int]]] = []
    for place, own in zip(places, owners, strict=True):
        joined = [group for group in groups if group[0] & own]
        groups = [group for group in groups if not group[0] & own]
        groups.append((own.union(*(g[0] for g in joined)), [*(p for g in joined for p in g[1]), place]))
    return tuple(sorted(tuple(sorted(group[1])) for group in groups))


def placeholder(mask: fx.Node, inputs: Mapping[str, Tensor], filled: Tensor) -> tuple[str, int] | None:
    """The input whose ids a mask compares, and with which id; of several comparisons behind it (what stood in the
    words before depends on other placeholders) the one that gives what it fills.

    Args:
        mask: over a prompt.
        inputs: the sample.
        filled: the mask's numbers for it, `[batch, length, ...]`.
    """
    behind = ancestors(mask) | {mask}
    compared = [
        (str(node.args[0].target), node.args[1])
        for node in mask.graph.nodes
        if node in behind and node.target is aten.eq.Scalar
        if isinstance(node.args[0], fx.Node) and node.args[0].op == "placeholder" and isinstance(node.args[1], int)
    ]
    rows = filled.flatten(2).any(-1) if filled.dim() > 2 else filled
    fits = [
        (name, number)
        for name, number in compared
        if name in inputs and inputs[name].shape == rows.shape and bool(((inputs[name] == number) == rows.bool()).all())
    ]
    found = dict.fromkeys(compared if len(set(compared)) == 1 else fits)
    return next(iter(found), None)


def placeholder_blocks(scatter: fx.Node, mask: Tensor) -> list[Block]:
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
