"""One scale, on the queries; the same numbers; and what TensorRT-RTX makes of it, which needs no GPU to build."""

from __future__ import annotations

import itertools
import re
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import onnxruntime
import pytest
from onnx import TensorProto, helper

import pumer_compile as pumer
from pumer_compile.exporters import EngineOptions
from pumer_compile.exporters import tensorrt as exporter
from pumer_compile.exporters.onnx import OnnxOptions, build_onnx
from pumer_compile.exporters.onnx_passes.attention import ScaleQueries
from pumer_compile.exporters.tensorrt import unsupported
from pumer_compile.runtimes.tensorrt_library import load_library, make_logger
from tests.support.models import Config, highest, program
from tests.support.models import schedule as budgets
from tests.support.tiny import image_inputs, text_inputs, tiny_vilt

RTX = load_library("tensorrt-rtx")

TYPES = {TensorProto.FLOAT: np.float32, TensorProto.FLOAT16: np.float16}
PLACES = ("scores", "query", "keys", "transposed", "query keys", "query scores")
# batch, heads, queries, keys, head size: apart, of one size, and colliding ones.
SIZES = [(2, 3, 5, 7, 12), (2, 2, 4, 4, 4), (1, 4, 4, 8, 4), (2, 1, 1, 2, 16)]


class Graph:
    """An attention, node by node."""

    def __init__(self, sizes: tuple[int, ...] = SIZES[0], dtype: int = TensorProto.FLOAT) -> None:
        b, h, s, t, d = sizes
        self.sizes, self.dtype = sizes, dtype
        self.nodes: list[onnx.NodeProto] = []
        self.constants: list[onnx.TensorProto] = []
        self.inputs = {"q": [b, h, s, d], "k": [b, h, t, d], "v": [b, h, t, d]}
        self.outputs = {"y": [b, h, s, d]}

    def node(self, operator: str, *inputs: str, gives: str = "", **attributes: Any) -> str:
        output = gives or f"{operator.lower()}_{len(self.nodes)}"
        name = f"layer.0.attention/{operator}_{len(self.nodes)}"
        self.nodes.append(helper.make_node(operator, inputs, [output], name=name, **attributes))
        return output

    def constant(self, values: Any) -> str:
        array = np.asarray(values, TYPES[self.dtype])
        self.constants.append(onnx.numpy_helper.from_array(array, f"constant_{len(self.constants)}"))
        return self.constants[-1].name

    def axis(self, number: int) -> str:
        self.constants.append(onnx.numpy_helper.from_array(np.array([number], np.int64), f"axis_{number}"))
        return self.constants[-1].name

    def scale(self, value: str, operator: str, factor: float) -> str:
        number = self.constant(factor if operator == "Mul" else 1 / factor)
        return self.node(operator, value, number)

    def scores(self, places: str = "scores", operator: str = "Div", factor: float | None = None) -> str:
        """The scaled product of queries and keys."""
        split = places.split()
        each = (self.sizes[-1] ** -0.5 if factor is None else factor) ** (1 / len(split))
        q, k = "q", "k"
        if "query" in split:
            q = self.scale(q, operator, each)
        if "keys" in split:
            k = self.scale(k, operator, each)
        k = self.node("Transpose", k, perm=[0, 1, 3, 2])
        if "transposed" in split:
            k = self.scale(k, operator, each)
        value = self.node("MatMul", q, k)
        return self.scale(value, operator, each) if "scores" in split else value

    def mask(self, value: str, rows: bool = False) -> str:
        b, _, s, t, _ = self.sizes
        self.inputs["m"] = [b, 1, s if rows else 1, t]
        return self.node("Add", value, "m")

    def attend(self, value: str, axis: int = -1, cast: bool = False) -> str:
        value = self.node("Cast", value, to=1) if cast else value
        value = self.node("Softmax", value, axis=axis)
        value = self.node("Cast", value, to=self.dtype) if cast else value
        return self.node("MatMul", value, "v", gives="y")

    def model(self) -> onnx.ModelProto:
        values = [
            [helper.make_tensor_value_info(name, self.dtype, shape) for name, shape in side.items()]
            for side in (self.inputs, self.outputs)
        ]
        graph = helper.make_graph(self.nodes, "graph", *values, self.constants)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
        onnx.checker.check_model(model, full_check=True)
        return onnx.shape_inference.infer_shapes(model, strict_mode=True)

    def feed(self, padded: bool) -> dict[str, np.ndarray]:
        generator, dtype = np.random.default_rng(0), TYPES[self.dtype]
        feed = {name: generator.standard_normal(shape).astype(dtype) for name, shape in self.inputs.items()}
        if "m" in feed:
            feed["m"] = np.zeros_like(feed["m"])
            if padded:  # the last keys of all samples, and everything of the last
                feed["m"][..., -1:] = feed["m"][-1] = np.finfo(dtype).min
        return feed


