"""A line of the cache more where rows lie a multiple of 4 KiB apart, and nowhere else."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from pumer_compile.exporters.onnx_passes.strides import LINE, PAGE, PadStrides
from tests.exporters.onnx_passes.graphs import Graph, numbers, operators, passed

WIDE = PAGE // 4
MORE = LINE // 4


def mlp(hidden: int = WIDE, activation: str = "Gelu", batch: int | str = 2) -> Graph:
    graph = Graph({"x": [batch, 3, 8]}, {"y": [batch, 3, 8]})
    inner = graph.node(activation, graph.linear("x", 8, hidden))
    product = graph.node("MatMul", inner, graph.weight(hidden, 8))
    graph.node("Add", product, graph.weight(8), gives="y")
    return graph


def shapes(model: onnx.ModelProto) -> set[tuple[int, ...]]:
    """Of the constants that something reads."""
    read = {name for node in model.graph.node for name in node.input}
    return {tuple(weight.dims) for weight in model.graph.initializer if weight.name in read}


@pytest.mark.parametrize("activation", ["Gelu", "Relu", "Sigmoid", "Tanh", "Erf", "HardSwish"])
@pytest.mark.parametrize("hidden", [WIDE, 3 * WIDE])
def test_rows_get_a_line_more(activation: str, hidden: int) -> None:
    before = mlp(hidden, activation).model()
    after, modified = passed(PadStrides, before, numbers(x=(2, 3, 8)))
    assert modified and operators(after) == operators(before)
    assert shapes(after) == {(8, hidden + MORE), (hidden + MORE,), (hidden + MORE, 8), (8,)}
    new = [numpy_helper.to_array(w) for w in after.graph.initializer if hidden + MORE in w.dims]
    assert not any(np.moveaxis(array, array.shape.index(hidden + MORE), 0)[hidden:].any() for array in new)


@pytest.mark.parametrize("hidden", [WIDE - 8, WIDE + MORE, WIDE // 2, 8])
def test_other_strides_are_left(hidden: int) -> None:
    assert not passed(PadStrides, mlp(hidden).model(), numbers(x=(2, 3, 8)))[1]


def test_an_open_batch() -> None:
    assert passed(PadStrides, mlp(batch="batch").model(), numbers(x=(5, 3, 8)))[1]


def test_colliding_sizes() -> None:
    """Width, tokens and hidden size are one number: what is padded follows the layers, not the sizes."""
    graph = Graph({"x": [1, WIDE, WIDE]}, {"y": [1, WIDE, WIDE]})
    inner = graph.node("Relu", graph.linear("x", WIDE, WIDE))
    graph.node("MatMul", inner, graph.weight(WIDE, WIDE), gives="y")
    after, modified = passed(PadStrides, graph.model(), numbers(x=(1, WIDE, WIDE)))
    assert modified
    assert shapes(after) == {(WIDE, WIDE + MORE), (WIDE + MORE,), (WIDE + MORE, WIDE)}


def test_the_operators_of_onnxruntime() -> None:
    """`--target onnxruntime-cpu` puts a bias into the activation."""
    graph = Graph({"x": [2, 3, 8]}, {"y": [2, 3, 8]})
    product = graph.node("MatMul", "x", graph.weight(8, WIDE))
    inner = graph.node("BiasGelu", product, graph.weight(WIDE), domain="com.microsoft")
    graph.node("MatMul", inner, graph.weight(WIDE, 8), gives="y")
    after, modified = passed(PadStrides, graph.model(), numbers(x=(2, 3, 8)))
    assert modified and shapes(after) == {(8, WIDE + MORE), (WIDE + MORE,), (WIDE + MORE, 8)}


def test_a_gated_layer() -> None:
    """Two products that meet: both are wider."""
    graph = Graph({"x": [2, 3, 8]}, {"y": [2, 3, 8]})
    gate = graph.linear("x", 8, WIDE)
    opened = graph.node("Mul", graph.node("Sigmoid", gate), gate)
    inner = graph.node("Mul", opened, graph.linear("x", 8, WIDE, bias=False))
    scaled = graph.node("Div", inner, graph.weight(values=np.float32(3.0)))
    graph.node("MatMul", scaled, graph.weight(WIDE, 8), gives="y")
    after, modified = passed(PadStrides, graph.model(), numbers(x=(2, 3, 8)))
    assert modified and shapes(after) == {(8, WIDE + MORE), (WIDE + MORE,), (WIDE + MORE, 8), ()}


def test_weights_of_two_layers_are_padded_once() -> None:
    graph = Graph({"x": [2, 3, 8]}, {"y": [2, 3, 8]})
    up, bias, down = graph.weight(8, WIDE), graph.weight(WIDE), graph.weight(WIDE, 8)
    value = "x"
    for gives in ("", "y"):
        wide = graph.node("Relu", graph.node("Add", graph.node("MatMul", value, up), bias))
        value = graph.node("MatMul", wide, down, gives=gives)
    after, modified = passed(PadStrides, graph.model(), numbers(x=(2, 3, 8)))
    assert modified and sum(WIDE + MORE in w.dims for w in after.graph.initializer) == 3


# --- Where it must not fire -------------------------------------------------------------------------------------------


def read_elsewhere(graph: Graph) -> None:
    graph.node("Identity", graph.nodes[2].output[0], gives="z")
    graph.outputs["z"] = [2, 3, WIDE]


def read_before_the_bias(graph: Graph) -> None:
    graph.node("ReduceSum", graph.nodes[0].output[0], graph.weight(values=np.array([-1])), gives="z", keepdims=0)
    graph.outputs["z"] = [2, 3]


def an_output(graph: Graph) -> None:
    graph.outputs[graph.nodes[2].output[0]] = [2, 3, WIDE]


def read_by_two_products(graph: Graph) -> None:
    graph.node("MatMul", graph.nodes[2].output[0], graph.weight(WIDE, 4), gives="z")
    graph.outputs["z"] = [2, 3, 4]


@pytest.mark.parametrize("more", [read_elsewhere, read_before_the_bias, an_output, read_by_two_products])
def test_what_something_else_sees_is_left(more: Callable[[Graph], None]) -> None:
    graph = mlp()
    more(graph)
    assert not passed(PadStrides, graph.model(), numbers(x=(2, 3, 8)))[1]


@pytest.mark.parametrize("case", ["input", "softmax", "reshape", "scaled by a value", "division", "weight is an input"])
def test_what_may_not_be_wider_is_left(case: str) -> None:
    graph = Graph({"x": [2, 3, WIDE]}, {"y": [2, 3, 8]})
    feed = numbers(x=(2, 3, WIDE))
    inner = "x"
    if case == "softmax":  # zeros would take a share
        inner = graph.node("Softmax", graph.linear("x", WIDE, WIDE), axis=-1)
    elif case == "reshape":
        inner = graph.node("Reshape", graph.linear("x", WIDE, WIDE), graph.weight(values=np.array([2, 3, WIDE])))
    elif case == "scaled by a value":
        inner = graph.node("Mul", graph.linear("x", WIDE, WIDE), "x")
    elif case == "division":  # zero by zero
        inner = graph.node("Div", graph.weight(WIDE), graph.linear("x", WIDE, WIDE))
    if case == "weight is an input":
        graph.inputs["w"], feed = [WIDE, WIDE], numbers(x=(2, 3, WIDE), w=(WIDE, WIDE))
        inner = graph.node("Relu", graph.node("MatMul", "x", "w"))
    graph.node("MatMul", inner, graph.weight(WIDE, 8), gives="y")
    assert not passed(PadStrides, graph.model(), feed)[1]
