"""Engines are built here by the real TensorRT-RTX, which needs no GPU; nothing here executes one."""

from __future__ import annotations

import json
import logging
import sys
import types
from pathlib import Path
from typing import Any

import onnx
import onnx_ir
import pytest
import torch
from onnx import TensorProto, helper

import pumer_compile as pumer
from pumer_compile.artifacts.manifest import read_manifest
from pumer_compile.errors import ExportError, UsageError
from pumer_compile.exporters import EngineOptions, Profile
from pumer_compile.exporters import tensorrt as exporter
from pumer_compile.exporters.tensorrt import LARGEST_TOPK, build_engine, targets, unsupported
from pumer_compile.files import sha256_file
from pumer_compile.reduce import Reduced
from pumer_compile.runtimes import tensorrt_library
from pumer_compile.runtimes.tensorrt_library import Library, load_library
from tests.support.commands import TOKENS, artifact, done, folder, refused, run, schedule, snapshot
from tests.support.conversions import converted_once
from tests.support.fake_tensorrt import install
from tests.support.models import Config, highest, program
from tests.support.models import schedule as budgets

__all__ = ["converted_once"]

pytestmark = pytest.mark.usefixtures("converted_once")

RTX = load_library("tensorrt-rtx")
MAGIC = b"vtrt"
TINY = Config(layers=1, head=highest)
COMPILE = ("--schedule", schedule(), "--batch", 2)


@pytest.fixture(scope="module")
def reduced() -> Reduced:
    return pumer.reduce(program(TINY), budgets(layers=(0,)))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An old engine."""
    path = tmp_path / "model.engine"
    path.write_bytes(b"the old engine")
    return path


@pytest.fixture(autouse=True)
def no_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a machine without a GPU, also on one that has one."""
    for module in (tensorrt_library, exporter):
        monkeypatch.setattr(module, "cuda_device", lambda: None)


def layers(path: Path) -> list[Any]:
    """The layers of a network, as the parser makes them of an ONNX file."""
    trt = RTX.trt
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    assert trt.OnnxParser(network, logger).parse_from_file(str(path))
    found = [(network.get_layer(i).name, network.get_layer(i)) for i in range(network.num_layers)]
    return [(name, layer.type.name, [layer.get_output(0).dtype.name]) for name, layer in found if layer.num_outputs]


# --- Through the command line -----------------------------------------------------------------------------------------


def test_an_engine(tmp_path: Path) -> None:
    path = tmp_path / "model.engine"
    result = done(folder(), *COMPILE, "-o", path)
    content = path.read_bytes()
    assert content.startswith(MAGIC) and len(content) > 100_000
    for name in (b"input_ids", b"attention_mask", b"pixel_values", b"pixel_mask", b"logits"):
        assert name in content
    assert b"reducer.cross_modal_0.image" in content
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.engine", "model.engine.manifest.json"]
    said = " ".join(result.out.split())
    assert "not executed" in said and "ONNX model that the engine was built from" in said

    manifest = read_manifest(path)
    assert manifest["sha256"] == sha256_file(path) and manifest["artifact"] == "model.engine"
    assert manifest["builder"] == "tensorrt-rtx" and manifest["builder_version"] == RTX.version
    assert manifest["compute_capabilities"] == [] and manifest["profiles"] == []
    assert manifest["build_seconds"] > 0 and manifest["peak_memory_mib"] > 100
    assert manifest["inputs"]["pixel_values"] == {"shape": [2, 3, 96, 96], "dtype": "float32"}
    assert manifest["outputs"] == ["logits"] and manifest["tokens"] == TOKENS
    assert manifest["schedule"]["layers"] == [0] and len(manifest["schedule_sha256"]) == 64
    assert len(manifest["checkpoint_sha256"]) == 64
    parity = manifest["parity"]
    assert parity["passed"] and parity["stand_in"] == "the ONNX model that the engine was built from"
    assert parity["artifact"] == "model.engine" and parity["decisions_compared"]
    assert any("cannot run on this machine" in note for note in parity["notes"])


