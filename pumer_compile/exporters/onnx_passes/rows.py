"""Rows: what works on each token by itself works on a matrix of tokens, `[batch x tokens, width]`.

    Linear [b, n, w] -> LayerNormalization [b, n, w] -> Linear [b, n, w]
    becomes
    Reshape -> Linear [b n, w] -> LayerNormalization [b n, w] -> Linear [b n, w] -> Reshape

onnxruntime computes a linear layer as a product of matrices, and wraps each in two reshapes of its own; here they
cancel between one layer and the next, and go into the reshape that parts the heads.

A node is turned where it is a product with a constant matrix, or reads a value that is in rows already; a value that
something else reads is given its dimensions back once. Not turned: what has no known width, or more than one open size;
what gives an output of the graph; products with a single column.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from math import prod

import onnx_ir

from .values import Dims, constant, dims, is_vector, matrix, named_like, sizes, typed, width

UNARY = frozenset({"Gelu", "Relu", "LeakyRelu", "Elu", "Sigmoid", "Tanh", "Erf", "HardSigmoid", "HardSwish", "Mish"})
BINARY = frozenset({"Add", "Sub", "Mul", "Div"})


@dataclass
class _Rows:
    """Values in rows by the value that they stand for, and the reshapes made for them."""

    graph: onnx_ir.Graph
    rows: dict[onnx_ir.Value, onnx_ir.Value] = field(default_factory=dict)
    replaced: list[onnx_ir.Node] = field(default_factory=list)

    def of(self, value: onnx_ir.Value, reader: onnx_ir.Node) -> onnx_ir.Value:
        """A value in rows."""
        if value not in self.rows:
            rows = _in_rows(value)
            flat = sizes(self.graph, (-1, width(value) or 0))
            node = onnx_ir.node("Reshape", [value, flat], name=_unique(reader, value, "rows"))
            self.rows[value] = typed(node, f"{value.name}.rows", value, rows)
            self.graph.insert_before(reader, node)
        return self.rows[value]

    def turn(self, node: onnx_ir.Node, tokens: list[int]) -> None:
        """Let a node work on rows; `tokens` are its inputs that have them."""
        inputs = [self.of(x, node) if i in tokens and x is not None else x for i, x in enumerate(node.inputs)]
        attributes = dict(node.attributes)
        if "axis" in attributes:
            attributes["axis"] = onnx_ir.AttrInt64("axis", -1)
        new = onnx_ir.Node("", node.op_type, inputs, attributes.values(), name=node.name)
        self.graph.insert_before(node, new)
        output = node.outputs[0]
        self.rows[output] = typed(new, f"{output.name}.rows", output, _in_rows(output))
        self.replaced.append(node)

    def give_back(self) -> None:
        """Let what is not in rows read what it read, and remove what was turned."""
        turned = set(self.replaced)
        for node in self.replaced:
            output = node.outputs[0]
            readers = [use for use in output.uses() if use.node not in turned]
            rest = [use for use in readers if not self._reshapes(use.node, use.idx)]
            for use in readers:
                if use not in rest:
                    use.node.replace_input_with(use.idx, self.rows[output])
            if rest:
                wide = self._wide(node)
                for use in rest:
                    use.node.replace_input_with(use.idx, wide)
        self.graph.remove(reversed(self.replaced), safe=True)

    def _reshapes(self, node: onnx_ir.Node, index: int) -> bool:
        """Whether a reader gives its input another shape whatever it had."""
        shape = constant(node.inputs[1]) if node.op_type == "Reshape" and index == 0 else None
        return shape is not None and 0 not in shape.numpy()

    def _wide(self, node: onnx_ir.Node) -> onnx_ir.Value:
        """A turned node's output with its dimensions."""
        output = node.outputs[0]
        shape = dims(output) or ()
        numbers = [size if isinstance(size, int) else -1 for size in shape]
        new = onnx_ir.node(
            "Reshape", [self.rows[output], sizes(self.graph, numbers)], name=_unique(node, output, "tokens")
        )
        self.graph.insert_before(node, new)  # which stands behind what replaces it
        return typed(new, f"{output.name}.tokens", output, shape)


def _unique(node: onnx_ir.Node, value: onnx_ir.Value, what: str) -> str:
    return f"{named_like(node, 'Reshape')}.{what}.{value.name}"


def _in_rows(value: onnx_ir.Value) -> Dims:
    """Rows and width; with an open batch there is no name for the number of rows."""
    *leading, last = dims(value) or ()
    numbers = [size for size in leading if isinstance(size, int)]
    return (prod(numbers) if len(numbers) == len(leading) else onnx_ir.SymbolicDim(None), last)


class TokensAsRows(onnx_ir.passes.InPlacePass):
    """See the module's docstring. Gain: `benchmarks/results/lean_cpu.json`."""

    def call(self, model: onnx_ir.Model) -> onnx_ir.passes.PassResult:
        """Turn what can be turned."""
        rows = _Rows(model.graph)
        for node in list(model.graph):
            tokens = _token_inputs(node)
            if tokens and (node.op_type == "MatMul" or any(node.inputs[i] in rows.rows for i in tokens)):
                rows.turn(node, tokens)
        rows.give_back()
        return onnx_ir.passes.PassResult(model, bool(rows.replaced))


def _token_inputs(node: onnx_ir.Node) -> list[int]:
    """The inputs of a node that have tokens, where it computes each token by itself and can be turned."""
    if node.domain not in ("", "ai.onnx") or len(node.outputs) != 1 or node.outputs[0].is_graph_output():
        return []
    shape = dims(node.outputs[0])
    columns = width(node.outputs[0])
    if shape is None or len(shape) < 3 or columns is None or sum(not isinstance(size, int) for size in shape) > 1:
        return []
    if node.op_type == "MatMul":
        linear = matrix(node.inputs[1]) is not None and columns > 1
        return [0] if linear and (dims(node.inputs[0]) or ())[:-1] == shape[:-1] else []
    if node.op_type in UNARY:
        return [0]
    if node.op_type in BINARY:
        tokens = [i for i, x in enumerate(node.inputs) if dims(x) == shape and constant(x) is None]
        return tokens if all(i in tokens or is_vector(x) for i, x in enumerate(node.inputs)) else []
    if node.op_type == "LayerNormalization" and node.attributes.get_int("axis", -1) in (-1, len(shape) - 1):
        return [0]
    return []
