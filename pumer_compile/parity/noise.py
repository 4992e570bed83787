"""The error that a precision makes in eager PyTorch itself: what an artifact of it cannot be blamed for.

The reduced module runs in the artifact's precision beside the one in float32, on the samples of the check, both made to
follow the same decisions. Half precision: the model is captured and reduced anew in it. int8: the linear layers of the
float32 graph take weights and inputs that are rounded to 8 bits, as onnxruntime's quantizers round them.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from ..analysis.nodes import copied
from ..capture.capture import Program
from ..reduce import reduce_graph
from ..schedule import Schedule

Coarse = Callable[[], fx.GraphModule]
"""Gives the reduced module in a coarser precision."""


def coarse_of(
    program: Program, schedule: Schedule | None, exact: fx.GraphModule, dtype: str, quantize_mode: str | None = None
) -> Coarse | None:
    """What computes as an artifact's precision does; None of float32, and of a program whose dtype is written into it.

    Args:
        program: captured.
        schedule: that it is reduced by; None where it is not, or exactly.
        exact: the reduced module in float32.
        dtype: of the artifact, or what it is quantized to.
        quantize_mode: see `exporters.quantize`.
    """
    if dtype == "int8":
        return partial(with_int8_linears, exact, inputs=quantize_mode != "weights")
    if dtype == "float32" or program.model is None:
        return None

    def half() -> fx.GraphModule:
        from ..exporters.chain import cast_program  # exporters import this stage to prove what they export

        found = cast_program(program, dtype)  # type: ignore[arg-type]  # a name of float16 or bfloat16
        return found.module if schedule is None or schedule.exact else reduce_graph(found, schedule)

    return half


def with_int8_linears(module: fx.GraphModule, *, inputs: bool) -> fx.GraphModule:
    """A copy of a graph whose linear layers are rounded to 8 bits; parameters and reducers are shared.

    Args:
        module: in float32.
        inputs: whether what they are given is rounded too, over its whole range, and not their weights alone.
    """
    twin = fx.GraphModule(module, copied(module.graph), class_name="Int8")
    for node in twin.graph.find_nodes(op="call_function", target=torch.ops.aten.linear.default):
        node.target = partial(_linear, inputs=inputs)
        node.target.__name__ = "int8_linear"  # fx writes a name for each target
    twin.recompile()
    return twin


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None = None, *, inputs: bool) -> Tensor:
    from ..exporters.quantize import BLOCK

    # Of the weights one scale for each output, or for each block of inputs where they alone are rounded.
    if inputs:
        return torch.nn.functional.linear(_rounded_range(x), _rounded(weight, 1), bias)
    padded = torch.nn.functional.pad(weight, (0, -weight.shape[1] % BLOCK))
    blocks = _rounded(padded.reshape(len(weight), -1, BLOCK), 2)
    return torch.nn.functional.linear(x, blocks.reshape(padded.shape)[:, : weight.shape[1]], bias)


def _rounded(values: Tensor, dim: int) -> Tensor:
    """To 255 levels around zero, by the largest of each row."""
    scale = values.abs().amax(dim, keepdim=True).clamp(min=1e-30) / 127
    return (values / scale).round() * scale


def _rounded_range(values: Tensor) -> Tensor:
    """To 256 levels from the smallest (or 0) to the largest (or 0)."""
    low, high = values.amin().clamp(max=0), values.amax().clamp(min=0)
    scale = ((high - low) / 255).clamp(min=1e-30)
    zero = (-low / scale).round()
    return ((values / scale).round().add(zero).clamp(0, 255) - zero) * scale


def failed(error: Exception) -> str:
    """Why nothing was measured, in a line."""
    first = next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
    return first.rstrip(".")


Batches = list[tuple[Mapping[str, Tensor], Any]]
"""Batches, and the decisions that were made on them, by reducer."""
