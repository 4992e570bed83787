"""Small questions about fx nodes that every pass asks."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, fx

from .operators import ATTENTION, SOFTMAX


def values(node: fx.Node) -> Sequence[Tensor]:
    """The tensors a node gives, with shapes and dtypes (fake tensors, or parameters); else ()."""
    value = node.meta.get("val")
    if value is None and node.op == "get_attr":
        value = attribute(node)
    if isinstance(value, Tensor):
        return (value,)
    if isinstance(value, list | tuple):
        return tuple(v for v in value if isinstance(v, Tensor)) if node.op != "output" else ()
    return ()


def copied(graph: fx.Graph) -> fx.Graph:
    """A copy of a graph, without the deprecation that torch's own tree of inputs raises when it is copied."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return copy.deepcopy(graph)


def keep_parameters(of: fx.GraphModule, module: fx.GraphModule) -> None:
    """Give a module the parameters of another that its graph does not read (a norm behind a tower whose last layers are
    not used), under their names; shared."""
    own = dict(module.named_parameters())
    for name, parameter in of.named_parameters():
        if name in own:
            continue
        *path, last = name.split(".")
        inside: torch.nn.Module = module
        for part in path:
            if not hasattr(inside, part):
                inside.add_module(part, torch.nn.Module())
            inside = getattr(inside, part)
        inside.register_parameter(last, parameter)


def attribute(node: fx.Node) -> object:
    """What a `get_attr` node reads: a parameter, buffer or constant."""
    value: object = node.graph.owning_module
    for part in str(node.target).split("."):
        value = getattr(value, part)
    return value


def give_numbers(tensor: Tensor, numbers: Tensor) -> None:
    """Let a constant of a graph on the meta device be known for what it is."""
    tensor._pumer_numbers = numbers  # type: ignore[attr-defined]


def with_numbers(value: object) -> object:
    """A constant as real numbers, where they are known beside a tensor on the meta device."""
    return getattr(value, "_pumer_numbers", value) if isinstance(value, Tensor) and value.is_meta else value


class Emitter:
    """Emits operators where its graph inserts, with the fake values, module path and source line that captured ones
    have.

    Args:
        origin: the node that they stand for.
        mode: makes the fake values of operators that take no tensor; None where all take one.
    """

    def __init__(self, origin: fx.Node, mode: AbstractContextManager[object] | None = None) -> None:
        self.origin, self.mode = origin, nullcontext() if mode is None else mode

    def __call__(self, target: Any, *arguments: Any, **options: Any) -> fx.Node:
        node = self.origin.graph.call_function(target, arguments, options)
        node.meta = {k: v for k, v in self.origin.meta.items() if k in ("nn_module_stack", "stack_trace")}
        given = fx.map_arg(arguments, lambda n: values(n)[0])
        with self.mode:
            node.meta["val"] = target(*given, **options)
        return node


def source_line(node: fx.Node) -> str:
    """`file:line` of the user's or model's code that made the node, or ''."""
    frames = [line.strip() for line in (node.meta.get("stack_trace") or "").splitlines()]
    files = [line for line in frames if line.startswith("File ")]
    if not files:
        return ""
    # torch's own modules call the operators; the line that called the module says more.
    outside = [line for line in files if "/torch/" not in line] or files
    parts = outside[-1].removeprefix("File ").split(", ")
    return f"{parts[0].strip(chr(34))}:{parts[1].removeprefix('line ')}" if len(parts) > 1 else parts[0]


def module_path(node: fx.Node) -> str:
    """Path of the innermost module that made the node, such as `encoder.layer.2.attention`, or ''."""
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    path = str(stack[-1][0]) if stack else ""
    return path.removeprefix("L['self'].").removeprefix("L__self___")


def operator_name(node: fx.Node) -> str:
    """What a node calls, as it is called in PyTorch (`aten.cat.default`), or the name of a plain function."""
    if callable(node.target) and not isinstance(node.target, torch._ops.OpOverload | torch._ops.OpOverloadPacket):
        return str(getattr(node.target, "__name__", node.target))
    return str(node.target)


