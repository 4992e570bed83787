"""Images that a language model reads by cross-attention: no placeholder stands for them in the prompt.

Text asks (queries) and the image answers (keys and values) in some of the layers. The image's tokens are marked at the
last value that all those keys and values are computed from, so that what a reducer leaves is what later layers project.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx

from ..errors import AxisError
from .attention import Parts, attention_parts
from .marks import ActsOn, Mark, Prompt, visual_tokens
from .nodes import Emitter, ancestors, copied, values
from .operators import aten
from .prompt_images import Image, made_of, voting


def mark_read_images(captured: fx.GraphModule, acts_on: ActsOn, *, votes: bool) -> Prompt | None:
    """The graph with a mark where text begins to read its image; None where it does not.

    Args:
        captured: pre-decomposition ATen graph; it is not changed.
        acts_on: see `lower_masked_scatter`; they are marked at one place whatever it is.
        votes: find the attention of the tower that decides over the image's tokens.

    Raises:
        AxisError: which tokens of the tower these are is not found.
    """
    graph = copied(captured.graph)
    module = fx.GraphModule(captured, graph)  # constants are looked up in it
    reading = [parts for parts in attention_parts(graph.output_node()) if _reads(parts)]
    source = _frontier(graph, reading)
    if source is None:
        return None
    batch = int(values(reading[0].query)[0].shape[0])
    emit = Emitter(source)
    behind = set().union(*(ancestors(n) | {n} for parts in reading for n in _read(parts)))
    readers = [user for user in source.users if user in behind]
    with graph.inserting_before(source.next):
        rows = source
        if values(source)[0].shape[0] != batch:  # images, or tiles, one after the other
            rows = emit(aten.reshape.default, source, [batch, -1, values(source)[0].shape[-1]])
        mark = emit(visual_tokens, rows)
    for reader in readers:
        reader.replace_input_with(source, mark)
    _new_shapes(graph, mark)
    count = int(values(rows)[0].shape[1])
    image = Image([(0, count)], [*range(count)], set())
    found = made_of(rows, int(values(rows)[0].shape[-1]), needed=votes) if votes or acts_on == "rows" else None
    crops, members = ((image.places,), None) if found is None else voting(mark, batch, image, found)
    graph.lint()
    module.recompile()
    return Prompt(module, [Mark(mark, rows, None, crops, votes=members if votes else None, enters=True)], [])


def _reads(parts: Parts) -> bool:
    """Whether queries are computed from ids that the keys are not, and the keys from pixels."""
    asked, read = _inputs(parts.query), set().union(*(_inputs(node) for node in _read(parts)))
    ids = {n for n in asked - read if not values(n)[0].is_floating_point()}
    return bool(ids) and any(values(n)[0].is_floating_point() for n in read)


def _read(parts: Parts) -> tuple[fx.Node, ...]:
    """Keys and values."""
    keys = parts.key if parts.key is not None else parts.key_transposed
    contents = parts.context.args[2] if parts.probabilities is None else parts.context.args[1]
    return tuple(node for node in (keys, contents) if isinstance(node, fx.Node))


def _inputs(node: fx.Node) -> set[fx.Node]:
    return {n for n in ancestors(node) | {node} if n.op == "placeholder" and values(n)}


def _frontier(graph: fx.Graph, reading: Iterable[Parts]) -> fx.Node | None:
    """The last value `[images, tokens, width]` that all keys and values come from."""
    common = [ancestors(node) for parts in reading for node in _read(parts)]
    if not common:
        return None
    shared = set.intersection(*common)
    found = [n for n in graph.nodes if n in shared and n.op == "call_function" and values(n)]
    last = next((n for n in reversed(found) if values(n)[0].is_floating_point() and values(n)[0].dim() == 3), None)
    if last is not None and not all(isinstance(size, int) for size in values(last)[0].shape):
        raise AxisError("The images that text reads have an open size; compile for a fixed batch.")
    return last


def _new_shapes(graph: fx.Graph, mark: fx.Node) -> None:
    """Shapes behind a mark that joined the rows of a prompt, as far as they differ."""
    changed = {mark}
    for node in list(graph.nodes):
        if node.op == "call_function" and node is not mark and changed & set(node.all_input_nodes):
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), lambda n: values(n)[0])
            with torch.no_grad():
                value = node.target(*args, **kwargs)  # of fake tensors
            if value.shape != values(node)[0].shape:
                changed.add(node)
            node.meta["val"] = value
