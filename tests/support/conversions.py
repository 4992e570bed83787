"""Conversions to ONNX that are done once, for files of tests that are about what comes before or after them.

What is kept is what the converters of PyTorch and transformers make of one model, one schedule and one sample. Options,
loading and the plan before it, and our ONNX passes, quantization, writing and proof after it, run every time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import nn

from pumer_compile import Program, Schedule
from pumer_compile.exporters import onnx
from pumer_compile.exporters.onnx import OnnxBuild, OnnxOptions

_kept: dict[tuple[object, ...], OnnxBuild] = {}
_alive: list[Program] = []
"""Programs that are known by their identity, which must not be given to others."""


def _content(model: nn.Module) -> str:
    digest = hashlib.sha256(f"{type(model)} {model.config.to_json_string(use_diff=False)}".encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _key(
    program: Program, model: nn.Module | None, schedule: Schedule | None, shapes: Any, options: OnnxOptions
) -> Any:
    """A model of transformers is told by what is in it, so that a command that loads it again finds it."""
    if model is None:
        _alive.append(program)
    samples = hashlib.sha256()
    for name, tensor in program.inputs.items():
        samples.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        samples.update(tensor.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return (
        id(program) if model is None else _content(model),
        samples.hexdigest(),
        program.dynamic_batch,
        repr((program.streams, program.outputs, program.fixed, program.unpadded, program.constant)),
        None if schedule is None else schedule.model_dump_json(),
        repr(shapes),
        options.opset,
        options.target,
    )


def _kept_by(key: tuple[object, ...], convert: Callable[[], OnnxBuild]) -> OnnxBuild:
    """A copy, because passes change it; weights are shared, and passes put others in their place."""
    if key not in _kept:
        _kept[key] = convert()
    build = _kept[key]
    return OnnxBuild(build.model.clone(), list(build.outputs), list(build.decisions))


@pytest.fixture
def converted_once(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Not for tests that change what happens while a graph is reduced or converted."""
    through_transformers, through_torch = onnx._through_transformers, onnx._through_torch

    def of_transformers(program: Program, model: Any, schedule: Any, shapes: Any, options: OnnxOptions) -> OnnxBuild:
        key = _key(program, model, schedule, shapes, options)
        return _kept_by(key, lambda: through_transformers(program, model, schedule, shapes, options))

    def of_torch(program: Program, schedule: Any, shapes: Any, options: OnnxOptions) -> OnnxBuild:
        key = _key(program, None, schedule, shapes, options)
        return _kept_by(key, lambda: through_torch(program, schedule, shapes, options))

    monkeypatch.setattr(onnx, "_through_transformers", of_transformers)
    monkeypatch.setattr(onnx, "_through_torch", of_torch)
    yield
