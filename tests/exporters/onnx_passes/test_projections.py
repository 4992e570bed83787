"""Products that read one value as one product."""

from __future__ import annotations

import numpy as np
import pytest

from pumer_compile.exporters.onnx_passes.projections import JoinProjections
from tests.exporters.onnx_passes.graphs import Graph, numbers, operators, passed

SIZES = [(4, 4, 4), (4, 2, 6)]  # colliding, and not


def heads(sizes: tuple[int, ...], *, bias: bool = True) -> Graph:
    graph = Graph({"x": [2, 3, 4]}, {f"y{i}": [2, 3, size] for i, size in enumerate(sizes)})
    made = [graph.linear("x", 4, size, bias=bias) for size in sizes]
    for i, value in enumerate(made):
        graph.node("Softmax", value, gives=f"y{i}")
    return graph


@pytest.mark.parametrize("sizes", SIZES)
@pytest.mark.parametrize("bias", [True, False])
def test_one_product(sizes: tuple[int, ...], bias: bool) -> None:
    before = heads(sizes, bias=bias).model()
    after, modified = passed(JoinProjections, before, numbers(x=(2, 3, 4)))
    assert modified and operators(after) == {"MatMul": 1, "Split": 1, "Softmax": 3} | ({"Add": 1} if bias else {})


def test_a_product_without_bias_stays_beside_those_with_one() -> None:
    graph = heads((4, 4))
    graph.node("Softmax", graph.linear("x", 4, 4, bias=False), gives="z")
    graph.outputs["z"] = [2, 3, 4]
    after, modified = passed(JoinProjections, graph.model(), numbers(x=(2, 3, 4)))
    assert modified and operators(after)["MatMul"] == 2


def test_a_product_that_is_read_twice_keeps_its_sum() -> None:
    graph = Graph({"x": [2, 3, 4]}, {"y": [2, 3, 4], "z": [2, 3, 4]})
    first = graph.node("MatMul", "x", graph.weight(4, 4))
    graph.node("Relu", first, gives="z")
    summed = graph.node("Add", first, graph.weight(4))
    graph.node("Add", summed, graph.node("Relu", graph.linear("x", 4, 4)), gives="y")
    assert not passed(JoinProjections, graph.model(), numbers(x=(2, 3, 4)))[1]


@pytest.mark.parametrize("case", ["alone", "other input", "output", "products of values"])
def test_what_is_left(case: str) -> None:
    graph = Graph({"x": [2, 3, 4], "w": [4, 4]}, {"y": [2, 3, 4]})
    first, second = graph.linear("x", 4, 4), "x"
    if case == "other input":
        second = graph.linear(first, 4, 4)
    elif case == "output":
        graph.outputs["z"] = [2, 3, 4]
        graph.node("MatMul", "x", graph.weight(4, 4), gives="z")
    elif case == "products of values":
        second = graph.node("MatMul", "x", "w")
    graph.node("Mul", first, second, gives="y")
    assert not passed(JoinProjections, graph.model(), numbers(x=(2, 3, 4), w=(4, 4)))[1]


def test_weights_are_joined_when_they_are_written() -> None:
    graph = heads((4, 2))
    after, _ = passed(JoinProjections, graph.model(), numbers(x=(2, 3, 4)))
    (wide,) = [w for w in after.graph.initializer if list(w.dims) == [4, 6]]
    parts = [np.frombuffer(w.raw_data, np.float32).reshape(w.dims) for w in graph.weights if len(w.dims) == 2]
    assert np.array_equal(np.frombuffer(wide.raw_data, np.float32).reshape(4, 6), np.concatenate(parts, 1))
