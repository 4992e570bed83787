"""ONNX artifacts under onnxruntime: where they run, what they take, and that the provider is the one asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from pumer_compile import OnnxSession
from pumer_compile.artifacts.runtime import TensorSpec, fitted, to_numpy
from pumer_compile.errors import ExportError, UsageError
from pumer_compile.runtimes.ort import CPU, CUDA, TENSORRT, placement
from tests.support.commands import artifact, feed, inner_manifest, onnx_outputs

OPEN = ("--dynamic-batch",)


def tensors(**options: Any) -> dict[str, torch.Tensor]:
    return {name: torch.from_numpy(array) for name, array in feed(**options).items()}


def test_where_it_runs() -> None:
    assert placement(None, None) == placement("cpu", None) == placement(CPU, "cpu") == (CPU, torch.device("cpu"))
    assert placement("cuda", None) == placement(None, "cuda") == (CUDA, torch.device("cuda"))
    assert placement("tensorrt", "cuda:1") == (TENSORRT, torch.device("cuda:1"))
    for provider, device, words in (
        ("rocm", None, "No provider 'rocm': choose cpu, cuda, tensorrt"),
        ("cpu", "cuda", "CPUExecutionProvider does not run on cuda"),
        ("tensorrt", "cpu", "TensorrtExecutionProvider does not run on cpu"),
    ):
        with pytest.raises(UsageError, match=words):
            placement(provider, device)


@pytest.mark.parametrize("provider", ["cuda", "tensorrt"])
def test_a_provider_that_this_build_lacks(provider: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CPUExecutionProvider"])
    with pytest.raises(UsageError, match=r"does not have .*it has CPUExecutionProvider.*pumer-compile\[gpu\]"):
        OnnxSession(artifact(), provider)


def test_a_gpu_that_torch_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [CUDA, CPU])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setattr(torch.version, "cuda", None)
    with pytest.raises(UsageError, match="torch is a build without CUDA"):
        OnnxSession(artifact(), "cuda")


def test_a_silent_fallback_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """onnxruntime-gpu on a machine without CUDA opens the model on the CPU and says nothing."""
    opened: list[Any] = []
    real = onnxruntime.InferenceSession

    def on_the_cpu(model: Any, options: Any, providers: Any) -> Any:
        opened.append(providers)
        return real(model, options, providers=[CPU])

    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: [TENSORRT, CUDA, CPU])
    monkeypatch.setattr(onnxruntime, "InferenceSession", on_the_cpu)
    monkeypatch.setattr(onnxruntime, "preload_dlls", lambda: None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(UsageError, match="fell back to CPUExecutionProvider: TensorrtExecutionProvider cannot be used"):
        OnnxSession(artifact(), "tensorrt", device="cuda:1")
    # What TensorRT does not take is meant to stay on the same GPU.
    assert opened == [[(TENSORRT, {"device_id": 1}), (CUDA, {"device_id": 1, "use_tf32": 0})]]


def test_without_onnxruntime(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "onnxruntime", None)
    with pytest.raises(UsageError, match=r"onnxruntime is not installed.*pumer-compile\[cpu\]"):
        OnnxSession(artifact())


# --- Bound memory -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [2, 3])
def test_bound_memory_gives_the_same(size: int) -> None:
    """What CUDA takes, on the CPU: onnxruntime reads and writes torch's own memory."""
    bound, plain = OnnxSession(artifact(*OPEN), io_binding=True), OnnxSession(artifact(*OPEN))
    outputs = bound.call(tensors(batch=size))
    assert torch.equal(outputs["logits"], plain.call(tensors(batch=size))["logits"])
    assert np.array_equal(outputs["logits"], onnx_outputs(artifact(*OPEN), feed(batch=size))["logits"])
    kept = outputs["logits"].clone()
    bound.call(tensors(batch=size, seed=3))
    assert torch.equal(outputs["logits"], kept)


def test_bound_memory_in_half_precision() -> None:
    path = artifact("--dtype", "float16", "--with-decisions")
    bound, plain = (OnnxSession(path, io_binding=binds).run(tensors()) for binds in (True, False))
    assert list(bound) == list(plain) and bound["logits"].dtype == np.float16 and len(bound) == 6
    assert all(np.array_equal(bound[name], plain[name]) for name in plain)


def test_inner_values_with_bound_memory() -> None:
    names = inner_manifest(artifact(*OPEN))["decisions"]
    bound, plain = OnnxSession(artifact(*OPEN), io_binding=True), OnnxSession(artifact(*OPEN))
    assert plain.outputs == ["logits"] and plain.exposing(names).outputs == ["logits", *names]
    exposed = OnnxSession(artifact(*OPEN), expose=names, io_binding=True).call(tensors(batch=3))
    expected = plain.exposing(names).call(tensors(batch=3))
    assert all(torch.equal(exposed[name], expected[name]) for name in names)
    assert list(bound.call(tensors())) == ["logits"]


def test_what_onnxruntime_refuses_while_running(monkeypatch: pytest.MonkeyPatch) -> None:
    session = OnnxSession(artifact())
    given = tensors()
    given["input_ids"] = given["input_ids"] + 10_000  # no such row of the embedding
    with pytest.raises(ExportError, match=r"onnxruntime failed on .*model\.onnx.*"):
        session.call(given)


# --- What every runtime checks ----------------------------------------------------------------------------------------


def test_fitting() -> None:
    specs = {"x": TensorSpec(("n", 2), torch.float16), "mask": TensorSpec(("n",), torch.bool)}
    fed = fitted({"x": torch.ones(3, 2), "mask": torch.tensor([1, 0, 1]), "more": torch.ones(1)}, specs)
    assert list(fed) == ["x", "mask"]
    assert fed["x"].dtype == torch.float16 and fed["mask"].tolist() == [True, False, True]
    with pytest.raises(UsageError, match=r"mask has a batch of 2, another input one of 3"):
        fitted({"x": torch.ones(3, 2), "mask": torch.ones(2, dtype=torch.bool)}, specs)
    with pytest.raises(UsageError, match=r"x has shape \[3\]; the artifact was compiled for \['n', 2\]"):
        fitted({"x": torch.ones(3), "mask": torch.ones(3)}, specs)
    assert specs["x"].resolved({"n": 4}) == (4, 2) and specs["x"].resolved({}) is None


def test_bfloat16_as_arrays() -> None:
    array = to_numpy(torch.tensor([1.5, 2.0], dtype=torch.bfloat16))
    assert array.dtype == np.float32 and array.tolist() == [1.5, 2.0]


def test_paths_as_text() -> None:
    assert OnnxSession(str(artifact())).path == Path(artifact())  # type: ignore[arg-type]


def test_a_closed_session_says_so() -> None:
    session = OnnxSession(artifact())
    session.run(tensors())
    session.close()
    session.close()
    with pytest.raises(UsageError, match="was closed"):
        session.run(tensors())
    assert session.outputs == ["logits"]


def test_no_room_for_a_copy(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arguments: Any) -> None:
        raise OSError(28, "No space left on device")

    session, names = OnnxSession(artifact()), inner_manifest(artifact())["decisions"]
    monkeypatch.setattr("shutil.copyfile", full)
    with pytest.raises(UsageError, match=r"No space left.*TMPDIR"):
        session.exposing(names)