def attention(places: str = "scores", operator: str = "Div", *, sizes: tuple[int, ...] = SIZES[0]) -> Graph:
    graph = Graph(sizes)
    graph.attend(graph.mask(graph.scores(places, operator)))
    return graph


def passed(model: onnx.ModelProto) -> tuple[onnx.ModelProto, bool]:
    """The model after the pass, checked; running it again finds nothing."""
    read = onnx_ir.from_proto(model)
    modified = ScaleQueries()(read).modified
    assert not ScaleQueries()(read).modified
    after = onnx_ir.to_proto(read)
    onnx.checker.check_model(after, full_check=True)
    onnx.shape_inference.infer_shapes(after, check_type=True, strict_mode=True, data_prop=True)
    return after, modified


def run(model: onnx.ModelProto, feed: dict[str, np.ndarray]) -> list[np.ndarray]:
    session = onnxruntime.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return list(session.run(None, feed))


def operators(model: onnx.ModelProto) -> Counter[str]:
    return Counter(node.op_type for node in model.graph.node)


# --- Where it fires ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("places", "operator"), list(itertools.product(PLACES, ("Mul", "Div"))))
def test_one_scale_on_the_queries(places: str, operator: str) -> None:
    graph = attention(places, operator)
    before = graph.model()
    after, modified = passed(before)
    assert modified == ((places, operator) != ("query", "Mul"))
    expected = operators(before)
    expected[operator] -= len(places.split())
    expected["Mul"] += 1
    assert operators(after) == +expected
    (scale,) = (node for node in after.graph.node if node.op_type == "Mul")
    assert scale.input[0] == "q" and scale.name.startswith("layer.0.attention/Mul_")
    (number,) = after.graph.initializer
    assert onnx.numpy_helper.to_array(number) == np.float32(12**-0.5)
    for padded in (False, True):
        feed = graph.feed(padded)
        (old,), (new,) = run(before, feed), run(after, feed)
        assert np.isfinite(old).all()
        np.testing.assert_allclose(new, old, rtol=0, atol=1e-6)


@pytest.mark.parametrize("sizes", SIZES)
def test_sizes_that_collide(sizes: tuple[int, ...]) -> None:
    graph = attention(sizes=sizes)
    before = graph.model()
    after, modified = passed(before)
    assert modified
    for padded in (False, True):
        feed = graph.feed(padded)
        (old,), (new,) = run(before, feed), run(after, feed)
        if sizes[-1] in (4, 16):  # a power of two scales exactly
            np.testing.assert_array_equal(new, old)
        np.testing.assert_allclose(new, old, rtol=0, atol=1e-6)


def test_a_softmax_in_single_precision() -> None:
    """As many models have it in float16; what they round, they still round."""
    graph = Graph(dtype=TensorProto.FLOAT16)
    graph.attend(graph.mask(graph.scores()), cast=True)
    before = graph.model()
    after, modified = passed(before)
    assert modified and operators(after)["Cast"] == 2
    assert {i.data_type for i in after.graph.initializer} == {TensorProto.FLOAT16}
    for padded in (False, True):
        (old,), (new,) = run(before, graph.feed(padded)), run(after, graph.feed(padded))
        np.testing.assert_allclose(new, old, rtol=0, atol=5e-3)


