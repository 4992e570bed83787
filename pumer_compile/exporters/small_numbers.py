"""Numbers near 0 and 1 that an optimizer would take for 0 and 1.

onnxscript's optimizer leaves `x + c` and `x - c` out where `c` is within 1e-8 of 0, and `x * c` and `x / c` where it is
within 1e-5 of 1. A sum of small numbers may well be below 1e-8, and then such an addend decides: in the published
masked softmax (eps / keys, below 1e-8 from 100 keys on), or before a division by a norm.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram

aten = torch.ops.aten
_NEUTRAL: dict[Any, float] = {
    aten.add.Tensor: 0.0, aten.add.Scalar: 0.0, aten.sub.Tensor: 0.0, aten.sub.Scalar: 0.0,
    aten.mul.Tensor: 1.0, aten.mul.Scalar: 1.0, aten.div.Tensor: 1.0, aten.div.Scalar: 1.0,
}  # fmt: skip
_TENSOR: dict[Any, Any] = {
    aten.add.Scalar: aten.add.Tensor, aten.sub.Scalar: aten.sub.Tensor,
    aten.mul.Scalar: aten.mul.Tensor, aten.div.Scalar: aten.div.Tensor,
}  # fmt: skip


def keep_small_numbers(exported: ExportedProgram) -> None:
    """Write numbers that are nearly neutral as tensors of one entry, which the optimizer does not look at; in place.

    The program computes the same numbers.

    Args:
        exported: before decomposition.
    """
    constants = _constants(exported)
    changed = False
    for node in list(exported.graph.nodes):
        if node.op != "call_function" or node.target not in _NEUTRAL or len(node.args) < 2 or not _is_floating(node):
            continue
        for place, other in ((0, 1), (1, 0)):
            number = _number(node.args[place], constants)
            left = node.args[other]
            wide = isinstance(left, fx.Node) and _rank(left) > 0
            if number is not None and wide and _nearly(number, _NEUTRAL[node.target]):
                _write(exported.graph, node, place, number)
                changed = True
    if changed:
        exported.graph.lint()
        exported.graph_module.recompile()


def _constants(exported: ExportedProgram) -> dict[str, Tensor]:
    """Buffers and lifted constants without dimensions, by the name of their placeholder."""
    signature, found = exported.graph_signature, {}
    for name, target in {**signature.inputs_to_buffers, **signature.inputs_to_lifted_tensor_constants}.items():
        value: Any = exported.state_dict.get(target, exported.constants.get(target))
        if isinstance(value, Tensor) and value.ndim == 0 and not value.is_meta:
            found[name] = value
    return found


def _number(value: object, constants: dict[str, Tensor]) -> float | None:
    if isinstance(value, fx.Node):
        constant = constants.get(value.name)
        return None if constant is None else float(constant)
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else None


def _nearly(number: float, neutral: float) -> bool:
    """As the optimizer compares, with a margin."""
    return number != neutral and math.isclose(number, neutral, rel_tol=2e-5, abs_tol=2e-8)


def _is_floating(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.is_floating_point()


def _rank(node: fx.Node) -> int:
    value = node.meta.get("val")
    return value.ndim if isinstance(value, Tensor) else 0


def _write(graph: fx.Graph, node: fx.Node, place: int, number: float) -> None:
    """A tensor of one entry, in the dtype of the result: a number takes no part in the promotion of dtypes."""
    result = node.meta["val"]
    with graph.inserting_before(node):
        made = graph.call_function(
            aten.full.default, ([1], number), {"dtype": result.dtype, "device": result.device, "pin_memory": False}
        )
    with result.fake_mode:
        made.meta = {
            **{k: v for k, v in node.meta.items() if k != "val"},
            "val": aten.full.default([1], number, dtype=result.dtype),
        }
    args = list(node.args)
    args[place] = made
    node.args = tuple(args)
    node.target = _TENSOR.get(node.target, node.target)
