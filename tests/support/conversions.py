"""Conversions to ONNX and OpenVINO that are done once, for tests that are about what comes before or after them.

What is kept is what the converters of PyTorch and transformers make of one model, one schedule and one sample. Options,
loading and the plan before it, and our ONNX passes, quantization, writing and proof after it, run every time.
"""

from __future__ import annotations

import hashlib
import types
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

from pumer_compile import Program, Reduced, Schedule
from pumer_compile.exporters import onnx, openvino
from pumer_compile.exporters.chain import Prepared, program_of, schedule_of
from pumer_compile.exporters.onnx import OnnxBuild, OnnxOptions

_kept: dict[tuple[object, ...], OnnxBuild] = {}
_kept_openvino: dict[tuple[object, ...], Any] = {}
_alive: list[Program] = []
"""Programs that are known by their identity, which must not be given to others."""


def _content(model: nn.Module) -> str:
    digest = hashlib.sha256(f"{type(model)} {model.config.to_json_string(use_diff=False)}".encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _key(
    program: Program, model: nn.Module | None, schedule: Schedule | None, shapes: Any, *options: object
) -> tuple[object, ...]:
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
        *options,
    )


def _kept_by(key: tuple[object, ...], convert: Callable[[], OnnxBuild]) -> OnnxBuild:
    """A copy, because passes change it; weights are shared, and passes put others in their place."""
    if key not in _kept:
        _kept[key] = convert()
    build = _kept[key]
    return OnnxBuild(build.model.clone(), list(build.outputs), list(build.decisions))


@pytest.fixture
def converted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for tests that change what happens while a graph is reduced or converted."""
    through_transformers, through_torch = onnx._through_transformers, onnx._through_torch
    key = _keys(monkeypatch, onnx)

    def of_transformers(prepared: Prepared, options: OnnxOptions) -> OnnxBuild:
        made = key(prepared, options.opset, options.target, by_content=True)
        return _kept_by(made, lambda: through_transformers(prepared, options))

    def of_torch(prepared: Prepared, options: OnnxOptions) -> OnnxBuild:
        made = key(prepared, options.opset, options.target, by_content=False)
        return _kept_by(made, lambda: through_torch(prepared, options))

    monkeypatch.setattr(onnx, "_through_transformers", of_transformers)
    monkeypatch.setattr(onnx, "_through_torch", of_torch)


@pytest.fixture
def openvino_converted_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """The same for OpenVINO, whose conversion has no options; what is kept is cloned, for it is named and shaped."""
    key = _keys(monkeypatch, openvino)

    def once(name: str, by_content: bool) -> None:
        convert = getattr(openvino, name)

        def kept(prepared: Prepared) -> Any:
            made = key(prepared, by_content=by_content)
            if made not in _kept_openvino:
                _kept_openvino[made] = convert(prepared)
            return _kept_openvino[made].clone()

        monkeypatch.setattr(openvino, name, kept)

    once("_through_transformers", True)
    once("_through_openvino", False)


def _keys(monkeypatch: pytest.MonkeyPatch, exporter: types.ModuleType) -> Callable[..., tuple[object, ...]]:
    """What tells the conversions of an exporter apart; the program and the schedule are those last prepared by it."""
    prepare = exporter.prepare
    prepared_of: list[Reduced | Program] = []

    def noted(reduced: Reduced | Program) -> Prepared:
        prepared_of.append(reduced)
        return prepare(reduced)

    def key(prepared: Prepared, *options: object, by_content: bool) -> tuple[object, ...]:
        program, schedule = program_of(prepared_of[-1]), schedule_of(prepared_of[-1])
        return _key(program, program.model if by_content else None, schedule, prepared.dynamic_shapes, *options)

    monkeypatch.setattr(exporter, "prepare", noted)
    return key