def test_a_bias_and_a_mask() -> None:
    graph = Graph()
    b, h, s, t, _ = graph.sizes
    graph.inputs["bias"] = [b, h, s, t]
    graph.attend(graph.mask(graph.node("Add", "bias", graph.scores())))
    before = graph.model()
    after, modified = passed(before)
    assert modified
    np.testing.assert_allclose(run(after, graph.feed(True)), run(before, graph.feed(True)), rtol=0, atol=1e-6)


def test_queries_that_something_else_reads() -> None:
    """Scaled queries that are read elsewhere stay as they are; the scale on the scores is moved onto them."""
    graph = Graph()
    scores = graph.scores("query scores")
    graph.node("Identity", graph.nodes[0].output[0], gives="z")
    graph.outputs["z"] = graph.inputs["q"]
    graph.attend(scores)
    before = graph.model()
    after, modified = passed(before)
    assert modified and operators(after) == operators(before) - Counter(["Div"]) + Counter(["Mul"])
    for old, new in zip(run(before, graph.feed(False)), run(after, graph.feed(False)), strict=True):
        np.testing.assert_allclose(new, old, rtol=0, atol=1e-6)


# --- Where it must not ------------------------------------------------------------------------------------------------


def _read_twice(graph: Graph) -> None:
    graph.attend(graph.scores())
    graph.node("ReduceMean", graph.nodes[-2].output[0], graph.axis(1), gives="z", keepdims=0)
    b, _, s, t, _ = graph.sizes
    graph.outputs["z"] = [b, s, t]


def _probabilities_given(graph: Graph) -> None:
    graph.attend(graph.scores())
    b, h, s, t, _ = graph.sizes
    graph.outputs[graph.nodes[-2].output[0]] = [b, h, s, t]


def _scores_given(graph: Graph) -> None:
    scores = graph.scores()
    graph.attend(scores)
    b, h, s, t, _ = graph.sizes
    graph.outputs[scores] = [b, h, s, t]


def _over_queries(graph: Graph) -> None:
    graph.attend(graph.scores(), axis=2)


def _spelled_out(graph: Graph) -> None:
    """The published softmax: weights by a mask instead of adding one."""
    b, _, _, t, _ = graph.sizes
    graph.inputs["w"] = [b, 1, 1, t]
    scores = graph.scores()
    last = graph.axis(-1)
    powers = graph.node("Exp", graph.node("Sub", scores, graph.node("ReduceMax", scores, last)))
    weighed = graph.node("Mul", powers, "w")
    probabilities = graph.node("Div", weighed, graph.node("ReduceSum", weighed, last))
    graph.node("MatMul", probabilities, "v", gives="y")


def _for_each_head(graph: Graph) -> None:
    heads = graph.sizes[1]
    scores = graph.node("Div", graph.scores("none"), graph.constant(np.arange(1, heads + 1).reshape(heads, 1, 1)))
    graph.attend(scores)


def _no_constant(graph: Graph) -> None:
    graph.inputs["scale"] = []
    graph.attend(graph.node("Div", graph.scores("none"), "scale"))


def _over_a_number(graph: Graph) -> None:
    graph.attend(graph.node("Div", graph.constant(2.0), graph.scores("none")))


def _by_zero(graph: Graph) -> None:
    graph.attend(graph.node("Div", graph.scores("none"), graph.constant(0.0)))


def _scaled_after_the_mask(graph: Graph) -> None:
    graph.attend(graph.scale(graph.mask(graph.scores("none")), "Div", 0.5))


def _larger_by_the_mask(graph: Graph) -> None:
    _, _, s, t, _ = graph.sizes
    graph.inputs["m"] = [2, 1, 1, s, t]
    graph.outputs["y"] = [2, *graph.outputs["y"]]
    graph.attend(graph.node("Add", graph.scores(), "m"))


