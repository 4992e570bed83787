"""Strides: no matrix product reads rows that lie a multiple of 4 KiB apart.

A layer of 3,072 hidden float32 numbers has rows of 12 KiB. A kernel that reads a dozen rows at a time (onnxruntime's on
the processor, which does not repack its left side) then finds them all in one set of a cache that holds eight lines
there. Sixteen numbers more put each row into a set of its own:

    MatMul [.., 3072] -> Add -> Gelu -> MatMul [3072, ..]
    becomes
    MatMul [.., 3088] -> Add -> Gelu -> MatMul [3088, ..]

with zeros in the columns and rows that are new, so that nothing is added to any number. It fires where the wide value
comes from products with constants through pointwise operators that are finite at 0, and nothing else sees it.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import onnx_ir

from .values import add_constant, constant, dims, is_vector, lazily, matrix, width

PAGE = 4096
"""Bytes after which addresses fall into the same set of a first-level cache (64 sets of 64 bytes)."""
LINE = 64
"""Bytes of a cache line."""
FINITE_AT_ZERO = frozenset(
    {"Gelu", "Relu", "LeakyRelu", "Elu", "Sigmoid", "Tanh", "Erf", "HardSigmoid", "HardSwish", "Add", "Sub", "Mul"}
    | {"BiasGelu", "FastGelu", "QuickGelu"}  # onnxruntime's
)
"""Operators that compute each number by itself, zeros into something finite."""


@dataclass
class _Hidden:
    """What computes a wide value: the nodes, and their constants that have its width (as node and place)."""

    nodes: set[onnx_ir.Node] = field(default_factory=set)
    wide: list[tuple[onnx_ir.Node, int]] = field(default_factory=list)


class PadStrides(onnx_ir.passes.InPlacePass):
    """See the module's docstring. Gain: `benchmarks/results/lean_cpu.json`."""

    def call(self, model: onnx_ir.Model) -> onnx_ir.passes.PassResult:
        """Widen what is read in bad strides."""
        modified = False
        for node in list(model.graph):
            hidden = _hidden(node)
            if hidden is not None:
                _widen(model.graph, node, hidden)
                modified = True
        return onnx_ir.passes.PassResult(model, modified)


def _hidden(node: onnx_ir.Node) -> _Hidden | None:
    """What computes the left side of a product that reads it in bad strides; None where that may not be wider."""
    weight = constant(node.inputs[1]) if node.op_type == "MatMul" else None
    sizes, left = matrix(node.inputs[1]) if weight else None, node.inputs[0] if node.inputs else None
    if weight is None or sizes is None or left is None or sizes[0] * weight.dtype.itemsize % PAGE:
        return None
    hidden, pending = _Hidden(), [left]
    while pending:
        maker = pending.pop().producer()
        if maker in hidden.nodes:
            continue
        more = None if maker is None else _sources(maker, sizes[0], hidden)
        if maker is None or more is None:
            return None
        hidden.nodes.add(maker)
        pending += more
    made = [value for maker in hidden.nodes for value in maker.outputs]
    readers = {reader for value in made for reader in value.consumers()}
    if any(value.is_graph_output() for value in made) or readers - hidden.nodes != {node}:
        return None
    return hidden


def _sources(maker: onnx_ir.Node, hidden_width: int, hidden: _Hidden) -> list[onnx_ir.Value] | None:
    """The wide values that a node makes its own from; None where it may not be wider."""
    if maker.op_type == "MatMul":
        hidden.wide.append((maker, 1))
        return None if matrix(maker.inputs[1]) is None else []
    if maker.op_type not in FINITE_AT_ZERO and not (maker.op_type == "Div" and _is_scalar(maker.inputs[1])):
        return None
    found = []
    for place, value in enumerate(maker.inputs):
        if value is None or _is_scalar(value):
            continue
        if constant(value) is None and width(value) == hidden_width:
            found.append(value)
        elif is_vector(value):
            hidden.wide.append((maker, place))
        else:
            return None
    return found


def _is_scalar(value: onnx_ir.Value | None) -> bool:
    tensor = constant(value)
    return tensor is not None and tensor.size == 1


def _widen(graph: onnx_ir.Graph, product: onnx_ir.Node, hidden: _Hidden) -> None:
    """Give what is computed, and the product that reads it, a line of the cache more."""
    weight = constant(product.inputs[1])
    assert weight is not None
    more = int(LINE / weight.dtype.itemsize)
    for node, place in [*hidden.wide, (product, 1)]:
        node.replace_input_with(place, _padded(graph, node.inputs[place], 0 if node is product else -1, more))
    for node in hidden.nodes:
        shape = dims(node.outputs[0])
        if shape is not None:
            node.outputs[0].shape = onnx_ir.Shape((*shape[:-1], weight.shape.numpy()[0] + more))


def _padded(graph: onnx_ir.Graph, value: onnx_ir.Value | None, axis: int, more: int) -> onnx_ir.Value:
    """A constant with zeros behind it."""
    tensor = constant(value)
    assert tensor is not None and value is not None
    shape = list(tensor.shape.numpy())
    pairs = [(0, 0)] * len(shape)
    shape[axis], pairs[axis] = shape[axis] + more, (0, more)
    name = f"{value.name}.padded{axis % len(shape)}"
    return add_constant(graph, lazily(lambda: np.pad(tensor.numpy(), pairs), tensor, shape, name), name)
