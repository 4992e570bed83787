"""Publication: an artifact appears whole and proved, or the old one stays."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import pumer_compile as pumer
from pumer_compile.capture.loading import load_model
from pumer_compile.capture.make_inputs import make_inputs
from pumer_compile.errors import ParityError, UsageError
from pumer_compile.exporters.onnx import OnnxBuild, OnnxOptions, build_onnx
from pumer_compile.files import sha256_file
from pumer_compile.parity import check as parity_check
from pumer_compile.reduce import Reduced, with_decisions
from tests.support.commands import artifact, feed, folder, inner_manifest, onnx_outputs, run, schedule, snapshot
from tests.support.models import Config, highest, inputs_for, make, program
from tests.support.models import schedule as budgets
from tests.support.tiny import tiny_vilt

CONFIG = Config(layers=1, head=highest)
ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def reduced() -> Reduced:
    return pumer.reduce(program(CONFIG), budgets(layers=(0,)))


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """An old artifact and its manifest."""
    path = tmp_path / "model.onnx"
    path.write_bytes(b"the old artifact")
    (tmp_path / "model.onnx.manifest.json").write_text('{"artifact": "model.onnx"}', encoding="utf-8")
    return path


@pytest.fixture
def converted(reduced: Reduced, monkeypatch: pytest.MonkeyPatch) -> OnnxBuild:
    """Conversion is done once for the tests that are about what comes after it."""
    if not hasattr(converted, "build"):
        converted.build = build_onnx(reduced, OnnxOptions())
    build: OnnxBuild = converted.build
    monkeypatch.setattr("pumer_compile.exporters.onnx.build_onnx", lambda *args: build)
    return build


# --- Killed -----------------------------------------------------------------------------------------------------------


class Server:
    """Commands in processes that can be killed; see `tests/support/kill_server.py`."""

    def __init__(self) -> None:
        environment = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.support.kill_server"],
            cwd=ROOT,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def run(self, *arguments: Any, **job: Any) -> dict[str, Any]:
        assert self.process.stdin is not None and self.process.stdout is not None
        print(json.dumps({"arguments": [str(a) for a in arguments], **job}), file=self.process.stdin, flush=True)
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    server = Server()
    path = tmp_path_factory.mktemp("server") / "model.onnx"
    server.run(folder(layers=1), "--schedule", "none", "-o", path, "--no-verify", warm=True)
    assert path.exists()
    yield server
    assert server.process.stdin is not None
    server.process.stdin.close()
    assert server.process.wait(timeout=60) == 0


def runs(path: Path) -> dict[str, Any]:
    """The manifest of an artifact that onnxruntime opens and runs."""
    outputs = onnx_outputs(path, feed())
    assert np.isfinite(outputs["logits"]).all()
    return inner_manifest(path)


def visible(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if not path.name.startswith(".")}


def test_killed_at_any_moment(server: Server, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    old = artifact().read_bytes()
    path.write_bytes(old)
    (tmp_path / "model.onnx.manifest.json").write_text('{"artifact": "model.onnx", "old": true}', encoding="utf-8")
    command = (folder(layers=1), "--schedule", "none", "-o", path, "--batch", 2)

    whole = server.run(*command)
    assert whole["code"] == 0 and path.read_bytes() != old
    random = np.random.default_rng(0)
    kills = 6
    interrupted = 0
    for part in range(kills):
        path.write_bytes(old)
        moment = (part + random.uniform()) / kills * whole["seconds"]
        answer = server.run(*command, after=moment)
        assert answer["code"] in (-signal.SIGKILL, 0)
        interrupted += answer["code"] != 0
        if path.read_bytes() != old:
            manifest = runs(path)
            assert manifest["parity"]["passed"]
            assert manifest["checkpoint_sha256"] != inner_manifest(artifact())["checkpoint_sha256"]
        json.loads((tmp_path / "model.onnx.manifest.json").read_text(encoding="utf-8"))
        assert visible(tmp_path) == {"model.onnx", "model.onnx.manifest.json"}
    assert interrupted >= 2  # it was killed while at work
    # What killed runs left behind is in nobody's way.
    path.write_bytes(old)
    assert server.run(*command)["code"] == 0
    assert runs(path)["parity"]["passed"]


def test_killed_between_files_that_belong_together(server: Server, tmp_path: Path) -> None:
    """Weights beside the graph: before the last rename the old graph still finds its own."""
    path = tmp_path / "model.onnx"
    options = ("-s", "none", "-o", path, "--batch", 2, "--no-verify")
    assert server.run(folder(1, layers=1), *options, external=True)["code"] == 0
    old, logits = path.read_bytes(), onnx_outputs(path, feed())["logits"]
    weights = set()
    for renamed in range(1, 4):  # the weights, the manifest, the graph
        answer = server.run(folder(layers=1), *options, external=True, replace=renamed, folder=str(tmp_path))
        assert answer["code"] == -signal.SIGKILL
        assert (path.read_bytes() == old) == (renamed < 3)
        new = onnx_outputs(path, feed())["logits"]
        assert np.array_equal(new, logits) == (renamed < 3) and np.isfinite(new).all()
        weights = {name for name in visible(tmp_path) if name.endswith(".data")}
        assert len(weights) == 2
    runs(path)
    described = json.loads((tmp_path / "model.onnx.manifest.json").read_text(encoding="utf-8"))
    assert described["sha256"] == sha256_file(path)


def test_a_polite_kill_leaves_nothing(server: Server, out: Path) -> None:
    before = snapshot(out.parent)
    command = (folder(layers=1), "--schedule", "none", "-o", out, "--no-verify")
    answer = server.run(*command, at="append_metadata", signal=signal.SIGTERM)
    assert answer["code"] == 128 + signal.SIGTERM
    assert snapshot(out.parent) == before
    answer = server.run(*command, at="append_metadata")
    assert answer["code"] == -signal.SIGKILL
    assert before.items() < snapshot(out.parent).items()  # rubble, which proves that it was at work


# --- Not proved -------------------------------------------------------------------------------------------------------


def test_an_artifact_that_fails_is_kept_aside(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = snapshot(out.parent)
    original = parity_check._eager_leaves

    def wrong(*args: Any) -> Any:
        return [value + 0.01 for value in original(*args)]

    monkeypatch.setattr(parity_check, "_eager_leaves", wrong)
    report = out.parent / "report.json"
    result = run(folder(layers=1), "--schedule", schedule(), "-o", out, "--batch", 2, "--report", report)
    assert result.code == 3
    assert "Parity failed, so" in result.message and "logits" in result.message and str(out) in result.message
    assert "model.onnx.failed" in result.message and "FAIL" in result.out and "Wrote" not in result.out
    after = snapshot(out.parent)
    assert set(after) == {*before, "model.onnx.failed", "report.json"}
    assert {name: after[name] for name in before} == before
    assert json.loads(report.read_text(encoding="utf-8"))["passed"] is False

    failed = out.with_name("model.onnx.failed")
    onnx.checker.check_model(str(failed), full_check=True)
    manifest = runs(failed)
    assert manifest["parity"]["passed"] is False and manifest["parity"]["outputs"][0]["max_abs"] >= 0.009


def test_a_model_with_nan_is_not_published(out: Path) -> None:
    config = Config(layers=1)
    model = make(config)
    with torch.no_grad():
        model.layers[0].down.weight[0, 0] = torch.nan
        model.words.weight[7] = torch.nan
    before = snapshot(out.parent)
    reduced = pumer.reduce(pumer.capture(model, inputs_for(config)), budgets(layers=(0,)))
    with pytest.raises(ParityError, match="NaN or Inf") as error:
        pumer.export(reduced, out)
    assert error.value.exit_code == 3 and not error.value.report.passed
    after = snapshot(out.parent)
    assert after.pop("model.onnx.failed") and after == before


def test_an_artifact_that_decides_otherwise_is_not_published(out: Path, reduced: Reduced) -> None:
    """The artifact of one schedule, judged by another with the same token counts."""
    build = build_onnx(reduced, OnnxOptions())
    other = pumer.reduce(reduced.program, budgets("safe", layers=(0,)))
    assert other.plan.tokens() == reduced.plan.tokens()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pumer_compile.exporters.onnx.build_onnx", lambda *args: build)
        with pytest.raises(ParityError, match="decides differently") as error:
            pumer.export(other, out)
    assert "--atol" not in str(error.value) and "no tolerance would let it pass" in str(error.value)
    assert any(not row.passed and row.worst_margin > 1e-3 for row in error.value.report.reducers)
    assert out.read_bytes() == b"the old artifact"


def test_a_tolerance_is_advised_where_it_would_do(out: Path, reduced: Reduced, converted: OnnxBuild) -> None:
    with pytest.raises(ParityError, match="raise --atol/--rtol only if"):
        pumer.export(reduced, out, atol=0, rtol=0)


def test_without_a_proof(
    tmp_path: Path, reduced: Reduced, converted: OnnxBuild, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*args: Any, **options: Any) -> None:
        raise AssertionError("verified all the same")

    monkeypatch.setattr("pumer_compile.exporters.publish.check", never)
    exported = pumer.export(reduced, tmp_path / "model.onnx", verify=False)
    assert exported.report is None and exported.manifest["parity"] == {"verified": False}
    assert inner_manifest(tmp_path / "model.onnx")["parity"] == {"verified": False}
    with pytest.raises(AssertionError, match="verified all the same"):
        pumer.export(reduced, tmp_path / "model.onnx")


def test_samples_of_the_user_are_part_of_the_proof(tmp_path: Path, reduced: Reduced, converted: OnnxBuild) -> None:
    samples = [inputs_for(CONFIG, seed=seed) for seed in (2, 3)]
    report = pumer.export(reduced, tmp_path / "model.onnx", samples=samples).report
    assert report is not None and report.samples == 6
    samples[1]["pixel_values"][0, 0, 0, 0] = torch.inf
    with pytest.raises(ParityError, match="NaN or Inf"):
        pumer.export(reduced, tmp_path / "model.onnx", samples=samples)


def test_samples_hold_what_a_processor_makes_besides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Token types of zeros, with which ViLT is as without; others are refused."""
    model = tiny_vilt(num_hidden_layers=1)
    captured = pumer.capture(model, make_inputs(model, batch=2))
    sample = make_inputs(model, batch=2, seed=1)
    sample["token_type_ids"] = torch.zeros_like(sample["input_ids"])
    report = pumer.export(captured, tmp_path / "model.onnx", samples=[sample]).report
    assert report is not None and report.passed and report.samples == 4
    sample["token_type_ids"] += 1
    with pytest.raises(UsageError, match="token_type_ids"):
        pumer.export(captured, tmp_path / "model.onnx", samples=[sample])


