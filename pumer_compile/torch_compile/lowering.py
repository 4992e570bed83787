"""Dynamo's graph to what the passes read, and back.

Dynamo gives a graph of torch-level calls whose parameters, buffers and symbolic sizes are inputs. The passes read
pre-decomposition ATen operators whose parameters are attributes. `DynamoGraph.lower` makes the one from the other,
with the batch as the only symbolic size, and `DynamoGraph.restore` gives the reduced graph Dynamo's inputs again.
Reducers are traced into it, so that no cache of compiled graphs can take two of them for the same.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import SymInt, Tensor, fx, nn
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import TracingContext, detect_fake_mode, tracing
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.amp import autocast_mode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ..analysis.nodes import attribute
from ..capture.loading import first_line
from ..errors import CaptureError, UsageError


@dataclass(frozen=True)
class Argument:
    """An input of Dynamo's graph.

    Attributes:
        node: its placeholder.
        name: what the user called it, or the placeholder's name.
        kind: `input` (a tensor of the call), `state` (a parameter or buffer) or `number` (a size; anything else).
        value: the tensor or number that Dynamo compiles for.
        shape: sizes, symbolic where Dynamo left them open.
    """

    node: fx.Node
    name: str
    kind: str
    value: Any
    shape: tuple[int | SymInt, ...] = ()


@dataclass(frozen=True)
class Padding:
    """Texts that are padded; see `padding.py`.

    Attributes:
        length: tokens.
        fill: the inputs whose last dimension is the text, and what each is padded with.
        symbol: the text's length in Dynamo's graph.
        ids: those of the inputs that are looked up in a table.
        seen: tokens of the text in the call that Dynamo compiles for.
    """

    length: int
    fill: dict[str, int]
    symbol: Any
    ids: frozenset[str]
    seen: int


@dataclass(frozen=True)
class Cut:
    """Padding that an output holds along one dimension: the last of the entries before `stop`."""

    dim: int
    stop: int


class DynamoGraph:
    """A graph that Dynamo hands to a backend.

    Args:
        module: torch-level graph.
        values: tensors and numbers, one for each placeholder.
        fixed: whether it is compiled for the sizes of the values, outside of Dynamo's compilation.

    Attributes:
        module, fixed: as given.
        arguments: its inputs, parameters and buffers among them.
        mode: fake tensors of this compilation.
        padding: of the texts, where there is any.
    """

    def __init__(self, module: fx.GraphModule, values: Sequence[Any], *, fixed: bool = False) -> None:
        self.module = module
        self.fixed = fixed
        self.arguments = _arguments(module, values, fixed)
        context = TracingContext.try_get()
        mode = None if fixed else (context.fake_mode if context else None) or detect_fake_mode(list(values))
        # Real tensors beside fake ones are constants that the passes have put into the graph.
        # A loop, such as that of a greedy choice, is traced with a ShapeEnv alone.
        self.mode: FakeTensorMode = mode or FakeTensorMode(
            allow_non_fake_inputs=True, shape_env=ShapeEnv(), static_shapes=True
        )
        self._batch = self._batch_symbol()
        self.padding: Padding | None = None

    @property
    def inputs(self) -> list[Argument]:
        """The tensors of the call, in order."""
        return [a for a in self.arguments if a.kind == "input"]

    def _batch_symbol(self) -> Any:
        """The symbol of the batch: what leads the first input and stands nowhere else. None where Dynamo fixed it."""
        shaped = [a.shape for a in self.inputs if a.shape]
        first = open_size(shaped[0][0]) if shaped else None
        others = {open_size(size) for shape in shaped for size in shape[1:]}
        used_elsewhere = {symbol for e in others if e is not None for symbol in e.free_symbols}
        return first if first is not None and first.is_symbol and first not in used_elsewhere else None

    def compiling(self) -> AbstractContextManager[object]:
        """For the inner backend of a graph that is compiled for the sizes of its values: with the fake tensors of here,
        whose ShapeEnv loops need."""
        return tracing(TracingContext(self.mode)) if self.fixed else nullcontext()

    # --- lowering -----------------------------------------------------------------------------------------------

    def lower(self) -> tuple[fx.GraphModule, dict[str, Tensor]]:
        """The graph for the passes, and its inputs by name (fake tensors, or the values where sizes are fixed).

        Sizes other than the batch become numbers, which is a guard: Dynamo compiles again where they change.

        Raises:
            CaptureError: an operator or control flow that cannot be traced.
            UsageError: an input or parameter is a tensor of a special kind (a DTensor, say), or parameters are frozen.
        """
        for argument in self.arguments:
            if is_traceable_wrapper_subclass(argument.value):
                raise UsageError(
                    f"{argument.name} is a {type(argument.value).__name__}, and only models of plain tensors can be "
                    "reduced. Compile before the model is distributed or quantized."
                )
        for node in self.module.graph.find_nodes(op="get_attr"):
            if isinstance(attribute(node), nn.Parameter):
                raise UsageError(
                    f"The parameter {node.target} is a constant of Dynamo's graph, as torch._inductor.config.freezing "
                    "makes it. Turn freezing off: a reduced model is compiled with its parameters as inputs."
                )
        with self.mode:
            fakes = {a.name: self._fake(a, padded=True) for a in self.arguments if a.kind != "number"}
        names = list(fakes)

        def run(*tensors: Tensor) -> Any:
            given = dict(zip(names, tensors, strict=True))
            arguments = [self._number(a, given) if a.kind == "number" else given[a.name] for a in self.arguments]
            return _Tracing(self.module).run(*arguments)

        module = self._trace(run, list(fakes.values()))
        for node, name in zip(_placeholders(module), names, strict=True):
            node.target = name
        for argument in self.arguments:
            if argument.kind == "state":
                _to_attribute(module, argument)
        for node in module.graph.nodes:
            stack = node.meta.get("nn_module_stack") or {}
            node.meta["nn_module_stack"] = {key: (_plain_path(path), kind) for key, (path, kind) in stack.items()}
        module.graph.eliminate_dead_code()
        module.graph.lint()
        module.recompile()
        return module, {a.name: a.value if self.fixed else fakes[a.name] for a in self.inputs}

    def restore(
        self,
        reduced: fx.GraphModule,
        lowered: fx.GraphModule | None = None,
        cuts: Mapping[int, Sequence[Cut]] | None = None,
    ) -> fx.GraphModule:
        """The reduced graph with the inputs of Dynamo's graph, in its order, as ATen operators alone.

        Args:
            reduced: from the passes.
            lowered: what they were given, where `reduced` returns other things beside its outputs.
            cuts: the padding in its outputs, by their number (`unpadding.py`).

        Raises:
            CaptureError: it cannot be traced.
        """
        with self.mode:
            values = [a.value if a.kind == "number" else self._fake(a, padded=False) for a in self.arguments]

        def run(*values: Any) -> Any:
            given = {a.name: v for a, v in zip(self.arguments, values, strict=True)}
            state = {a.name: given[a.name] for a in self.arguments if a.kind == "state"}
            inputs = [self._padded(a.name, given[a.name]) for a in self.inputs]
            outputs = _Tracing(reduced, state).run(*inputs, enable_io_processing=False)
            outputs = list(outputs if lowered is None else _as_in(lowered, outputs))
            for number, places in (cuts or {}).items():
                for cut in places:
                    outputs[number] = _without_padding(outputs[number], cut, self._missing(given))
            return tuple(outputs)

        final = self._trace(run, values)
        as_dynamo_left_it(final, self.module)
        return final

    def _trace(self, run: Callable[..., Any], values: list[Any]) -> fx.GraphModule:
        try:
            with self.mode, enable_python_dispatcher(), fx.traceback.preserve_node_meta():
                return make_fx(run, pre_dispatch=True)(*values)
        except Exception as error:
            raise CaptureError(
                f"Dynamo's graph could not be traced to ATen operators: {first_line(error)}. Compile the model without "
                "gradient checkpointing and other wrappers of its layers, or a smaller part of it."
            ) from error

    def _fake(self, argument: Argument, *, padded: bool) -> Tensor:
        """A fake tensor of the argument's shape, or of its shape after padding."""
        sizes = [self._size(size, padded) for size in argument.shape]
        return torch.empty(sizes, dtype=argument.value.dtype, device=argument.value.device)

    def _size(self, size: int | SymInt, padded: bool) -> int | SymInt:
        expression = open_size(size)
        if expression is not None and expression == self._batch:
            return size
        if self.padding is not None and expression == self.padding.symbol:
            return self.padding.length if padded else size
        return int(size)

    def _padded(self, name: str, value: Tensor) -> Tensor:
        if self.padding is None or name not in self.padding.fill:
            return value
        missing = self.padding.length - value.shape[-1]
        return torch.nn.functional.pad(value, (0, missing), value=self.padding.fill[name])

    def _missing(self, given: Mapping[str, Tensor]) -> int | SymInt:
        """How many tokens the texts of a call are padded with."""
        assert self.padding is not None
        return self.padding.length - given[next(iter(self.padding.fill))].shape[-1]

    def _number(self, argument: Argument, given: dict[str, Tensor]) -> Any:
        """What stands for a number: the batch of a traced tensor, so that it stays symbolic, or the number itself."""
        expression = open_size(argument.value)
        if expression is not None and expression == self._batch:
            leader = next(a for a in self.inputs if a.shape)
            return given[leader.name].shape[0]
        return self._size(argument.value, padded=True) if isinstance(argument.value, SymInt) else argument.value


