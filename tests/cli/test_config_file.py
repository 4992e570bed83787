"""`--config-file`, `--json`, `--log-level`, progress where there is no terminal, and shell completion."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from unittest import mock

import pytest

from pumer_compile.cli import commands
from tests.support.commands import TOKENS, artifact, done, folder, refused, run, schedule


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_compilation_from_a_file_alone_and_its_json(tmp_path: Path) -> None:
    keys = f"model: {folder()}\nschedule: {schedule()}\noutput: {tmp_path}/model.onnx\nbatch: 2\n"
    config = written(tmp_path / "compile.yaml", keys + "text_length: 9\natol: [logits=1e-3]\nwith-decisions: true\n")
    result = done("--config-file", config, "--text-length", 12, "--json")
    said = json.loads(result.out)
    assert said["path"] == str(tmp_path / "model.onnx") and Path(said["manifest_path"]).is_file()
    manifest = said["manifest"]
    # The command line's text length counts more; the rest is the file's.
    assert manifest["inputs"]["input_ids"]["shape"] == [2, 12]
    assert manifest["tokens"] == TOKENS and manifest["parity"]["passed"] is True
    judged = [row for row in manifest["parity"]["outputs"] if row["against"] != "model"]
    assert {row["atol"] for row in judged} == {1e-3}
    assert manifest["decisions"]
    assert "Wrote" in result.err  # in words, beside it


def test_it_says_the_same_as_the_command_line(tmp_path: Path) -> None:
    config = written(tmp_path / "plan.yaml", f"schedule: {schedule()}\noutput: {tmp_path}/a.onnx\nno-verify: yes\n")
    reference = json.loads((artifact().parent / "model.onnx.manifest.json").read_text(encoding="utf-8"))
    found = json.loads(done(folder(), "--config-file", config, "--batch", 2, "--json").out)["manifest"]
    same = ("schedule_sha256", "tokens", "inputs", "outputs", "plan")
    assert {name: found[name] for name in same} == {name: reference[name] for name in same}
    assert found["parity"] == {"verified": False}


@pytest.mark.parametrize(
    ("text", "match"),
    [
        ("shedule: vilt-vqa\n", r"has the key 'shedule', .* no option --shedule\. Did you mean schedule"),
        ("text_lenght: 9\n", r"Did you mean text-length"),
        ("config-file: other.yaml\n", r"no option --config-file"),
        ("batch: true\n", r"`batch: True`; it takes a value"),
        ("dynamic-batch: 1\n", r"`dynamic-batch: 1`; it takes true or false"),
        ("batch: [1, 2]\n", r"`batch: \[1, 2\]`; it takes one value"),
        ("atol: {logits: 1}\n", r"it takes a value, or a list of them"),
        ("onnx-passes: rows\nlean: rows\n", r"says 'lean' twice"),
        ("- schedule\n", r"must hold a mapping"),
    ],
)
def test_a_file_that_is_wrong_is_refused(text: str, match: str, tmp_path: Path) -> None:
    config = written(tmp_path / "compile.yaml", text)
    assert re.search(match, refused(2, folder(), "--config-file", config))
    assert "cannot be read" in refused(2, folder(), "--config-file", tmp_path / "none.yaml")


def test_log_level_and_progress_without_a_terminal() -> None:
    plan = ("plan", folder(), "-s", schedule())
    result = done(*plan)
    lines = [line for line in result.err.splitlines() if line.endswith(" ...")]
    assert re.match(r"\[0%, \d+\.\d s\] loading ", lines[0])
    assert re.match(r"\[33%, \d+\.\d s\] capturing", lines[1]) and re.match(r"\[67%, ", lines[2])
    assert "No log level 'loud': choose debug, info" in refused(2, *plan, "--log-level", "loud")


def test_the_shell_completes_commands_and_options() -> None:
    """As the script that `--install-completion` writes asks for them."""
    assert "--install-completion" in done("--help").out
    for words, expected in (("pumer-compile pla", "plan"), ("pumer-compile plan --text-l", "--text-length")):
        asked = {"_PUMER_COMPILE_COMPLETE": "complete_bash", "COMP_WORDS": words, "COMP_CWORD": str(words.count(" "))}
        with mock.patch.dict(os.environ, asked):
            assert expected in run().out.split()
    assert commands.app.info.name == "pumer-compile"
