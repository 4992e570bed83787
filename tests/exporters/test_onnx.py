"""ONNX models: valid, portable, named, in the dtype and for the runtime that was asked for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from onnx import TensorProto, numpy_helper
from torch import Tensor

import pumer_compile as pumer
from pumer_compile.capture.loading import load_model
from pumer_compile.errors import ExportError, UsageError
from pumer_compile.exporters.chain import cast_program
from pumer_compile.exporters.onnx import (
    MIN_OPSET,
    OnnxOptions,
    append_metadata,
    build_onnx,
    save_onnx,
)
from tests.support.commands import artifact, done, feed, folder, inner_manifest, onnx_outputs, refused, schedule
from tests.support.models import Config, highest, inputs_for, program
from tests.support.models import schedule as budgets

HALF = ("--dtype", "float16", "--with-decisions")
FUSED = ("--target", "onnxruntime-cpu")
DECISIONS = [f"reducer.cross_modal_0.{name}" for name in ("text.source", "text.target")] + [
    f"reducer.cross_modal_0.image.{name}" for name in ("kept", "source", "target")
]


@pytest.fixture(scope="module")
def eager() -> dict[str, np.ndarray]:
    """Logits of the tiny ViLT, reduced and not, in float32 and eager PyTorch."""
    inputs = {name: torch.from_numpy(array) for name, array in feed().items()}
    captured = pumer.capture(load_model(folder()), inputs)
    reduced = pumer.reduce(captured, schedule())
    with torch.no_grad():
        return {
            "reduced": reduced.module(**inputs).logits.numpy(),
            "unreduced": captured.module(**inputs).logits.numpy(),
        }


def half_feed() -> dict[str, np.ndarray]:
    return feed() | {"pixel_values": feed()["pixel_values"].astype(np.float16)}


# --- The default ------------------------------------------------------------------------------------------------------


def test_portable_onnx(eager: dict[str, np.ndarray]) -> None:
    model = onnx.load(str(artifact()))
    onnx.checker.check_model(model, full_check=True)
    assert [(opset.domain, opset.version) for opset in model.opset_import] == [("", 20)]
    assert {node.domain for node in model.graph.node} == {""} and not model.functions
    assert [value.name for value in model.graph.input] == ["input_ids", "attention_mask", "pixel_values", "pixel_mask"]
    logits = onnx_outputs(artifact(), feed())["logits"]
    assert np.abs(logits - eager["reduced"]).max() <= 1e-5
    assert np.abs(eager["unreduced"] - eager["reduced"]).max() > 1e-3


def test_it_says_nothing_of_the_machine() -> None:
    content = artifact().read_bytes()
    for text in (b"site-packages", str(Path.home()).encode(), str(folder()).encode(), b".py"):
        assert text not in content
    model = onnx.load(str(artifact()))
    assert not [node for node in model.graph.node if node.metadata_props or node.doc_string]


def test_every_weight_is_used() -> None:
    graph = onnx.load(str(artifact())).graph
    used = {name for node in graph.node for name in node.input}
    assert graph.initializer and {weight.name for weight in graph.initializer} <= used


def test_nodes_are_named_after_their_modules() -> None:
    names = [node.name for node in onnx.load(str(artifact())).graph.node]
    assert len(set(names)) == len(names)
    scopes = {name.rpartition("/")[0] for name in names}
    assert {"vilt.encoder.layer.0.attention.attention.query", "vilt.pooler.dense", "classifier.1"} <= scopes
    assert any(scope.startswith("reducer.cross_modal_0.image") for scope in scopes)
    assert not [scope for scope in scopes if scope.startswith("_empty")]


# --- float16 ----------------------------------------------------------------------------------------------------------


def test_half_precision_from_end_to_end(eager: dict[str, np.ndarray]) -> None:
    model = onnx.load(str(artifact(*HALF)))
    onnx.checker.check_model(model, full_check=True)
    kinds = {value.name: value.type.tensor_type.elem_type for value in [*model.graph.input, *model.graph.output]}
    assert kinds.pop("pixel_values") == kinds.pop("logits") == TensorProto.FLOAT16
    assert set(kinds.values()) == {TensorProto.INT64}
    # Reducers decide, and positions are interpolated, in single precision; nothing else is.
    exact = ("reducer.", "published_softmax.", "vilt.embeddings/")
    used = {name for node in model.graph.node if not node.name.startswith(exact) for name in node.input}
    floating = (TensorProto.FLOAT, TensorProto.FLOAT16)
    weights = [w for w in model.graph.initializer if w.data_type in floating and w.name in used]
    assert len(weights) >= 30 and {w.data_type for w in weights} == {TensorProto.FLOAT16}

    outputs = onnx_outputs(artifact(*HALF), half_feed())
    assert np.isfinite(outputs["logits"]).all()
    assert 1e-7 < np.abs(outputs["logits"] - eager["reduced"]).max() < 2e-2
    manifest = inner_manifest(artifact(*HALF))
    assert manifest["dtype"] == "float16" and manifest["inputs"]["pixel_values"]["dtype"] == "float16"
    assert manifest["inputs"]["input_ids"]["dtype"] == "int64"


def test_half_precision_decides_in_single_precision() -> None:
    report = json.loads(artifact(*HALF).with_name("report.json").read_text(encoding="utf-8"))
    assert report["passed"] and report["decisions_compared"] and report["dtype"] == "float16"
    assert [row["samples"] for row in report["reducers"]] == [report["samples"]] * 2
    forced = report["outputs"][0]
    assert forced["against"] == "forced" and forced["judged"] and forced["atol"] == 2e-2

    model = onnx.load(str(artifact(*HALF)))
    inferred = onnx.shape_inference.infer_shapes(model, data_prop=True)
    kinds = {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}
    compared = [
        kinds[node.input[0]]
        for node in model.graph.node
        if node.name.startswith("reducer.cross_modal_0") and node.op_type == "Greater"
    ]
    assert compared and set(compared) == {TensorProto.FLOAT}


def test_half_precision_proved_again() -> None:
    done("parity", artifact(*HALF), "--model", folder())
    message = refused(3, "parity", artifact(*HALF), "--model", folder(), "--atol", "1e-6", "--rtol", "1e-6")
    assert "logits" in message


def test_decisions_are_outputs_where_asked_for() -> None:
    outputs = onnx_outputs(artifact(*HALF), half_feed())
    assert list(outputs) == ["logits", *inner_manifest(artifact(*HALF))["decisions"]]
    assert sorted(outputs)[1:] == sorted(DECISIONS)
    kept = outputs["reducer.cross_modal_0.image.kept"]
    assert kept.dtype == np.int64 and kept.shape == (2, 33)
    assert all(len(set(row.tolist())) == 33 and set(row.tolist()) <= set(range(37)) for row in kept)
    assert list(onnx_outputs(artifact(), feed())) == ["logits"]


# --- Fused operators --------------------------------------------------------------------------------------------------


def test_operators_of_onnxruntime(eager: dict[str, np.ndarray]) -> None:
    model = onnx.load(str(artifact(*FUSED)))
    fused = {node.op_type for node in model.graph.node if node.domain == "com.microsoft"}
    assert fused
    assert len(model.graph.node) < len(onnx.load(str(artifact())).graph.node)
    logits = onnx_outputs(artifact(*FUSED), feed())["logits"]
    assert np.abs(logits - eager["reduced"]).max() <= 1e-5
    manifest = inner_manifest(artifact(*FUSED))
    assert manifest["target"] == "onnxruntime-cpu" and manifest["parity"]["decisions_compared"]
    done("parity", artifact(*FUSED), "--model", folder())


# --- Options ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"opset": MIN_OPSET - 1}, "18"),
        ({"opset": onnx.defs.onnx_opset_version() + 1}, str(onnx.defs.onnx_opset_version())),
        ({"dtype": "int8"}, "float32, float16, bfloat16"),
        ({"target": "openvino"}, "onnxruntime-cpu, onnxruntime-cuda, tensorrt"),
        ({"onnx_passes": ("stride",)}, "projections, rows, strides, attention"),
        ({"lean": ("rows",), "quantize": "int8"}, "--onnx-passes"),
    ],
)
def test_options_that_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(UsageError, match=words):
        OnnxOptions(**options)


def test_options_that_are_taken() -> None:
    assert (OnnxOptions().opset, OnnxOptions().dtype, OnnxOptions().target) == (20, "float32", None)
    OnnxOptions(opset=MIN_OPSET), OnnxOptions(opset=onnx.defs.onnx_opset_version(), target="onnxruntime-cuda")


def test_the_model_of_the_user_keeps_its_precision() -> None:
    captured = pumer.capture(load_model(folder(layers=1)), {n: torch.from_numpy(a) for n, a in feed().items()})
    assert cast_program(captured, "float32") is captured
    half = cast_program(captured, "float16")
    assert half.inputs["pixel_values"].dtype == torch.float16 and half.inputs["input_ids"].dtype == torch.int64
    assert {p.dtype for p in half.module.parameters()} == {torch.float16}
    assert {p.dtype for p in captured.module.parameters()} == {torch.float32}
    assert captured.model is not None and {p.dtype for p in captured.model.parameters()} == {torch.float32}


# --- Plain modules ----------------------------------------------------------------------------------------------------


def largest(x: Tensor, text: int) -> Tensor:
    """A head that needs an operator which runtimes disagree on."""
    return x[:, 0].topk(32).values


def test_an_operator_that_must_not_be_there() -> None:
    captured = program(Config(layers=1, head=largest))
    with pytest.raises(ExportError, match=r"TopK .*nothing was written"):
        build_onnx(pumer.reduce(captured, budgets(layers=(0,))), OnnxOptions())
    model = build_onnx(captured, OnnxOptions()).model  # as it is, it is the user's own
    assert "TopK" in {node.op_type for node in model.graph.all_nodes()}


def test_an_operator_that_onnx_does_not_have() -> None:
    def special(x: Tensor, text: int) -> Tensor:
        return torch.special.bessel_j0(x[:, 0])

    with pytest.raises(ExportError, match="could not convert") as error:
        build_onnx(program(Config(layers=1, head=special)), OnnxOptions())
    assert "\n" not in str(error.value)


@pytest.fixture(scope="module")
def build() -> Any:
    captured = program(Config(layers=1, head=highest))
    return build_onnx(pumer.reduce(captured, budgets(layers=(0,))), OnnxOptions(opset=18))


def test_weights_are_inside_below_the_limit_and_beside_above_it(
    build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "model.onnx"
    assert save_onnx(build.without_decisions(), path) == [path]
    monkeypatch.setattr("pumer_compile.exporters.onnx.INLINE_WEIGHTS_LIMIT", 1000)
    (tmp_path / "beside").mkdir()
    weights, graph = save_onnx(build.without_decisions(), tmp_path / "beside" / "model.onnx")
    assert graph.stat().st_size < path.stat().st_size
    located = {
        entry.value
        for tensor in onnx.load(str(graph), load_external_data=False).graph.initializer
        for entry in tensor.external_data
        if entry.key == "location"
    }
    assert located == {weights.name}
    inline, external = (
        {w.name: numpy_helper.to_array(w) for w in onnx.load(str(file)).graph.initializer} for file in (path, graph)
    )
    assert inline.keys() == external.keys() and all(np.array_equal(inline[name], external[name]) for name in inline)


def test_the_file_is_what_onnx_itself_would_write(build: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Large weights are written one by one, around protobuf."""
    model = build.without_decisions()
    expected = onnx_ir.to_proto(model)
    largest = max(weight.ByteSize() for weight in expected.graph.initializer)
    for limit in (0, 200, largest - 100, 10 * largest):  # all by themselves, some, (nearly) none
        monkeypatch.setattr("pumer_compile.exporters.onnx._LARGE", limit)
        save_onnx(model, tmp_path / "model.onnx")
        written = onnx.load(str(tmp_path / "model.onnx"))
        assert {w.name: w for w in written.graph.initializer} == {w.name: w for w in expected.graph.initializer}
        onnx.checker.check_model(written, full_check=True)
        rest = onnx.ModelProto()
        rest.CopyFrom(expected)
        weights = {weight.name for weight in expected.graph.initializer}
        for graph in (written.graph, rest.graph):
            typed = [info for info in graph.value_info if info.name not in weights]  # a weight says its own type
            del graph.initializer[:], graph.value_info[:]
            graph.value_info.extend(typed)
        assert written == rest


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.bool])
def test_a_weight_of_any_type(dtype: torch.dtype, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pumer_compile.exporters.onnx._LARGE", 0)
    value = (torch.arange(300) % 2).reshape(3, 100).to(dtype)
    weight = onnx_ir.Value(name="w", const_value=onnx_ir.tensor(value, name="w"))
    node = onnx_ir.node("Shape", [weight])
    node.outputs[0].name = "y"
    node.outputs[0].shape, node.outputs[0].dtype = onnx_ir.Shape([2]), onnx_ir.DataType.INT64
    graph = onnx_ir.Graph([], node.outputs, nodes=[node], initializers=[weight], opset_imports={"": 20}, name="g")
    save_onnx(onnx_ir.Model(graph, ir_version=10), tmp_path / "model.onnx")
    (written,) = onnx.load(str(tmp_path / "model.onnx")).graph.initializer
    assert written == onnx_ir.to_proto(weight.const_value)


def test_without_decisions_the_model_is_as_it_was(build: Any) -> None:
    names = [value.name for value in build.model.graph.outputs]
    without = build.without_decisions()
    assert [value.name for value in without.graph.outputs] == build.outputs == names[:1]
    assert [value.name for value in build.model.graph.outputs] == names == [*build.outputs, *build.decisions]
    inside = {value.name for node in without.graph.all_nodes() for value in node.outputs}
    assert set(build.decisions) <= inside
    assert not [value for node in without.graph.all_nodes() for value in node.outputs if value.is_graph_output()][1:]


def test_metadata_is_appended(build: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    save_onnx(build.model, path)
    before = onnx.load(str(path))
    size = path.stat().st_size
    append_metadata(path, {"one": "ä" * 1000, "two": "{}"})
    after = onnx.load(str(path))
    assert [(entry.key, entry.value) for entry in after.metadata_props] == [("one", "ä" * 1000), ("two", "{}")]
    del after.metadata_props[:]
    assert after == before
    assert path.stat().st_size > size
    onnx.checker.check_model(str(path), full_check=True)


def test_an_invalid_model_is_not_saved_quietly(build: Any, tmp_path: Path) -> None:
    model = build.model.clone()
    next(iter(model.graph.all_nodes())).op_type = "NoSuchOperator"
    with pytest.raises(ExportError, match="not valid ONNX"):
        save_onnx(model, tmp_path / "model.onnx")


def test_a_session_checks_what_it_is_given(build: Any, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    save_onnx(build.without_decisions(), path)
    session = pumer.OnnxSession(path)
    inputs = inputs_for(Config(layers=1))
    assert session.inputs == ["input_ids", "pixel_values", "attention_mask"] and session.outputs == ["output"]
    session.run({name: tensor.int() if name != "pixel_values" else tensor.double() for name, tensor in inputs.items()})
    with pytest.raises(UsageError, match="attention_mask"):
        session.run({name: tensor for name, tensor in inputs.items() if name != "attention_mask"})
    with pytest.raises(UsageError, match=r"\[1, 7\].*\[2, 7\]"):
        session.run({name: tensor[:1] for name, tensor in inputs.items()})
    with pytest.raises(ExportError, match="cannot open"):
        pumer.OnnxSession(tmp_path / "missing.onnx")
    with pytest.raises(ExportError, match="cannot open"):
        pumer.OnnxSession(path, expose=["no such value"])
    (name, *_) = build.decisions
    assert pumer.OnnxSession(path, expose=[name]).run(inputs)[name].dtype == np.int64


def test_an_open_batch_size(tmp_path: Path) -> None:
    """Proved, and run at other sizes than it was compiled with."""
    config = Config(layers=1, dynamic=True, head=highest)
    reduced = pumer.reduce(program(config), budgets(layers=(0,)))
    exported = pumer.export(reduced, tmp_path / "model.onnx")
    assert exported.report is not None and exported.report.passed and exported.manifest["dynamic_batch"] is True
    session = pumer.OnnxSession(exported.path)
    for batch in (1, 5):
        inputs = inputs_for(config, batch=batch)
        with torch.no_grad():
            expected = reduced.module(**inputs).numpy()
        assert np.abs(session.run(inputs)["output"] - expected).max() <= 1e-5
    samples = [inputs_for(config, batch=batch) for batch in (1, 3)]
    assert pumer.parity(exported.path, reduced.program.model, samples).passed
