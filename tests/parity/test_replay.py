"""What parity saves, replayed by Polygraphy itself; and Polygraphy's word on what TensorRT-RTX takes."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pumer_compile.errors import UsageError
from pumer_compile.parity.replay import check_recording
from tests.support.commands import artifact, done, folder, inner_manifest, refused, snapshot
from tests.support.conversions import converted_once

__all__ = ["converted_once"]

pytestmark = pytest.mark.usefixtures("converted_once")

HALF = ("--dtype", "float16", "--with-decisions")


def polygraphy(*arguments: object, **environment: str) -> subprocess.CompletedProcess[str]:
    """`polygraphy ...` in a process of its own, as a user runs it."""
    command = [str(Path(sys.executable).with_name("polygraphy")), *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, text=True, timeout=110, env={**os.environ, **environment}, check=False
    )


def replay(path: Path, recorded: Path) -> subprocess.CompletedProcess[str]:
    inputs, outputs = recorded / "in.json", recorded / "out.json"
    return polygraphy("run", path, "--onnxrt", "--load-inputs", inputs, "--load-outputs", outputs)


@pytest.mark.parametrize("options", [(), HALF])
def test_polygraphy_replays_what_was_saved(options: tuple[str, ...], tmp_path: Path) -> None:
    path = artifact(*options)
    saved = ("--save-inputs", tmp_path / "in.json", "--save-outputs", tmp_path / "out.json")
    done("parity", path, "--model", folder(), *saved)
    assert sorted(snapshot(tmp_path)) == ["in.json", "out.json"]
    replayed = replay(path, tmp_path)
    assert replayed.returncode == 0, replayed.stdout + replayed.stderr
    assert re.search(r"Passed: (\d+)/\1 iterations", replayed.stdout)

    from polygraphy.comparator import RunResults
    from polygraphy.json import load_json, save_json

    fed = load_json(str(tmp_path / "in.json"))
    assert len(fed) > 2 and {name: str(array.dtype) for name, array in fed[0].items()} == {
        name: spec["dtype"] for name, spec in inner_manifest(path)["inputs"].items()
    }
    ((runner, given),) = RunResults.load(str(tmp_path / "out.json")).items()
    assert runner == "pumer-compile CPUExecutionProvider" and len(given) == len(fed)
    assert list(given[0]) == ["logits", *(inner_manifest(path)["decisions"] if options else [])]

    # Polygraphy does compare: other inputs give other outputs.
    fed[1]["pixel_values"] = np.zeros_like(fed[1]["pixel_values"])
    save_json(fed, str(tmp_path / "in.json"))
    replayed = replay(path, tmp_path)
    assert replayed.returncode == 1 and "FAILED" in replayed.stdout + replayed.stderr


def test_they_are_saved_of_a_failed_proof_too(tmp_path: Path) -> None:
    saved = ("--save-inputs", tmp_path / "in.json", "--save-outputs", tmp_path / "out.json")
    refused(3, "parity", artifact(), "--model", folder(), "--atol", 0, "--rtol", 0, *saved)
    assert sorted(snapshot(tmp_path)) == ["in.json", "out.json"]


def test_files_that_cannot_be_written(tmp_path: Path) -> None:
    for option in ("--save-inputs", "--save-outputs"):
        message = refused(2, "parity", artifact(), "--model", "nowhere", option, tmp_path / "no" / "file.json")
        assert "does not exist" in message and "nowhere" not in message  # before the model is looked for


def test_without_polygraphy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == "polygraphy"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "polygraphy", None)
    path = tmp_path / "in.json"
    message = refused(2, "parity", artifact(), "--model", "nowhere", "--save-inputs", path)
    assert "pumer-compile[tools]" in message
    check_recording({"dtype": "float32"}, None, None)


def test_bfloat16_has_no_arrays(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="no bfloat16"):
        check_recording({"dtype": "bfloat16"}, tmp_path / "in.json")


@pytest.mark.parametrize("options", [(), HALF, ("--dynamic-batch",)])
def test_the_parser_of_tensorrt_rtx_takes_every_operator(options: tuple[str, ...]) -> None:
    report = polygraphy("inspect", "capability", artifact(*options), POLYGRAPHY_USE_TENSORRT_RTX="1")
    assert report.returncode == 0, report.stdout + report.stderr
    assert "Graph is fully supported by TensorRT" in report.stdout
