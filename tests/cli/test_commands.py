"""The command line as a user meets it: what it refuses and how, what it leaves behind, what it prints."""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from onnx import helper
from safetensors.torch import save_file
from torch import nn
from transformers import BertConfig, BertForSequenceClassification, ViltForQuestionAnswering

from pumer_compile import __version__
from pumer_compile.capture import loading
from pumer_compile.schedule import PRESETS
from tests.support.commands import (
    TOKENS,
    artifact,
    done,
    feed,
    folder,
    inner_manifest,
    onnx_outputs,
    refused,
    run,
    schedule,
    snapshot,
)
from tests.support.conversions import converted_once
from tests.support.models import Config, inputs_for, make
from tests.support.tiny import tiny_vilt

__all__ = ["converted_once"]

pytestmark = pytest.mark.usefixtures("converted_once")


@pytest.fixture
def out(tmp_path: Path) -> Path:
    """Where a command is told to write: an old artifact and its manifest lie there."""
    path = tmp_path / "out" / "model.onnx"
    path.parent.mkdir()
    path.write_bytes(b"the old artifact")
    path.with_name("model.onnx.manifest.json").write_text('{"artifact": "model.onnx"}', encoding="utf-8")
    return path


@pytest.fixture
def unchanged(tmp_path: Path) -> Any:
    """Run at the end of a test: nothing below `tmp_path` differs from when the check was made."""

    def start() -> Callable[[], None]:
        before = snapshot(tmp_path)

        def check() -> None:
            assert snapshot(tmp_path) == before

        return check

    return start


