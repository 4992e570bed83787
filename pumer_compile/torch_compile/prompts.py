"""Graphs with an image in a prompt: compiled when the ids are there, once for each place of the image.

Where the image stands is data that Dynamo's graph does not know. So nothing is compiled when Dynamo hands the graph
over, but at its first call, for the sizes and the place of that call's prompt, and again for every other form.
"""

from __future__ import annotations

import copy
import ctypes
import functools
import importlib
import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..analysis.nodes import ancestors
from ..errors import UsageError
from ..schedule import Schedule
from .lowering import DynamoGraph, as_dynamo_left_it, calls_attention

log = logging.getLogger("pumer_compile")

Compiled = Callable[..., Any]
Compile = Callable[[DynamoGraph], Compiled]

_SCATTERS = {"masked_scatter", "masked_scatter_"}
_CHECKS = {"_assert_scalar", "_assert_async", "_check_tensor_all_with", "sym_constrain_range_for_size"}


def reduces_prompts(schedule: Schedule | None) -> bool:
    """Whether a schedule reduces the image inside of a prompt."""
    return schedule is not None and schedule.marks is not None


def scatters(module: fx.GraphModule) -> list[fx.Node]:
    """Where a graph scatters features into a prompt."""
    return [n for n in module.graph.nodes if n.op.startswith("call_") and _name(n) in _SCATTERS]


def has_tower(scatter: fx.Node) -> bool:
    """Whether what is scattered is computed from an attention in the same graph: a vision tower's output."""
    return any(calls_attention(node) for node in ancestors(scatter))


def has_static_cache(module: fx.GraphModule) -> bool:
    """Whether a graph copies tokens to numbered places, as a cache of fixed length does."""
    return any(_name(node) == "index_copy_" for node in module.graph.nodes if node.op.startswith("call_"))


def no_image(module: fx.GraphModule) -> str:
    """Why the image in a prompt cannot be reduced in a graph."""
    if not scatters(module):
        return (
            "No image features are scattered into a prompt in it. After a graph with an image, it would be a decoding "
            "step or a text; before one, it may be a part of a model. Make the first call with an image."
        )
    return (
        "Image features are scattered into a prompt in it, and the vision tower that gives them is not there. The "
        "`generate` of transformers runs the tower before the model where the model's forward lets it: compile "
        "`pumer_compile.generation.whole_forward(model)` and set `model.forward` to that."
    )


class PromptGraph:
    """A callable in place of a graph, which compiles a variant for each form of its prompt.

    Args:
        module: Dynamo's graph.
        compile: what compiles the graph of one call, whose values are real tensors.
        where: the function that Dynamo compiled, for messages.
        strict: whether one form too many is an error (True), or is run unreduced with a warning.
    """

    def __init__(self, module: fx.GraphModule, compile: Compile, where: str, *, strict: bool) -> None:
        self._whole, self._compile, self._where, self._strict = module, compile, where, strict
        self._plain = _without_checks(module)
        self._masks, self._read = _masks(self._plain)
        self._variants: dict[Any, Compiled] = {}

    def __call__(self, *values: Any) -> Any:
        """What the graph gives, of a shortened prompt.

        Raises:
            PumerError: from the passes; UsageError for one form of prompt too many.
        """
        form = self._form(values)
        if form not in self._variants:
            limit = torch._dynamo.config.recompile_limit
            if len(self._variants) >= limit:
                return self._one_too_many(limit, values)
            grad = torch.is_grad_enabled()
            with torch.inference_mode(False), torch.set_grad_enabled(grad):
                self._variants[form] = self._compile(DynamoGraph(self._plain, values, fixed=True))
            self._warn_before_the_last(limit)
        return self._variants[form](*values)

    def _form(self, values: Sequence[Any]) -> Any:
        """What a variant is compiled for: sizes, numbers, and which places the images fill."""
        with torch.no_grad():
            masks = self._masks(*(values[i] for i in self._read))
        places = tuple((mask.shape, mask.cpu().numpy().tobytes()) for mask in masks)
        given = tuple((v.shape, v.stride()) if isinstance(v, Tensor) else v for v in values)
        return given, places

    def _warn_before_the_last(self, limit: int) -> None:
        if len(self._variants) == limit:
            log.warning(
                "%s has been compiled for %d forms of prompts (lengths, places of the image), which is as many as "
                "torch._dynamo.config.recompile_limit allows.",
                self._where,
                limit,
            )

    def _one_too_many(self, limit: int, values: Sequence[Any]) -> Any:
        what = (
            f"{self._where} has been compiled for {limit} forms of prompts (lengths, places of the image), and this "
            "call has another one. Let prompts have few lengths, and the image the same place in them, or raise "
            "torch._dynamo.config.recompile_limit."
        )
        if self._strict:
            raise UsageError(what)
        log.warning("%s It runs uncompiled and unreduced.", what)
        return self._whole(*values)