def test_without_a_schedule_there_is_no_reducer(tmp_path: Path) -> None:
    path = tmp_path / "model.plan"
    done(folder(layers=1), "--schedule", "none", "-o", path, "--no-verify")
    content = path.read_bytes()
    assert content.startswith(MAGIC) and b"reducer." not in content
    assert read_manifest(path)["parity"] == {"verified": False}


def test_decisions_are_outputs_where_asked_for(reduced: Reduced, tmp_path: Path) -> None:
    for asked in (False, True):
        path = tmp_path / f"{asked}.engine"
        pumer.export(reduced, path, with_decisions=asked, verify=False)
        assert (b"reducer.cross_modal_0.image.kept" in path.read_bytes()) == asked


# --- Precision --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("dtype", "name"), [("float16", "HALF"), ("bfloat16", "BF16")])
def test_reducers_decide_in_single_precision(dtype: str, name: str, tmp_path: Path) -> None:
    path = artifact("--dtype", dtype, "--no-verify")
    products = [(layer, kinds) for layer, kind, kinds in layers(path) if kind == "MATRIX_MULTIPLY"]
    inside = [kinds for layer, kinds in products if layer.startswith("reducer.")]
    merging = [kinds for kinds in inside if kinds == [name]]  # the features themselves: once for each stream
    # Positions are interpolated in single precision by transformers itself.
    outside = [kinds for layer, kinds in products if not layer.startswith(("reducer.", "vilt.embeddings/"))]
    assert len(merging) == 2 and inside.count(["FLOAT"]) == len(inside) - 2 >= 8
    assert len(outside) >= 10 and all(kinds == [name] for kinds in outside)
    engine = build_engine(RTX, path, EngineOptions(), lambda text: None)
    assert engine.startswith(MAGIC)


def test_half_precision_is_smaller(tmp_path: Path) -> None:
    # One reducer; in so small an engine, those of two outweigh the weights.
    reduced, sizes = pumer.reduce(program(Config(layers=1)), budgets(layers=(0,))), {}
    for dtype in ("float32", "float16"):
        path = tmp_path / f"{dtype}.engine"
        exported = pumer.export(reduced, path, options=EngineOptions(dtype=dtype), verify=dtype == "float16")
        if dtype == "float16":
            assert exported.report is not None and exported.report.passed and exported.report.dtype == dtype
        assert exported.manifest["dtype"] == exported.manifest["inputs"]["pixel_values"]["dtype"] == dtype
        sizes[dtype] = path.stat().st_size
    assert sizes["float16"] < sizes["float32"]


# --- Targets ----------------------------------------------------------------------------------------------------------


def test_the_gpus_it_builds_for() -> None:
    known = targets(RTX)
    assert {"7.5", "8.0", "8.6", "8.9", "12.0"} <= set(known) and "9.0" not in known
    assert known["8.9"] == RTX.trt.ComputeCapability.SM89


def test_an_engine_for_some_gpus(reduced: Reduced, tmp_path: Path) -> None:
    path = tmp_path / "model.engine"
    exported = pumer.export(reduced, path, options=EngineOptions(compute_capabilities=("8.6", "12.0")), verify=False)
    assert exported.manifest["compute_capabilities"] == ["8.6", "12.0"]
    portable = build_engine(RTX, _onnx(reduced, tmp_path), EngineOptions(), lambda text: None)
    assert path.read_bytes().startswith(MAGIC) and path.read_bytes() != portable


def test_a_builder_that_fails_says_why(reduced: Reduced, out: Path) -> None:
    """Turing has no single-precision matrix product, and the reducers decide with one."""
    before = snapshot(out.parent)
    options = EngineOptions(compute_capabilities=("7.5",), dtype="float16")
    with pytest.raises(ExportError, match=r"could not build the engine: .*FP32 GEMM is not supported"):
        pumer.export(reduced, out, options=options)
    assert snapshot(out.parent) == before


# --- Profiles ---------------------------------------------------------------------------------------------------------


