"""The benchmark for a GPU, in its cheapest form on the CPU: first cases of the steps, clock, files, parcels."""

from __future__ import annotations

import json
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import harness, pack, step_decisions, step_engines, step_ort
from benchmarks.gpu.harness import ROOT, Bench, NotHere, Settings, figures, fresh_cache, reason_of
from benchmarks.gpu.runner import STEPS, line, run_steps, table, work
from pumer_compile.errors import UsageError


def settings(out: Path) -> Settings:
    return Settings(torch.device("cpu"), tiny=True, out=out, inner="eager", commit="abc", rounds=2, least=True)


def done(name: str, out: Path) -> list[dict[str, Any]]:
    """Run a step in this process; its rows, from its file."""
    work(name, STEPS[name][1], settings(out), time.monotonic() + 600)
    return rows_of(name, out, "abc")


def rows_of(name: str, out: Path, commit: str) -> list[dict[str, Any]]:
    said = json.loads((out / f"{name}.json").read_text(encoding="utf-8"))
    assert said["complete"] and said["commit"] == commit
    assert {"cpu", "python", "versions", "driver", "gpus"} <= said["machine"].keys()
    rows: list[dict[str, Any]] = said["rows"]
    assert rows and all(("reason" in row) != ("milliseconds" in row or "share_that_differs" in row) for row in rows)
    return rows


# --- The steps --------------------------------------------------------------------------------------------------------


def test_torch_compile(tmp_path: Path) -> None:
    rows = done("1-torch-compile", tmp_path)
    assert [row["contender"] for row in rows] == ["eager", "inductor", "tiny"]
    reduced = rows[-1]
    # What is compiled computes what the reduced module does; the share of its reducers is a share.
    assert reduced["largest_difference_from_eager"] < 0.05 and 0 < reduced["reducers_share_in_eager"] < 1
    assert reduced["fewer_multiply_adds"] > 1.2
    assert reduced["cuda_graph"] == {"reason": "CUDA graphs need a GPU"}


def test_prompts_through_the_command(tmp_path: Path) -> None:
    """As on the day: a process for the command, and one that it starts for the step. What lay there before goes."""
    (tmp_path / "2-prompts.json").write_text("of an earlier run", encoding="utf-8")
    how = ["--device", "cpu", "--tiny", "--least", "--inner", "eager", "--step", "2", "--rounds", "2", "--minutes", "9"]
    command = [sys.executable, "-m", "benchmarks.gpu", *how, "--out", str(tmp_path)]
    ran = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=600)
    assert ran.returncode == 0, ran.stderr
    assert "2-prompts (complete)" in ran.stdout and "vispruner, 9: " in ran.stdout
    whole, reduced = rows_of("2-prompts", tmp_path, harness.commit())
    assert (whole["method"], whole["image_tokens"], whole["cache_tokens"]) == ("none", 36, [96])
    assert (reduced["method"], reduced["image_tokens"], reduced["cache_tokens"]) == ("vispruner", 9, [69])
    assert len(whole["token"]["milliseconds"]) == len(reduced["token"]["milliseconds"]) == 2


def test_what_a_machine_lacks_is_a_row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(name: str) -> None:
        raise UsageError(f"{name} is not installed.")

    monkeypatch.setattr(step_engines, "load_library", refuse)
    monkeypatch.setattr(step_ort, "check_provider", refuse)
    engines, ort = done("3-tensorrt", tmp_path), done("4-onnxruntime", tmp_path)
    assert [row["reason"] for row in engines] == [
        "UsageError: tensorrt is not installed.",
        "UsageError: tensorrt-rtx is not installed.",
    ]
    assert [row["reason"] for row in ort] == ["UsageError: cpu is not installed."]


def test_choices_that_differ_are_counted_as_sets() -> None:
    """One of four indices of the second sample is another; their order says nothing."""
    expected = {"a.keep": torch.tensor([[1, 2, 3, 4], [1, 2, 3, 4]]), "b.keep": torch.tensor([[7], [8]])}
    found = {"a.keep": torch.tensor([[4, 3, 2, 1], [1, 2, 3, 9]]), "b.keep": torch.tensor([[7], [8]])}
    row = step_decisions.differences(expected, found)
    assert row == {"share_that_differs": {"a.keep": 0.125, "b.keep": 0.0}, "largest": 0.125, "samples": 0.5}


