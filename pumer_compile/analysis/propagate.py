"""Run a graph on fake tensors: shapes and multiply-adds without computing anything."""

from __future__ import annotations

import math
import types
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode, flop_registry

from ..errors import VerifyError
from .nodes import attribute, describe
from .operators import ATTENTION, DROPOUT, MOVES, NEW, PIECES, PRODUCTS, SOFTMAX, overloads


def _fused_attention(query: Any, key: Any, value: Any, *args: Any, **options: Any) -> int:
    """Floating-point operations of a fused attention; the shapes are `[batch, heads, tokens, head size]`."""
    *batch, queries, size = query
    return int(2 * math.prod(batch) * queries * key[-2] * (size + value[-1]))


# The kernel of the CPU, which PyTorch's counter does not know.
_COUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _fused_attention}
# Composite operators that no product is made of; of others that are not known, PyTorch's counter looks into them.
_NO_PRODUCT = {*MOVES, *DROPOUT, *SOFTMAX, *PIECES, *NEW, *overloads("layer_norm group_norm rms_norm type_as")}


class ModuleRuns:
    """What inserted modules give for fake values, and their multiply-adds: with the same shapes a module gives the
    same, and need not run again for each pass that asks."""

    def __init__(self) -> None:
        self._found: dict[tuple[Any, ...], tuple[Any, Any]] = {}

    def find(self, module: torch.nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Results and multiply-adds for these values; None where it has not run on their like."""
        return self._found.get((id(module), _like(args), _like(kwargs)))

    def add(self, module: torch.nn.Module, args: Any, kwargs: Any, result: Any, multiply_adds: Any) -> None:
        """What a run gave."""
        # The module is kept: another one must not get its number.
        self._found[id(module), _like(args), _like(kwargs)] = result, multiply_adds
        self._found[id(module),] = module, None


def _like(value: Any) -> Any:
    """What is equal for values on which the same module does the same."""
    if isinstance(value, Tensor):
        mode = getattr(value, "fake_mode", None)
        sizes = tuple(map(_like, (*value.shape, *value.stride())))
        return id(mode), sizes, value.dtype, value.device
    if isinstance(value, torch.SymInt):
        return value.node.expr
    if isinstance(value, list | tuple):
        return tuple(map(_like, value))
    if isinstance(value, dict):
        return tuple((key, _like(part)) for key, part in value.items())
    return type(value), value


class _FakeInterpreter(fx.Interpreter):
    """Runs nodes on fake tensors; it is twice the work to count as well."""

    def __init__(self, module: fx.GraphModule, mode: FakeTensorMode, counting: bool, runs: ModuleRuns) -> None:
        super().__init__(module)
        self.counting, self.runs = counting, runs
        self.values: dict[fx.Node, Any] = {}
        self.multiply_adds: dict[fx.Node, int] = {}
        # Made fake before the mode is entered, and without gradients, which a run under no_grad has no place for.
        self.attributes = {
            str(node.target): mode.from_tensor(value.detach(), static_shapes=True)
            for node in module.graph.nodes
            if node.op == "get_attr" and isinstance(value := attribute(node), Tensor)
        }

        # And what inserted modules hold, a text tower say.
        on_meta = any(value.device.type == "meta" for value in self.attributes.values())
        self.states: dict[str, dict[str, Tensor]] = {
            str(node.target): {
                name: mode.from_tensor(value.detach().to("meta" if on_meta else value.device), static_shapes=True)
                for name, value in module.get_submodule(str(node.target)).state_dict().items()
            }
            for node in module.graph.find_nodes(op="call_module")
        }

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        called = self.fetch_attr(target)
        if (found := self.runs.find(called, args, kwargs)) is not None:
            return found[0]
        with _counter() as counter:
            if not self.states.get(target):
                result = super().call_module(target, args, kwargs)
            else:
                result = functional_call(called, self.states[target], args, kwargs)
        self.runs.add(called, args, kwargs, result, counter.get_total_flops() // 2)
        return result

    def fetch_attr(self, target: str) -> Any:
        return self.attributes[target] if target in self.attributes else super().fetch_attr(target)

    def run_node(self, n: fx.Node) -> Any:
        counter = _counter() if self.counting and n.op != "call_module" else None
        try:
            with counter or nullcontext():
                result = super().run_node(n)
        except Exception as error:
            # Whatever a kernel's shape function raises, the node is what the user needs to know.
            first = next((line for line in str(error).splitlines() if line.strip()), type(error).__name__)
            raise VerifyError(
                f"{describe(n)} cannot run on the reduced tokens: {first.strip()} A size that the rules did not follow "
                "is written into the graph; the rule of this operator, or of one before it, is in analysis/rules.py."
            ) from error
        self.values[n] = result
        if counter is not None:
            # One multiply-add counts as two floating-point operations there.
            self.multiply_adds[n] = counter.get_total_flops() // 2
        elif self.counting:
            args, kwargs = self.fetch_args_kwargs_from_env(n)
            found = self.runs.find(self.fetch_attr(str(n.target)), args, kwargs)
            assert found is not None
            self.multiply_adds[n] = found[1]
        return result


def _counter() -> FlopCounterMode:
    return FlopCounterMode(display=False, custom_mapping=_COUNTED)


def propagate(
    module: fx.GraphModule, inputs: Mapping[str, Tensor], runs: ModuleRuns | None = None
) -> dict[fx.Node, Any]:
    """Fake values of every node.

    Args:
        module: a graph module whose placeholders are named as `inputs`.
        inputs: sample tensors; fake ones keep their symbolic sizes.
        runs: what modules gave before, which is used and added to.

    Raises:
        VerifyError: a node cannot run on these sizes.
    """
    return _run(module, inputs, counting=False, runs=runs).values


def count_multiply_adds(
    module: fx.GraphModule, inputs: Mapping[str, Tensor], runs: ModuleRuns | None = None
) -> dict[fx.Node, int]:
    """Multiply-adds of every node for the whole batch: matrix products and convolutions, as fvcore counts them
    (Table 7 of the paper).

    Args:
        module: a graph module whose placeholders are named as `inputs`.
        inputs: sample tensors.
        runs: of its modules, by an earlier pass. With these, and values of such inputs noted on all nodes
            (`meta["val"]`), only what is neither a known product nor free of any is run.

    Raises:
        VerifyError: a node cannot run on these sizes.
    """
    counted = _from_noted_values(module, inputs, runs or ModuleRuns())
    return _run(module, inputs, counting=True).multiply_adds if counted is None else counted


def _from_noted_values(
    module: fx.GraphModule, inputs: Mapping[str, Tensor], runs: ModuleRuns
) -> dict[fx.Node, int] | None:
    """Multiply-adds by the values that are noted on nodes; None where one is missing, or these are of other inputs."""
    mode = None
    for node in module.graph.find_nodes(op="placeholder"):
        value, given = node.meta.get("val"), inputs.get(str(node.target))
        if node.users and not isinstance(value, FakeTensor):
            return None
        if isinstance(value, FakeTensor):
            mode = value.fake_mode
            if given is None or [*map(_hint, value.shape)] != list(given.shape):
                return None
    if mode is None:
        return None
    called = [node for node in module.graph.nodes if node.op in ("call_function", "call_module", "call_method")]
    try:
        return {node: _count(module, node, runs, mode) for node in called}
    except _NotNotedError:
        return None


class _NotNotedError(Exception):
    """A value, or what a module gave, is not known."""


def _hint(size: Any) -> int:
    """A size, or for an open one what the sample has."""
    return int(size.node.hint) if isinstance(size, torch.SymInt) else int(size)


def _count(module: fx.GraphModule, node: fx.Node, runs: ModuleRuns, mode: FakeTensorMode) -> int:
    """Multiply-adds of a node by noted values."""
    if node.op == "call_module":
        found = runs.find(module.get_submodule(str(node.target)), *_given(node, mode))
        if found is None:
            raise _NotNotedError
        return _hint(found[1])
    target: Any = node.target
    if node.op == "call_method":
        raise _NotNotedError
    if isinstance(target, types.BuiltinFunctionType) or target in _NO_PRODUCT:  # `operator.getitem` and its like
        return 0
    if isinstance(target, torch._ops.OpOverload):
        if target.overloadpacket not in flop_registry and not target._can_decompose():
            return 0
        if (count := _product(node, target)) is not None:
            return count
    args, kwargs = _given(node, mode)
    with mode, torch.no_grad(), enable_python_dispatcher(), _counter() as counter:
        target(*args, **kwargs)
    return _hint(counter.get_total_flops()) // 2


def _product(node: fx.Node, target: Any) -> int | None:
    """Multiply-adds of a matrix product or a fused attention; None of anything else, and of products of vectors."""
    result, left = node.meta.get("val"), node.args[PRODUCTS.get(target, 0)] if node.args else None
    value = left.meta.get("val") if isinstance(left, fx.Node) else None
    if not isinstance(result, Tensor) or not isinstance(value, Tensor) or min(result.dim(), value.dim()) < 2:
        return None
    if target is ATTENTION:
        query, key, given = ([*map(_hint, _noted(x).shape)] for x in node.args[:3] if isinstance(x, fx.Node))
        return _fused_attention(query, key, given) // 2
    if target not in PRODUCTS or result.dim() < value.dim():
        return None
    return math.prod(map(_hint, result.shape)) * _hint(value.shape[-1])


def _given(node: fx.Node, mode: FakeTensorMode) -> tuple[Any, Any]:
    """The noted values of what a node takes."""

    def value(source: fx.Node) -> Any:
        if source.op == "get_attr" and "val" not in source.meta and isinstance(found := attribute(source), Tensor):
            return mode.from_tensor(found.detach(), static_shapes=True)
        return _noted(source)

    args: Any = fx.map_arg(node.args, value)
    kwargs: Any = fx.map_arg(node.kwargs, value)
    return args, kwargs


def _noted(node: fx.Node) -> Any:
    value = node.meta.get("val")
    if value is None:
        raise _NotNotedError
    return value


def _run(
    module: fx.GraphModule, inputs: Mapping[str, Tensor], counting: bool, runs: ModuleRuns | None = None
) -> _FakeInterpreter:
    fakes = [v for v in inputs.values() if isinstance(v, FakeTensor)]
    mode = fakes[0].fake_mode if fakes else FakeTensorMode()
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    given = [inputs[str(n.target)] for n in placeholders]
    if any(isinstance(v := attribute(n), Tensor) and v.is_meta for n in module.graph.nodes if n.op == "get_attr"):
        given = [tensor.to("meta") for tensor in given]
    arguments = [g if fakes else mode.from_tensor(g, static_shapes=True) for g in given]
    # The counter takes composite operators apart by itself: of a fused attention with an open batch that is three times
    # as fast as what the dispatcher in Python does with it.
    open_batch = any(isinstance(size, torch.SymInt) for fake in fakes for size in fake.shape)
    interpreter = _FakeInterpreter(module, mode, counting or open_batch, runs or ModuleRuns())
    # Of composite operators torch 2.11 has shapes with an open batch in Python alone.
    with mode, torch.no_grad(), enable_python_dispatcher() if open_batch else nullcontext():
        interpreter.run(*arguments, enable_io_processing=False)
    return interpreter