def _two_products(graph: Graph) -> None:
    """A position bias that is a product as well: which of the two has the keys is not known."""
    _, h, s, t, _ = graph.sizes
    b = graph.sizes[0]
    graph.inputs |= {"left": [b, h, s, 2], "right": [b, h, 2, t]}
    graph.attend(graph.node("Add", graph.scores(), graph.node("MatMul", "left", "right")))


def _no_scale(graph: Graph) -> None:
    graph.attend(graph.mask(graph.scores("none")))


def _a_classifier(graph: Graph) -> None:
    """A softmax over a linear layer, which weighs prototypes."""
    weights = graph.constant(np.ones((graph.sizes[-1], 7)))
    graph.attend(graph.scale(graph.node("MatMul", "q", weights), "Div", 0.5))


LEFT_ALONE = [
    _read_twice,
    _probabilities_given,
    _scores_given,
    _over_queries,
    _spelled_out,
    _for_each_head,
    _no_constant,
    _over_a_number,
    _by_zero,
    _scaled_after_the_mask,
    _larger_by_the_mask,
    _two_products,
    _no_scale,
    _a_classifier,
]


@pytest.mark.parametrize("build", LEFT_ALONE, ids=lambda build: build.__name__)
def test_left_alone(build: Any) -> None:
    graph = Graph()
    build(graph)
    before = graph.model()
    after, modified = passed(before)
    assert not modified
    assert [node.op_type for node in after.graph.node] == [node.op_type for node in before.graph.node]


# --- Models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("semantics", "moved"), [(None, 2), ("safe", 0), ("reference", 0)])
def test_a_model(semantics: str | None, moved: int) -> None:
    """The site's probabilities decide, the last layer's one query meets no keys, and the published softmax is none that
    a runtime has."""
    inputs = {**text_inputs(2), **image_inputs([(96, 96), (96, 64)], (96, 96))}
    captured = pumer.capture(tiny_vilt(), inputs)
    schedule = None if semantics is None else budgets(semantics, (0,))
    build = build_onnx(captured if schedule is None else pumer.reduce(captured, schedule), OnnxOptions())
    before = onnx_ir.to_proto(build.model)
    after, _ = passed(before)
    change = Counter(operators(after))
    change.subtract(operators(before))
    assert {name: count for name, count in change.items() if count} == ({"Mul": moved, "Div": -moved} if moved else {})
    feed = {name: value.numpy() for name, value in inputs.items() if name in build.inputs}
    for old, new in zip(run(before, feed), run(after, feed), strict=True):
        np.testing.assert_allclose(new, old, rtol=1e-5, atol=1e-5)


def test_a_model_of_fused_attention() -> None:
    """torch.onnx spells `scaled_dot_product_attention` out with a scale on queries and keys each."""
    config = Config(layers=1, head=highest, form="sdpa")
    build = build_onnx(program(config), OnnxOptions())
    before = onnx_ir.to_proto(build.model)
    after, modified = passed(before)
    assert modified and operators(before)["Mul"] - operators(after)["Mul"] == operators(before)["Softmax"] > 0


# --- TensorRT ---------------------------------------------------------------------------------------------------------


def launches(model: onnx.ModelProto, folder: Path) -> list[tuple[str, set[str]]]:
    """What an engine launches, and the ONNX nodes each computes. A detailed engine says so; reading needs no GPU."""
    trt, logger = RTX.trt, make_logger(RTX)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    onnx.save(model, str(folder / "model.onnx"))
    assert unsupported(RTX, folder / "model.onnx", network, logger) == []
    config = exporter._configured(RTX, builder, network, EngineOptions())
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED
    plan = builder.build_serialized_network(network, config)
    assert plan is not None, logger.errors
    found = re.findall(rb'\w+=\{ name="?(\S+?)"? [^\n]*?layers="([^"]*)"', bytes(memoryview(plan)))
    return [(name.decode(), {n.decode() for n in re.findall(rb"ONNX Layer: ([^]]+)]", nodes)}) for name, nodes in found]