# --- The clock and the files ------------------------------------------------------------------------------------------


def hang(bench: Bench) -> None:
    bench.add({"model": "first"}, **figures([1.0, 2.0, 3.0]))
    time.sleep(600)


def fail(bench: Bench) -> None:
    bench.attempt({"model": "bad"}, lambda: 1 // 0)  # type: ignore[arg-type,return-value]
    raise RuntimeError("nothing catches this")


def test_a_step_that_hangs_or_fails_keeps_its_rows_and_no_other_is_lost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.gpu.runner.GRACE_SECONDS", 1.0)
    # Time enough for a slow machine to import what a step ends with; what the first leaves over goes to the second.
    steps = {"hangs": (1.0, hang), "fails": (9.0, fail)}
    ended = run_steps(steps, settings(tmp_path), minutes=1.0, start="fork")
    assert "ended after" in ended["hangs"] and "its process ended with 1" in ended["fails"]
    said = table(tmp_path, steps, ended)
    assert "first: 2.00 ms (1.00 to 3.00)" in said and "bad: ZeroDivisionError" in said
    assert not json.loads((tmp_path / "hangs.json").read_text(encoding="utf-8"))["complete"]


def test_what_was_not_begun_in_time_says_so(tmp_path: Path) -> None:
    bench = Bench("late", settings(tmp_path), deadline=time.monotonic() - 1)
    bench.attempt({"model": "any"}, lambda: pytest.fail("was begun"))
    assert bench.rows[0]["reason"] == "not begun: the step's time was up"
    assert line(bench.rows[0]) == "  any: not begun: the step's time was up"


def test_a_long_reason_keeps_its_end() -> None:
    said = reason_of(ValueError("begin " + "x" * 900 + " out of memory"))
    assert said.startswith("ValueError: begin") and said.endswith("out of memory") and len(said) < 420
    assert reason_of(NotHere("no GPU")) == "no GPU"


def test_a_fresh_cache_leaves_the_old_one_as_it_was() -> None:
    from transformers import DynamicCache

    cache = DynamicCache()
    cache.update(torch.ones(1, 2, 3, 4), torch.ones(1, 2, 3, 4), 0)
    fresh_cache(cache).update(torch.zeros(1, 2, 1, 4), torch.zeros(1, 2, 1, 4), 0)
    assert cache.get_seq_length() == 3


# --- The parcels ------------------------------------------------------------------------------------------------------


def test_packages_travel_in_parcels(tmp_path: Path) -> None:
    wheels, parcels, place = (tmp_path / name for name in ("wheels", "parcels", "place"))
    wheels.mkdir()
    noise = torch.randint(256, (5000,), dtype=torch.uint8, generator=torch.Generator().manual_seed(0)).numpy().tobytes()
    with zipfile.ZipFile(wheels / "a-1-py3-none-any.whl", "w") as wheel:
        wheel.writestr("a/__init__.py", "value = 3\n")
        wheel.writestr("a/library.so", noise)
    written = pack.pack(wheels, parcels, most=2000)
    assert len(written) == 4 and all(path.stat().st_size <= 2000 for path in written)
    assert pack.unpack(parcels, place) == ["a-1-py3-none-any.whl"]
    assert (place / "a" / "library.so").read_bytes() == noise
    written[1].write_bytes(b"?" + written[1].read_bytes()[1:])
    with pytest.raises(SystemExit, match="damaged"):
        pack.unpack(parcels, place)
    written[0].unlink()
    with pytest.raises(SystemExit, match=r"lacks packages\.tar\.xz\.00 of 3"):
        pack.unpack(parcels, place)


def test_what_is_missing_is_listed() -> None:
    said = pack.missing()
    assert "there    pydantic>=2.10" in said and "onnxruntime-gpu>=1.22" in said
    with pytest.raises(SystemExit, match="'numpy1' is none of"):
        pack.fetch(Path("wheels"), ["numpy1"], "3.12")
