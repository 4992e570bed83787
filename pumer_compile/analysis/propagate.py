"""Run a graph on fake tensors: shapes and multiply-adds without computing anything."""

from __future__ import annotations

import math
from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from ..errors import VerifyError
from .nodes import attribute, describe


def _fused_attention(query: Any, key: Any, value: Any, *args: Any, **options: Any) -> int:
    """Floating-point operations of a fused attention; the shapes are `[batch, heads, tokens, head size]`."""
    *batch, queries, size = query
    return int(2 * math.prod(batch) * queries * key[-2] * (size + value[-1]))


# The kernel of the CPU, which PyTorch's counter does not know.
_COUNTED = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _fused_attention}


class _FakeInterpreter(fx.Interpreter):
    """Runs nodes on fake tensors; it is twice the work to count as well."""

    def __init__(self, module: fx.GraphModule, mode: FakeTensorMode, counting: bool) -> None:
        super().__init__(module)
        self.counting = counting
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
        if not self.states.get(target):
            return super().call_module(target, args, kwargs)
        return functional_call(self.fetch_attr(target), self.states[target], args, kwargs)

    def fetch_attr(self, target: str) -> Any:
        return self.attributes[target] if target in self.attributes else super().fetch_attr(target)

    def run_node(self, n: fx.Node) -> Any:
        counter = FlopCounterMode(display=False, custom_mapping=_COUNTED) if self.counting else None
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
        return result


def propagate(module: fx.GraphModule, inputs: Mapping[str, Tensor]) -> dict[fx.Node, Any]:
    """Fake values of every node.

    Args:
        module: a graph module whose placeholders are named as `inputs`.
        inputs: sample tensors; fake ones keep their symbolic sizes.

    Raises:
        VerifyError: a node cannot run on these sizes.
    """
    return _run(module, inputs, counting=False).values


def count_multiply_adds(module: fx.GraphModule, inputs: Mapping[str, Tensor]) -> dict[fx.Node, int]:
    """Multiply-adds of every node for the whole batch: matrix products and convolutions, as fvcore counts them
    (Table 7 of the paper).

    Args:
        module: a graph module whose placeholders are named as `inputs`.
        inputs: sample tensors.

    Raises:
        VerifyError: a node cannot run on these sizes.
    """
    return _run(module, inputs, counting=True).multiply_adds


def _run(module: fx.GraphModule, inputs: Mapping[str, Tensor], counting: bool) -> _FakeInterpreter:
    fakes = [v for v in inputs.values() if isinstance(v, torch._subclasses.fake_tensor.FakeTensor)]
    mode = fakes[0].fake_mode if fakes else FakeTensorMode()
    placeholders = [n for n in module.graph.nodes if n.op == "placeholder"]
    given = [inputs[str(n.target)] for n in placeholders]
    if any(isinstance(v := attribute(n), Tensor) and v.is_meta for n in module.graph.nodes if n.op == "get_attr"):
        given = [tensor.to("meta") for tensor in given]
    arguments = [g if fakes else mode.from_tensor(g, static_shapes=True) for g in given]
    # The counter takes composite operators apart by itself: of a fused attention with an open batch that is three times
    # as fast as what the dispatcher in Python does with it.
    open_batch = any(isinstance(size, torch.SymInt) for fake in fakes for size in fake.shape)
    interpreter = _FakeInterpreter(module, mode, counting or open_batch)
    # Of composite operators torch 2.11 has shapes with an open batch in Python alone.
    with mode, torch.no_grad(), enable_python_dispatcher() if fakes else nullcontext():
        interpreter.run(*arguments, enable_io_processing=False)
    return interpreter