@pytest.mark.parametrize("dynamic", [False, True])
def test_a_proof_takes_no_batch_twice(
    tmp_path: Path, converted: OnnxBuild, dynamic: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, given = tiny_vilt(), []
    program = pumer.capture(model, make_inputs(model, batch=2), dynamic_batch=dynamic)

    def noted(session: Any, eager: Any, unreduced: Any, batches: Any, *rest: Any, **more: Any) -> Any:
        given.extend([*batches, next(iter(more["more"]))])
        raise KeyboardInterrupt

    monkeypatch.setattr("pumer_compile.exporters.publish.check", noted)
    with pytest.raises(KeyboardInterrupt):
        pumer.export(pumer.reduce(program, schedule()), tmp_path / "model.onnx")
    firsts = [float(batch["pixel_values"].flatten()[0]) for batch in given]
    assert len(set(firsts)) == len(firsts)
    sizes = [len(batch["pixel_values"]) for batch in given]
    assert sizes == ([2, 2, 1, 3, 2, 2] if dynamic else [2, 2, 2, 2, 2, 2])


# --- Interrupted ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "step", ["onnx.save_onnx", "publish._prove", "onnx.append_metadata", "publish.make_manifest", "publish.publish"]
)
@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_an_exception_leaves_nothing(
    step: str, error: type[BaseException], out: Path, reduced: Reduced, converted: OnnxBuild, monkeypatch: Any
) -> None:
    before = snapshot(out.parent)

    def broken(*args: Any, **options: Any) -> None:
        raise error

    monkeypatch.setattr(f"pumer_compile.exporters.{step}", broken)
    with pytest.raises(error):
        pumer.export(reduced, out)
    assert snapshot(out.parent) == before


