"""Projections: one product where several read the same value.

    MatMul(x, query), MatMul(x, key), MatMul(x, value), each with an Add
    becomes
    Split(Add(MatMul(x, [query | key | value]), [biases]))

On the processor the wide product is 3 to 8% faster on a few hundred rows, and the copy that parts its result takes that
back: measured, it does not pay there, and no target has it by itself (`--onnx-passes projections`).
"""

from __future__ import annotations

import numpy as np
import onnx_ir

from .values import add_constant, constant, dims, lazily, matrix, named_like, only_reader, sizes, typed, width


class JoinProjections(onnx_ir.passes.InPlacePass):
    """See the module's docstring. Gain: `benchmarks/results/lean_cpu.json`."""

    def call(self, model: onnx_ir.Model) -> onnx_ir.passes.PassResult:
        """Join what reads the same value."""
        groups: dict[tuple[onnx_ir.Value | None, bool], list[onnx_ir.Node]] = {}
        for node in model.graph:
            if _is_projection(node):
                groups.setdefault((node.inputs[0], _sum(node) is not None), []).append(node)
        joined = [group for group in groups.values() if len(group) > 1]
        for group in joined:
            _join(model.graph, group)
        return onnx_ir.passes.PassResult(model, bool(joined))


def _is_projection(node: onnx_ir.Node) -> bool:
    """A product with a constant matrix whose result, with its bias, nobody outside sees."""
    if node.op_type != "MatMul" or matrix(node.inputs[1]) is None or dims(node.outputs[0]) is None:
        return False
    return not any(end.outputs[0].is_graph_output() for end in (node, _sum(node)) if end is not None)


def _sum(node: onnx_ir.Node) -> onnx_ir.Node | None:
    """The sum with a constant vector that alone reads a product."""
    reader = only_reader(node.outputs[0])
    if reader is None or reader.op_type != "Add":
        return None
    vectors = [x for x in reader.inputs if constant(x) is not None and dims(x) == (width(node.outputs[0]),)]
    return reader if len(vectors) == 1 else None


def _join(graph: onnx_ir.Graph, group: list[onnx_ir.Node]) -> None:
    first, like = group[0], group[0].outputs[0]
    parts = [width(node.outputs[0]) or 0 for node in group]
    whole = (*(dims(like) or ())[:-1], sum(parts))
    weights = _side_by_side(graph, [node.inputs[1] for node in group])
    new = [onnx_ir.node("MatMul", [first.inputs[0], weights], name=named_like(first, "MatMul.joined"))]
    last = typed(new[0], f"{like.name}.joined", like, whole)
    sums = [node for node in map(_sum, group) if node is not None]
    if sums:
        biases = _side_by_side(graph, [x for node in sums for x in node.inputs if constant(x) is not None])
        new.append(onnx_ir.node("Add", [last, biases], name=named_like(first, "Add.joined")))
        last = typed(new[-1], f"{like.name}.joined.sum", like, whole)
    new.append(
        onnx_ir.node(
            "Split", [last, sizes(graph, parts)], {"axis": -1}, num_outputs=len(parts), name=named_like(first, "Split")
        )
    )
    graph.insert_before(first, new)
    for end, part in zip(sums or group, new[-1].outputs, strict=True):
        old = end.outputs[0]
        part.name, part.type, part.shape = f"{old.name}.part", old.type, old.shape
        onnx_ir.convenience.replace_all_uses_with(old, part)
    graph.remove([*sums, *group], safe=True)


def _side_by_side(graph: onnx_ir.Graph, values: list[onnx_ir.Value | None]) -> onnx_ir.Value:
    """Constants joined along their last dimension."""
    tensors = [tensor for tensor in map(constant, values) if tensor is not None]
    shapes = [tensor.shape.numpy() for tensor in tensors]
    shape = (*shapes[0][:-1], sum(sizes[-1] for sizes in shapes))
    name = "|".join(str(value.name) for value in values if value is not None)
    joined = lazily(lambda: np.concatenate([tensor.numpy() for tensor in tensors], -1), tensors[0], shape, name)
    return add_constant(graph, joined, name)
