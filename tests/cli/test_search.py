"""`search`, `inspect`, `evaluate` and a compilation without a schedule, as a user meets them."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pumer_compile import Schedule
from tests.support.commands import done, feed, folder, refused, run

COUNT = 8


@pytest.fixture(scope="module")
def samples(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("samples") / "x.npz"
    np.savez(path, **feed(batch=COUNT))
    return path


def searching(samples: Path, out: Path, *more: object) -> tuple[object, ...]:
    return ("search", folder(), "--inputs", samples, "-o", out / "s.yaml", "--trials", 3, *more)


def test_a_search_leaves_a_schedule_that_compiles(samples: Path, tmp_path: Path) -> None:
    result = done(*searching(samples, tmp_path, "--max-drop", "100%", "--method", "pumer"))
    words = " ".join(result.out.split())
    assert "of the multiply-adds" in words and f"on {COUNT} samples" in words and "Next: pumer-compile" in words
    assert all(len(line) <= 80 or "/" in line for line in result.out.splitlines())
    found = Schedule.load(tmp_path / "s.yaml")
    trials = json.loads((tmp_path / "s.trials.json").read_text())
    best = next(trial for trial in trials["trials"] if trial["number"] == trials["best"])
    assert best["sha256"] == found.sha256 and len(trials["trials"]) == 3
    assert (tmp_path / "s.png").stat().st_size > 1000
    planned = json.loads(done("plan", folder(), "--schedule", tmp_path / "s.yaml", "--json").out)
    assert planned["multiply_adds"]["ratio"] > 1


def metric_that_raises(outputs: object, labels: object) -> float:
    raise ValueError("no such answer")


def test_bad_input_is_one_message(samples: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "few.npz", labels=np.zeros(COUNT - 1, dtype=np.int64))
    message = refused(2, *searching(samples, tmp_path, "--labels", tmp_path / "few.npz"))
    assert f"{COUNT - 1} labels" in message and f"{COUNT} samples" in message

    np.savez(tmp_path / "blind.npz", **{k: v for k, v in feed(batch=COUNT).items() if "pixel" not in k})
    message = refused(2, *searching(tmp_path / "blind.npz", tmp_path))
    assert "has no picture" in message and "pixel_values" in message

    message = refused(2, *searching(samples, tmp_path, "--metric", f"{__name__}:metric_that_raises"))
    assert "ValueError: no such answer" in message

    message = refused(2, *searching(samples, tmp_path, "--multiply-adds", "0.01", "--method", "pumer"))
    assert "No schedule of 3 tried meets the limits" in message and "The cheapest has 0." in message

    assert "--latency" in refused(2, *searching(samples, tmp_path, "--latency", "fast"))
    assert "--resume" in refused(2, *searching(samples, tmp_path, "--resume"))
    assert "--sampler" in refused(2, *searching(samples, tmp_path, "--sampler", "grid"))
    assert not (tmp_path / "s.yaml").exists()


def test_inspect_reads_no_weights(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_bytes((folder() / "config.json").read_bytes())
    result = done("inspect", tmp_path)
    words = " ".join(result.out.split())
    assert "ViltForQuestionAnswering fits" in words and "Methods that apply: pumer, tome." in words
    assert "method: pumer" in result.out and "semantics: safe" in result.out
    said = json.loads(done("inspect", tmp_path, "--json").out)
    assert said["fits"] and said["suggestion"]["schedule"]["method"] == "pumer"
    assert said["outline"]["informed"] == ["cross_modal.0", "cross_modal.1"]


def test_a_compilation_without_a_schedule_takes_the_one_suggested(tmp_path: Path) -> None:
    result = done(folder(), "-o", tmp_path / "m.onnx", "--no-verify")
    words = " ".join(result.out.split())
    assert "No schedule was given: taking pumer, semantics safe" in words and "x fewer" in words
    manifest = json.loads((tmp_path / "m.onnx.manifest.json").read_text())
    assert manifest["schedule"]["semantics"] == "safe" and manifest["schedule"]["prune"] == 0.1
    assert "go with --schedule" in refused(2, folder(), "-o", tmp_path / "m.onnx", "--semantics", "safe")


def test_the_list_of_models() -> None:
    words = " ".join(done("list", "models").out.split())
    assert "ViLT" in words and "Qwen2.5-VL" in words and "not reduced" in words
    assert run("list", "model").code == 2