def _name(node: fx.Node) -> str:
    """`item` of a method, of a torch function and of an operator."""
    target: Any = node.target
    packet = getattr(target, "overloadpacket", target)
    return packet if isinstance(packet, str) else str(getattr(packet, "__name__", packet))


def _without_checks(module: fx.GraphModule) -> fx.GraphModule:
    """A copy without assertions on data, such as that there are as many placeholders as features: the passes compare
    these for each form, and what reads a number out of a tensor cannot be traced."""
    copied = fx.GraphModule(module, copy.deepcopy(module.graph))
    as_dynamo_left_it(copied, module)
    unused = {n for n in copied.graph.nodes if _name(n) in _CHECKS}
    for node in reversed(list(copied.graph.nodes)):
        if node in unused and not node.users and node.op != "placeholder":
            unused.update(node.all_input_nodes)
            copied.graph.erase_node(node)
    copied.recompile()
    return copied


def _masks(module: fx.GraphModule) -> tuple[fx.GraphModule, list[int]]:
    """The part of a graph that computes which places are filled, and which of its inputs that reads."""
    masks: list[fx.Node] = []
    for scatter in scatters(module):
        mask = scatter.kwargs["mask"] if "mask" in scatter.kwargs else scatter.args[1]
        assert isinstance(mask, fx.Node)
        masks.append(mask)
    needed = set(masks).union(*(ancestors(mask) for mask in masks))
    graph = fx.Graph()
    copies: dict[fx.Node, fx.Node] = {}
    for node in module.graph.nodes:
        if node in needed:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(tuple(copies[mask] for mask in masks))
    placeholders = module.graph.find_nodes(op="placeholder")
    return fx.GraphModule(module, graph), [i for i, node in enumerate(placeholders) if node in needed]


# --- frontends --------------------------------------------------------------------------------------------------


def run_while_tracing(path: str) -> None:
    """Let Dynamo call a function that prepares a module, rather than trace it.

    transformers installs its hooks for hidden states at the first call that asks for them, under a lock that Dynamo
    cannot enter.

    Args:
        path: dotted, of a function of one module; a version of the library without it needs nothing.
    """
    name, _, attribute = path.rpartition(".")
    owner = importlib.import_module(name)
    original = getattr(owner, attribute, None)
    if original is None or hasattr(original, "_pumer_original"):
        return

    def prepare(address: int) -> None:
        # PyTorch 2.11 hands no modules to such a function. The caller has this one, so it is alive.
        original(ctypes.cast(address, ctypes.py_object).value)

    by_address = torch.compiler.assume_constant_result(prepare)

    @functools.wraps(original)
    def called(module: nn.Module) -> None:
        if torch.compiler.is_dynamo_compiling():
            by_address(id(module))
        else:
            original(module)

    called._pumer_original = original  # type: ignore[attr-defined]  # says that it is wrapped already
    setattr(owner, attribute, called)