class _Tracing(fx.Interpreter):
    """Runs a graph while it is traced; `state` stands for its attributes of those names."""

    def __init__(self, module: fx.GraphModule, state: dict[str, Tensor] | None = None) -> None:
        super().__init__(module)
        self.state = state or {}

    def fetch_attr(self, target: str) -> Any:
        return self.state[target] if target in self.state else super().fetch_attr(target)

    def run_node(self, n: fx.Node) -> Any:
        # With dynamic=True a Python float is an input, read by item(). As a number it is a guard.
        seen = n.meta.get("example_value")
        if n.target == "item" and isinstance(seen, torch.SymFloat):
            return float(seen)
        return super().run_node(n)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        # While tracing, torch only records these two; the operators between them must also run under autocast.
        if target is autocast_mode._enter_autocast:
            device, dtype, enabled, cache = args
            context = torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=cache)
            context.__enter__()
            return context
        if target is autocast_mode._exit_autocast:
            return args[0].__exit__(None, None, None)
        return super().call_function(target, args, kwargs)


# --- arguments --------------------------------------------------------------------------------------------------


def _arguments(module: fx.GraphModule, values: Sequence[Any], fixed: bool) -> list[Argument]:
    arguments: list[Argument] = []
    for node, value in zip(_placeholders(module), values, strict=True):
        seen = value if fixed else node.meta.get("example_value")
        if not isinstance(value, Tensor):
            arguments.append(Argument(node, node.name, "number", value if seen is None else seen))
            continue
        shape = tuple(seen.shape) if isinstance(seen, Tensor) else tuple(value.shape)
        source = getattr(node, "_dynamo_source", None)
        state = isinstance(value, nn.Parameter) or (source is not None and _of_module(source))
        name = node.name if state else _name(source, node, [a.name for a in arguments])
        arguments.append(Argument(node, name, "state" if state else "input", value, shape))
    return arguments


