"""Small ONNX graphs for the lean passes, and what is asked of every one of them."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

Shape = list[int | str]


@dataclass
class Graph:
    """A graph that is written node by node, and its result `y` last."""

    inputs: dict[str, Shape] = field(default_factory=dict)
    outputs: dict[str, Shape] = field(default_factory=dict)
    nodes: list[onnx.NodeProto] = field(default_factory=list)
    weights: list[onnx.TensorProto] = field(default_factory=list)

    def weight(self, *shape: int, values: Any = None) -> str:
        generator = np.random.default_rng(len(self.weights))
        array = generator.standard_normal(shape).astype(np.float32) if values is None else np.asarray(values)
        self.weights.append(numpy_helper.from_array(array, f"weight_{len(self.weights)}"))
        return self.weights[-1].name

    def node(self, operator: str, *inputs: str, gives: str = "", **attributes: Any) -> str:
        output = gives or f"{operator.lower()}_{len(self.nodes)}"
        name = f"layer.0/{operator}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [output], name=name, **attributes))
        return output

    def linear(self, value: str, given: int, made: int, *, bias: bool = True) -> str:
        product = self.node("MatMul", value, self.weight(given, made))
        return self.node("Add", product, self.weight(made)) if bias else product

    def model(self) -> onnx.ModelProto:
        infos = [
            [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in side.items()]
            for side in (self.inputs, self.outputs)
        ]
        graph = helper.make_graph(self.nodes, "graph", *infos, self.weights)
        domains = {"": 20} | {node.domain: 1 for node in self.nodes if node.domain}
        opsets = [helper.make_opsetid(domain, version) for domain, version in domains.items()]
        model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
        onnx.checker.check_model(model, full_check=True)
        return onnx.shape_inference.infer_shapes(model, strict_mode=True)


def run(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # constants that a pass left behind; the exporter drops them
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return list(session.run(None, feed))


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


def passed(
    kind: type[onnx_ir.passes.InPlacePass], model: onnx.ModelProto, feed: dict[str, np.ndarray]
) -> tuple[onnx.ModelProto, bool]:
    """The model after a pass: valid, with the shapes that the pass noted, of the same results, and with names of its
    own for every node and value."""
    read = onnx_ir.from_proto(model)
    modified = kind()(read).modified
    after = onnx_ir.to_proto(read)
    onnx.checker.check_model(after, full_check=True)
    onnx.shape_inference.infer_shapes(after, check_type=True, strict_mode=True, data_prop=True)
    names = [node.name for node in after.graph.node]
    assert len(names) == len(set(names)) and all(names)
    for old, new in zip(run(model, feed), run(after, feed), strict=True):
        assert old.shape == new.shape and np.abs(old - new).max() <= 1e-5 * max(1.0, float(np.abs(old).max()))
    assert modified or after.SerializeToString() == onnx_ir.to_proto(onnx_ir.from_proto(model)).SerializeToString()
    return after, modified


def numbers(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(7)
    return {name: generator.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}