def write(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


# --- Refusals: one clear paragraph, the right exit code, nothing written ----------------------------------------------

SCHEDULES = {
    "a layer that does not exist": ("layers: [7]\nprune: 0.1\n", ("cross_modal.7", "cross_modal.0 to cross_modal.1")),
    "a ratio of 1.5": ("layers: [0]\nprune: 1.5\n", ("prune", "1.5")),
    "a negative ratio": ("layers: [0]\nmerge: {image: -0.1}\n", ("merge.image", "-0.1")),
    "a typo in a key": ("layers: [0]\nprunes: 0.1\n", ("prunes", "unknown key")),
    "a typo in an inner key": ("layers: [0]\nmerge: {images: 0.1}\n", ("images", "unknown key", "text")),
    "a key twice": ("layers: [0]\nprune: 0.1\nprune: 0.2\n", ("prune", "twice")),
    "a list": ("- 0\n- 1\n", ("mapping", "list")),
    "not YAML": ("layers: [0\n", ("YAML",)),
    "nothing to reduce": ("layers: [0]\nprune: 0.0\n", ("reduce nothing",)),
    "more than there is": ("layers: [0]\nprune: 37\n", ("37", "36")),
    "a wrong stream": ("sites: [{at: vision.3, prune: 0.1}]\n", ("vision.3",)),
}


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("command", ["compile", "plan"])
def test_a_bad_schedule(command: str, name: str, tmp_path: Path, out: Path, unchanged: Any) -> None:
    text, words = SCHEDULES[name]
    file = write(tmp_path / "schedule.yaml", text)
    check = unchanged()
    where = ("-o", out) if command == "compile" else ()
    message = refused(2, command, folder(), "--schedule", file, *where)
    for word in words:
        assert word in message, message
    check()


def test_an_unknown_preset(out: Path, unchanged: Any) -> None:
    check = unchanged()
    message = refused(2, folder(), "--schedule", "vilt-vaq", "-o", out)
    assert "vilt-vaq" in message and "vilt-vqa" in message
    check()


def test_a_plan_of_nothing() -> None:
    # Known before the model is: a model that does not exist is not looked for.
    assert "none" in refused(2, "plan", "no-such-model", "--schedule", "none")


OPTIONS = {
    "an old opset": (("--opset", "12"), ("12", "18")),
    "an opset to come": (("--opset", "1000"), ("1000", "18")),
    "an unknown dtype": (("--dtype", "int3"), ("int3", "float16", "float32")),
    "an unknown target": (("--target", "bogus"), ("bogus", "onnxruntime-cpu")),
    "no image size": (("--image-size", "abc"), ("abc", "384x640")),
    "an image size of zero": (("--image-size", "0x96"), ("0x96",)),
    "three image sizes": (("--image-size", "96x96x3"), ("96x96x3",)),
    "a stream without a name": (("--stream", "input_ids"), ("input_ids", "INPUT=NAME")),
    "a stream of an unknown input": (("--stream", "pixels=image"), ("pixels", "pixel_values")),
    "a tolerance that is no number": (("--atol", "small"), ("small", "number")),
    "a tolerance that is NaN": (("--rtol", "nan"), ("nan",)),
    "a negative tolerance": (("--atol", "logits=-1"), ("logits=-1",)),
    "two tolerances for all": (("--atol", "1", "--atol", "logits=1"), ("one tolerance",)),
    "a text longer than the position table": (("--text-length", "13"), ("13", "12", "max_position_embeddings")),
    "sizes beside inputs": (("--inputs", "inputs.npz", "--batch", "2"), ("--inputs", "--batch")),
    "inputs that do not exist": (("--inputs", "no-such.npz"), ("no-such.npz",)),
    "a config for a folder": (("--config", "config.json"), ("--config", "folder")),
    "a report that cannot be written": (("--report", "no-such-folder/report.json"), ("no-such-folder",)),
}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_bad_option(name: str, out: Path, unchanged: Any) -> None:
    options, words = OPTIONS[name]
    check = unchanged()
    message = refused(2, folder(), "--schedule", schedule(), "-o", out, *options)
    for word in words:
        assert word in message, message
    check()


@pytest.mark.parametrize("option", [("--atol", "small"), ("--opset", "12"), ("--dtype", "int3")])
def test_a_bad_option_does_not_wait_for_the_model(option: tuple[str, str], tmp_path: Path) -> None:
    message = refused(2, "no-such-model", "--schedule", "vilt-vqa", "-o", tmp_path / "model.onnx", *option)
    assert option[1] in message


@pytest.mark.parametrize("option", ["--batch", "--text-length"])
def test_a_size_of_zero(option: str, out: Path, unchanged: Any) -> None:
    check = unchanged()
    result = run(folder(), "--schedule", schedule(), "-o", out, option, "0")
    assert result.code == 2 and option in result.err and "Traceback" not in result.err
    check()


def test_a_tolerance_of_an_unknown_output(out: Path, unchanged: Any) -> None:
    check = unchanged()
    message = refused(2, folder(layers=1), "--schedule", "none", "-o", out, "--atol", "logit=1e-3")
    assert "'logit'" in message and "logits" in message
    check()
    message = refused(2, "parity", artifact(), "--model", folder(), "--rtol", "logit=1e-3")
    assert "'logit'" in message and "logits" in message


# Where it cannot write. The tests may run as root, whom permission bits do not stop.


def test_an_output_in_a_missing_folder(tmp_path: Path, unchanged: Any) -> None:
    check = unchanged()
    missing = tmp_path / "missing" / "model.onnx"
    assert str(missing.parent) in refused(2, folder(), "--schedule", schedule(), "-o", missing)
    check()


def test_an_output_that_is_a_folder(tmp_path: Path, unchanged: Any) -> None:
    (tmp_path / "model.onnx").mkdir()
    check = unchanged()
    message = refused(2, folder(), "--schedule", schedule(), "-o", tmp_path / "model.onnx")
    assert "is a directory" in message
    check()


def test_an_output_below_a_file(tmp_path: Path, unchanged: Any) -> None:
    write(tmp_path / "file", "")
    check = unchanged()
    refused(2, folder(), "--schedule", schedule(), "-o", tmp_path / "file" / "model.onnx")
    check()


def test_an_output_where_the_system_lets_nobody_write() -> None:
    assert "/proc/model.onnx" in refused(2, folder(), "--schedule", schedule(), "-o", "/proc/model.onnx")


def test_a_read_only_folder(out: Path, unchanged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    check = unchanged()

    def refuse(*args: Any, **options: Any) -> None:
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    monkeypatch.setattr(tempfile, "NamedTemporaryFile", refuse)
    assert "Read-only file system" in refused(2, folder(), "--schedule", schedule(), "-o", out)
    check()


@pytest.mark.parametrize("name", ["model.foo", "model", "model.onnx.txt"])
def test_an_unknown_suffix(name: str, tmp_path: Path) -> None:
    message = refused(2, "no-such-model", "--schedule", schedule(), "-o", tmp_path / name)
    assert ".onnx" in message
    assert not list(tmp_path.iterdir())


def test_a_disk_that_fills_up(out: Path, unchanged: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    check = unchanged()

    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(out))

    monkeypatch.setattr("pumer_compile.exporters.onnx.append_metadata", full)
    message = refused(1, folder(layers=1), "--schedule", "none", "-o", out, "--no-verify")
    assert "No space left on device" in message and str(out) in message
    check()


# What it cannot load.


def test_a_model_that_does_not_exist(out: Path, unchanged: Any) -> None:
    check = unchanged()
    assert "no-such-model" in refused(2, "no-such-model", "--schedule", schedule(), "-o", out)
    check()


@pytest.mark.parametrize("command", [[], ["plan"]], ids=["compile", "plan"])
def test_an_id_of_a_model_that_is_not_here(command: list[str], out: Path) -> None:
    """It is no path; nothing is downloaded, and the message says how to."""
    where = () if command else ("-o", out)
    message = refused(2, *command, "dandelin/vilt-b32-finetuned-vqa", "--schedule", schedule(), *where)
    assert "hf download dandelin/vilt-b32-finetuned-vqa" in message and "local cache" in message
    assert "does not exist" not in message


MISTYPED = {
    "pariti": (("model.onnx", "--model", "m"), "did you mean parity?"),
    "Plan": (("model", "--schedule", "vilt-vqa"), "did you mean plan?"),
    "benchmark": (("model.onnx",), "did you mean bench?"),
    "prove": (
        ("model.onnx",),
        "Commands: bench, compile, evaluate, inspect, list, parity, plan, report, search, triton",
    ),
    "help": ((), "Commands: bench, compile, evaluate, inspect, list, parity, plan, report, search, triton"),
    "examine": ((), "pumer-compile --help"),
}


@pytest.mark.parametrize("word", MISTYPED)
def test_a_mistyped_command_is_not_taken_for_a_model(
    word: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    more, says = MISTYPED[word]
    message = refused(2, word, *more)
    assert f"no command {word!r}" in message and says in message
    # A model of that name is one.
    write(tmp_path / word, "no model")
    assert "is not a model file" in refused(1, word, "--schedule", "vilt-vqa", "-o", tmp_path / "model.onnx")


@pytest.mark.parametrize("command", [[], ["plan"]], ids=["compile", "plan"])
def test_a_mistyped_preset(command: list[str], out: Path) -> None:
    where = () if command else ("-o", out)
    message = refused(2, *command, folder(), "--schedule", "vilt-vqaa", *where)
    assert "No schedule 'vilt-vqaa'" in message and "did you mean vilt-vqa?" in message
    message = refused(2, *command, folder(), "--schedule", "nothing.yaml", *where)
    assert "did you mean" not in message and all(name in message for name in PRESETS)
    assert "none, " in message


def test_a_text_only_model(tmp_path: Path, out: Path, unchanged: Any) -> None:
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertForSequenceClassification(BertConfig(vocab_size=60, **sizes)).save_pretrained(tmp_path / "bert")
    check = unchanged()
    message = refused(2, tmp_path / "bert", "--schedule", schedule(), "-o", out)
    assert "text.0" in message and "image" in message
    check()


def test_a_truncated_checkpoint(tmp_path: Path, out: Path, unchanged: Any) -> None:
    shutil.copytree(folder(), tmp_path / "model")
    weights = tmp_path / "model" / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    check = unchanged()
    message = refused(1, tmp_path / "model", "--schedule", schedule(), "-o", out)
    assert str(tmp_path / "model") in message and "truncated" in message
    check()


def test_a_pickled_module_without_the_flag(tmp_path: Path, out: Path, unchanged: Any) -> None:
    torch.save(tiny_vilt(num_hidden_layers=1), tmp_path / "model.pt")
    check = unchanged()
    message = refused(2, tmp_path / "model.pt", "--schedule", schedule(), "-o", out)
    assert "--allow-pickle" in message and "ViltForQuestionAnswering" in message
    check()


def test_a_bare_state_dict_without_config(tmp_path: Path, out: Path, unchanged: Any) -> None:
    shutil.copy(folder() / "model.safetensors", tmp_path / "weights")
    check = unchanged()
    assert "--config" in refused(2, tmp_path / "weights", "--schedule", schedule(), "-o", out)
    check()


def test_no_model_at_all(tmp_path: Path, out: Path, unchanged: Any) -> None:
    (tmp_path / "noise").write_bytes(bytes(range(256)))
    check = unchanged()
    refused(1, tmp_path / "noise", "--schedule", schedule(), "-o", out)
    check()


# What does not fit the model.


def without(name: str) -> dict[str, np.ndarray]:
    return {key: array for key, array in feed().items() if key != name}


INPUTS: dict[str, tuple[Callable[[], dict[str, np.ndarray]], tuple[str, ...]]] = {
    "a wrong rank": (lambda: feed() | {"pixel_values": feed()["pixel_values"][0]}, ("pixel_values", "4 dimensions")),
    "a wrong number of channels": (lambda: feed() | {"pixel_values": feed()["pixel_values"][:, :2]}, ("3 channels",)),
    "another batch": (lambda: feed() | {"attention_mask": feed()["attention_mask"][:1]}, ("batch", "attention_mask")),
    "another length": (lambda: feed() | {"attention_mask": feed()["attention_mask"][:, :9]}, ("length", "9", "12")),
    "a longer text than the model has": (lambda: feed(text=13), ("13", "12")),
    "an unknown name": (lambda: {**feed(), "pixels": feed()["pixel_values"]}, ("'pixels'", "pixel_values")),
    "a missing input": (lambda: without("pixel_values"), ("pixel_values",)),
    "ids outside of the vocabulary": (lambda: feed() | {"input_ids": feed()["input_ids"] + 60}, ("input_ids", "59")),
    "numbers for ids": (lambda: feed() | {"input_ids": feed()["input_ids"] * 1.0}, ("input_ids", "integers")),
    "text": (lambda: feed() | {"input_ids": np.array(["what", "is"])}, ("input_ids", "numbers")),
}


@pytest.mark.parametrize("name", INPUTS)
def test_inputs_that_do_not_fit(name: str, tmp_path: Path, out: Path, unchanged: Any) -> None:
    arrays, words = INPUTS[name]
    np.savez(tmp_path / "inputs.npz", **arrays())
    check = unchanged()
    message = refused(2, folder(), "--schedule", schedule(), "-o", out, "--inputs", tmp_path / "inputs.npz")
    for word in words:
        assert word in message, message
    check()


def test_inputs_that_are_no_npz(tmp_path: Path, out: Path, unchanged: Any) -> None:
    file = write(tmp_path / "inputs.npz", "input_ids: 1, 2")
    check = unchanged()
    assert str(file) in refused(2, folder(), "--schedule", schedule(), "-o", out, "--inputs", file)
    check()


class Rolling(nn.Module):
    """Something between the layers that moves tokens about."""

    def __init__(self, what: str) -> None:
        super().__init__()
        self.what = what
        self.fusion = make(Config(layers=2, mask="none"))

    def forward(self, input_ids: torch.Tensor, pixel_values: torch.Tensor) -> torch.Tensor:
        x = self.fusion.embed(input_ids, pixel_values)
        for index, layer in enumerate(self.fusion.layers):
            x = layer(x, None)
            if index == 0:
                x = torch.renorm(x, 2, 1, 1.0) if self.what == "renorm" else torch.fft.fft(x, dim=1).real
        return self.fusion.finish(x, input_ids.shape[1])


@pytest.mark.parametrize("what", ["renorm", "fft"])
def test_an_unknown_operator_on_a_token_axis(what: str, tmp_path: Path, out: Path, unchanged: Any) -> None:
    inputs = inputs_for(Config(mask="none"))
    torch.export.save(torch.export.export(Rolling(what).eval(), (), inputs), tmp_path / "model.pt2")
    check = unchanged()
    message = refused(1, tmp_path / "model.pt2", "--schedule", schedule(), "-o", out)
    assert what in message and "rule" in message
    assert "test_commands.py" in message  # the line that the operator comes from
    check()


def test_a_target_for_a_plain_module(tmp_path: Path, out: Path, unchanged: Any) -> None:
    torch.export.save(torch.export.export(make(Config(layers=1)), (), inputs_for(Config())), tmp_path / "model.pt2")
    check = unchanged()
    message = refused(2, tmp_path / "model.pt2", "--schedule", schedule(), "-o", out, "--target", "onnxruntime-cpu")
    assert "--target" in message
    assert "float16" in refused(2, tmp_path / "model.pt2", "--schedule", schedule(), "-o", out, "--dtype", "float16")
    check()


def test_a_dynamic_batch_that_an_archive_does_not_have(tmp_path: Path, out: Path, unchanged: Any) -> None:
    torch.export.save(torch.export.export(make(Config(layers=1)), (), inputs_for(Config())), tmp_path / "model.pt2")
    check = unchanged()
    message = refused(2, tmp_path / "model.pt2", "--schedule", schedule(), "-o", out, "--dynamic-batch")
    assert "torch.export.Dim" in message
    check()


# What is no artifact.


def test_parity_of_something_else(tmp_path: Path, unchanged: Any) -> None:
    write(tmp_path / "text.onnx", "this is not protobuf")
    identity = helper.make_node("Identity", ["x"], ["y"])
    x, y = (helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [2]) for name in "xy")
    onnx.save(helper.make_model(helper.make_graph([identity], "g", [x], [y])), str(tmp_path / "foreign.onnx"))
    check = unchanged()
    for name in ("text.onnx", "foreign.onnx", "missing.onnx"):
        assert name in refused(2, "parity", tmp_path / name, "--model", folder())
    assert "pumer-compile" in refused(2, "parity", tmp_path / "foreign.onnx", "--model", folder())
    assert "small" in refused(2, "parity", artifact(), "--model", folder(), "--atol", "small")
    check()


def test_parity_with_inputs_of_another_shape(tmp_path: Path) -> None:
    np.savez(tmp_path / "inputs.npz", **feed(batch=3))
    message = refused(2, "parity", artifact(), "--model", folder(), "--inputs", tmp_path / "inputs.npz")
    assert "[3, 12]" in message and "[2, 12]" in message
    np.savez(tmp_path / "inputs.npz", **without("pixel_mask"))
    refused(2, "parity", artifact(), "--model", folder(), "--inputs", tmp_path / "inputs.npz")


# --- Tracebacks -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("flag", ["-v", "--verbose"])
def test_verbose_adds_the_traceback(flag: str, out: Path, unchanged: Any) -> None:
    check = unchanged()
    result = run("no-such-model", "--schedule", schedule(), "-o", out, flag)
    assert result.code == 2
    assert "Traceback" in result.err and "UsageError" in result.err
    assert result.err.splitlines()[-1].startswith("error: The model no-such-model does not exist")
    assert "Traceback" not in run("no-such-model", "--schedule", schedule(), "-o", out).err
    check()


def test_a_defect_of_ours_is_one_line_too(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*args: Any, **options: Any) -> None:
        raise ZeroDivisionError("a defect\nover two lines")

    monkeypatch.setattr(loading, "load_model", broken)
    result = run(folder(), "--schedule", schedule(), "-o", out)
    assert result.code == 1
    assert "Unexpected ZeroDivisionError: a defect over two lines" in result.err and "-v" in result.err
    assert "Traceback" not in result.err
    assert "Traceback" in run(folder(), "--schedule", schedule(), "-o", out, "-v").err


# --- Help -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [[], ["compile"], ["parity"], ["plan"]], ids=" ".join)
def test_help_has_examples(command: list[str]) -> None:
    text = " ".join(done(*command, "--help").out.split())
    example = (
        f"pumer-compile {command[0]} " if command[1:] or command in (["parity"], ["plan"]) else "pumer-compile MODEL"
    )
    assert example in text
    assert command == ["parity"] or ("--schedule" in text and all(name in text for name in PRESETS))
    if not command:
        assert all(name in text for name in ("compile", "parity", "plan", "Exit codes"))


@pytest.mark.parametrize("command", [[], ["parity"], ["plan"]], ids=" ".join)
def test_the_examples_of_the_help_are_understood(command: list[str]) -> None:
    """They fail for the file that is not there, and not for an option."""
    lines = [line.strip() for line in done(*command, "--help").out.splitlines()]
    examples = [line.split()[1:] for line in lines if line.startswith("pumer-compile ")]
    assert len(examples) >= 2
    for example in examples:
        message = refused(2, *example)
        assert any(name in message for name in ("MODEL", "schedule.yaml", "model.onnx")), message


@pytest.mark.parametrize("command", [[], ["compile"], ["plan"], ["bench"]], ids=" ".join)
def test_the_short_option_of_help(command: list[str]) -> None:
    assert done(*command, "-h").out == done(*command, "--help").out


def test_version() -> None:
    assert done("--version").out.strip() == f"pumer-compile {__version__}"


def test_without_arguments_there_is_help() -> None:
    result = run()
    assert "pumer-compile MODEL" in " ".join((result.out + result.err).split())


def test_the_artifact_must_have_a_name() -> None:
    """A schedule need not be given: `tests/cli/test_inspect.py`."""
    result = run(folder(), "--schedule", "vilt-vqa")
    assert result.code == 2 and "--output" in result.err


# --- What it prints ---------------------------------------------------------------------------------------------------


def test_plan_json_is_alone_on_stdout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    result = done("plan", folder(), "--schedule", schedule(), "--json")
    plan = json.loads(result.out)
    assert list(plan) == ["schedule", "signals", "sites", "multiply_adds"]
    assert (plan["schedule"]["method"], plan["schedule"]["semantics"]) == ("pumer", "reference")
    (site,) = plan["sites"]
    assert site == {
        "site": "cross_modal.0",
        "module": "vilt.encoder.layer.0.attention.attention",
        "before": {"text": 12, "image": 37},
        "after": TOKENS["cross_modal.0"],
    }
    saved = plan["multiply_adds"]
    assert list(saved) == ["before", "after", "ratio"]
    assert saved["before"] > saved["after"] > 0
    assert saved["ratio"] == pytest.approx(saved["before"] / saved["after"])
    assert "loading" in result.err and "capturing" in result.err
    assert not list(tmp_path.iterdir())  # a plan writes nothing


def test_plan_counts_one_sample() -> None:
    plans = [done("plan", folder(), "-s", schedule(), "--json", "--batch", n).out for n in (1, 3)]
    first, second = (json.loads(plan)["multiply_adds"] for plan in plans)
    assert first["before"] == second["before"] and first["after"] == second["after"]


def test_plan_as_a_table() -> None:
    result = done("plan", folder(), "--schedule", schedule(), "--text-length", 9, "--image-size", "64x96")
    assert "cross_modal.0" in result.out and "text 9" in result.out and "image 25" in result.out
    assert "multiply-adds" in result.out and "fewer" in result.out
    assert "…" not in result.out  # nothing is cut, on 80 columns


def test_the_tables_of_a_compilation(tmp_path: Path) -> None:
    result = done("parity", artifact(), "--model", folder(), "--report", tmp_path / "report.json")
    assert "…" not in result.out
    for word in (
        "(in reducer.cross_modal_0)",
        "image",
        "text",
        "logits",
        "forced",
        "end to end",
        "unreduced",
    ):
        assert word in result.out
    verdicts = [line.split()[-1] for line in result.out.splitlines() if line.split()[-1:] in (["pass"], ["reported"])]
    assert verdicts.count("pass") >= 4 and "reported" in verdicts and "FAIL" not in result.out


def test_verbose_says_what_each_pass_did_and_dump_graph_writes_it(tmp_path: Path) -> None:
    result = done("plan", folder(), "-s", schedule(), "-v", "--json", "--dump-graph", tmp_path / "graphs")
    json.loads(result.out)
    for name in ("annotate", "locate", "insert", "rewrite", "verify"):
        assert name in result.err
    files = sorted((tmp_path / "graphs").iterdir())
    assert len(files) >= 2 and all(file.stat().st_size for file in files)
    assert "annotate" not in done("plan", folder(), "-s", schedule(), "--json").err


# --- What it compiles -------------------------------------------------------------------------------------------------


def kind_folder(path: Path, model: ViltForQuestionAnswering) -> tuple[Any, ...]:
    model.save_pretrained(path)
    return (path,)


def config_of(model: ViltForQuestionAnswering) -> dict[str, Any]:
    return {**model.config.to_dict(), "architectures": [type(model).__name__]}


def kind_checkpoint(path: Path, model: ViltForQuestionAnswering) -> tuple[Any, ...]:
    torch.save({"config": config_of(model), "state_dict": model.state_dict()}, path)
    return (path,)


def kind_state_dict(path: Path, model: ViltForQuestionAnswering) -> tuple[Any, ...]:
    torch.save(model.state_dict(), path)
    return (path, "--config", write(path.with_name("config.json"), json.dumps(config_of(model))))


def kind_safetensors(path: Path, model: ViltForQuestionAnswering) -> tuple[Any, ...]:
    save_file(model.state_dict(), path)
    model.save_pretrained(path.with_name("folder"))
    return (path, "--config", path.with_name("folder"))


def kind_pickle(path: Path, model: ViltForQuestionAnswering) -> tuple[Any, ...]:
    torch.save(model, path)
    return (path, "--allow-pickle")


@pytest.mark.parametrize("kind", [kind_folder, kind_checkpoint, kind_state_dict, kind_safetensors, kind_pickle])
def test_every_kind_of_file_compiles(
    kind: Callable[..., tuple[Any, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """To the current directory, by a bare name, in the shapes of an .npz file."""
    model = tiny_vilt(num_hidden_layers=1)
    arguments = kind(tmp_path / "model.bin", model)  # the suffix says nothing
    np.savez(tmp_path / "inputs.npz", **feed())
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    options = ("--inputs", tmp_path / "inputs.npz", "--no-verify")
    result = done(*arguments, "--schedule", "none", "-o", "model.onnx", *options)
    said = " ".join(result.out.split())
    assert re.search(
        r"^Wrote model.onnx \([\d.]+ kB\) and model.onnx.manifest.json; not verified. Not reduced. Fixed", said
    )
    assert sorted(os.listdir()) == ["model.onnx", "model.onnx.manifest.json"]
    with torch.no_grad():
        logits = model.eval()(**{name: torch.from_numpy(array) for name, array in feed().items()}).logits
    np.testing.assert_allclose(onnx_outputs(Path("model.onnx"), feed())["logits"], logits, atol=1e-5, rtol=0)
    manifest = inner_manifest(Path("model.onnx"))
    assert manifest["schedule"] is None and manifest["tokens"] is None and manifest["decisions"] == []
    assert manifest["parity"] == {"verified": False}


def test_an_archive_compiles(tmp_path: Path) -> None:
    config = Config(layers=2)
    model = make(config)
    inputs = inputs_for(config)
    torch.export.save(torch.export.export(model, (), inputs), tmp_path / "model.pt2")
    done(tmp_path / "model.pt2", "--schedule", schedule(), "-o", tmp_path / "model.onnx")
    manifest = inner_manifest(tmp_path / "model.onnx")
    assert manifest["parity"]["passed"] and manifest["parity"]["decisions_compared"]
    assert manifest["tokens"]["cross_modal.0"] == {"text": 6, "image": 15}
    assert set(manifest["inputs"]) == set(inputs)
    done("parity", tmp_path / "model.onnx", "--model", tmp_path / "model.pt2", "--inputs", npz(tmp_path, inputs))


def npz(folder: Path, inputs: dict[str, torch.Tensor]) -> Path:
    np.savez(folder / "inputs.npz", **{name: tensor.numpy() for name, tensor in inputs.items()})
    return folder / "inputs.npz"


def test_the_inputs_of_the_processor_compile(tmp_path: Path) -> None:
    """ViLT's own processor gives token types too, which random samples lack."""
    arrays = {**feed(), "token_type_ids": np.zeros((2, 12), np.int64)}
    np.savez(tmp_path / "inputs.npz", **arrays)
    options = ("--inputs", tmp_path / "inputs.npz")
    done(folder(layers=1), "--schedule", schedule(), "-o", tmp_path / "model.onnx", *options)
    manifest = inner_manifest(tmp_path / "model.onnx")
    assert set(manifest["inputs"]) == set(arrays)
    assert manifest["parity"]["samples"] > 2  # random samples as well
    done("parity", tmp_path / "model.onnx", "--model", folder(layers=1))
