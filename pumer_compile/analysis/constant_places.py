"""Constant places: reads and writes at fixed places of a prompt, as slices and joins.

Models that add features of several depths of the tower to the first language layers (deepstack) read the image's
places, add, and write them back; others write learned embeddings over the placeholders of tags. With places that are
constants (`capture/follow.py`) both are cuts along the prompt, whose axes follow by the ordinary rules. So they are
where a mask of the placeholders says the places (`x.masked_scatter(mask, x[mask] + features)`) and these are the
images' own. What a tower gives for the places of an image is marked as tokens of that image (`same_tokens`): a
reducer's map brings it along.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, fx

from ..errors import AxisError
from .axes import ByPosition, Constraint, Dim, Same, Seed
from .nodes import Emitter, after_attention, ancestors, constant_value, describe, values
from .operators import CASTS, VIEWS, aten
from .rules import is_pointwise, node_arg, rule, source_input

_READ = aten.index.Tensor
_LOOKUP = aten.embedding.default
_WRITES = {aten.index_put_.default, aten.index_put.default}
_SCATTER = aten.masked_scatter.default
Block = tuple[int, int]


def same_tokens(features: Tensor, place: str = "prompt") -> Tensor:
    """A mark in the graph: features of the tokens of the image at a place, `[batch, tokens, width]`, for a later
    layer."""
    return features


def held_places(words: Tensor) -> Tensor:
    """A mark in the graph: what words left at the places of images, `[places, width]`. These rows are no text: features
    of image tokens are added to them."""
    return words


@rule(held_places)
def _held_places(node: fx.Node) -> list[Constraint]:
    (source,) = node.all_input_nodes
    return [*(ByPosition(Dim(source, i)) for i in (0, 1)), ByPosition(Dim(node, 0))]


@rule(same_tokens)
def _same_tokens(node: fx.Node) -> list[Constraint]:
    (source,) = node.all_input_nodes
    return [
        Same(Dim(node, 0), Dim(source, 0)),
        Same(Dim(node, 2), Dim(source, 2)),
        ByPosition(Dim(source, 1)),
        Seed((Dim(node, 1),), f"image@{node.args[1]}"),
    ]


def lower_constant_places(
    graph: fx.Graph,
    images: Mapping[Block, str],
    marks: Sequence[fx.Node],
    inputs: Mapping[str, Tensor] | None = None,
    updates: Mapping[fx.Node, fx.Node] | None = None,
) -> None:
    """Write reads and writes at constant places of a prompt as slices and joins.

    Args:
        graph: it is changed.
        images: the place of each image in the prompt, and what it is called.
        marks: of these images: what is computed from them holds the prompt.
        inputs: the sample inputs, whose ids say which places a mask gives.
        updates: scatters of `x[mask] + features` (`masked_updates`) and what they read, where some are lowered already;
            they are cuts too where these places are the images'.

    Raises:
        AxisError: features of a tower go to places that are no whole image's.
    """
    scatters = updates or {}
    masked = {*scatters, *scatters.values()}
    for node in list(graph.nodes):
        if node.target is not _READ and node.target not in _WRITES and node not in scatters:
            continue
        constant = [] if node in scatters else _blocks(node)
        blocks = constant or (_masked(node, images, inputs) if node in masked else [])
        if blocks and node.target is _READ:
            before = not (ancestors(node) & set(marks))  # what stood there before an image did
            _read(node, blocks, of_no_image=before and not constant)
        elif blocks:
            _Write(node, blocks, images, marks).lower()


def masked_updates(graph: fx.Graph) -> dict[fx.Node, fx.Node]:
    """Scatters that write back what they read (`x.masked_scatter(mask, x[mask] + features)`), and that read of each."""
    found = {node: _updated(node) for node in graph.nodes if node.target is _SCATTER}
    return {node: read for node, read in found.items() if read is not None}


def _updated(scatter: fx.Node) -> fx.Node | None:
    """The read `x[mask]` that a `masked_scatter(x, mask, ...)` writes back, changed element by element; None where what
    it writes is not made of what stood there."""
    words, _, source = scatter.args[:3]
    stack, seen = [source], set()
    while stack:
        node = stack.pop()
        if not isinstance(node, fx.Node) or node in seen:
            continue
        seen.add(node)
        if node.target is _READ and node.args[0] is words:
            return node
        if node.target in VIEWS or node.target in CASTS or is_pointwise(node):
            stack.extend(node.all_input_nodes)
    return None


def _masked(node: fx.Node, images: Mapping[Block, str], inputs: Mapping[str, Tensor] | None) -> list[Block]:
    """The blocks that a mask of a prompt's ids gives, `[batch, length]` or with a last dimension of 1, the same in
    every prompt and all of them images'; [] for anything else."""
    mask = node.args[1]
    if node.target is _READ:
        mask = mask[0] if isinstance(mask, Sequence) and len(mask) == 1 else None
    if inputs is None or not isinstance(mask, fx.Node) or not values(mask):
        return []
    shape = values(node_arg(node, 0))[0].shape
    of_prompt = values(mask)[0].dtype == torch.bool and len(shape) == 3
    if not of_prompt or tuple(values(mask)[0].shape) not in (tuple(shape[:2]), (*shape[:2], 1)):
        return []
    known = [n for n in ancestors(mask) | {mask} if n.op == "placeholder"]
    if any(values(n)[0].is_floating_point() for n in known):
        return []
    filled = constant_value(mask, inputs)
    rows = None if filled is None else filled.reshape(filled.shape[:2])
    if rows is None or not bool((rows == rows[0]).all()):
        return []
    blocks = _runs(rows[0].nonzero().flatten().tolist())
    return blocks if all(block in images for block in blocks) else []


