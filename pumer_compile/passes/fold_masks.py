"""No padding: masks that are known to be ones, and what is computed from them alone, leave the graph.

An additive mask of zeros, a weight of ones or a choice that always falls the same way changes nothing, and no runtime
sees it, because the mask is an input. It is evaluated once; what it does not change goes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, fx, nn
from torch.fx.node import map_arg

from ..analysis.axes import same_size
from ..analysis.dead_code import drop_dead, may_be_changed
from ..analysis.nodes import attribute, copied, values
from ..analysis.operators import ATTENTION, MASKED_FILL, aten, is_mutable, overloads
from ..analysis.rules import argument
from ..errors import UsageError
from .manager import Pass, State

_ADD, _MULTIPLY = frozenset(overloads("add add_")), frozenset(overloads("mul mul_"))


@dataclass(frozen=True)
class FoldedMasks:
    """The masks that are written into a graph, by the names of the inputs."""

    names: tuple[str, ...]


class FoldMasks(Pass):
    """Write the masks of a sample without padding into the captured graph."""

    name: ClassVar[str] = "fold_masks"
    ensures: ClassVar[tuple[type, ...]] = (FoldedMasks,)

    def run(self, state: State) -> int:
        """On a copy of the captured graph.

        Raises:
            UsageError: no input is a mask, one has padding, or they change nothing.
        """
        masks = masks_of(state.inputs)
        state.captured = fx.GraphModule(state.captured, copied(state.captured.graph))
        folded = fold_masks(state.captured, masks, state.inputs)
        state.add(FoldedMasks(tuple(masks)))
        return folded


def masks_of(inputs: Mapping[str, Tensor]) -> list[str]:
    """The inputs that tell real tokens from padding: `attention_mask`, `pixel_mask` and others called so.

    Raises:
        UsageError: there is none, or one has padding.
    """
    found = [name for name, t in inputs.items() if name.endswith("mask") and not t.is_floating_point()]
    if not found:
        raise UsageError(f"--no-padding writes masks of ones into the graph; no input is a mask: {', '.join(inputs)}.")
    padded = [name for name in found if not bool((inputs[name] == 1).all())]
    if padded:
        raise UsageError(f"--no-padding was given, but {padded[0]} of the sample inputs has padding (zeros).")
    return found


def fold_masks(module: fx.GraphModule, masks: Sequence[str], inputs: Mapping[str, Tensor]) -> int:
    """Write masks of ones into a captured graph, in place; it still takes them, and does not read them.

    Args:
        module: captured, with values noted (`meta["val"]`).
        masks: names of inputs, all ones.
        inputs: samples for every input.

    Returns:
        How many operators the masks did not change, and which are gone.

    Raises:
        UsageError: there is none.
    """
    known = _constants(module, masks, inputs)
    folded = 0
    for node in list(module.graph.nodes):
        if node.op != "call_function" or node in known:
            continue
        kept = _unchanged(node, known)
        if kept is not None:
            node.replace_all_uses_with(kept)
            folded += 1
        elif node.target is ATTENTION and _masks_nothing(known.get(argument(node, 3, "attn_mask"))):
            _without_mask(node)
            folded += 1
    if not folded:
        raise UsageError(
            f"--no-padding found nothing to leave out: looked for operators that {' and '.join(masks)} of ones change "
            "nothing in (an added mask of zeros, say), and found none. Compile without it."
        )
    drop_dead(module.graph)
    _read_as_ones(module.graph, masks, inputs)
    module.graph.lint()
    module.recompile()
    return folded


def _constants(module: fx.GraphModule, masks: Sequence[str], inputs: Mapping[str, Tensor]) -> dict[fx.Node, Any]:
    """What depends on the masks and on no other input or parameter, evaluated."""
    known: dict[fx.Node, Any] = {}
    from_masks: set[fx.Node] = set()
    changed = may_be_changed(module.graph)
    for node in module.graph.nodes:
        if node in changed:
            continue
        if node.op == "placeholder" and node.target in masks:
            known[node] = inputs[node.target]
            from_masks.add(node)
        elif node.target is aten.sym_size.int and node.args[0].op == "placeholder":
            known[node] = inputs[node.args[0].target].shape[node.args[1]]
        elif node.op == "get_attr" and not isinstance(constant := attribute(node), nn.Parameter):
            known[node] = constant
        elif _is_pure(node) and all(x in known for x in node.all_input_nodes):
            args, kwargs = map_arg((node.args, node.kwargs), known.__getitem__)
            known[node] = node.target(*args, **kwargs)
            if from_masks.intersection(node.all_input_nodes):
                from_masks.add(node)
    return {node: known[node] for node in from_masks}


def _is_pure(node: fx.Node) -> bool:
    if node.op != "call_function" or is_mutable(node.target):
        return False
    tags = getattr(node.target, "tags", ())
    return torch.Tag.nondeterministic_seeded not in tags


def _unchanged(node: fx.Node, known: Mapping[fx.Node, Any]) -> fx.Node | None:
    """The input that an operator gives back as it is."""
    a, b = (argument(node, i, name) for i, name in ((0, "self"), (1, "other")))
    kept: Any = None
    if node.target in _ADD and _holds_only(known.get(b), 0):
        kept = a
    elif node.target in _ADD and _holds_only(known.get(a), 0) and argument(node, 2, "alpha", 1) == 1:
        kept = b
    elif node.target in _MULTIPLY and _holds_only(known.get(b), 1):
        kept = a
    elif node.target in _MULTIPLY and _holds_only(known.get(a), 1):
        kept = b
    elif node.target in MASKED_FILL and _holds_only(known.get(argument(node, 1, "mask")), False):
        kept = a
    elif node.target is aten.where.self and isinstance(known.get(a), Tensor):
        chosen = [x for i, x in ((True, node.args[1]), (False, node.args[2])) if _holds_only(known[a], i)]
        kept = chosen[0] if chosen else None
    return kept if isinstance(kept, fx.Node) and _alike(kept, node) else None


def _holds_only(value: Any, number: float) -> bool:
    return isinstance(value, Tensor) and bool((value == number).all())


def _masks_nothing(value: Any) -> bool:
    return isinstance(value, Tensor) and _holds_only(value, value.dtype == torch.bool)


def _alike(kept: fx.Node, node: fx.Node) -> bool:
    (a,), (b,) = values(kept)[:1], values(node)[:1]
    return a.dtype == b.dtype and len(a.shape) == len(b.shape) and all(map(same_size, a.shape, b.shape))


def _without_mask(attention: fx.Node) -> None:
    if len(attention.args) > 3:
        attention.update_arg(3, None)
    else:
        attention.kwargs = {k: v for k, v in attention.kwargs.items() if k != "attn_mask"}


def _read_as_ones(graph: fx.Graph, masks: Sequence[str], inputs: Mapping[str, Tensor]) -> None:
    """Let what still reads a mask (the place of the last token, say) read ones instead."""
    placeholders = list(graph.find_nodes(op="placeholder"))
    for mask in (node for node in placeholders if node.target in masks and node.users):
        size = list(mask.meta["val"].shape)
        with graph.inserting_before(placeholders[-1].next):
            if not isinstance(size[0], int):
                others = (node for node in placeholders if node.target not in masks)
                like = next(node for node in others if values(node)[0].shape[:1] == tuple(size[:1]))
                size[0] = graph.call_function(aten.sym_size.int, (like, 0))
                size[0].meta["val"] = mask.meta["val"].shape[0]
            given = inputs[str(mask.target)]
            ones = graph.call_function(aten.ones.default, (size,), {"dtype": given.dtype, "device": given.device})
        ones.meta["val"] = mask.meta["val"]
        mask.replace_all_uses_with(ones)
