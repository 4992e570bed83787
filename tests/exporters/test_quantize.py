"""int8: linear layers are quantized, reducers are not, and parity says what that does to decisions and outputs."""

from __future__ import annotations

import functools
import json
import logging
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper

import pumer_compile as pumer
from pumer_compile.artifacts.manifest import read_manifest
from pumer_compile.errors import UsageError
from pumer_compile.exporters import OnnxOptions
from pumer_compile.exporters.onnx import build_onnx, save_onnx
from pumer_compile.exporters.quantize import linear_layers, quantize_onnx
from pumer_compile.files import sha256_file
from tests.support.commands import TOKENS, artifact, done, feed, folder, onnx_outputs, refused, run, schedule
from tests.support.conversions import converted_once
from tests.support.models import Config, highest, inputs_for, program
from tests.support.models import schedule as budgets

__all__ = ["converted_once"]

pytestmark = pytest.mark.usefixtures("converted_once")

pytest.importorskip("transformers.exporters.quantizers")

MODES = ("weights", "dynamic", "static")
INT8 = ("--quantize", "int8")
QUANTIZED = {"MatMulNBits", "MatMulInteger", "DynamicQuantizeLinear", "QuantizeLinear", "DequantizeLinear"}


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Nine samples of the tiny ViLT: four batches of two, and one sample that is left over."""
    path = tmp_path_factory.mktemp("calibration") / "samples.npz"
    np.savez(path, **feed(9, seed=5))
    return path


@pytest.fixture(scope="module")
def artifacts(tmp_path_factory: pytest.TempPathFactory, calibration: Path) -> Any:
    """The tiny ViLT, reduced, batch 2, quantized, proved; by mode. Tests must not change them."""

    @functools.cache
    def quantized(mode: str) -> Path:
        path = tmp_path_factory.mktemp(mode) / "model.onnx"
        options = ("--quantize-mode", mode) if mode != "dynamic" else ()  # the default
        options += ("--calibration", calibration) if mode == "static" else ()
        result = done(
            *(folder(), "-s", schedule(), "-o", path, "--batch", 2, *INT8, *options),
            *("--report", path.with_name("report.json")),
        )
        path.with_name("screen.txt").write_text(result.out + result.err, encoding="utf-8")
        return path

    return quantized


def nodes_of(path: Path) -> list[onnx.NodeProto]:
    return list(onnx.load(str(path)).graph.node)


def constants_of(path: Path) -> dict[str, np.ndarray]:
    return {weight.name: numpy_helper.to_array(weight) for weight in onnx.load(str(path)).graph.initializer}


def in_reducer(node: onnx.NodeProto) -> bool:
    return node.name.startswith(("reducer.", "published_softmax."))


def float_layers() -> set[str]:
    """Linear layers of the float32 artifact, as products and as `Gemm`."""
    constants = {name: w for name, w in constants_of(artifact()).items() if w.ndim == 2}
    return {
        node.name
        for node in nodes_of(artifact())
        if node.op_type in ("MatMul", "Gemm") and node.input[1] in constants and not in_reducer(node)
    }


# --- What is quantized and what is not --------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_reducers_are_those_of_float32(artifacts: Any, mode: str) -> None:
    quantized = nodes_of(artifacts(mode))
    onnx.checker.check_model(str(artifacts(mode)), full_check=True)

    def reducing(nodes: list[onnx.NodeProto]) -> dict[str, Any]:
        return {n.name: (n.op_type, n.attribute, list(n.output)) for n in nodes if in_reducer(n)}

    assert len(reducing(quantized)) > 100 and reducing(quantized) == reducing(nodes_of(artifact()))
    assert not [node.name for node in quantized if in_reducer(node) and node.op_type in QUANTIZED]
    # Nor do they read a tensor that was made for a quantized layer.
    rounded = {name for node in quantized if node.op_type in QUANTIZED - {"MatMulNBits"} for name in node.output}
    assert not [node.name for node in quantized if in_reducer(node) and rounded & set(node.input)]


def test_every_linear_layer_is_quantized(artifacts: Any) -> None:
    # Six in each of two layers but keys and values of the last one's query, the positions, the pooler, two of the head.
    assert len(float_layers()) == 14
    for mode, operator in (("weights", "MatMulNBits"), ("dynamic", "MatMulInteger")):
        nodes, constants = nodes_of(artifacts(mode)), constants_of(artifacts(mode))
        assert len([node for node in nodes if node.op_type == operator]) == 14
        assert not [node for node in nodes if node.op_type == "Gemm"]
        flat = {name for name, w in constants.items() if w.ndim == 2}  # others are by head, for the last one's query
        products = [node for node in nodes if node.op_type == "MatMul" and flat & set(node.input)]
        assert all(in_reducer(node) for node in products)  # they count
        read = {name for node in nodes if not in_reducer(node) for name in node.input}
        matrices = [w for name, w in constants.items() if name in read and w.dtype == np.float32 and w.ndim == 2]
        assert {w.shape for w in matrices if min(w.shape) > 8} == {(60, 24)}  # word embeddings


def test_static_reads_and_weighs_in_int8(artifacts: Any) -> None:
    nodes, constants = nodes_of(artifacts("static")), constants_of(artifacts("static"))
    made_by = {name: node for node in nodes for name in node.output}
    readers = {n: [r for r in nodes if n in r.input] for r in nodes for n in r.input}
    dequantized = [node for node in nodes if node.op_type == "DequantizeLinear"]
    layers = [reader for node in dequantized for reader in readers[node.output[0]]]
    assert {node.op_type for node in layers} == {"MatMul"}  # no residual sum, no layer norm
    assert len({node.name for node in layers}) == 14
    for node in layers:
        activation, weight = (made_by[name] for name in node.input)
        assert made_by[activation.input[0]].op_type == "QuantizeLinear"
        assert constants[weight.input[0]].dtype == np.int8
        assert constants[weight.input[1]].shape == constants[weight.input[0]].shape[1:]  # a scale for each column
    assert not [node for node in nodes if node.op_type == "Identity"]


def test_weights_mode_computes_in_float32(artifacts: Any) -> None:
    layers = [node for node in nodes_of(artifacts("weights")) if node.op_type == "MatMulNBits"]
    for node in layers:
        given = {attribute.name: helper.get_attribute_value(attribute) for attribute in node.attribute}
        assert (given["bits"], given["accuracy_level"]) == (8, 1)
    errors = {mode: deviation(artifacts(mode)) for mode in MODES}
    assert 0 < errors["weights"] < errors["dynamic"] < 0.1 and 0 < errors["static"] < 0.1


def deviation(path: Path) -> float:
    """Largest relative error of a sample, with the float32 artifact's decisions or not."""
    exact, given = (onnx_outputs(p, feed())["logits"] for p in (artifact(), path))
    return float((np.linalg.norm(given - exact, axis=1) / np.linalg.norm(exact, axis=1)).max())