def _runs(places: Sequence[int]) -> list[Block]:
    """First and last-but-one place of every run."""
    found = set(places)
    starts = [place for place in places if place - 1 not in found]
    stops = [place + 1 for place in places if place + 1 not in found]
    return list(zip(starts, stops, strict=True))


def _blocks(node: fx.Node) -> list[Block]:
    """The places along dimension 1 that constant indices `[rows], [places]` cover, the same in every prompt and in
    order; [] for anything else."""
    source, indices = node.args[:2]
    assert isinstance(source, fx.Node) and isinstance(indices, Sequence)
    shape = values(source)[0].shape
    if len(indices) != 2 or len(shape) != 3 or not all(isinstance(size, int) for size in shape):
        return []
    if not all(isinstance(i, fx.Node) and not _reads_input(i) for i in indices):
        return []
    rows, places = (constant_value(i) for i in indices)  # type: ignore[arg-type]  # nodes, as was asked
    if rows is None or places is None or rows.dim() != 1 or rows.shape != places.shape:
        return []
    mask = torch.zeros(shape[0], shape[1], dtype=torch.bool)
    mask[rows, places] = True
    if mask.nonzero().tolist() != torch.stack([rows, places], 1).tolist() or not bool((mask == mask[0]).all()):
        return []
    return _runs(mask[0].nonzero().flatten().tolist())


def _reads_input(node: fx.Node) -> bool:
    return any(n.op == "placeholder" for n in ancestors(node) | {node})


def _read(node: fx.Node, blocks: list[Block], *, of_no_image: bool) -> None:
    source = node.args[0]
    emit, width = Emitter(node), values(node)[0].shape[-1]
    with node.graph.inserting_before(node):
        parts = [emit(aten.slice.Tensor, source, 1, start, stop) for start, stop in blocks]
        whole = emit(aten.cat.default, parts, 1) if len(parts) > 1 else parts[0]
        rows = emit(aten.reshape.default, whole, [-1, width])
        node.replace_all_uses_with(emit(held_places, rows) if of_no_image else rows)
    node.graph.erase_node(node)


def lookups_of_words(words: fx.Node) -> set[fx.Node]:
    """The lookups that a prompt's words come from."""
    return {n for n in ancestors(words) | {words} if n.target is _LOOKUP and _input(n)}


def lower_other_lookups(graph: fx.Graph, images: Mapping[Block, str], words: set[fx.Node]) -> None:
    """Say of what else is looked up for every token of a prompt (embeddings for each layer of a language model) that it
    is an image's where that stands.

    Args:
        graph: it is changed.
        images: the place of each image in the prompt, and what it is called.
        words: the lookups that the prompt comes from.
    """
    there = set(graph.nodes)  # a prompt of images alone looks no word up
    read = {(_input(node), tuple(values(node)[0].shape[:2])) for node in words & there}
    for node in [n for n in graph.nodes if n.target is _LOOKUP and n not in words]:
        if (_input(node), tuple(values(node)[0].shape[:2])) not in read or values(node)[0].dim() != 3:
            continue
        emit, position, parts = Emitter(node), 0, []
        with graph.inserting_before(node.next):
            for (start, stop), place in sorted(images.items()):
                if position < start:
                    parts.append(emit(aten.slice.Tensor, node, 1, position, start))
                parts.append(emit(same_tokens, emit(aten.slice.Tensor, node, 1, start, stop), place))
                position = stop
            if position < values(node)[0].shape[1]:
                parts.append(emit(aten.slice.Tensor, node, 1, position, values(node)[0].shape[1]))
            whole = emit(aten.cat.default, parts, 1)
        cuts = {x for part in parts for x in (part, *part.all_input_nodes)}
        for user in [user for user in node.users if user not in cuts]:
            user.replace_input_with(node, whole)


