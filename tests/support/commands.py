"""The command line in this process (torch is loaded once), and what tests share of its work."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import io
import json
import logging
import os
import signal
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import onnx
import onnxruntime
import torch

from pumer_compile.cli import commands as cli
from pumer_compile.cli.tables import console, status
from pumer_compile.exporters.tensorrt import unsupported
from pumer_compile.runtimes.tensorrt_library import load_library
from tests.support.tiny import tiny_vilt


@dataclass(frozen=True)
class Result:
    """What a command left on the screen, and its exit code."""

    code: int
    out: str
    err: str

    @property
    def message(self) -> str:
        """The error, without the prefix."""
        return self.err.partition("error: ")[2].strip()


def run(*arguments: Any) -> Result:
    """Run `pumer-compile` with these arguments, on a screen of 80 columns."""
    out, err = io.StringIO(), io.StringIO()
    console.width = status.width = 80
    with (
        _process_as_found(),
        mock.patch.dict(os.environ, COLUMNS="80"),
        contextlib.redirect_stdout(out),
        contextlib.redirect_stderr(err),
    ):
        try:
            cli.main([str(argument) for argument in arguments])
        except SystemExit as stop:
            code = stop.code
    assert isinstance(code, int)
    return Result(code, out.getvalue(), err.getvalue())


def done(*arguments: Any) -> Result:
    """Run a command that must succeed."""
    result = run(*arguments)
    assert result.code == 0, result.err
    return result


@contextlib.contextmanager
def _process_as_found() -> Iterator[None]:
    # The command sets up logging and signals for its process, but other tests run in this one.
    log = logging.getLogger("pumer_compile")
    handlers, level, propagate = log.handlers, log.level, log.propagate
    handler = signal.getsignal(signal.SIGTERM)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)
        log.handlers, log.propagate = handlers, propagate
        log.setLevel(level)


def refused(code: int, *arguments: Any) -> str:
    """Run a command that must fail with this code and one readable paragraph, which is returned."""
    result = run(*arguments)
    assert result.code == code, f"exit code {result.code}: {result.out}{result.err}"
    assert result.err.count("error: ") == 1, result.err
    lines = [line for line in result.err.splitlines() if not line.endswith(" ...")]  # progress
    assert len(lines) == 1, result.err
    assert "Traceback" not in result.err + result.out
    assert "Unexpected" not in result.message
    assert 20 < len(result.message) < 700
    return result.message


def snapshot(folder: Path) -> dict[str, bytes | None]:
    """Everything below a folder: content by relative path, None for folders."""
    return {
        str(path.relative_to(folder)): path.read_bytes() if path.is_file() else None
        for path in sorted(folder.rglob("*"))
    }


def onnx_outputs(path: Path, feed: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Outputs of an artifact under plain onnxruntime, by name."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(None, dict(feed)), strict=True))


def tensorrt_refuses(path: Path) -> list[str]:
    """What the parser of TensorRT-RTX refuses in an artifact; it needs no GPU."""
    return unsupported(load_library("tensorrt-rtx"), path)


def inner_manifest(path: Path) -> dict[str, Any]:
    """The manifest in the metadata of an artifact."""
    model = onnx.load(str(path), load_external_data=False)
    found = [entry.value for entry in model.metadata_props if entry.key == "pumer_compile.manifest"]
    assert len(found) == 1
    return json.loads(found[0])


def with_manifest(model: onnx.ModelProto, manifest: Mapping[str, Any], path: Path) -> Path:
    """Write a model with another manifest inside it and no seal, as those had that were made before there was one."""
    del model.metadata_props[:]
    said = {name: value for name, value in manifest.items() if name != "sealed"}
    model.metadata_props.add(key="pumer_compile.manifest", value=json.dumps(said))
    onnx.save(model, str(path))
    return path


# --- One small model and its artifacts, made when first asked for, once for all processes -----------------------------

SCHEDULE = "semantics: reference\nlayers: [0]\nprune: 0.1\nmerge: {image: 0.3, text: 0.2}\n"
TOKENS = {"cross_modal.0": {"text": 10, "image": 22}, "cross_modal.1": {"text": 10, "image": 22}}
"""After each layer of the small model with `SCHEDULE`; 12 and 37 before."""


def _shared(name: str) -> Path:
    return Path(os.environ["PUMER_COMPILE_TESTS"]) / name


@contextlib.contextmanager
def _once(path: Path) -> Iterator[bool]:
    """Whether a file or a folder is still to be made; who wants it meanwhile waits."""
    made = path.with_name(f"{path.name}.made")
    with path.with_name(f"{path.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield not made.exists()
        made.touch()


@functools.cache
def folder(seed: int = 0, layers: int = 2) -> Path:
    """A tiny ViLT as a save_pretrained folder: 12 text and 37 image tokens."""
    path = _shared(f"model-{seed}-{layers}")
    with _once(path) as missing:
        if missing:
            tiny_vilt(seed=seed, num_hidden_layers=layers).save_pretrained(path)
    return path


@functools.cache
def schedule() -> Path:
    """`SCHEDULE` as a file."""
    path = _shared("schedule.yaml")
    with _once(path) as missing:
        if missing:
            path.write_text(SCHEDULE, encoding="utf-8")
    return path


@functools.cache
def artifact(*options: str) -> Path:
    """The tiny ViLT, reduced by `SCHEDULE`, batch 2, proved; with a report. Tests must not change it."""
    path = _shared("-".join(["artifact", *(option.strip("-") for option in options)])) / "model.onnx"
    with _once(path.parent) as missing:
        if missing:
            path.parent.mkdir(exist_ok=True)
            report = ("--report", path.with_name("report.json"))
            done(folder(), "--schedule", schedule(), "-o", path, "--batch", 2, *report, *options)
    return path


def feed(batch: int = 2, text: int = 12, size: int | tuple[int, int] = 96, seed: int = 7) -> dict[str, np.ndarray]:
    """Inputs of the tiny ViLT with padded text; images fill the canvas."""
    generator = torch.Generator().manual_seed(seed)
    height, width = (size, size) if isinstance(size, int) else size
    mask = torch.ones(batch, text, dtype=torch.int64)
    for row in range(1, batch):
        mask[row, max(1, text - 2 * row) :] = 0
    return {
        "input_ids": torch.randint(1, 60, (batch, text), generator=generator).numpy(),
        "attention_mask": mask.numpy(),
        "pixel_values": torch.randn(batch, 3, height, width, generator=generator).numpy(),
        "pixel_mask": torch.ones(batch, height, width, dtype=torch.int64).numpy(),
    }
