"""What the ONNX passes ask of values, and how they make new ones."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import prod
from typing import Any

import numpy as np
import onnx_ir

Dims = tuple[int | onnx_ir.SymbolicDim, ...]


def dims(value: onnx_ir.Value | None) -> Dims | None:
    """Sizes of a value; None where they are not known. An open size is no number."""
    return None if value is None or value.shape is None else tuple(value.shape)


def constant(value: onnx_ir.Value | None) -> onnx_ir.TensorProtocol | None:
    """The tensor of a value that no caller can change."""
    if value is None or value.is_graph_input() or value.const_value is None:
        return None
    return value.const_value


def matrix(value: onnx_ir.Value | None) -> tuple[int, int] | None:
    """Rows and columns of a constant matrix; None of anything else."""
    tensor = constant(value)
    sizes = () if tensor is None else tensor.shape.numpy()
    return (sizes[0], sizes[1]) if len(sizes) == 2 else None


def width(value: onnx_ir.Value | None) -> int | None:
    """The last size of a value, where it is a known number."""
    last = (dims(value) or (None,))[-1]
    return last if isinstance(last, int) else None


def is_vector(value: onnx_ir.Value | None) -> bool:
    """Whether this is a constant that stands along the last dimension, or one number."""
    tensor = constant(value)
    return tensor is not None and (len(tensor.shape) <= 1 or prod(tensor.shape.numpy()[:-1]) == 1)


def only_reader(value: onnx_ir.Value) -> onnx_ir.Node | None:
    """The one node that reads a value, once; None where there are several, or a caller sees it."""
    uses = tuple(value.uses())
    return uses[0].node if len(uses) == 1 and not value.is_graph_output() else None


def scope(node: onnx_ir.Node) -> str:
    """The module that a node came from, as its name says."""
    return str(node.name).rpartition("/")[0]


def named_like(node: onnx_ir.Node, operator: str) -> str:
    """A name for an operator that a pass puts beside a node: its scope, its number."""
    path, number = scope(node), str(node.name).rpartition("_")[2]
    return f"{path}/{operator}_{number}" if path else f"{operator}_{number}"


def lazily(
    compute: Callable[[], np.ndarray[Any, Any]], like: onnx_ir.TensorProtocol, shape: Sequence[int], name: str
) -> onnx_ir.TensorProtocol:
    """A constant that is computed each time it is read, so that no second copy of a weight stays in memory."""
    return onnx_ir.LazyTensor(
        lambda: onnx_ir.tensor(compute(), dtype=like.dtype, name=name), like.dtype, onnx_ir.Shape(shape), name=name
    )


def add_constant(graph: onnx_ir.Graph, tensor: onnx_ir.TensorProtocol, name: str) -> onnx_ir.Value:
    """A constant of the graph; one that has the name already is taken as it is."""
    if name in graph.initializers:
        return graph.initializers[name]
    value = onnx_ir.Value(
        name=name, shape=onnx_ir.Shape(tensor.shape.numpy()), type=onnx_ir.TensorType(tensor.dtype), const_value=tensor
    )
    graph.register_initializer(value)
    return value


def sizes(graph: onnx_ir.Graph, numbers: Sequence[int]) -> onnx_ir.Value:
    """The constant that a `Reshape` or `Split` takes."""
    name = "sizes." + ".".join(map(str, numbers))
    return add_constant(graph, onnx_ir.tensor(np.array(numbers, np.int64), name=name), name)


def typed(
    node: onnx_ir.Node, name: str, like: onnx_ir.Value, shape: Sequence[int | onnx_ir.SymbolicDim]
) -> onnx_ir.Value:
    """The first output of a new node, with its name, shape and the type of another value."""
    value = node.outputs[0]
    value.name, value.type, value.shape = name, like.type, onnx_ir.Shape(shape)
    return value
