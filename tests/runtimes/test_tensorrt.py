"""Engines: bindings, casts, profiles and graphs, against a stand-in for the library and the device (`fake_tensorrt`).

Nothing here runs TensorRT: what is tested is what we ask of it.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pumer_compile as pumer
from pumer_compile.artifacts.profile import Profile
from pumer_compile.artifacts.runtime import TensorSpec
from pumer_compile.artifacts.session import open_session
from pumer_compile.errors import ExportError, UsageError
from pumer_compile.runtimes.compatibility import check_device, engine_library
from pumer_compile.runtimes.tensorrt import choose_profile
from tests.support.commands import artifact, done, feed, folder, onnx_outputs, refused
from tests.support.conversions import converted_once
from tests.support.fake_tensorrt import DataType, EngineInvalidityDiagnostics, EngineValidity, engine_of, install

__all__ = ["converted_once"]

pytestmark = pytest.mark.usefixtures("converted_once")

OPEN = ("--dynamic-batch",)
PROFILES = [(1, 1, 2), (2, 4, 8)]
SAID = ["batch=1:1:2", "batch=2:4:8"]


def tensors(**options: Any) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in feed(**options).items()}


def test_it_gives_what_the_engine_computes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch)
    engine = pumer.Engine(engine_of(artifact(), tmp_path))
    assert engine.provider == "tensorrt-rtx" and engine.manifest["builder"] == "tensorrt-rtx"
    assert engine.inputs == ["input_ids", "attention_mask", "pixel_values", "pixel_mask"]
    assert engine.input_specs["input_ids"] == TensorSpec((2, 12), torch.int64)
    assert engine.output_specs == {"logits": TensorSpec((2, 5), torch.float32)}
    expected = onnx_outputs(artifact(), feed())["logits"]
    outputs = engine(**tensors())
    assert list(outputs) == ["logits"] and torch.equal(outputs["logits"], torch.from_numpy(expected))
    assert np.array_equal(engine.run(tensors())["logits"], expected)


def test_inputs_are_cast_and_made_contiguous(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch)
    engine = pumer.Engine(engine_of(artifact(), tmp_path))
    given = tensors()
    given |= {"input_ids": given["input_ids"].int(), "pixel_mask": given["pixel_mask"].bool()}
    given["pixel_values"] = given["pixel_values"].double().permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0)
    assert not given["pixel_values"].is_contiguous()
    assert torch.equal(engine(**given)["logits"], engine(**tensors())["logits"])


def test_inputs_that_do_not_fit(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = install(monkeypatch)
    engine = pumer.Engine(engine_of(artifact(), tmp_path))
    given = tensors()
    for change, words in (
        ({"input_ids": given["input_ids"][:, :5]}, r"input_ids has shape \[2, 5\].*\[2, 12\]"),
        ({"input_ids": given["input_ids"].float()}, "input_ids is float32; the artifact takes int64"),
        ({"token_type_ids": given["input_ids"]}, "compiled without token_type_ids"),
        ({"image_embeds": given["input_ids"]}, "takes no input image_embeds"),
    ):
        with pytest.raises(UsageError, match=words):
            engine(**(given | change))
    del given["pixel_mask"]
    with pytest.raises(UsageError, match=r"takes an input pixel_mask"):
        engine(**given)
    assert library.calls == [("context",)]


# --- Profiles ---------------------------------------------------------------------------------------------------------


def test_the_profile_follows_the_batch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = install(monkeypatch, profiles=PROFILES)
    engine = pumer.Engine(engine_of(artifact(*OPEN), tmp_path, profiles=SAID))
    assert engine.input_specs["input_ids"].shape == ("batch", 12)
    for size in (1, 2, 5, 1):
        given = feed(batch=size)
        outputs = engine(**tensors(batch=size))
        assert outputs["logits"].shape == (size, 5)
        assert np.array_equal(outputs["logits"], onnx_outputs(artifact(*OPEN), given)["logits"])
    # 2 is in both; the first is tuned for a nearer size.
    assert library.calls == [
        ("context",),
        *[("run", 1), ("run", 2)],
        ("profile", 1),
        ("run", 5),
        ("profile", 0),
        ("run", 1),
    ]
    with pytest.raises(UsageError, match=r"batch of 9; it has batch=1:1:2, batch=2:4:8"):
        engine(**tensors(batch=9))
    mixed = tensors(batch=2) | {"input_ids": tensors(batch=1)["input_ids"]}
    with pytest.raises(UsageError, match=r"same batch"):
        engine(**mixed)


def test_choosing_a_profile() -> None:
    profiles = [Profile(1, 1, 4), Profile(1, 8, 8), Profile(4, 32, 64)]
    assert [choose_profile(profiles, size) for size in (1, 4, 5, 8, 9, 64)] == [0, 0, 1, 1, 2, 2]
    with pytest.raises(UsageError, match=r"No profile"):
        choose_profile(profiles, 65)


def test_profiles_that_the_manifest_does_not_name(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, profiles=PROFILES)
    with pytest.raises(ExportError, match=r"profiles batch=1:1:2, and the engine has batch=1:1:2, batch=2:4:8"):
        pumer.Engine(engine_of(artifact(*OPEN), tmp_path, profiles=SAID[:1]))


# --- CUDA graphs ------------------------------------------------------------------------------------------------------


def test_graphs_are_captured_once_for_each_batch(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = install(monkeypatch, profiles=PROFILES)
    engine = pumer.Engine(engine_of(artifact(*OPEN), tmp_path, profiles=SAID), cuda_graph=True)
    kept = {}
    for size, seed in ((2, 1), (2, 2), (4, 1), (2, 1), (2, 3)):
        outputs = engine(**tensors(batch=size, seed=seed))["logits"]
        assert np.array_equal(outputs, onnx_outputs(artifact(*OPEN), feed(batch=size, seed=seed))["logits"])
        kept[size, seed] = outputs
    # What was given out before is not written over by later replays.
    assert np.array_equal(kept[2, 1], onnx_outputs(artifact(*OPEN), feed(batch=2, seed=1))["logits"])
    contexts = [call for call in library.calls if call == ("context",)]
    assert len(contexts) == 3  # the session's own, and one for each of two sizes
    assert [call for call in library.calls if call[0] == "run"].count(("run", 2)) == 2 + 4  # warm-up, capture, replays


def test_graphs_are_for_engines() -> None:
    with pytest.raises(UsageError, match=r"cuda_graph is for TensorRT engines"):
        pumer.Engine(artifact(), cuda_graph=True)


def test_what_is_for_onnx(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch)
    path = engine_of(artifact(), tmp_path, suffix=".plan")
    with pytest.raises(UsageError, match=r"provider is for ONNX"):
        pumer.Engine(path, provider="cpu")
    with pytest.raises(UsageError, match=r"expose is for ONNX"):
        pumer.Engine(path, expose=["x"])


# --- What cannot be loaded here ---------------------------------------------------------------------------------------


def test_no_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pumer_compile.runtimes.cuda.cuda_device", lambda: None)
    with pytest.raises(UsageError, match=r"no CUDA device here\. .*-o model\.onnx"):
        pumer.Engine(engine_of(artifact(), tmp_path))
    with pytest.raises(UsageError, match=r"runs on an NVIDIA GPU and not on cpu"):
        pumer.Engine(tmp_path / "model.engine", device="cpu")


def test_torch_without_cuda(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pumer_compile.runtimes.cuda.cuda_device", lambda: (8, 9))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UsageError, match=r"build without CUDA.*Install a CUDA build of torch"):
        pumer.Engine(engine_of(artifact(), tmp_path))
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    with pytest.raises(UsageError, match=r"torch finds none"):
        pumer.Engine(tmp_path / "model.engine")


def test_a_device_that_is_not_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pumer_compile.runtimes.cuda.cuda_device", lambda: (8, 9))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(UsageError, match=r"no device cuda:3: this machine has 1"):
        pumer.Engine(engine_of(artifact(), tmp_path), device="cuda:3")


@pytest.mark.parametrize(
    ("manifest", "words"),
    [
        ({"builder": None}, "does not say that TensorRT or TensorRT-RTX built it"),
        (
            {"builder": "tensorrt"},
            "was built by tensorrt 1.7.1.116, and no other library loads it.*compile.tensorrt",
        ),
        ({"builder_version": "1.6.0.3"}, "built by tensorrt-rtx 1.6.0.3, and 1.7.1.116 is installed"),
        ({"builder_version": "2.0.0", "version_compatible": True}, "a later minor version would do"),
        ({"builder_version": "1.8.0", "version_compatible": True}, "a later minor version would do"),
        ({"builder_version": None}, "built by tensorrt-rtx None"),
        ({"compute_capabilities": ["8.6", "12.0"]}, "built for compute capability 8.6, 12.0, and the GPU here has 8.9"),
    ],
)
def test_an_engine_for_another_place(
    manifest: dict[str, Any], words: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    library = install(monkeypatch)
    with pytest.raises(UsageError, match=words) as refusal:
        pumer.Engine(engine_of(artifact(), tmp_path, **manifest))
    assert len(str(refusal.value)) < 600 and library.calls == []


def test_versions_that_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch)
    base = {"builder": "tensorrt-rtx", "version_compatible": False}
    for version, flagged in (("1.7.1.9", False), ("1.6.0", True), ("1.7.1.116", True)):
        said = base | {"builder_version": version, "version_compatible": flagged}
        assert engine_library(tmp_path, said).name == "tensorrt-rtx"


def test_the_gpu_that_tensorrt_tuned_on() -> None:
    tuned = {"builder": "tensorrt", "compute_capabilities": [], "device_capability": "9.0"}
    check_device(Path("model.engine"), tuned, "9.0")
    with pytest.raises(UsageError, match=r"built for compute capability 9.0, and the GPU here has 8.9"):
        check_device(Path("model.engine"), tuned, "8.9")
    # TensorRT-RTX without targets is portable, wherever it was built.
    check_device(Path("model.engine"), tuned | {"builder": "tensorrt-rtx"}, "8.9")


def test_an_engine_of_tensorrt(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch, "tensorrt", version="10.13.2")
    path = engine_of(artifact(), tmp_path, builder="tensorrt", builder_version="10.13.2")
    engine = pumer.Engine(path)
    assert engine.provider == "tensorrt"
    assert np.array_equal(engine.run(tensors())["logits"], onnx_outputs(artifact(), feed())["logits"])


def test_what_the_library_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = install(monkeypatch)
    path = engine_of(artifact(), tmp_path)
    kinds = EngineInvalidityDiagnostics
    library.validity = (EngineValidity.INVALID, int(kinds.VERSION_MISMATCH | kinds.OLD_CUDA_DRIVER))
    with pytest.raises(UsageError, match=r"not valid here: version mismatch, old cuda driver"):
        pumer.Engine(path)
    library.validity, library.refuses = (EngineValidity.SUBOPTIMAL, 0), True
    with pytest.raises(ExportError, match=r"could not load .*Serialization assertion failed"):
        pumer.Engine(path)
    library.refuses, library.no_memory = False, True
    with pytest.raises(ExportError, match=r"could not make an execution context.*gave no reason"):
        pumer.Engine(path)
    library.no_memory, library.odd = False, {"logits": DataType.FP8}
    with pytest.raises(ExportError, match=r"binding logits of type FP8"):
        pumer.Engine(path)
    library.odd = {}
    engine = pumer.Engine(path)
    library.broken = True
    with pytest.raises(ExportError, match=r"could not run .*illegal memory access"):
        engine(**tensors())


def test_an_engine_that_is_not_what_its_manifest_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = install(monkeypatch)
    path = engine_of(artifact(), tmp_path)
    library.odd = {"input_ids": DataType.INT32}
    with pytest.raises(ExportError, match=r"names input_ids as int64 \[2, 12\], and the artifact has int32 \[2, 12\]"):
        pumer.Engine(path)
    library.odd = {}
    path.write_bytes(path.read_bytes() + b"\0")
    with pytest.raises(UsageError, match=r"SHA-256 differs"):
        pumer.Engine(path)
    path.with_name(f"{path.name}.manifest.json").unlink()
    with pytest.raises(UsageError, match=r"No manifest describes"):
        pumer.Engine(path)


def test_the_library_is_not_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch)
    monkeypatch.setitem(sys.modules, "tensorrt_rtx", None)
    with pytest.raises(UsageError, match=r"tensorrt-rtx is not installed.*pumer-compile\[rtx\]"):
        pumer.Engine(engine_of(artifact(), tmp_path))


# --- Parity of engines ------------------------------------------------------------------------------------------------


def test_parity_runs_the_engine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    library = install(monkeypatch, profiles=[(3, 4, 8)])
    path = engine_of(artifact(*OPEN), tmp_path, profiles=["batch=3:4:8"])
    report = pumer.parity(path, folder())
    assert report.passed and report.provider == "tensorrt-rtx" and report.samples >= 3 + 4 + 8
    # The captured batch of 2 is in no profile.
    assert {call[1] for call in library.calls if call[0] == "run"} == {3, 4, 8}
    assert not report.decisions_compared and any("--with-decisions" in note for note in report.notes)


def test_parity_compares_the_decisions_that_an_engine_gives(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch)
    report = pumer.parity(engine_of(artifact("--with-decisions"), tmp_path), folder())
    assert report.passed and report.decisions_compared and report.provider == "tensorrt-rtx"
    assert [row.samples for row in report.reducers] == [report.samples] * 2 and report.samples >= 6


def test_a_format_that_nothing_runs(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"Nothing here runs '\.pte'"):
        open_session(tmp_path / "model.pte", {"inputs": {}, "outputs": []})


# --- The commands refuse before any model is loaded -------------------------------------------------------------------


def test_commands_without_a_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("pumer_compile.runtimes.cuda.cuda_device", lambda: None)
    path = engine_of(artifact(), tmp_path)
    for command in (("parity", path, "--model", tmp_path / "no model"), ("bench", path)):
        message = refused(2, *command)
        assert "no CUDA device here" in message and "no model" not in message


def test_parity_of_an_engine_of_another_version(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch)
    path = engine_of(artifact(), tmp_path, builder_version="1.6.0")
    assert "1.7.1.116 is installed" in refused(2, "parity", path, "--model", tmp_path / "no model")
    path = engine_of(artifact(), tmp_path)
    assert "provider is for ONNX" in refused(2, "parity", path, "--model", tmp_path / "no model", "--provider", "cuda")


def test_parity_by_the_command(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    install(monkeypatch)
    path = engine_of(artifact("--with-decisions"), tmp_path)
    result = done("parity", path, "--model", folder(), "--report", tmp_path / "report.json")
    assert "tensorrt-rtx" in result.out
    assert json.loads((tmp_path / "report.json").read_text(encoding="utf-8"))["decisions_compared"] is True
