"""Token-wise layers on matrices of tokens: which reshapes are left, and where nothing is turned."""

from __future__ import annotations

import numpy as np
import onnx_ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pumer_compile.exporters.onnx_passes.rows import TokensAsRows
from tests.exporters.onnx_passes.graphs import Graph, numbers, operators, passed


def block(batch: int | str, tokens: int, width: int) -> Graph:
    """A feed-forward block between two residual sums, its input from somewhere else."""
    shape = [batch, tokens, width]
    graph = Graph({"x": shape}, {"y": shape})
    start = graph.node("Softmax", "x")
    normed = graph.node("LayerNormalization", start, graph.weight(width), graph.weight(width), axis=-1)
    first = graph.node("Add", graph.linear(normed, width, width), start)
    normed = graph.node("LayerNormalization", first, graph.weight(width), graph.weight(width), axis=2)
    inner = graph.node("Gelu", graph.linear(normed, width, 2 * width))
    second = graph.node("Add", graph.linear(inner, 2 * width, width), first)
    graph.node("Softmax", second, gives="y")
    return graph


@pytest.mark.parametrize("batch", [2, "batch"])
def test_reshapes_stand_at_the_ends_alone(batch: int | str) -> None:
    before = block(batch, 5, 8).model()
    after, modified = passed(TokensAsRows, before, numbers(x=(2, 5, 8)))
    assert modified and operators(after) - operators(before) == {"Reshape": 3}  # normed, residual; and back
    flat = {value.name for value in after.graph.value_info if len(value.type.tensor_type.shape.dim) == 2}
    turned = [node for node in after.graph.node if node.op_type in ("MatMul", "Gelu") and node.output[0] in flat]
    assert len(turned) == 4


@settings(max_examples=20, deadline=None)
@given(batch=st.integers(1, 3), tokens=st.integers(1, 4), width=st.integers(2, 4))
def test_any_sizes(batch: int, tokens: int, width: int) -> None:
    assert passed(TokensAsRows, block(batch, tokens, width).model(), numbers(x=(batch, tokens, width)))[1]


def test_heads_take_rows_as_they_are() -> None:
    """The reshape that parts the heads is the one that was there; sizes collide."""
    graph = Graph({"x": [4, 4, 4]}, {"y": [4, 2, 4, 2]})
    parted = graph.node("Reshape", graph.linear("x", 4, 4), graph.weight(values=np.array([4, 4, 2, 2])))
    graph.node("Transpose", parted, perm=[0, 2, 1, 3], gives="y")
    before = graph.model()
    after, modified = passed(TokensAsRows, before, numbers(x=(4, 4, 4)))
    assert modified and operators(after) - operators(before) == {"Reshape": 1}


def test_a_reshape_that_keeps_a_size_gets_its_dimensions_back() -> None:
    graph = Graph({"x": [2, 3, 4]}, {"y": [2, 3, 2, 2]})
    graph.node("Reshape", graph.linear("x", 4, 4), graph.weight(values=np.array([0, 0, 2, 2])), gives="y")
    assert passed(TokensAsRows, graph.model(), numbers(x=(2, 3, 4)))[1]


def test_a_value_with_readers_of_both_kinds() -> None:
    graph = Graph({"x": [2, 3, 4]}, {"y": [2, 3, 4], "z": [2, 3]})
    made = graph.linear("x", 4, 4)
    graph.node("Softmax", graph.linear(made, 4, 4), gives="y")
    graph.node("ReduceSum", made, graph.weight(values=np.array([2])), keepdims=0, gives="z")
    after, modified = passed(TokensAsRows, graph.model(), numbers(x=(2, 3, 4)))
    assert modified and operators(after)["Reshape"] == 3


def test_names_say_where_nodes_are() -> None:
    after, _ = passed(TokensAsRows, block(2, 5, 8).model(), numbers(x=(2, 5, 8)))
    assert {node.name.split("/")[0] for node in after.graph.node} == {"layer.0"}


def not_turned(graph: Graph, feed: dict[str, np.ndarray]) -> None:
    assert not passed(TokensAsRows, graph.model(), feed)[1]


def test_matrices_are_left() -> None:
    graph = Graph({"x": [2, 4]}, {"y": [2, 4]})
    graph.node("Relu", graph.linear("x", 4, 4), gives="y")
    not_turned(graph, numbers(x=(2, 4)))


def test_two_open_sizes_are_left() -> None:
    graph = Graph({"x": ["batch", "tokens", 4]}, {"y": ["batch", "tokens", 4]})
    graph.node("Relu", graph.linear("x", 4, 4), gives="y")
    not_turned(graph, numbers(x=(2, 3, 4)))


def test_products_of_values_are_left() -> None:
    graph = Graph({"x": [2, 3, 4], "w": [2, 4, 4]}, {"y": [2, 3, 4]})
    graph.node("Relu", graph.node("MatMul", "x", "w"), gives="y")
    not_turned(graph, numbers(x=(2, 3, 4), w=(2, 4, 4)))


def test_one_column_is_left() -> None:
    """onnxruntime multiplies a transposed value by a vector wrongly."""
    graph = Graph({"x": [2, 3, 4]}, {"y": [2, 3, 1]})
    graph.node("Relu", graph.linear("x", 4, 1), gives="y")
    not_turned(graph, numbers(x=(2, 3, 4)))


def test_outputs_are_left() -> None:
    graph = Graph({"x": [2, 3, 4]}, {"y": [2, 3, 4]})
    graph.node("MatMul", "x", graph.weight(4, 4), gives="y")
    not_turned(graph, numbers(x=(2, 3, 4)))


@pytest.mark.parametrize("case", ["mask by token", "norm over tokens", "broadcast"])
def test_what_is_not_by_token_gets_its_dimensions(case: str) -> None:
    graph = Graph({"x": [2, 3, 4], "m": [2, 3, 1]}, {"y": [2, 3, 4]})
    made = graph.linear("x", 4, 4)
    if case == "mask by token":
        made = graph.node("Mul", made, "m")
    elif case == "norm over tokens":
        made = graph.node("LayerNormalization", made, graph.weight(3, 4), graph.weight(3, 4), axis=1)
    else:
        made = graph.node("Add", made, graph.weight(3, 4))
    graph.node("Softmax", made, gives="y")
    before = graph.model()
    after, modified = passed(TokensAsRows, before, numbers(x=(2, 3, 4), m=(2, 3, 1)))
    (reader,) = [
        n for n in after.graph.node if n.op_type in ("Mul", "LayerNormalization", "Add") and "rows" not in n.output[0]
    ]
    assert modified and reader.input[0].endswith(".tokens")


def test_known_shapes_are_needed() -> None:
    model = onnx_ir.from_proto(block(2, 3, 4).model())
    for node in model.graph:
        node.outputs[0].shape = None
    assert not TokensAsRows()(model).modified
