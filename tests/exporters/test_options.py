"""No option is lost on its way: from the command line into the options of a writer, from a program into its chain."""

from __future__ import annotations

import functools
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
import typer
from torch import nn

import pumer_compile as pumer
from pumer_compile.artifacts import options
from pumer_compile.artifacts.formats import FORMATS, OPENVINO, Format
from pumer_compile.artifacts.profile import Profile
from pumer_compile.capture import added
from pumer_compile.capture.capture import Program
from pumer_compile.cli.commands import app
from pumer_compile.errors import UsageError
from pumer_compile.exporters import OnnxOptions, chain
from pumer_compile.exporters.chain import cast
from pumer_compile.exporters.onnx_passes import ONNX_PASSES
from pumer_compile.schedule import Schedule
from tests.support.commands import feed, refused
from tests.support.tiny import tiny_vilt

EACH = pytest.mark.parametrize("known", FORMATS, ids=lambda known: known.suffixes[0])
# Every option of every format: how it is given on the command line, and what it is then.
FLAGS: dict[str, tuple[tuple[str, ...], Any]] = {
    "dtype": (("--dtype", "float16"), "float16"),
    "profiles": (("--profile", "batch=1:2:4", "--profile", "batch=8:8:8"), (Profile(1, 2, 4), Profile(8, 8, 8))),
    "opset": (("--opset", "19"), 19),
    "target": (("--target", "tensorrt"), "tensorrt"),
    "onnx_passes": (("--onnx-passes", "strides,rows"), ("strides", "rows")),
    "quantize": (("--quantize", "int8"), "int8"),
    "quantize_mode": (("--quantize", "int8", "--quantize-mode", "weights"), "weights"),
    "calibration": (
        ("--quantize", "int8", "--quantize-mode", "static", "--calibration", "samples.npz"),
        Path("samples.npz"),
    ),
    "builder": (("--builder", "tensorrt-rtx"), "tensorrt-rtx"),
    "compute_capabilities": (("--compute-capability", "8.6,12.0"), ("8.6", "12.0")),
    "timing_cache": (("--timing-cache", "timings"), Path("timings")),
    "optimization_level": (("--optimization-level", "5"), 5),
    "workspace": (("--workspace", "100"), 100),
    "layer_info": (("--layer-info", "layers.json"), Path("layers.json")),
    "version_compatible": (("--version-compatible",), True),
}


def options_of(known: Format) -> list[str]:
    return [field.name for field in fields(known.load_writer().options_class)]


def flag_of(known: Format, flag: str) -> bool:
    return any(FLAGS[name][0][0] == flag for name in options_of(known))


def test_every_option_has_a_flag() -> None:
    assert {name for known in FORMATS for name in options_of(known)} == set(FLAGS)


def test_the_command_line_says_what_the_options_say() -> None:
    """Help and defaults have one place, and an option that is not given leaves the format's default."""
    command = typer.main.get_command(app).commands["compile"]  # type: ignore[attr-defined]
    told = {flag: parameter for parameter in command.params for flag in parameter.opts}
    for known in FORMATS:
        for option in fields(known.load_writer().options_class):
            parameter = told[FLAGS[option.name][0][-2 if option.name != "version_compatible" else 0]]
            assert option.metadata["help"] and parameter.help == option.metadata["help"]
            assert not parameter.default and option.metadata.get("flag", parameter.opts[0]) == parameter.opts[0]
    opset, dtype, mode = (told[flag].help for flag in ("--opset", "--dtype", "--quantize-mode"))
    assert f"(default {OnnxOptions().opset})" in opset and f"{OnnxOptions().dtype} (default)" in dtype
    assert f"{OnnxOptions(quantize='int8').quantize_mode} (default)" in mode


def test_passes_and_targets_have_the_names_that_options_take() -> None:
    assert get_args(options.PassName) == tuple(ONNX_PASSES)
    assert set(options.DEFAULT_PASSES) == {None, *get_args(options.Target)}
    assert {name for names in options.DEFAULT_PASSES.values() for name in names} <= set(ONNX_PASSES)


@EACH
def test_every_flag_reaches_the_options_of_its_formats(
    known: Format, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Any] = []

    def stop(path: Path, options: Any, **checks: Any) -> None:
        seen.append(options)
        raise UsageError("This is far enough for the test.")

    monkeypatch.setattr("pumer_compile.exporters.check_exporter", stop)
    path = tmp_path / f"model{known.suffixes[0]}"
    for name, (flags, value) in FLAGS.items():
        message = refused(2, "MODEL", "--schedule", "none", "-o", path, *flags)
        if name in options_of(known):
            assert message == "This is far enough for the test." and getattr(seen[-1], name) == value
        else:
            flag, _, why = message.partition(" does not apply to ")
            assert flag in flags, message
            takers = [suffix for other in FORMATS if flag_of(other, flag) for suffix in other.suffixes]
            assert why.endswith(f"it is for {' and '.join(takers)}. Leave it out."), message


class Arrived(Exception):
    """What a second capture was asked."""


@functools.cache
def program() -> Program:
    inputs = {name: torch.from_numpy(array) for name, array in feed(batch=1).items()}
    return pumer.capture(
        tiny_vilt(num_hidden_layers=2), inputs, streams={"input_ids": "text"}, outputs=["logits"], padding=False
    )


def never(*args: Any, **options: Any) -> None:
    raise AssertionError("captured, reduced or traced anew")


@EACH
def test_a_compile_captures_once_and_reduces_once(known: Format, monkeypatch: pytest.MonkeyPatch) -> None:
    """What every writer converts is the graph that was reduced."""
    if known is OPENVINO:
        pytest.importorskip("openvino")
        pytest.importorskip("transformers.exporters.exporter_openvino")
    reduced = pumer.reduce(program(), Schedule(layers=(0,), prune=0.5))
    for module, name in ((chain, "capture_with"), (chain, "reduce_graph"), (added, "capture")):
        monkeypatch.setattr(module, name, never)
    monkeypatch.setattr(type(reduced.program.model), "forward", never)
    build = known.load_writer()(known.load_writer().options_class()).build(reduced)
    assert build.outputs == ["logits"] and build.decisions == ["reducer.cross_modal_0.image.kept"]
    assert build.inputs == ["input_ids", "pixel_values"]


def test_what_was_captured_reaches_the_capture_in_another_dtype(monkeypatch: pytest.MonkeyPatch) -> None:
    def captured(model: nn.Module, inputs: Mapping[str, Any], **asked: Any) -> None:
        raise Arrived(asked)

    monkeypatch.setattr(added, "capture", captured)
    with pytest.raises(Arrived) as arrived:
        cast(program(), "float16")
    streams: Mapping[str, str] = program().streams
    outputs: Sequence[str] = program().outputs
    assert streams and outputs
    asked = {"streams": streams, "outputs": tuple(outputs), "padding": False, "dynamic_batch": False}
    assert arrived.value.args[0] == asked