@pytest.mark.parametrize("norm", ["pre", "post"])
def test_what_others_read_too_stays_exact(norm: str, tmp_path: Path) -> None:
    """In a post-norm layer, the residual sum and the reducer read what the linear layers do."""
    config = Config(norm=norm, layers=1, dynamic=True, head=highest)
    captured, path = program(config), tmp_path / "samples.npz"
    np.savez(path, **{name: t.numpy() for name, t in inputs_for(config, seed=9, batch=40).items()})
    options = OnnxOptions(quantize="int8", quantize_mode="static", calibration=path)
    model = build_onnx(pumer.reduce(captured, budgets(layers=(0,))), options).model
    quantized = {n.outputs[0] for n in model.graph if n.op_type == "DequantizeLinear"}
    readers = [usage.node for value in quantized for usage in value.uses()]
    assert {node.op_type for node in readers} == {"MatMul"}
    assert len({node.name for node in readers}) == 7  # six in the layer and the head
    assert not [node.name for node in readers if str(node.name).startswith("reducer.")]


# --- What parity says -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_the_report(artifacts: Any, mode: str) -> None:
    report = json.loads(artifacts(mode).with_name("report.json").read_text(encoding="utf-8"))
    assert report["passed"] and report["decisions_compared"] and report["dtype"] == "int8"
    assert [row["samples"] for row in report["reducers"]] == [report["samples"]] * 2 and report["samples"] >= 6
    assert not any(row["judged"] or row["fault"] for row in report["reducers"])
    image = report["reducers"][1]
    assert 0 < image["differ"] and 0 < image["flipped"] < image["chosen"]
    forced = report["outputs"][0]
    assert forced["against"] == "forced" and forced["judged"] and forced["samples"] == report["samples"]
    assert 1e-4 < forced["max_norm"] <= forced["norm"] == 0.1
    screen = artifacts(mode).with_name("screen.txt").read_text(encoding="utf-8")
    assert "reported" in screen and f"{image['flipped'] / image['chosen']:.2%}" in screen