def describe(node: fx.Node) -> str:
    """A node for an error message: operator, name, module and source line."""
    where = [f"in module {path}" for path in [module_path(node)] if path]
    where += [f"at {line}" for line in [source_line(node)] if line]
    return f"{operator_name(node)} (node {node.name}{''.join(', ' + w for w in where)})"


_LIKE = {"zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty"}
_TAKES_FIRST = {"type_as", "expand_as", "view_as", "reshape_as", "_to_copy"}


def content_inputs(node: fx.Node) -> list[fx.Node]:
    """The inputs whose numbers a node's value depends on, and not only whose shape, dtype or device."""
    if not isinstance(node.target, torch._ops.OpOverload):
        return node.all_input_nodes
    name = node.target.overloadpacket.__name__
    if name in _LIKE or name == "sym_size":
        return []
    if name in _TAKES_FIRST or node.target is torch.ops.aten.to.other:
        return [x for x in node.args[:1] if isinstance(x, fx.Node)]
    return node.all_input_nodes


def _reaches(node: fx.Node, wanted: Callable[[fx.Node], bool]) -> bool:
    stack, seen = [node], set()
    while stack:
        current = stack.pop()
        if current in seen:
            continue
        seen.add(current)
        if wanted(current):
            return True
        stack.extend(content_inputs(current))
    return False


def ancestors(node: fx.Node) -> set[fx.Node]:
    """Every node that a node is computed from."""
    found: set[fx.Node] = set()
    stack = list(node.all_input_nodes)
    while stack:
        current = stack.pop()
        if current not in found:
            found.add(current)
            stack.extend(current.all_input_nodes)
    return found


def depends_on_input(node: fx.Node) -> bool:
    """Whether a value is computed from the content of any input."""
    return _reaches(node, lambda n: n.op == "placeholder")


def depends_on_parameter(node: fx.Node) -> bool:
    """Whether a value is computed from any learned parameter."""
    return _reaches(node, lambda n: n.op == "get_attr" and isinstance(attribute(n), torch.nn.Parameter))


def after_attention(node: fx.Node) -> bool:
    """Whether a value is computed from the output of any attention."""
    return _reaches(node, lambda n: n.target in SOFTMAX or n.target is ATTENTION)


def constant_value(node: fx.Node, inputs: Mapping[str, Tensor] | None = None) -> Tensor | None:
    """The value of a node, computed; None where a symbolic size is in the way.

    Args:
        node: that depends on the content of no input but those of `inputs`.
        inputs: by name.
    """
    known: dict[fx.Node, Any] = {}

    def run(current: fx.Node) -> Any:
        if current not in known:
            if current.op == "get_attr":
                known[current] = with_numbers(attribute(current))
            elif current.op == "placeholder" and current in needed and inputs is not None:
                known[current] = inputs[str(current.target)]
            elif current not in needed:  # only its shape and dtype are asked for
                (value,) = values(current)
                known[current] = torch.zeros([int(n) for n in value.shape], dtype=value.dtype)
            else:
                args = fx.map_arg(current.args, run)
                kwargs = fx.map_arg(current.kwargs, run)
                known[current] = current.target(*args, **kwargs)  # type: ignore[operator]  # an operator, as it is needed
                if args and isinstance(args[0], Tensor) and known[current].is_meta and not args[0].is_meta:
                    # A model on the meta device moves its inputs there; their values are needed.
                    known[current] = args[0].to(known[current].dtype)
        return known[current]

    needed = {node}
    stack = [node]
    while stack:
        for source in content_inputs(stack.pop()):
            if source not in needed:
                needed.add(source)
                stack.append(source)
    if any(n.op == "call_function" and not all(map(_static, values(n))) for n in needed):
        return None
    with torch.no_grad():
        result = run(node)
    return result if isinstance(result, Tensor) else None


def _static(value: Tensor) -> bool:
    return all(isinstance(size, int) for size in value.shape)
