"""Model repositories: the layout, and a configuration that Triton's own protobuf schema reads."""

from __future__ import annotations

import dataclasses
import functools
import importlib.util
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from google.protobuf import text_format

import pumer_compile as pumer
from pumer_compile.artifacts.formats import ONNX
from pumer_compile.artifacts.runtime import TensorSpec
from pumer_compile.errors import UsageError
from pumer_compile.exporters import onnx as onnx_exporter
from pumer_compile.exporters import triton
from pumer_compile.exporters.triton import DEFAULT_MAX_BATCH, MARK, ServedModel, write_triton_repository
from pumer_compile.files import sha256_file
from tests.support.commands import (
    artifact,
    done,
    feed,
    folder,
    inner_manifest,
    onnx_outputs,
    refused,
    schedule,
    snapshot,
)
from tests.support.conversions import converted_once
from tests.support.fake_tensorrt import engine_of, install

__all__ = ["converted_once"]

pytestmark = pytest.mark.usefixtures("converted_once")

OPEN = ("--dynamic-batch",)


@functools.cache
def schema() -> Any:
    """The published schema, from the file of `tritonclient` that needs protobuf alone (its package needs grpc)."""
    package = importlib.util.find_spec("tritonclient")
    assert package is not None and package.submodule_search_locations, "the extra dev brings tritonclient"
    path = Path(package.submodule_search_locations[0]) / "grpc" / "model_config_pb2.py"
    spec = importlib.util.spec_from_file_location("triton_model_config", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def parsed(text: str) -> Any:
    return text_format.Parse(text, schema().ModelConfig())


def config(model: Path) -> Any:
    return parsed((model / "config.pbtxt").read_text(encoding="utf-8"))


def described(tensors: Any) -> dict[str, tuple[str, list[int]]]:
    return {t.name: (schema().DataType.Name(t.data_type), list(t.dims)) for t in tensors}


def tensors(**options: Any) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in feed(**options).items()}


# --- ONNX -------------------------------------------------------------------------------------------------------------


def test_an_open_batch(tmp_path: Path) -> None:
    model = write_triton_repository(tmp_path / "models", "vqa", artifact(*OPEN))
    assert model == tmp_path / "models" / "vqa"
    assert sorted(snapshot(tmp_path / "models")) == [
        *("vqa", "vqa/1", "vqa/1/model.onnx", "vqa/1/model.onnx.manifest.json", "vqa/config.pbtxt")
    ]
    assert (model / "1" / "model.onnx").read_bytes() == artifact(*OPEN).read_bytes()
    said = config(model)
    assert (said.name, said.platform, said.backend) == ("vqa", "onnxruntime_onnx", "onnxruntime")
    assert said.max_batch_size == DEFAULT_MAX_BATCH and said.HasField("dynamic_batching")
    assert described(said.input) == {
        "input_ids": ("TYPE_INT64", [12]),
        "attention_mask": ("TYPE_INT64", [12]),
        "pixel_values": ("TYPE_FP32", [3, 96, 96]),
        "pixel_mask": ("TYPE_INT64", [96, 96]),
    }
    assert described(said.output) == {"logits": ("TYPE_FP32", [5])}
    (group,) = said.instance_group
    assert (group.count, group.kind, list(group.profile)) == (1, group.KIND_AUTO, [])
    assert said.parameters[MARK].string_value == sha256_file(artifact(*OPEN))


def test_a_fixed_batch(tmp_path: Path) -> None:
    said = config(write_triton_repository(tmp_path, "vqa", artifact()))
    assert said.max_batch_size == 0 and not said.HasField("dynamic_batching")
    assert described(said.input)["pixel_values"] == ("TYPE_FP32", [2, 3, 96, 96])
    assert described(said.output) == {"logits": ("TYPE_FP32", [2, 5])}
    with pytest.raises(UsageError, match="fixed batch"):
        write_triton_repository(tmp_path, "vqa", artifact(), max_batch_size=4)


def test_half_precision_with_decisions(tmp_path: Path) -> None:
    path = artifact("--dtype", "float16", "--with-decisions")
    said = config(write_triton_repository(tmp_path, "half", path))
    assert described(said.input)["pixel_values"] == ("TYPE_FP16", [2, 3, 96, 96])
    assert described(said.output)["logits"] == ("TYPE_FP16", [2, 5])
    assert [output.name for output in said.output] == ["logits", *inner_manifest(path)["decisions"]]
    assert described(said.output)["reducer.cross_modal_0.image.kept"] == ("TYPE_INT64", [2, 33])


def test_fused_operators_run_where_they_were_made_for(tmp_path: Path) -> None:
    said = config(write_triton_repository(tmp_path, "fused", artifact("--target", "onnxruntime-cpu")))
    assert said.instance_group[0].kind == said.instance_group[0].KIND_CPU


