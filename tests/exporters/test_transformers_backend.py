"""Engines through transformers' own `ExportedModel`; nothing here executes one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers.exporters import AutoHfExporter
from transformers.exporters.auto import AutoExportConfig, get_exporter_class, get_runner_class
from transformers.exporters.base import ExportedModel

import pumer_compile as pumer
from pumer_compile.artifacts.manifest import read_manifest
from pumer_compile.errors import ScheduleError, UsageError
from pumer_compile.exporters.transformers_backend import TensorRtConfig, TensorRtExporter, TensorRtRunner
from pumer_compile.files import sha256_file
from tests.support.commands import artifact, feed, onnx_outputs
from tests.support.fake_tensorrt import engine_of, install
from tests.support.tiny import tiny_vilt

SCHEDULE = {"layers": [0], "prune": 0.1, "merge": {"image": 0.3, "text": 0.2}}


@pytest.fixture(scope="module")
def exported() -> ExportedModel:
    config = TensorRtConfig(schedule=SCHEDULE)
    return AutoHfExporter.from_config(config).export(tiny_vilt(num_hidden_layers=2), tensors(), config)


def tensors(batch: int = 2) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in feed(batch).items()}


def test_the_backend_is_registered() -> None:
    assert get_exporter_class("tensorrt") is TensorRtExporter
    assert get_runner_class("tensorrt") is TensorRtRunner
    given = AutoExportConfig.from_dict({"export_format": "tensorrt", "schedule": "vilt-vqa"})
    assert isinstance(given, TensorRtConfig) and given.schedule == "vilt-vqa"


def test_the_engine_is_reduced(exported: ExportedModel) -> None:
    content = exported.program.path.read_bytes()
    assert content.startswith(b"vtrt") and b"reducer.cross_modal_0.image" in content
    manifest = read_manifest(exported.program.path)
    assert manifest["outputs"] == ["logits"] and manifest["schedule"]["layers"] == [0]
    assert manifest["builder"] == "tensorrt-rtx" and manifest["parity"] == {"verified": False}


def test_it_is_saved_and_loaded(exported: ExportedModel, tmp_path: Path) -> None:
    exported.save_pretrained(tmp_path)
    names = {path.name for path in tmp_path.iterdir()}
    assert names == {"model.engine", "model.engine.manifest.json", "export.json", "config.json"}
    saved = json.loads((tmp_path / "export.json").read_text(encoding="utf-8"))
    assert saved["export_format"] == "tensorrt"
    assert saved["components"]["model"]["metadata"]["export_config"]["schedule"] == SCHEDULE
    program = TensorRtExporter.load_program(tmp_path / "model.engine")
    assert sha256_file(program.path) == sha256_file(exported.program.path)

    (tmp_path / "model.engine").write_bytes(b"vtrt something else")
    with pytest.raises(UsageError, match="SHA-256 differs"):
        TensorRtExporter.load_program(tmp_path / "model.engine")


def test_without_a_device_it_says_so(exported: ExportedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    exported.save_pretrained(tmp_path)
    for load in (lambda: ExportedModel.from_pretrained(tmp_path), lambda: pumer.Engine(tmp_path / "model.engine")):
        with pytest.raises(UsageError, match="no CUDA device"):
            load()


def test_an_open_batch() -> None:
    config = TensorRtConfig(profiles=["batch=1:2:4"])
    exported = TensorRtExporter().export(tiny_vilt(num_hidden_layers=1), tensors(1), config)
    manifest = read_manifest(exported.program.path)
    assert manifest["profiles"] == ["batch=1:2:4"] and manifest["dynamic_batch"]
    assert b"reducer." not in exported.program.path.read_bytes()


def test_half_precision() -> None:
    inputs = {name: t.half() if t.is_floating_point() else t for name, t in tensors().items()}
    exported = TensorRtExporter().export(tiny_vilt(num_hidden_layers=1).half(), inputs, TensorRtConfig())
    assert read_manifest(exported.program.path)["dtype"] == "float16"
    assert exported.dtype == torch.float16


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"schedule": {"layers": [0], "cut": 1}}, ScheduleError, "cut"),
        ({"schedule": "vilt-nothing"}, ScheduleError, "vilt-nothing"),
        ({"compute_capabilities": ["9.0"]}, UsageError, "compute capability 9.0"),
        ({"profiles": ["1:2:4"]}, UsageError, "batch=MIN:OPT:MAX"),
        ({"builder": "openvino"}, UsageError, "tensorrt or tensorrt-rtx"),
    ],
)
def test_what_is_refused(options: dict[str, Any], error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        TensorRtExporter().export(tiny_vilt(num_hidden_layers=1), tensors(), TensorRtConfig(**options))


def test_options_of_onnxruntime() -> None:
    with pytest.raises(UsageError, match="neither ort_fusions nor a quantizer"):
        TensorRtConfig(ort_fusions="cpu")


def test_it_is_called_by_keyword(exported: ExportedModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Against a stand-in for the device, which executes an ONNX model of the same schedule."""
    exported.save_pretrained(tmp_path)
    install(monkeypatch)
    outputs = artifact()
    engine = engine_of(outputs, tmp_path)
    loaded = ExportedModel.from_pretrained(tmp_path)
    found = loaded(**tensors(), unknown=1)
    assert type(found).__name__ == "SequenceClassifierOutput" and engine.exists()
    np.testing.assert_array_equal(found.logits.numpy(), onnx_outputs(outputs, feed())["logits"])
