"""`bench`: what is measured and written. How long anything takes is not tested: the machines are shared."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pumer_compile as pumer
import pumer_compile.bench.bench as bench_module
from pumer_compile import Engine
from pumer_compile.bench.bench import BenchReport, Comparison, Measurement, alternate, bench
from pumer_compile.errors import ExportError, UsageError
from pumer_compile.files import sha256_file
from tests.support.commands import artifact, done, feed, refused
from tests.support.fake_tensorrt import engine_of, install
from tests.support.talker import prompts, talker

OPEN = ("--dynamic-batch",)


@pytest.fixture
def no_memory(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """Leaves out the processes that memory is measured in; they take seconds."""
    asked: list[Any] = []

    def measured(path: str, options: Any, feeds: Any, on_gpu: bool) -> list[int]:
        asked.append((path, dict(options), [len(feed["input_ids"]) for feed in feeds], on_gpu))
        return [1 << 20] * len(feeds)

    monkeypatch.setattr(bench_module, "memory_in_a_process", measured)
    return asked


@pytest.mark.parametrize("kind", [0, 1])
def test_inputs_as_a_processor_makes_them(kind: int, no_memory: list[Any], tmp_path: Path) -> None:
    given = feed()
    np.savez(tmp_path / "inputs.npz", **given, token_type_ids=np.full_like(given["input_ids"], kind))
    if kind:
        with pytest.raises(UsageError, match="compiled without token_type_ids, which is as good as 0"):
            bench([artifact()], iterations=1, warmup=0, inputs=tmp_path / "inputs.npz")
    else:
        assert bench([artifact()], iterations=1, warmup=0, inputs=tmp_path / "inputs.npz").measurements


def test_two_artifacts_in_turn(tmp_path: Path) -> None:
    """With everything: memory in processes of their own, JSON, a table."""
    paths, out = (artifact(), artifact(*OPEN)), tmp_path / "bench.json"
    result = done("bench", paths[0], "--vs", paths[1], "-n", 4, "--warmup", 1, "--json", out)
    assert "p50" in result.out and "CPUExecutionProvider" in result.out
    assert re.search(r"x faster than artifact(-dynamic-batch)?/model.onnx \(medians\)", " ".join(result.out.split()))
    said = json.loads(out.read_text(encoding="utf-8"))
    assert said["settings"] == {"iterations": 4, "warmup": 1, "inputs": "made up", "seed": 0}
    assert list(said["artifacts"]) == [str(path) for path in paths]
    for path in paths:
        about = said["artifacts"][str(path)]
        assert about["sha256"] == sha256_file(path) and about["provider"] == "CPUExecutionProvider"
        assert about["dtype"] == "float32" and about["tokens"]
    rows = said["measurements"]
    assert [(row["artifact"], row["batch"]) for row in rows] == [(str(path), 2) for path in paths]
    for row in rows:
        times = row["milliseconds"]
        assert len(times) == 4 and all(time > 0 for time in times)
        assert row["p50_ms"] == pytest.approx(np.median(times)) and row["mean_ms"] == pytest.approx(np.mean(times))
        assert min(times) <= row["p50_ms"] <= row["p90_ms"] <= row["p99_ms"] <= max(times)
        assert row["samples_per_second"] == pytest.approx(2e3 / row["mean_ms"])
        # More than the weights, less than a process with torch in it.
        assert path.stat().st_size < row["peak_memory_bytes"] < 500 << 20
    machine = said["environment"]
    assert machine["cores"] >= machine["usable_cores"] >= 1 and machine["gpus"] == {}
    assert {"torch", "onnxruntime"} <= set(machine["versions"]) and machine["cpu"]


def test_batch_sizes(no_memory: list[Any]) -> None:
    report = bench([artifact(*OPEN)], batches=[5, 1, 5], iterations=2, warmup=0)
    assert [(row.batch, len(row.milliseconds)) for row in report.measurements] == [(1, 2), (5, 2)]
    assert no_memory == [(str(artifact(*OPEN)), {"provider": None}, [1, 5], False)]
    assert [row.peak_memory for row in report.measurements] == [1 << 20, 1 << 20]
    # Without sizes: what it was compiled with, or what its profile is tuned for.
    assert [row.batch for row in bench([artifact(*OPEN)], iterations=1).measurements] == [2]
    tuned = artifact("--profile", "batch=1:3:4")
    assert [row.batch for row in bench([tuned], iterations=1).measurements] == [3]


def test_inputs_of_ones_own(tmp_path: Path, no_memory: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    given, fed = feed(batch=3), []
    np.savez(tmp_path / "samples.npz", **given)
    real = Engine.__call__

    def noted(engine: Engine, **inputs: torch.Tensor) -> Any:
        fed.append({name: tensor.numpy() for name, tensor in inputs.items()})
        return real(engine, **inputs)

    monkeypatch.setattr(Engine, "__call__", noted)
    report = bench([artifact(*OPEN)], batches=[2, 4], iterations=1, warmup=0, inputs=tmp_path / "samples.npz")
    assert report.settings["inputs"] == "samples.npz" and [len(one["input_ids"]) for one in fed] == [2, 4]
    for one, rows in zip(fed, ([0, 1], [0, 1, 2, 0]), strict=True):
        assert all(np.array_equal(one[name], given[name][rows]) for name in given)


def test_made_up_inputs(no_memory: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Whole texts and images in the artifact's dtypes, of words that the model has."""
    path = artifact("--dtype", "float16", "--with-decisions")  # its own proof calls engines, too
    fed: list[dict[str, torch.Tensor]] = []
    real = Engine.__call__

    def noted(engine: Engine, **inputs: torch.Tensor) -> Any:
        fed.append(inputs)
        return real(engine, **inputs)

    monkeypatch.setattr(Engine, "__call__", noted)
    bench([path], iterations=1, warmup=0)
    (made,) = fed
    assert {name: (tuple(t.shape), t.dtype) for name, t in made.items()} == {
        "input_ids": ((2, 12), torch.int64),
        "attention_mask": ((2, 12), torch.int64),
        "pixel_values": ((2, 3, 96, 96), torch.float16),
        "pixel_mask": ((2, 96, 96), torch.int64),
    }
    assert made["attention_mask"].all() and made["pixel_mask"].all()
    assert 0 <= int(made["input_ids"].min()) and int(made["input_ids"].max()) < 60 and made["pixel_values"].std() > 0.5