def computing(found: list[tuple[str, set[str]]], operator: str) -> list[tuple[str, set[str]]]:
    """The launches that compute an operator, with the operators they compute."""
    names = [(name, {node.rpartition("/")[2].rpartition("_")[0] for node in nodes}) for name, nodes in found]
    return [(name, operators) for name, operators in names if operator in operators]


@pytest.mark.parametrize("rows", [False, True])
@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize("moved", [False, True])
def test_tensorrt_takes_it_for_one_kernel(moved: bool, cast: bool, rows: bool, tmp_path: Path) -> None:
    """TensorRT-RTX does so before as well."""
    graph = Graph((2, 4, 37, 41, 64), TensorProto.FLOAT16)
    graph.attend(graph.mask(graph.scores(), rows), cast=cast)
    model = passed(graph.model())[0] if moved else graph.model()
    ((kernel, nodes),) = computing(launches(model, tmp_path), "Softmax")
    assert re.match(r"_gemm_mha_v\d", kernel) and nodes >= {"MatMul", "Add", "Softmax"}


def test_tensorrt_in_single_precision(tmp_path: Path) -> None:
    """It has no such kernel there; the softmax is one with the mask, and the scale leaves it."""
    graph = attention(sizes=(2, 4, 37, 41, 64))
    ((_, before),) = computing(launches(graph.model(), tmp_path), "Softmax")
    ((_, after),) = computing(launches(passed(graph.model())[0], tmp_path), "Softmax")
    assert before == {"Div", "Add", "Softmax"} and after == {"Add", "Softmax"}


def test_tensorrt_launches_no_more(tmp_path: Path) -> None:
    """The scale goes into the kernel that adds the bias of the queries."""
    inputs = {**text_inputs(2), **image_inputs([(96, 96), (96, 64)], (96, 96))}
    captured = pumer.capture(tiny_vilt(hidden_size=64, num_attention_heads=2, num_hidden_layers=1), inputs)
    before = onnx_ir.to_proto(build_onnx(captured, OnnxOptions(dtype="float16")).model)
    found, kept = launches(passed(before)[0], tmp_path), launches(before, tmp_path)
    assert len(found) == len(kept) > 20
    for made in (found, kept):
        ((kernel, _),) = computing(made, "Softmax")
        assert "_mha_" in kernel


@pytest.mark.parametrize("dtype", [TensorProto.FLOAT, TensorProto.FLOAT16])
def test_why_not_the_operator(dtype: int, tmp_path: Path) -> None:
    """A version that fails here makes `Attention` worth another look."""
    shape = [2, 4, 37, 64]
    inputs = [helper.make_tensor_value_info(name, dtype, shape) for name in "qkv"]
    inputs.append(helper.make_tensor_value_info("m", dtype, [2, 1, 1, 37]))
    node = helper.make_node("Attention", ["q", "k", "v", "m"], ["y"], name="layer.0/Attention_0")
    graph = helper.make_graph([node], "graph", inputs, [helper.make_tensor_value_info("y", dtype, shape)])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 23)], ir_version=11)
    onnx.checker.check_model(model, full_check=True)
    if dtype == TensorProto.FLOAT:
        with pytest.raises(AssertionError, match="not supported by a dedicated kernel"):
            launches(model, tmp_path)
    else:
        assert any("_mha_" in kernel for kernel, _ in computing(launches(model, tmp_path), "Attention"))
    feed = {"m": np.zeros((2, 1, 1, 37), TYPES[dtype]), **{name: np.zeros(shape, TYPES[dtype]) for name in "qkv"}}
    with pytest.raises(onnxruntime.capi.onnxruntime_pybind11_state.Fail, match="inconsistent q_sequence_length"):
        run(model, feed)