def _of_module(source: Any) -> bool:
    """Whether a Dynamo source is an attribute of a module."""
    kind = source.guard_source
    kind = kind() if callable(kind) else kind
    return bool(kind.is_unspecialized_nn_module() or kind.is_specialized_nn_module())


def _name(source: Any, node: fx.Node, taken: list[str]) -> str:
    """`input_ids` of `L['input_ids']` or `L['kwargs']['input_ids']`; the placeholder's name where that fails."""
    for member in ("local_name", "index", "member"):
        name = getattr(source, member, None)
        if isinstance(name, str) and name.isidentifier() and name not in taken:
            return name
    return node.name


def _placeholders(module: fx.GraphModule) -> list[fx.Node]:
    return list(module.graph.find_nodes(op="placeholder"))


def open_size(size: Any) -> Any:
    """The sympy expression of a size that is still open, else None."""
    if not isinstance(size, SymInt):
        return None
    expression = size.node.expr
    return None if expression.is_number else expression


# --- graphs -----------------------------------------------------------------------------------------------------


def _as_in(lowered: fx.GraphModule, values: Sequence[Any]) -> tuple[Any, ...]:
    """The outputs of a graph from the values of those that it computes, in order; what follows is left out."""
    outputs: Any = lowered.graph.output_node().args[0]
    remaining = iter(values)
    return tuple(next(remaining) if isinstance(o, fx.Node) else o for o in outputs)