def test_made_up_prompts_have_their_image_where_the_artifact_has_it(tmp_path: Path, no_memory: list[Any]) -> None:
    """And no placeholder elsewhere: the artifact refuses any other prompt."""
    path = tmp_path / "prompt.onnx"
    program = pumer.capture(talker(), prompts(3, 5))
    pumer.export(pumer.reduce(program, pumer.Schedule(method="vispruner", budget=6)), path, verify=False)
    report = bench([path], iterations=1, warmup=0)
    assert [(row.batch, len(row.milliseconds)) for row in report.measurements] == [(2, 1)]
    assert report.settings["inputs"] == "made up"


def test_turns_are_reversed(monkeypatch: pytest.MonkeyPatch) -> None:
    """None is always the first after the other."""
    turns: list[str] = []
    engines = {"a": Engine(artifact()), "b": Engine(artifact(*OPEN))}
    real = Engine.__call__
    names = {id(engine): name for name, engine in engines.items()}

    def noted(engine: Engine, **inputs: torch.Tensor) -> Any:
        turns.append(names[id(engine)])
        return real(engine, **inputs)

    monkeypatch.setattr(Engine, "__call__", noted)
    given = {name: torch.from_numpy(array) for name, array in feed().items()}
    samples = alternate(engines, {name: given for name in engines}, iterations=3, warmup=1)
    assert "".join(turns) == "abbaabba" and {name: len(times) for name, times in samples.items()} == {"a": 3, "b": 3}


def test_figures() -> None:
    first = Measurement("a", 4, [1.0, 2.0, 3.0, 10.0], None)
    second = Measurement("b", 4, [5.0, 5.0, 5.0, 5.0], None)
    assert (first.percentile(50), first.percentile(90), first.mean) == (2.5, pytest.approx(7.9), 4.0)
    assert first.throughput == 1000.0 and second.throughput == 800.0
    report = BenchReport({}, {}, {}, [first, second])
    # The factor is of the faster one, whichever comes first.
    assert report.comparisons() == [Comparison(4, "a", "b", 2.0)]
    assert BenchReport({}, {}, {}, [second, first]).comparisons() == [Comparison(4, "a", "b", 2.0)]
    (told,) = report.to_dict()["comparisons"]
    assert {key: told[key] for key in ("batch", "faster", "slower", "factor")} == {
        "batch": 4,
        "faster": "a",
        "slower": "b",
        "factor": 2.0,
    }
    assert report.to_dict()["measurements"][0]["milliseconds"] == [1.0, 2.0, 3.0, 10.0]