def _input(lookup: fx.Node) -> fx.Node | None:
    return source_input(node_arg(lookup, 1))


def _before_views(value: fx.Node, shape: list[int]) -> fx.Node:
    """What a value is viewed from, of that shape; the value itself where there is no such thing."""
    before = value
    while list(values(before)[0].shape) != shape:
        if before.target not in VIEWS:
            return value
        before = node_arg(before, 0)
    return before


class _Write:
    """One `index_put` or `masked_scatter` at constant places of every prompt."""

    def __init__(
        self, node: fx.Node, blocks: list[Block], images: Mapping[Block, str], marks: Sequence[fx.Node]
    ) -> None:
        source, _, value = node.args[:3]
        assert isinstance(source, fx.Node) and isinstance(value, fx.Node)
        batch, self.length, width = (int(size) for size in values(source)[0].shape)
        self.shape = [batch, sum(stop - start for start, stop in blocks), width]
        if node.target is _SCATTER:  # what it writes may come as one row of numbers
            value = _before_views(value, [self.shape[0] * self.shape[1], width])
        self.node, self.source, self.value, self.blocks, self.images = node, source, value, blocks, images
        self.emit = Emitter(node)
        self.prompts = set(marks)
        self.made: dict[fx.Node, fx.Node] = {}

    def lower(self) -> None:
        """Put slices and joins in its place; later readers of what it changes in place read these."""
        if self.node.args[3:] and self.node.args[3]:
            raise AxisError(
                f"{describe(self.node)} adds up what it writes at places of a prompt, which is not supported."
            )
        node, graph = self.node, self.node.graph
        with graph.inserting_before(node):
            given, parts, done, position = self._by_prompt(self.value), [], 0, 0
            for start, stop in self.blocks:
                if position < start:
                    parts.append(self.emit(aten.slice.Tensor, self.source, 1, position, start))
                parts.append(self.emit(aten.slice.Tensor, given, 1, done, done + stop - start))
                done, position = done + stop - start, stop
            if position < self.length:
                parts.append(self.emit(aten.slice.Tensor, self.source, 1, position, self.length))
            whole = self.emit(aten.cat.default, parts, 1)
        node.replace_all_uses_with(whole)
        if node.target is aten.index_put_.default:
            before, later = set(), False
            for other in graph.nodes:
                later = later or other is node
                if not later:
                    before.add(other)
            for user in [user for user in self.source.users if user not in before and user is not node]:
                user.replace_input_with(self.source, whole)
        graph.erase_node(node)

    def _by_prompt(self, value: fx.Node) -> fx.Node:
        """What is written, `[batch * tokens, width]` or broadcast to it, as `[batch, tokens, width]`."""
        if value not in self.made:
            self.made[value] = self._written(value)
        return self.made[value]

    def _written(self, value: fx.Node) -> fx.Node:
        shape = list(values(value)[0].shape)
        if shape != [self.shape[0] * self.shape[1], self.shape[2]]:  # of one row, or one number
            return self.emit(aten.expand.default, value, self.shape)
        if not self._holds_prompt(value):
            whole = self.emit(aten.reshape.default, value, self.shape)
            return self._tokens(whole) if after_attention(value) else whole
        source = value.args[0] if value.args else None
        if value.target is aten.reshape.default and isinstance(source, fx.Node):
            if list(values(source)[0].shape) == self.shape:  # what was read
                return source
        if is_pointwise(value) or value.target in CASTS:
            args = [self._by_prompt(x) if self._by_row(x) else x for x in value.args]  # type: ignore[arg-type]
            return self.emit(value.target, *args, **dict(value.kwargs))
        return self.emit(aten.reshape.default, value, self.shape)

    def _by_row(self, value: object) -> bool:
        return isinstance(value, fx.Node) and len(values(value)) > 0 and values(value)[0].dim() == 2

    def _holds_prompt(self, value: fx.Node) -> bool:
        return bool((ancestors(value) | {value}) & self.prompts)

    def _tokens(self, whole: fx.Node) -> fx.Node:
        """Features of a tower, by image."""
        parts, done = [], 0
        for start, stop in self.blocks:
            if (start, stop) not in self.images:
                known = ", ".join(f"{a} to {b - 1}" for a, b in self.images) or "none"
                raise AxisError(
                    f"{describe(self.node)} writes features of the vision tower to places {start} to {stop - 1} of the "
                    f"prompt, which are no whole image's (images stand at {known})."
                )
            rows = self.emit(aten.slice.Tensor, whole, 1, done, done + stop - start)
            parts.append(self.emit(same_tokens, rows, self.images[start, stop]))
            done += stop - start
        return self.emit(aten.cat.default, parts, 1) if len(parts) > 1 else parts[0]