def test_paths_are_checked_before_any_work(tmp_path: Path, reduced: Reduced, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> None:
        raise AssertionError("it went to work")

    monkeypatch.setattr("pumer_compile.exporters.onnx.build_onnx", never)
    for path in (tmp_path / "model.pb", tmp_path / "missing" / "model.onnx", tmp_path):
        with pytest.raises(UsageError):
            pumer.export(reduced, path)
    assert not list(tmp_path.iterdir())


def test_tolerances_are_checked_before_any_work(tmp_path: Path, reduced: Reduced) -> None:
    told: list[str] = []
    for tolerance in ({"atol": {"logit": 1e-3}}, {"rtol": {"output": 1e-3, "logit": 1e-3}}):
        with pytest.raises(UsageError, match=f"--{next(iter(tolerance))} names the output 'logit'; there are output"):
            pumer.export(reduced, tmp_path / "model.onnx", progress=told.append, **tolerance)
    assert not told and not list(tmp_path.iterdir())


# --- Weights beside the graph -----------------------------------------------------------------------------------------


def test_weights_beside_the_graph(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above 2 GB they cannot be in it. Proved, proved again, moved, and replaced by others."""
    monkeypatch.setattr("pumer_compile.exporters.onnx.INLINE_WEIGHTS_LIMIT", 1000)
    models = [make(CONFIG, seed=seed) for seed in (0, 1)]
    inputs = inputs_for(CONFIG)
    given = {name: tensor.numpy() for name, tensor in inputs.items()}
    path = tmp_path / "here" / "model.onnx"
    path.parent.mkdir()
    seen: list[dict[str, np.ndarray]] = []
    for number, model in enumerate(models, 1):
        exported = pumer.export(pumer.reduce(pumer.capture(model, inputs), budgets(layers=(0,))), path)
        assert exported.report is not None and exported.report.passed and exported.report.decisions_compared
        files = {name for name in visible(path.parent) if name.endswith(".data")}
        assert len(files) == number and all(name.startswith("model.onnx.") for name in files)
        assert path.stat().st_size < sum((path.parent / name).stat().st_size for name in files)
        assert not [name for name in snapshot(path.parent) if name.startswith(".")]
        seen.append(onnx_outputs(path, given))
        with torch.no_grad():
            expected = pumer.reduce(pumer.capture(model, inputs), budgets(layers=(0,))).module(**inputs)
        np.testing.assert_allclose(seen[-1]["output"], expected, atol=1e-5, rtol=0)
    assert np.abs(seen[0]["output"] - seen[1]["output"]).max() > 1e-2
    assert pumer.parity(path, models[1], [inputs]).passed
    assert not pumer.parity(path, models[0], [inputs]).passed

    shutil.move(path.parent, tmp_path / "there")
    moved = tmp_path / "there" / "model.onnx"
    assert np.array_equal(onnx_outputs(moved, given)["output"], seen[1]["output"])
    assert pumer.parity(moved, models[1], [inputs]).passed
    onnx.checker.check_model(str(moved), full_check=True)


# --- What comes out ---------------------------------------------------------------------------------------------------


def test_decisions_as_outputs(tmp_path: Path, reduced: Reduced, converted: OnnxBuild) -> None:
    given = {name: tensor.numpy() for name, tensor in inputs_for(CONFIG).items()}
    plain = pumer.export(reduced, tmp_path / "plain.onnx")
    wordy = pumer.export(reduced, tmp_path / "wordy.onnx", with_decisions=True)
    assert plain.manifest["outputs"] == wordy.manifest["outputs"] == ["output"]
    assert plain.manifest["decisions"] == wordy.manifest["decisions"] == converted.decisions
    answers = onnx_outputs(wordy.path, given)
    assert list(answers) == ["output", *converted.decisions]
    assert np.array_equal(onnx_outputs(plain.path, given)["output"], answers["output"])
    exposed = pumer.OnnxSession(plain.path, expose=converted.decisions).run(inputs_for(CONFIG))
    assert all(np.array_equal(exposed[name], answers[name]) for name in answers)
    with torch.no_grad():
        eager = with_decisions(reduced.module, ["output"])[0](**inputs_for(CONFIG))
    assert all(np.array_equal(answers[name], eager[name].numpy()) for name in converted.decisions)
    assert plain.path.stat().st_mode & 0o777 == 0o666 & ~_umask()


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask


def test_the_command_and_the_library_make_the_same(tmp_path: Path) -> None:
    program = pumer.capture(load_model(folder()), {name: torch.from_numpy(array) for name, array in feed().items()})
    pumer.export(pumer.reduce(program, schedule()), tmp_path / "model.onnx", verify=False)
    graphs = [onnx.load(str(path)).graph.SerializeToString() for path in (artifact(), tmp_path / "model.onnx")]
    assert graphs[0] == graphs[1]