def test_engines_too(tmp_path: Path, no_memory: list[Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """The logic alone: a stand-in for TensorRT (`fake_tensorrt`) executes."""
    library = install(monkeypatch, profiles=[(1, 4, 8)])
    engine = engine_of(artifact(*OPEN), tmp_path, profiles=["batch=1:4:8"])
    report = bench([engine, artifact(*OPEN)], iterations=2, warmup=1, provider="cpu", cuda_graph=True)
    assert [row.batch for row in report.measurements] == [4, 4]
    assert [about["provider"] for about in report.artifacts.values()] == ["tensorrt-rtx", "CPUExecutionProvider"]
    assert report.artifacts[str(engine)]["builder"] == "tensorrt-rtx"
    assert [options for _, options, _, _ in no_memory] == [{"cuda_graph": True}, {"provider": "cpu"}]
    assert library.calls.count(("run", 4)) == 2 + 3  # warm-up and capture of the graph, three replays


@pytest.mark.parametrize("command", ["bench", "triton"])
def test_the_examples_of_the_help_are_understood(command: str) -> None:
    """They fail for the file that is not there, and not for an option."""
    lines = [line.strip() for line in done(command, "--help").out.splitlines()]
    examples = [line.split()[1:] for line in lines if line.startswith("pumer-compile ")]
    assert len(examples) >= 2
    for example in examples:
        message = refused(2, *example)
        assert any(name in message for name in ("MODEL", "model.onnx", "model.engine")), message


# --- What is refused --------------------------------------------------------------------------------------------------


def test_what_is_refused(tmp_path: Path, no_memory: list[Any]) -> None:
    message = refused(2, "bench", artifact(), "--batch", 4)
    assert "compiled for a batch of 2" in message and "--dynamic-batch" in message
    assert "No artifact at" in refused(2, "bench", artifact(), "--vs", tmp_path / "missing.onnx")
    assert "different artifacts" in refused(2, "bench", artifact(), "--vs", artifact())
    assert "does not exist" in refused(2, "bench", artifact(), "--json", tmp_path / "no" / "bench.json")
    assert "No provider 'rocm'" in refused(2, "bench", artifact(), "--provider", "rocm")
    np.savez(tmp_path / "few.npz", input_ids=feed()["input_ids"])
    assert "no array attention_mask" in refused(2, "bench", artifact(), "--inputs", tmp_path / "few.npz")
    np.savez(tmp_path / "long.npz", **feed(text=9))
    assert "[2, 9]" in refused(2, "bench", artifact(), "--inputs", tmp_path / "long.npz")
    assert "--cuda-graph is for TensorRT engines" in refused(2, "bench", artifact(), "--cuda-graph")
    assert no_memory == []


def test_artifacts_of_different_models(monkeypatch: pytest.MonkeyPatch) -> None:
    said = {name: {"inputs": {inner: {"shape": [1]}}} for name, inner in (("a", "x"), ("b", "y"))}
    monkeypatch.setattr(bench_module, "manifest_of", lambda path: {"profiles": ["batch=1:1:1"], **said[str(path)]})
    with pytest.raises(UsageError, match="b takes y, and a x"):
        bench(["a", "b"])


def test_a_provider_without_onnx(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch)
    with pytest.raises(UsageError, match="--provider is for ONNX"):
        bench([engine_of(artifact(), tmp_path)], provider="cuda")


def test_a_process_that_fails(tmp_path: Path) -> None:
    feeds = [{name: torch.from_numpy(array) for name, array in feed().items()}]
    with pytest.raises(ExportError, match=r"could not be measured, because it did not run: .*No artifact at"):
        bench_module.memory_in_a_process(str(tmp_path / "missing.onnx"), {}, feeds, False)
