"""Prompt: say plainly where the image stands in a language model's prompt.

Models of LLaVA's kind look a prompt up in the word table, placeholders included, and scatter the projected image
features over the placeholders (`masked_scatter`). Where these stand is data; for one compiled prompt form it is fixed.
This pass reads it off the sample ids and writes it down as what it is: words before, image, words after, joined by a
`cat`. From there on the axes of the prompt follow by the ordinary rules. It also marks where the features leave the
vision tower for the projector, as a stream of their own (`visual_tokens`).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import AxisError
from ..plan import PromptPlace
from .axes import Constraint, Dim, Opaque, Same, Seed
from .graph import ancestors, attribute, constant_value, describe, module_path, values
from .rules import aten, rule

_SCATTER = aten.masked_scatter.default
_ATTENTION = {aten.softmax.int, aten._softmax.default, aten.scaled_dot_product_attention.default}


def visual_tokens(features: Tensor) -> Tensor:
    """A mark in the graph: these are the tokens that a vision tower gives, `[batch, tokens, width]`."""
    return features


@rule(visual_tokens)
def _visual_tokens(node: fx.Node) -> list[Constraint]:
    (source,) = node.all_input_nodes
    return [
        Same(Dim(node, 0), Dim(source, 0)),
        Same(Dim(node, 2), Dim(source, 2)),
        Opaque(Dim(source, 1)),
        Seed((Dim(node, 1),), "image@prompt"),
    ]


@dataclass(frozen=True)
class Prompt:
    """A graph whose prompt is spelled out.

    Attributes:
        module: a copy of the captured graph; parameters are shared.
        marks: its `visual_tokens` nodes.
        places: where the images stand, for those whose placeholder is an id.
    """

    module: fx.GraphModule
    marks: list[fx.Node]
    places: list[PromptPlace]


def spell_out(captured: fx.GraphModule, inputs: Mapping[str, Tensor]) -> Prompt | None:
    """The graph with its prompts spelled out; None where nothing is scattered into one.

    Args:
        captured: pre-decomposition ATen graph; it is not changed.
        inputs: the sample inputs, whose placeholder ids say where images stand.

    Raises:
        AxisError: the placeholders stand elsewhere in another row, in several blocks, or do not fit the features.
    """
    if not any(node.target is _SCATTER for node in captured.graph.nodes):
        return None
    graph = copy.deepcopy(captured.graph)
    module = fx.GraphModule(captured, graph)
    marks: list[fx.Node] = []
    places: list[PromptPlace] = []
    for node in [n for n in graph.nodes if n.target is _SCATTER]:
        if not any(n.target in _ATTENTION for n in ancestors(node)):
            continue  # not the output of a tower
        _spell_out(graph, node, inputs, marks, places)
    graph.eliminate_dead_code()
    _towers_first(graph, marks)
    graph.lint()
    module.recompile()
    return Prompt(module, marks, places) if marks else None


def _towers_first(graph: fx.Graph, marks: list[fx.Node]) -> None:
    """Let everything that the marks need come before everything else: positions in a prompt may be counted before the
    image is looked at, and have to be counted over what is left of it."""
    early = set(marks).union(*(ancestors(mark) for mark in marks))
    nodes = [n for n in graph.nodes if n.op == "call_function"]
    first = next((n for n in nodes if n not in early), None)
    if first is None:
        return
    for node in nodes[nodes.index(first) :]:
        if node in early:
            first.prepend(node)


def _spell_out(
    graph: fx.Graph,
    scatter: fx.Node,
    inputs: Mapping[str, Tensor],
    marks: list[fx.Node],
    places: list[PromptPlace],
) -> None:
    words, mask, source = scatter.args
    assert isinstance(words, fx.Node) and isinstance(mask, fx.Node) and isinstance(source, fx.Node)
    if not all(isinstance(size, int) for n in (words, source) for size in values(n)[0].shape[:-1]):
        raise AxisError(
            f"{describe(scatter)} scatters image features whose number depends on data; a prompt of one form has a "
            "fixed number of them."
        )
    filled = constant_value(mask, inputs)
    if filled is None:
        raise AxisError(f"{describe(scatter)} fills places whose number is open; an image needs a fixed place.")
    start, stop, length = _block(scatter, filled)
    marks.append(_mark(graph, scatter, source))
    known = _placeholder(mask)
    if known is not None:
        places.append(PromptPlace(*known, start, stop))
    flat = _flattened(graph, source)
    width = values(words)[0].shape[-1]
    if values(source)[0].numel() != values(words)[0].shape[0] * (stop - start) * width:
        raise AxisError(
            f"{describe(scatter)} fills {stop - start} placeholders in each prompt, and the image features "
            f"{tuple(values(source)[0].shape)} do not fit them: one image for each prompt is expected."
        )
    with graph.inserting_before(scatter):
        emit = _Emitter(graph, scatter)
        image = emit(aten.view.default, flat, [-1, stop - start, width])
        parts = [image]
        if start > 0:
            parts.insert(0, emit(aten.slice.Tensor, words, 1, 0, start))
        if stop < length:
            parts.append(emit(aten.slice.Tensor, words, 1, stop, length))
        joined = emit(aten.cat.default, parts, 1)
    scatter.replace_all_uses_with(joined)
    graph.erase_node(scatter)


def _placeholder(mask: fx.Node) -> tuple[str, int] | None:
    """The input whose ids a mask compares, and with which id."""
    for node in ancestors(mask) | {mask}:
        if node.target is aten.eq.Scalar and isinstance(node.args[0], fx.Node) and isinstance(node.args[1], int):
            if node.args[0].op == "placeholder":
                return str(node.args[0].target), node.args[1]
    return None


def _block(scatter: fx.Node, mask: Tensor) -> tuple[int, int, int]:
    """First and last-but-one placeholder, and the length of the prompt."""
    rows = mask.flatten(2).any(-1) if mask.dim() > 2 else mask
    if not bool((rows == rows[0]).all()):
        raise AxisError(
            f"{describe(scatter)} puts the image at other places in another prompt of the batch. One compiled prompt "
            "form has it at one place: pad the prompts in front, or compile for a batch of one."
        )
    found = rows[0].nonzero().flatten()
    if len(found) == 0:
        raise AxisError(
            f"{describe(scatter)} finds no image placeholder in the sample prompt. Give inputs whose ids hold them, as "
            "the model's processor makes them."
        )
    start, stop = int(found[0]), int(found[-1]) + 1
    if stop - start != len(found):
        raise AxisError(
            f"{describe(scatter)} finds image placeholders in several blocks between {start} and {stop} of the prompt. "
            "One block is supported."
        )
    return start, stop, rows.shape[1]


class _Emitter:
    """Emits operators with the fake values, module path and source line that captured ones have."""

    def __init__(self, graph: fx.Graph, origin: fx.Node) -> None:
        self.graph, self.origin = graph, origin

    def __call__(self, target: Any, *arguments: Any) -> fx.Node:
        node = self.graph.call_function(target, arguments)
        node.meta = {k: v for k, v in self.origin.meta.items() if k in ("nn_module_stack", "stack_trace")}
        given = fx.map_arg(arguments, lambda n: n.meta["val"])
        node.meta["val"] = target(*given)
        return node


def _flattened(graph: fx.Graph, source: fx.Node) -> fx.Node:
    """The features without taking the batch apart: `cat(unbind(x))`, and copies, are `x` itself."""
    node = source
    while True:
        if node.target in (aten.to.device, aten.to.dtype, aten.to.dtype_layout, aten.contiguous.default):
            before = node.all_input_nodes[0]
            if values(before)[0].dtype != values(node)[0].dtype:
                return node
            node = before
        elif node.target is aten.cat.default and (whole := _unbound(node)) is not None:
            # Other uses (an output of the model) see the same rows without the batch taken apart.
            with graph.inserting_before(node):
                rows = _Emitter(graph, node)(aten.view.default, whole, [-1, *values(whole)[0].shape[2:]])
            node.replace_all_uses_with(rows)
            node = whole
        else:
            return node


def _unbound(cat: fx.Node) -> fx.Node | None:
    """What a `cat` along dimension 0 puts together again, all of it and in order."""
    parts = cat.args[0]
    if not isinstance(parts, list | tuple) or (len(cat.args) > 1 and cat.args[1] != 0):
        return None
    sources = {part.args[0] for part in parts if isinstance(part, fx.Node) and part.args}
    if len(sources) != 1:
        return None
    (unbind,) = sources
    if not isinstance(unbind, fx.Node) or unbind.target is not aten.unbind.int:
        return None
    dim = unbind.args[1] if len(unbind.args) > 1 else 0
    order = [part.args[1] for part in parts if isinstance(part, fx.Node)]
    whole = unbind.args[0]
    if dim != 0 or not isinstance(whole, fx.Node) or order != list(range(len(values(unbind)))):
        return None
    return whole


def _mark(graph: fx.Graph, scatter: fx.Node, source: fx.Node) -> fx.Node:
    """Mark the features where they leave the tower: before the first learned operator outside of it."""
    behind = ancestors(source) | {source}
    order = [n for n in graph.nodes if n in behind]
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
            with graph.inserting_after(features):
                mark = _Emitter(graph, node)(visual_tokens, features)
            for user in [u for u in features.users if u is not mark and u in behind]:
                user.replace_input_with(features, mark)
            return mark
    raise AxisError(
        f"{describe(scatter)} scatters the output of the vision tower {tower or '(the whole model)'} with no projector "
        "between; where its features leave is not found."
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