def test_what_is_in_the_repository_runs(tmp_path: Path) -> None:
    model = write_triton_repository(tmp_path, "vqa", artifact(*OPEN))
    outputs = pumer.Engine(model / "1" / "model.onnx")(**tensors(batch=3))
    assert np.array_equal(outputs["logits"], onnx_outputs(artifact(*OPEN), feed(batch=3))["logits"])
    done("parity", model / "1" / "model.onnx", "--model", folder())


def test_weights_beside_the_model_come_along(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnx_exporter, "INLINE_WEIGHTS_LIMIT", 1000)
    path = tmp_path / "large.onnx"
    done(folder(), "--schedule", schedule(), "-o", path, "--batch", 2, "--no-verify")
    (weights,) = tmp_path.glob("*.data")
    model = write_triton_repository(tmp_path / "models", "large", path)
    assert {p.name for p in (model / "1").iterdir()} == {"model.onnx", "model.onnx.manifest.json", weights.name}
    expected = onnx_outputs(path, feed())["logits"]
    weights.unlink()
    assert np.array_equal(onnx_outputs(model / "1" / "model.onnx", feed())["logits"], expected)


def test_the_largest_batch_can_be_named(tmp_path: Path) -> None:
    said = config(write_triton_repository(tmp_path, "vqa", artifact(*OPEN), max_batch_size=5))
    assert said.max_batch_size == 5
    with pytest.raises(UsageError, match="give 1 or more"):
        write_triton_repository(tmp_path, "vqa", artifact(*OPEN), max_batch_size=0)


# --- Unusual tensors --------------------------------------------------------------------------------------------------


def served(**changes: Any) -> ServedModel:
    specs = {"x": TensorSpec(("n", 4), torch.bfloat16)}
    return dataclasses.replace(ServedModel("a", ONNX, specs, specs, 8, (), "KIND_AUTO", "0"), **changes)


def test_one_number_a_sample_has_no_dimensions_left() -> None:
    said = parsed(served(outputs={"score": TensorSpec(("n",), torch.float32)}).config())
    assert described(said.input) == {"x": ("TYPE_BF16", [4])}
    assert described(said.output) == {"score": ("TYPE_FP32", [1])}
    assert said.output[0].HasField("reshape") and list(said.output[0].reshape.shape) == []
    assert not said.input[0].HasField("reshape")


def test_a_batch_that_is_not_in_front_of_everything() -> None:
    said = parsed(served(max_batch_size=0, outputs={"scale": TensorSpec((), torch.bool)}).config())
    assert described(said.input) == {"x": ("TYPE_BF16", [-1, 4])} and not said.HasField("dynamic_batching")
    assert described(said.output) == {"scale": ("TYPE_BOOL", [1])} and said.output[0].HasField("reshape")


def test_names_are_quoted() -> None:
    said = parsed(served(name='a "b" \\ c').config())
    assert said.name == 'a "b" \\ c'


# --- Engines ----------------------------------------------------------------------------------------------------------


def standard(tmp_path: Path, profiles: list[str], **manifest: Any) -> Path:
    said = {"builder": "tensorrt", "builder_version": "10.13.2", "profiles": profiles}
    return engine_of(artifact(*OPEN) if profiles else artifact(), tmp_path, **said, **manifest)


def test_an_engine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its outputs come from the engine itself; here a stand-in for TensorRT (`fake_tensorrt`)."""
    install(monkeypatch, "tensorrt", version="10.13.2", profiles=[(1, 1, 2), (2, 8, 16)])
    path = standard(tmp_path, ["batch=1:1:2", "batch=2:8:16"])
    model = write_triton_repository(tmp_path / "models", "vqa", path)
    assert {p.name for p in (model / "1").iterdir()} == {"model.plan", "model.plan.manifest.json"}
    said = config(model)
    assert (said.platform, said.backend, said.max_batch_size) == ("tensorrt_plan", "tensorrt", 16)
    assert list(said.dynamic_batching.preferred_batch_size) == [1, 8]
    (group,) = said.instance_group
    assert group.kind == group.KIND_GPU and list(group.profile) == ["0", "1"]
    assert described(said.input)["pixel_values"] == ("TYPE_FP32", [3, 96, 96])
    assert described(said.output) == {"logits": ("TYPE_FP32", [5])}
    assert pumer.Engine(model / "1" / "model.plan").provider == "tensorrt"
    with pytest.raises(UsageError, match="batch of 17 is in no profile"):
        write_triton_repository(tmp_path / "models", "vqa", path, max_batch_size=17)


def test_an_engine_with_a_fixed_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, "tensorrt", version="10.13.2")
    said = config(write_triton_repository(tmp_path / "models", "vqa", standard(tmp_path, [])))
    assert said.max_batch_size == 0 and list(said.instance_group[0].profile) == []
    assert described(said.output) == {"logits": ("TYPE_FP32", [2, 5])}


def test_profiles_with_a_gap(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Triton would send a batch that no profile takes."""
    install(monkeypatch, "tensorrt", version="10.13.2", profiles=[(1, 1, 2), (4, 8, 16)])
    path = standard(tmp_path, ["batch=1:1:2", "batch=4:8:16"])
    with pytest.raises(UsageError, match=r"no profile of .* contains 3"):
        write_triton_repository(tmp_path / "models", "vqa", path)
    said = config(write_triton_repository(tmp_path / "models", "vqa", path, max_batch_size=2))
    assert said.max_batch_size == 2 and list(said.dynamic_batching.preferred_batch_size) == [1]