def test_proved_again_and_refuted(artifacts: Any) -> None:
    done("parity", artifacts("dynamic"), "--model", folder())
    message = refused(3, "parity", artifacts("dynamic"), "--model", folder(seed=1))
    assert "of its norm, allowed 0.1" in message
    message = refused(3, "parity", artifacts("dynamic"), "--model", folder(), "--atol", "1e-6", "--rtol", "1e-6")
    assert "allowed atol 1e-06" in message


@pytest.mark.parametrize("mode", MODES)
def test_the_manifest(artifacts: Any, calibration: Path, mode: str) -> None:
    manifest = read_manifest(artifacts(mode))
    assert (manifest["quantize"], manifest["quantize_mode"], manifest["dtype"]) == ("int8", mode, "float32")
    assert manifest["calibration_sha256"] == (sha256_file(calibration) if mode == "static" else None)
    assert manifest["tokens"] == TOKENS and manifest["inputs"]["pixel_values"]["dtype"] == "float32"
    assert str(calibration) not in json.dumps(manifest)
    plain = read_manifest(artifact())
    assert (plain["quantize"], plain["quantize_mode"], plain["calibration_sha256"]) == (None, None, None)


# --- One form of a linear layer ---------------------------------------------------------------------------------------


def gemm(bias: bool, **attributes: Any) -> onnx_ir.Model:
    """A model of one `Gemm` from 64 to 32."""
    random = np.random.default_rng(0)
    shape = (32, 64) if attributes.get("transB") else (64, 32)
    constants = {"w": random.normal(size=shape).astype(np.float32), "b": random.normal(size=32).astype(np.float32)}
    names = ["w", "b"][: 1 + bias]
    graph = helper.make_graph(
        [helper.make_node("Gemm", ["x", *names], ["y"], name="head/Gemm_0", **attributes)],
        "gemm",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [3, 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [3, 32])],
        [numpy_helper.from_array(constants[name], name) for name in names],
    )
    return onnx_ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("bias", "attributes"), [(True, {"transB": 1}), (False, {"transB": 1}), (True, {})])
def test_heads_are_quantized_too(mode: Any, bias: bool, attributes: dict[str, int], tmp_path: Path) -> None:
    model = gemm(bias, **attributes)
    x = torch.from_numpy(np.random.default_rng(1).normal(size=(3, 64)).astype(np.float32))
    save_onnx(model, tmp_path / "float.onnx")
    quantized = quantize_onnx(model, mode, {"x": x}, [{"x": x}])
    save_onnx(quantized, tmp_path / "int8.onnx")
    assert {"Gemm", "Identity"}.isdisjoint({node.op_type for node in quantized.graph})
    exact, given = (onnx_outputs(tmp_path / f"{n}.onnx", {"x": x.numpy()})["y"] for n in ("float", "int8"))
    assert 0 < np.abs(given - exact).max() < 0.03 * np.abs(exact).max()


def test_a_scaled_product_stays_what_it_is() -> None:
    model = gemm(True, alpha=0.5)
    assert linear_layers(model) == []
    with pytest.raises(UsageError, match="no linear layer"):
        quantize_onnx(model, "dynamic", {"x": torch.zeros(3, 64)})
    assert [node.op_type for node in model.graph] == ["Gemm"]


def test_logging_is_left_as_found() -> None:
    root = logging.getLogger()
    before = (list(root.handlers), root.level, root.manager.disable)
    model = gemm(True, transB=1)
    quantize_onnx(model, "weights", {"x": torch.zeros(3, 64)})
    assert (list(root.handlers), root.level, root.manager.disable) == before


