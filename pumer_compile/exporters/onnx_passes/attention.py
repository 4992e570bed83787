"""Attention: its scale stands on the queries, where TensorRT asks for it.

    MatMul(q, k^T) -> Div by 8 -> Add(mask) -> Softmax -> MatMul(p, v)
    becomes
    Mul(q, 1/8) -> MatMul(q', k^T) -> Add(mask) -> Softmax -> MatMul(p, v)

TensorRT computes that as one kernel in float16 and bfloat16. Its manual wants queries or keys scaled before the first
product; TensorRT-RTX 1.7 finds attention wherever the scale stands, and launches as much with it here as there. In
float32, where it has no such kernel, the scale leaves the softmax. This one takes the place of all, on scores, queries
and keys: TensorRT 10.7 computed wrong values of `scaled_dot_product_attention` as it is exported, with a scale on
queries and keys each, and right ones with this (NVIDIA/TensorRT, issues 4328 and 4333). Values stay as they are where
the scale is a power of two, and otherwise differ in the last bits.

The operator `Attention` (opset 23) is not used. TensorRT-RTX takes it as a demand for one kernel and fails to build
where it has none: in float32, for heads of up to 8 or more than 256 numbers, and for small shapes that it does compute
in one kernel when it finds them by itself. onnxruntime 1.31 takes no mask by key alone for it, is no faster with it on
the processor, and gives zeros for a row that is all padding, where the softmax gives a mean.

Not touched: attention whose probabilities something else reads, such as a reducer; a softmax over another axis, or
spelled out; a scale for each head; masks that make the scores larger.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from math import isfinite, prod

import numpy as np
import onnx_ir

from .values import dims, named_like, only_reader


@dataclass(frozen=True)
class _Scale:
    """A product with one number, or a division by it.

    Attributes:
        node: that scales.
        operand: what it scales.
        factor: by which it multiplies.
    """

    node: onnx_ir.Node
    operand: onnx_ir.Value
    factor: float


@dataclass(frozen=True)
class _Attention:
    """What of an attention matters here.

    Attributes:
        product: of queries and transposed keys.
        query: as it is before any scale.
        scales: on scores, queries and keys; none of them is read by anything else.
        factor: of all scales together, in the type of the queries.
    """

    product: onnx_ir.Node
    query: onnx_ir.Value
    scales: tuple[_Scale, ...]
    factor: onnx_ir.TensorProtocol

    @property
    def in_place(self) -> bool:
        """Whether the queries are multiplied already, and nothing else is."""
        (first, *others) = self.scales
        return not others and first.node.op_type == "Mul" and first.node.outputs[0] is self.product.inputs[0]


class ScaleQueries(onnx_ir.passes.InPlacePass):
    """See the module's docstring."""

    def call(self, model: onnx_ir.Model) -> onnx_ir.passes.PassResult:
        """Move the scale of every attention that is one."""
        found = [_attention(node) for node in model.graph if _is(node, "Softmax")]
        moved = [attention for attention in found if attention is not None and not attention.in_place]
        for attention in moved:
            _move(model.graph, attention)
        return onnx_ir.passes.PassResult(model, bool(moved))


def _move(graph: onnx_ir.Graph, attention: _Attention) -> None:
    product, query = attention.product, attention.query
    for scale in attention.scales:
        scale.node.outputs[0].replace_all_uses_with(scale.operand)
        numbers = [value for value in scale.node.inputs if value is not None and value is not scale.operand]
        graph.remove(scale.node, safe=True)
        for value in numbers:
            if value.is_initializer() and not value.uses():
                del graph.initializers[str(value.name)]
    node = onnx_ir.node("Mul", [query, _constant(graph, attention.factor)], name=named_like(product, "Mul"))
    output = node.outputs[0]
    output.name, output.type, output.shape = f"{product.outputs[0].name}.query", query.type, query.shape
    graph.insert_before(product, node)
    product.replace_input_with(0, output)


def _constant(graph: onnx_ir.Graph, factor: onnx_ir.TensorProtocol) -> onnx_ir.Value:
    """One number; a graph has it once."""
    name = f"scale.{factor.numpy().item()!r}.{factor.dtype.name.lower()}"
    if name not in graph.initializers:
        kind, shape = onnx_ir.TensorType(factor.dtype), onnx_ir.Shape(())
        graph.register_initializer(onnx_ir.Value(name=name, shape=shape, type=kind, const_value=factor))
    return graph.initializers[name]


# --- Recognising ------------------------------------------------------------------------------------------------------