def test_several_profiles_in_one_engine(tmp_path: Path) -> None:
    path = tmp_path / "model.engine"
    profiles = ("--profile", "batch=1:2:4", "--profile", "batch=4:8:32")
    result = done(folder(layers=1), "--schedule", schedule(), "-o", path, *profiles)
    manifest = read_manifest(path)
    assert manifest["profiles"] == ["batch=1:2:4", "batch=4:8:32"] and manifest["dynamic_batch"]
    assert manifest["parity"]["samples"] >= 1 + 2 + 4 + 8
    assert "not proved at a batch of 32" in " ".join(result.out.split())


def test_profiles_reach_the_builder() -> None:
    trt = RTX.trt
    logger = trt.Logger(trt.Logger.ERROR)
    builder = trt.Builder(logger)
    network = builder.create_network(0)
    network.add_input("x", trt.float32, (-1, 3))
    network.add_input("scale", trt.float32, (3,))
    inputs = [network.get_input(0), network.get_input(1)]
    made = exporter._optimization_profile(builder, inputs, Profile(1, 8, 32))
    assert [tuple(shape) for shape in made.get_shape("x")] == [(1, 3), (8, 3), (32, 3)]


def test_profiles_of_an_onnx_model(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    done(folder(layers=1), "--schedule", schedule(), "-o", path, "--profile", "batch=1:3:5")
    for value in (*onnx.load(str(path)).graph.input, *onnx.load(str(path)).graph.output):
        assert value.type.tensor_type.shape.dim[0].dim_param == "batch"
    manifest = read_manifest(path)
    assert manifest["profiles"] == ["batch=1:3:5"] and manifest["parity"]["samples"] >= 1 + 3 + 5


@pytest.mark.parametrize(
    "text", ["batch=1:8", "8", "batch=8:1:32", "batch=0:1:2", "text=1:8:32", "batch=1:8:x", "batch="]
)
def test_profiles_that_are_refused(text: str, out: Path) -> None:
    message = refused(2, folder(), *COMPILE, "-o", out, "--profile", text)
    assert "rofile" in message and ("batch=MIN:OPT:MAX" in message or "MIN:OPT:MAX" in message)


def test_a_profile_without_an_open_batch(reduced: Reduced, out: Path) -> None:
    with pytest.raises(UsageError, match="captured with a fixed one"):
        pumer.export(reduced, out, options=EngineOptions(profiles=(Profile(1, 2, 4),)))


# --- Refused before any work: the model does not even exist -----------------------------------------------------------

REFUSED = {
    "an open batch without sizes": (("--dynamic-batch",), "--profile batch=MIN:OPT:MAX"),
    "a GPU that RTX lacks": (("--compute-capability", "8.9,9.0"), "compute capability 9.0"),
    "no list of GPUs": (("--compute-capability", "sm_89"), "not a list of the form"),
    "Turing in single precision": (("--compute-capability", "7.5"), "--dtype float16"),
    "a timing cache": (("--timing-cache", "cache.bin"), "keeps no timing cache"),
    "a lean runtime": (("--version-compatible",), "no lean runtime"),
    "layers without a device": (("--layer-info", "layers.json"), "needs a CUDA device"),
    "an optimization level": (("--optimization-level", "6"), "between 0 and 5"),
    "no builder": (("--builder", "myelin"), "tensorrt or tensorrt-rtx"),
    "bfloat16 with a proof": (("--dtype", "bfloat16"), "--no-verify"),
    "no dtype": (("--dtype", "int4"), "float32, float16, bfloat16"),
    "an option of ONNX": (("--opset", "20"), "--opset does not apply to .engine"),
    "both screens": (("-v", "-q"), "exclude each other"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refusals(name: str, out: Path, tmp_path: Path) -> None:
    options, words = REFUSED[name]
    before = snapshot(tmp_path)
    # -v adds a traceback
    message = (run if "-v" in options else refused)(
        *(() if "-v" in options else (2,)), tmp_path / "missing", "--schedule", "none", "-o", out, *options
    )
    text = message if isinstance(message, str) else message.message
    assert words in " ".join(text.split())
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("option", ["--builder", "--compute-capability", "--timing-cache", "--layer-info"])
def test_options_of_engines_for_onnx(option: str, tmp_path: Path) -> None:
    value = "8.6" if option == "--compute-capability" else "x"
    message = refused(2, tmp_path / "missing", "--schedule", "none", "-o", tmp_path / "model.onnx", option, value)
    assert "does not apply to .onnx" in message


def test_without_any_package(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tensorrt_library, "_imported", lambda name: None)
    assert "pumer-compile[rtx]" in refused(2, folder(), *COMPILE, "-o", out)
    for name, extra in (("tensorrt", "[tensorrt]"), ("tensorrt-rtx", "[rtx]")):
        message = refused(2, folder(), *COMPILE, "-o", out, "--builder", name)
        assert f"{name} is not installed" in message and extra in message


def test_tensorrt_without_a_device(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "tensorrt", types.SimpleNamespace(Builder=None, __version__="10.0"))
    message = refused(2, folder(), *COMPILE, "-o", out, "--builder", "tensorrt")
    assert "no CUDA device" in message and "tensorrt-rtx" in message
    assert load_library().name == "tensorrt-rtx"
    # It is not so much as imported: standard TensorRT ends the process there.
    seen: list[str] = []
    monkeypatch.setattr(tensorrt_library, "_imported", lambda name: seen.append(name))
    refused(2, folder(), *COMPILE, "-o", out, "--builder", "tensorrt")
    assert seen == []
    monkeypatch.undo()
    monkeypatch.setitem(sys.modules, "tensorrt", types.SimpleNamespace(Builder=None, __version__="10.0"))
    monkeypatch.setattr(tensorrt_library, "cuda_device", lambda: (9, 0))
    assert load_library().name == "tensorrt"


# --- What a parser refuses --------------------------------------------------------------------------------------------


def _onnx(reduced: Reduced, folder: Path) -> Path:
    path = folder / "parsed.onnx"
    pumer.export(reduced, path, verify=False)
    return path


def graph(
    path: Path, nodes: list[Any], inputs: dict[str, list[int]], outputs: dict[str, list[int]], **weights: Any
) -> Path:
    values = [
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in side.items()]
        for side in (inputs, outputs)
    ]
    tensors = [helper.make_tensor(name, TensorProto.INT64, [len(v)], v) for name, v in weights.items()]
    made = helper.make_graph(nodes, "graph", values[0], values[1], tensors)
    model = helper.make_model(made, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    onnx.save(model, str(path))
    return path


def test_nothing_that_is_reduced_is_refused(reduced: Reduced, tmp_path: Path) -> None:
    assert unsupported(RTX, _onnx(reduced, tmp_path)) == []


def test_an_operator_that_is_refused(tmp_path: Path) -> None:
    node = helper.make_node("ScatterND", ["x", "where", "y"], ["z"], name="merge/Scatter", reduction="add")
    path = graph(tmp_path / "s.onnx", [node], {"x": [4], "y": [1]}, {"z": [4]}, where=[2])
    refused = unsupported(RTX, path)
    assert refused and "ScatterND" in refused[0]
    with pytest.raises(ExportError, match=r"cannot take the ONNX model: .*ScatterND"):
        build_engine(RTX, path, EngineOptions(), lambda text: None)


@pytest.mark.parametrize("k", [LARGEST_TOPK, LARGEST_TOPK + 1])
def test_the_limit_of_topk_is_the_builders(k: int, tmp_path: Path) -> None:
    node = helper.make_node("TopK", ["x", "k"], ["v", "i"], name="model/TopK")
    path = graph(tmp_path / "t.onnx", [node], {"x": [1, 5000]}, {"v": [1, k]}, k=[k])
    model = onnx_ir.load(str(path))
    if k <= LARGEST_TOPK:
        exporter._check_topk(model)
        assert build_engine(RTX, path, EngineOptions(), lambda text: None).startswith(MAGIC)
    else:
        with pytest.raises(ExportError, match=f"gives {k} entries, and TensorRT's limit is {LARGEST_TOPK}"):
            exporter._check_topk(model)
        with pytest.raises(ExportError, match="could not build the engine"):
            build_engine(RTX, path, EngineOptions(), lambda text: None)


def test_a_budget_beyond_the_limit_of_topk(tmp_path: Path) -> None:
    """The reducers count instead of sorting, so the limit is not theirs."""
    large = Config(layers=1, grid=(64, 63), heads=1, width=8, batch=1, head=highest)
    reduced = pumer.reduce(program(large), budgets(layers=(0,), prune=100, merge={"image": 20, "text": 0}))
    (site,) = reduced.plan.sites
    assert site.before["image"] > LARGEST_TOPK and site.after["image"] > LARGEST_TOPK
    exported = pumer.export(reduced, tmp_path / "model.engine", verify=False)
    assert exported.path.read_bytes().startswith(MAGIC)


# --- What happens on the way ------------------------------------------------------------------------------------------


def test_a_failed_run_leaves_the_old_engine(reduced: Reduced, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot(out.parent)
    monkeypatch.setattr(exporter, "build_engine", lambda *args: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
        pumer.export(reduced, out)
    assert snapshot(out.parent) == before


def test_progress_and_messages(reduced: Reduced, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    steps: list[str] = []
    with caplog.at_level(logging.INFO, "pumer_compile"):
        pumer.export(reduced, tmp_path / "model.engine", verify=False, progress=steps.append)
    assert steps[0] == "converting" and "parsing" in steps and "building engine" in steps
    assert any(step.startswith("optimizing graph ") and "/" in step for step in steps)
    assert any("built the engine with tensorrt-rtx" in message for message in caplog.messages)
    assert any(message.startswith("tensorrt-rtx: ") for message in caplog.messages)


def test_quiet_prints_nothing(tmp_path: Path) -> None:
    result = done(folder(layers=1), *COMPILE, "-o", tmp_path / "model.engine", "-q", "--no-verify")
    assert result.out == result.err == ""
    assert refused(2, folder(layers=1), *COMPILE, "-o", tmp_path / "model.engine", "-q", "--dtype", "int4")


def test_options_of_the_builder(reduced: Reduced, tmp_path: Path) -> None:
    options = EngineOptions(optimization_level=0, workspace=64)
    exported = pumer.export(reduced, tmp_path / "model.engine", options=options, verify=False)
    assert exported.manifest["optimization_level"] == 0 and exported.manifest["workspace"] == 64
    trt = RTX.trt
    builder = trt.Builder(trt.Logger(trt.Logger.ERROR))
    config = exporter._configured(RTX, builder, builder.create_network(0), options)
    assert config.builder_optimization_level == 0
    # Products in TF32 keep ten bits: decisions would flip.
    assert builder.create_builder_config().get_flag(trt.BuilderFlag.TF32) and not config.get_flag(trt.BuilderFlag.TF32)
    assert config.get_memory_pool_limit(trt.MemoryPoolType.WORKSPACE) == 64 << 20
    assert EngineOptions().workspace is None
    with pytest.raises(UsageError, match="no workspace"):
        EngineOptions(workspace=0)


# --- Options that only TensorRT has, against a stand-in for it --------------------------------------------------------


class Cache:
    def __init__(self, blob: bytes) -> None:
        self.blob = blob

    def serialize(self) -> memoryview:
        return memoryview(self.blob + b"+timings")


def stand_in(monkeypatch: pytest.MonkeyPatch) -> Library:
    """TensorRT-RTX with the parts of TensorRT that it lacks, so that the calls are seen; not TensorRT itself."""
    trt = types.SimpleNamespace(**{name: getattr(RTX.trt, name) for name in dir(RTX.trt) if name[0] != "_"})
    trt.__version__ = "10.99"

    class Builder(RTX.trt.Builder):
        def create_builder_config(self) -> Any:
            config = super().create_builder_config()
            seen: dict[str, Any] = {"cache": Cache(b""), "flags": []}

            class Proxy:
                def __getattr__(self, name: str) -> Any:
                    return getattr(config, name)

                def __setattr__(self, name: str, value: Any) -> None:
                    setattr(config, name, value)

                def create_timing_cache(self, blob: bytes) -> Cache:
                    return Cache(blob)

                def set_timing_cache(self, cache: Cache, ignore_mismatch: bool) -> bool:
                    seen["cache"] = cache
                    return cache.blob != b"of another GPU" and not ignore_mismatch

                def get_timing_cache(self) -> Cache:
                    return seen["cache"]

            return Proxy()

        def build_serialized_network(self, network: Any, config: Any) -> bytes:
            return b"ftrt an engine"

    trt.Builder = Builder
    monkeypatch.setattr(tensorrt_library, "cuda_device", lambda: (8, 9))
    monkeypatch.setattr(tensorrt_library, "_imported", lambda name: trt if name == "tensorrt" else None)
    return load_library("tensorrt")


def test_a_timing_cache_is_read_and_written(reduced: Reduced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = stand_in(monkeypatch)
    model, cache = _onnx(reduced, tmp_path), tmp_path / "timing.cache"
    options = EngineOptions(timing_cache=cache, version_compatible=True)
    for expected in (b"+timings", b"+timings+timings"):
        assert build_engine(library, model, options, lambda text: None) == b"ftrt an engine"
        assert cache.read_bytes() == expected
    cache.write_bytes(b"of another GPU")
    with pytest.raises(UsageError, match="another TensorRT or another GPU"):
        build_engine(library, model, options, lambda text: None)
    assert cache.read_bytes() == b"of another GPU"


def test_tensorrt_builds_for_its_own_gpu(reduced: Reduced, out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stand_in(monkeypatch)
    with pytest.raises(UsageError, match="TensorRT builds for the GPU of this machine"):
        pumer.export(reduced, out, options=EngineOptions(compute_capabilities=("8.9",)))


# --- On a device, against stand-ins for it and for the library --------------------------------------------------------


def test_on_a_device_the_engine_itself_is_proved(
    reduced: Reduced, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second engine that shows the decisions is built for the proof, and goes."""
    install(monkeypatch)
    built: list[str] = []

    def build(library: Library, model: Path, options: EngineOptions, progress: Any) -> bytes:
        built.append(model.name)
        return model.read_bytes()

    monkeypatch.setattr(exporter, "build_engine", build)
    monkeypatch.setattr(exporter, "targets", lambda library: {})
    exported = pumer.export(reduced, tmp_path / "model.engine", options=EngineOptions(builder="tensorrt-rtx"))
    report = exported.report
    assert report is not None and report.passed and report.decisions_compared and report.stand_in == ""
    assert report.provider == "tensorrt-rtx" and len(report.reducers) == 2
    assert built == ["model.onnx", "deciding.onnx"]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.engine", "model.engine.manifest.json"]


# --- The manifest beside the engine -----------------------------------------------------------------------------------


def test_an_engine_is_what_its_manifest_describes(reduced: Reduced, tmp_path: Path) -> None:
    path = tmp_path / "model.engine"
    pumer.export(reduced, path, verify=False)
    assert read_manifest(path)["builder"] == "tensorrt-rtx"
    content = path.read_bytes()
    path.write_bytes(content + b" ")
    with pytest.raises(UsageError, match=r"not the file that .*manifest.json describes"):
        read_manifest(path)
    path.write_bytes(content)
    manifest = path.with_name("model.engine.manifest.json")
    text = manifest.read_text(encoding="utf-8")
    manifest.write_text(json.dumps({**json.loads(text), "artifact": "other.engine"}), encoding="utf-8")
    with pytest.raises(UsageError, match="No manifest describes"):
        read_manifest(path)
    manifest.rename(tmp_path / "model.manifest.json")
    (tmp_path / "model.manifest.json").write_text(text, encoding="utf-8")
    assert read_manifest(path)["artifact"] == "model.engine"


def test_a_model_in_a_plain_module(tmp_path: Path) -> None:
    """No transformers model, so the graph goes through torch.onnx alone."""
    exported = pumer.export(pumer.reduce(program(TINY), budgets(layers=(0,))), tmp_path / "model.plan")
    assert exported.report is not None and exported.report.passed and exported.report.stand_in
    assert torch.is_tensor(next(iter(program(TINY).inputs.values())))