# --- Refused before any long work -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--quantize", "int4"), "choose int8"),
        (("--quantize-mode", "static"), "--quantize-mode is for quantized artifacts"),
        (("--calibration", "x.npz"), "--calibration is for quantized artifacts"),
        ((*INT8, "--quantize-mode", "best"), "choose weights, dynamic, static"),
        ((*INT8, "--quantize-mode", "static"), "--calibration FILE.npz"),
        ((*INT8, "--calibration", "x.npz"), "dynamic needs no samples"),
        ((*INT8, "--quantize-mode", "weights", "--calibration", "x.npz"), "weights needs no samples"),
        ((*INT8, "--dtype", "float16"), "--dtype float16 does not go with it"),
        ((*INT8, "--target", "onnxruntime-cpu"), "--target onnxruntime-cpu fuses"),
        ((*INT8, "--quantize-mode", "static", "--calibration", "missing.npz"), "missing.npz does not exist"),
    ],
)
def test_options_that_are_refused(options: tuple[str, ...], words: str, tmp_path: Path) -> None:
    missing = tmp_path / "no-model"  # not even looked for
    assert words in refused(2, missing, "-s", "none", "-o", tmp_path / "model.onnx", *options)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("suffix", [".xml", ".engine"])
def test_other_formats_are_refused(suffix: str, tmp_path: Path) -> None:
    message = refused(2, tmp_path / "no-model", "-s", "none", "-o", tmp_path / f"model{suffix}", *INT8)
    assert f"--quantize does not apply to {suffix}" in message


def test_onnxruntime_is_missing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "onnxruntime.quantization", None)
    message = refused(2, tmp_path / "no-model", "-s", "none", "-o", tmp_path / "model.onnx", *INT8)
    assert "onnxruntime is not installed" in message and "pumer-compile[cpu]" in message


def test_transformers_has_no_quantizers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("transformers.exporters.quantizers", raising=False)
    monkeypatch.setitem(sys.modules, "transformers.exporters.quantizers", None)
    message = refused(2, tmp_path / "no-model", "-s", "none", "-o", tmp_path / "model.onnx", *INT8)
    assert "which this version lacks" in message


def without(name: str) -> dict[str, np.ndarray]:
    return {key: array for key, array in feed(4).items() if key != name}


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        (lambda: without("pixel_mask"), "lacks pixel_mask"),
        (lambda: feed(4) | {"labels": np.zeros(4)}, "has labels"),
        (lambda: feed(4, text=9), "has input_ids of shape [4, 9]; the program takes [2, 12]"),
        (lambda: feed(4) | {"input_ids": feed(3)["input_ids"]}, "a different number of samples"),
        (lambda: feed(1), "has 1 samples, fewer than a batch of 2"),
        (lambda: feed(0), "has 0 samples"),
    ],
)
def test_calibration_samples_that_do_not_fit(arrays: Any, words: str, tmp_path: Path) -> None:
    np.savez(tmp_path / "samples.npz", **arrays())
    options = (*INT8, "--quantize-mode", "static", "--calibration", tmp_path / "samples.npz")
    message = refused(2, folder(layers=1), "-s", "none", "-o", tmp_path / "model.onnx", "--batch", 2, *options)
    assert words in message
    assert [p.name for p in tmp_path.iterdir()] == ["samples.npz"]


def test_calibration_is_from_what_was_given(tmp_path: Path) -> None:
    """Samples of another scale give other ranges."""
    scales = []
    for factor in (1, 10):
        arrays = feed(4)
        np.savez(tmp_path / "samples.npz", **(arrays | {"pixel_values": factor * arrays["pixel_values"]}))
        path = tmp_path / f"model{factor}.onnx"
        options = (*INT8, "--quantize-mode", "static", "--calibration", tmp_path / "samples.npz", "--no-verify")
        assert run(folder(layers=1), "-s", "none", "-o", path, "--batch", 2, *options).code == 0
        constants = constants_of(path)
        quantizing = [node for node in nodes_of(path) if node.op_type == "QuantizeLinear"]
        scales.append({node.name: float(constants[node.input[1]]) for node in quantizing})
    assert scales[0].keys() == scales[1].keys() and scales[0] != scales[1]