def _attention(softmax: onnx_ir.Node) -> _Attention | None:
    """The attention that a softmax belongs to, where it is one and keeps its probabilities to itself."""
    scores = softmax.inputs[0]
    shape = None if scores is None else dims(scores)
    if scores is None or shape is None or len(shape) < 3 or not _over_keys(softmax, len(shape)) or not _weighs(softmax):
        return None
    # A bias may be a product as well; then which of the two is of queries and keys is not known.
    found = [scaled for value in _unmasked(scores) if (scaled := _scaled_product(value)) is not None]
    if len(found) != 1:
        return None
    product, scales = found[0]
    query, keys = product.inputs
    if query is None or keys is None or query.dtype is None or not query.dtype.is_floating_point():
        return None
    on_query = _scale_of(query)
    unscaled = query if on_query is None else on_query.operand
    scales += [scale for scale in (on_query, _scale_of_keys(keys)) if scale is not None]
    factor = np.array(prod(scale.factor for scale in scales), query.dtype.numpy())
    if not scales or not np.isfinite(factor) or factor == 0:
        return None
    return _Attention(product, unscaled, tuple(scales), onnx_ir.tensor(factor))


def _over_keys(softmax: onnx_ir.Node, rank: int) -> bool:
    return softmax.attributes.get_int("axis", -1) in (-1, rank - 1)


def _weighs(softmax: onnx_ir.Node) -> bool:
    """Whether probabilities only weigh values."""
    node: onnx_ir.Node | None = softmax
    while node is not None:
        output = node.outputs[0]
        node = only_reader(output)
        if node is not None and _is(node, "MatMul"):
            return node.inputs[0] is output and not _is_constant(node.inputs[1])
        if node is not None and not _is(node, "Cast", "Identity"):
            return False
    return False


def _unmasked(value: onnx_ir.Value) -> Iterator[onnx_ir.Value]:
    """A softmax's input, and what may be the scores before masks were added and precision changed."""
    if only_reader(value) is None:
        return
    yield value
    node = value.producer()
    if node is not None and _is(node, "Add", "Cast", "Identity"):
        for operand in node.inputs:
            # What is as large as the scores: a mask by key is not, and one that repeats the scores is no mask.
            if operand is not None and dims(operand) == dims(value):
                yield from _unmasked(operand)


def _scaled_product(value: onnx_ir.Value) -> tuple[onnx_ir.Node, list[_Scale]] | None:
    """The product that scores are, and the scales on it."""
    scales = []
    while (scale := _scale_of(value)) is not None:
        scales.append(scale)
        value = scale.operand
    node = value.producer()
    if node is None or not _is(node, "MatMul") or only_reader(value) is None or any(map(_is_constant, node.inputs)):
        return None
    return node, scales


def _scale_of_keys(keys: onnx_ir.Value) -> _Scale | None:
    """The scale of transposed keys, before or after they were transposed."""
    node = keys.producer()
    if node is not None and _is(node, "Transpose") and only_reader(keys) is not None and node.inputs[0] is not None:
        return _scale_of(node.inputs[0])
    return _scale_of(keys)


def _scale_of(value: onnx_ir.Value) -> _Scale | None:
    """What multiplied a value by one number, where nothing else reads the result."""
    node = value.producer()
    if node is None or not _is(node, "Mul", "Div") or only_reader(value) is None:
        return None
    for index in (0, 1) if node.op_type == "Mul" else (0,):
        operand, number = node.inputs[index], _number(node.inputs[1 - index])
        # Of one shape: the number has no dimensions that it would give.
        if operand is None or number in (None, 0) or dims(operand) is None or dims(operand) != dims(value):
            continue
        assert number is not None
        return _Scale(node, operand, number if node.op_type == "Mul" else 1 / number)
    return None


def _number(value: onnx_ir.Value | None) -> float | None:
    """The one number that a constant is."""
    if value is None or not _is_constant(value):
        return None
    tensor = onnx_ir.convenience.get_const_tensor(value)
    if tensor is None or tensor.size != 1:
        return None
    number = float(tensor.numpy().item())
    return number if isfinite(number) else None


def _is_constant(value: onnx_ir.Value | None) -> bool:
    """Whether no caller and no input can change a value."""
    if value is None or value.is_graph_input():
        return False
    return onnx_ir.convenience.get_const_tensor(value) is not None


def _is(node: onnx_ir.Node, *operators: str) -> bool:
    return node.domain in ("", "ai.onnx") and node.op_type in operators