def test_engines_of_the_other_library(tmp_path: Path) -> None:
    path = engine_of(artifact(), tmp_path)
    message = refused(2, "triton", path, tmp_path / "models")
    assert "TensorRT-RTX is another library" in message and "-o model.onnx" in message
    assert not (tmp_path / "models").exists()


# --- What is there already --------------------------------------------------------------------------------------------


def test_our_own_model_is_replaced(tmp_path: Path) -> None:
    first = write_triton_repository(tmp_path, "vqa", artifact(*OPEN))
    before = snapshot(tmp_path)
    assert write_triton_repository(tmp_path, "vqa", artifact(*OPEN)) == first and snapshot(tmp_path) == before
    write_triton_repository(tmp_path, "vqa", artifact())
    assert config(first).max_batch_size == 0 and sorted(snapshot(tmp_path)) == sorted(before)


@pytest.mark.parametrize("name", ["vqa/2/model.onnx", "vqa/labels.txt", "other/config.pbtxt"])
def test_the_model_of_somebody_else_stays(name: str, tmp_path: Path) -> None:
    write_triton_repository(tmp_path, "vqa", artifact())
    theirs = tmp_path / name
    theirs.parent.mkdir(exist_ok=True)
    theirs.write_text("theirs", encoding="utf-8")
    before = snapshot(tmp_path)
    with pytest.raises(UsageError, match=r"not written by pumer-compile, or more was put into it"):
        write_triton_repository(tmp_path, Path(name).parts[0], artifact())
    assert snapshot(tmp_path) == before


def test_a_failure_leaves_the_old_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_triton_repository(tmp_path, "vqa", artifact(*OPEN))
    before = snapshot(tmp_path)

    def full(files: Any) -> None:
        raise OSError(28, "No space left on device")

    for broken, where in ((full, "publish"), (full, "_fill")):
        with monkeypatch.context() as patch:
            patch.setattr(triton, where, broken if where == "publish" else lambda *given: full(given))
            with pytest.raises(UsageError, match="cannot be written: No space left on device"):
                write_triton_repository(tmp_path, "vqa", artifact())
        assert snapshot(tmp_path) == before


def test_names_and_places_that_do_not_do(tmp_path: Path) -> None:
    for name in ("", ".hidden", "a/b"):
        with pytest.raises(UsageError, match="cannot be the name of a model"):
            write_triton_repository(tmp_path, name, artifact())
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="not a directory"):
        write_triton_repository(tmp_path / "file", "vqa", artifact())
    if os.geteuid() != 0:
        (tmp_path / "closed").mkdir(mode=0o500)
        with pytest.raises(UsageError, match="cannot be written"):
            write_triton_repository(tmp_path / "closed", "vqa", artifact())


# --- The commands -----------------------------------------------------------------------------------------------------


def test_compiled_into_a_repository(tmp_path: Path) -> None:
    path, models = tmp_path / "vqa.onnx", tmp_path / "models"
    result = done(
        *(folder(), "--schedule", schedule(), "-o", path, "--profile", "batch=1:2:6", "--triton-repository", models)
    )
    assert f"Wrote {models}/vqa for Triton." in " ".join(result.out.split())
    said = config(models / "vqa")
    assert said.max_batch_size == 6 and said.parameters[MARK].string_value == sha256_file(path)


def test_compiling_asks_for_the_repository_first(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for output, repository, words in (
        ("model.onnx", tmp_path / "file", "not a directory"),
        ("model.xml", tmp_path / "models", "not for '.xml'"),
        ("model.engine", tmp_path / "models", "TensorRT-RTX is another library"),
    ):
        builder = ("--builder", "tensorrt-rtx") if output == "model.engine" else ()
        given = ("-o", tmp_path / output, "--triton-repository", repository, *builder)
        # The model does not exist: it was not looked for.
        message = refused(2, "no model", "--schedule", "vilt-vqa", *given)
        assert words in message


def test_the_command(tmp_path: Path) -> None:
    models = tmp_path / "models"
    done("triton", artifact(*OPEN), models)
    done("triton", artifact(*OPEN), models, "--name", "second", "--max-batch-size", 4)
    assert config(models / "model").max_batch_size == 32 and config(models / "second").max_batch_size == 4
    assert "No artifact at" in refused(2, "triton", tmp_path / "missing.onnx", models)