def _without_padding(value: Tensor, cut: Cut, missing: int | SymInt) -> Tensor:
    """A tensor of its own: a view would have other strides than the model's output, and whether it is contiguous would
    be a guard on the text's length."""
    own: Any = cut.stop - missing
    kept = torch.arange(own, device=value.device)
    if cut.stop < value.shape[cut.dim]:
        kept = torch.cat([kept, torch.arange(cut.stop, int(value.shape[cut.dim]), device=value.device)])
    return value.index_select(cut.dim, kept)


def _plain_path(path: str) -> str:
    """`encoder.layer.2` of Dynamo's `L['self'].encoder.layer.2`."""
    return re.sub(r"^[LG]\['[^']*'\]\.?", "", path)


def _to_attribute(module: fx.GraphModule, argument: Argument) -> None:
    """A placeholder of a parameter or buffer becomes an attribute that holds it."""
    (node,) = (n for n in _placeholders(module) if n.target == argument.name)
    if isinstance(argument.value, nn.Parameter):
        module.register_parameter(argument.name, argument.value)
    else:
        module.register_buffer(argument.name, argument.value, persistent=False)
    with module.graph.inserting_before(node):
        attribute = module.graph.get_attr(argument.name)
    attribute.meta.update(node.meta)
    node.replace_all_uses_with(attribute)
    module.graph.erase_node(node)


def as_dynamo_left_it(final: fx.GraphModule, original: fx.GraphModule) -> None:
    """Give placeholders and module what backends read from Dynamo's: where inputs come from, and which are static."""
    for node, old in zip(_placeholders(final), _placeholders(original), strict=True):
        node.meta.update({k: v for k, v in old.meta.items() if k == "tensor_dict"})
        if hasattr(old, "_dynamo_source"):
            node._dynamo_source = old._dynamo_source
    if "_param_name_to_source" not in vars(original):
        return
    from torch._dynamo.source import ConstantSource

    final.meta.update(original.meta)
    # Constants of the traced graph are its buffers, and every buffer needs a source.
    sources = {name: ConstantSource(name) for name, _ in final.named_buffers()}
    known: dict[str, Any] = vars(original)["_param_name_to_source"]
    vars(final)["_param_name_to_source"] = {**known, **sources}
    vars(final)["_source_to_user_stacks"] = vars(original).get("_source_to_user_stacks", {})


def may_attend(module: fx.GraphModule) -> bool:
    """Whether Dynamo's graph, or a part of it that is wrapped, calls what an attention is made of."""
    parts = (part for part in module.modules() if isinstance(part, fx.GraphModule))
    return any(calls_attention(node) for part in parts for node in part.graph.nodes)


def calls_attention(node: fx.Node) -> bool:
    """Whether a node of Dynamo's graph calls what an attention is made of."""
    name = str(getattr(node.target, "__name__", node.target))
    return node.op.startswith("call_") and ("attention" in name or ("softmax" in name and "log" not in name))
