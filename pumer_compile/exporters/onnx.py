"""ONNX: a captured graph through transformers' own exporter.

`GraphOnnxExporter` is transformers' `OnnxExporter` (patches, graph fixes, fusions for onnxruntime) with the captured,
reduced graph in place of the model that it would trace. The graphs of plain modules and of torch.export archives go
through `torch.export` and `torch.onnx` directly.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, Literal

import onnx
import onnx_ir
import torch
from onnx_ir.passes import common as ir_passes
from transformers import PreTrainedModel
from transformers.exporters.configs import OnnxConfig
from transformers.exporters.exporter_onnx import OnnxExporter

from ..artifacts.manifest import KEY, seal_onnx
from ..artifacts.options import DEFAULT_OPSET as DEFAULT_OPSET
from ..artifacts.options import MIN_OPSET as MIN_OPSET
from ..artifacts.options import OnnxOptions, Options
from ..artifacts.options import Target as Target
from ..artifacts.session import decision_session_of
from ..capture.capture import Program
from ..capture.loading import quiet
from ..errors import ExportError, UsageError
from ..files import content_name, sha256_file
from ..reduce import Reduced
from ..runtimes.ort import OnnxSession, check_provider
from .base import Evidence, Writer
from .chain import GraphStep, Prepared, cast, prepare, program_of, schedule_of
from .onnx_passes import run_onnx_passes
from .quantize import calibration_batches, check_environment, quantize_onnx
from .small_numbers import small_numbers_kept

log = logging.getLogger("pumer_compile")

_FUSIONS: dict[str, Literal["cpu", "cuda"]] = {"onnxruntime-cpu": "cpu", "onnxruntime-cuda": "cuda"}
# Protobuf cannot hold more in one file; the graph itself needs some room too.
INLINE_WEIGHTS_LIMIT = 1_900_000_000
_FORBIDDEN = ("Scatter", "NonZero", "Unique", "Compress", "TopK")


class GraphOnnxExporter(OnnxExporter, GraphStep):  # type: ignore[misc]  # one converts what the other exports
    """transformers' ONNX exporter for a graph that was captured before."""


@dataclass(frozen=True)
class OnnxBuild:
    """An ONNX model in memory.

    Attributes:
        model: with the decisions as extra outputs.
        outputs: the model's own outputs.
        decisions: the extra outputs.
    """

    model: onnx_ir.Model
    outputs: list[str]
    decisions: list[str]

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs."""
        return [str(value.name) for value in self.model.graph.inputs]

    def without_decisions(self) -> onnx_ir.Model:
        """A copy that gives the model's own outputs only; weights are shared.

        The decisions stay inside under their names, so that parity can read them (`OnnxSession(expose=...)`).
        """
        model = self.model.clone()
        keep = [value for value in model.graph.outputs if value.name in self.outputs]
        model.graph.outputs.clear()
        model.graph.outputs.extend(keep)
        return model


def build_onnx(reduced: Reduced | Program, options: OnnxOptions) -> OnnxBuild:
    """Convert the graph of a reduced program, or of a captured one as it is, to an ONNX model in memory.

    Args:
        reduced: from `reduce` or `capture`; captured and reduced anew only where it is of another dtype.
        options: see `OnnxOptions`.

    Raises:
        ExportError: conversion failed, or the graph has operators it must not have.
    """
    reduced = cast(reduced, options.dtype)
    program, schedule = program_of(reduced), schedule_of(reduced)
    calibration = () if options.calibration is None else calibration_batches(options.calibration, program)
    try:
        with torch_onnx():
            convert = _through_transformers if isinstance(program.model, PreTrainedModel) else _through_torch
            build = convert(prepare(reduced), options)
    except torch.onnx.OnnxExporterError as error:
        first = next((line for line in str(error).splitlines() if line.strip()), "no message")
        raise ExportError(f"torch.onnx could not convert the graph: {first.strip()}") from error
    has_reducers = schedule is not None and not schedule.exact
    build = finalize(build, reduced=has_reducers, passes=options.passes(schedule))
    if program.outputs:
        _drop_unread(build.model)
    if options.quantize_mode is not None:
        quantized = quantize_onnx(build.model, options.quantize_mode, program.inputs, calibration)
        build = OnnxBuild(quantized, build.outputs, build.decisions)
    return build


def _drop_unread(model: onnx_ir.Model) -> None:
    """Inputs that only left-out outputs need: the ids, where a vision tower alone is kept."""
    for value in list(model.graph.inputs):
        if not value.uses() and not value.is_graph_output():
            model.graph.inputs.remove(value)


def finalize(build: OnnxBuild, *, reduced: bool, passes: Sequence[str] = ()) -> OnnxBuild:
    """The build with names a reader understands, after its ONNX passes, in place.

    Args:
        build: fresh from the converter.
        reduced: whether it has reducers, and so must have no operator that decides otherwise in another runtime.
        passes: of `ONNX_PASSES`.

    Raises:
        ExportError: it has such an operator.
    """
    _scope_names(build.model)
    _name_batch(build.model)
    run_onnx_passes(build.model, passes)
    _drop_unused_weights(build.model)
    if reduced:
        _check_operators(build.model)
    return build


def _drop_unused_weights(model: onnx_ir.Model) -> None:
    """Constants that the converter folded into others and left behind; onnxruntime warns of each."""
    for name, value in list(model.graph.initializers.items()):
        if not value.uses() and not value.is_graph_output():
            del model.graph.initializers[name]


def _through_transformers(prepared: Prepared, options: OnnxOptions) -> OnnxBuild:
    exporter = GraphOnnxExporter()  # type: ignore[no-untyped-call]
    wanted: dict[str, Any] = {"dynamic_shapes": prepared.dynamic_shapes, "opset_version": options.opset}
    if options.target in _FUSIONS:
        wanted["ort_fusions"] = _FUSIONS[options.target]
    try:
        config = OnnxConfig(**wanted)
    except TypeError as error:
        raise UsageError(
            f"--target {options.target} needs transformers' fusions for onnxruntime, which this version lacks: install "
            "a newer transformers or leave --target out for portable ONNX."
        ) from error
    converted = exporter.convert(prepared, config)
    return named(converted, prepared.outputs, prepared.decisions)


def _through_torch(prepared: Prepared, options: OnnxOptions) -> OnnxBuild:
    if options.target in _FUSIONS:
        raise UsageError(
            f"--target {options.target} uses transformers' fusions, which need a transformers model; this one is a "
            "plain module or a torch.export archive. Leave --target out for portable ONNX."
        )
    converted = torch.onnx.export(
        prepared.export(), args=(), kwargs=prepared.inputs, opset_version=options.opset, dynamo=True, verbose=False
    )
    assert converted is not None
    return named(converted.model, prepared.outputs, prepared.decisions)


def named(model: onnx_ir.Model, outputs: list[str], decisions: list[str]) -> OnnxBuild:
    """A build of a converted model, whose outputs get these names."""
    for value, name in zip(model.graph.outputs, [*outputs, *decisions], strict=True):
        value.name = name
    return OnnxBuild(model, outputs, decisions)


def _scope_names(model: onnx_ir.Model) -> None:
    """Name nodes after the module they came from, so that reducers can be read in a viewer."""
    for index, node in enumerate(model.graph.all_nodes()):
        scopes = [s.strip(" '\"") for s in node.metadata_props.get("pkg.torch.onnx.name_scopes", "[]")[1:-1].split(",")]
        # torch names the scope of a node that belongs to no module after the hook that made it.
        path = next((s for s in reversed(scopes[:-1]) if s and not s.startswith("_empty_nn_module_stack")), "")
        node.name = f"{path}/{node.op_type}_{index}" if path else f"{node.op_type}_{index}"
    # What remains are stack traces: half the file of a small model, and paths of the machine that compiled it.
    ir_passes.ClearMetadataAndDocStringPass()(model)


def _name_batch(model: onnx_ir.Model) -> None:
    """Call the open batch `batch`, where torch.export has made up a name for it."""
    leading = [value.shape[0] for value in model.graph.inputs if value.shape]
    symbol = next((d.value for d in leading if isinstance(d, onnx_ir.SymbolicDim) and d.value), None)
    if symbol is None:
        return
    whole = re.compile(rf"\b{re.escape(symbol)}\b")
    values = [*model.graph.inputs, *(value for node in model.graph.all_nodes() for value in node.outputs)]
    for shape in [value.shape for value in values if value.shape is not None]:
        for axis, dim in enumerate(shape):
            if isinstance(dim, onnx_ir.SymbolicDim) and dim.value:
                shape[axis] = whole.sub("batch", dim.value)


def _check_operators(model: onnx_ir.Model) -> None:
    for node in model.graph.all_nodes():
        if node.op_type.startswith(_FORBIDDEN):
            raise ExportError(
                f"The ONNX graph has {node.op_type} (node {node.name}): a data-dependent shape, or an operator that "
                "differs between runtimes. It came from the model itself or from a rule; nothing was written."
            )


def save_onnx(model: onnx_ir.Model, path: Path) -> list[Path]:
    """Write a model, with its weights beside it where one file cannot hold them.

    Args:
        model: to write.
        path: of the graph; the weights file is named after it and their hash, so that an older graph never meets
            newer weights.

    Returns:
        The files written, the graph last.

    Raises:
        ExportError: the model is not valid ONNX (full check).
    """
    weights = [v.const_value for v in model.graph.initializers.values() if v.const_value is not None]
    bare, large = _without_weights(model)
    _check_valid(bare, large)
    if sum(weight.nbytes for weight in weights) <= INLINE_WEIGHTS_LIMIT:
        _write_inline(bare, large, path)
        return [path]
    digest = hashlib.sha256()
    for weight in weights:
        digest.update(weight.numpy().tobytes())
    beside = path.with_name(content_name(path, digest.hexdigest()))
    onnx_ir.save(model, str(path), external_data=beside.name)
    return [beside, path]


# Fields of ONNX's messages that hold others or bytes: number and wire type 2, as one byte.
_MODEL_GRAPH, _GRAPH_INITIALIZER, _TENSOR_RAW_DATA = (number << 3 | 2 for number in (7, 5, 9))
_LARGE = 2**16
"""Bytes of a weight that is written by itself."""


def _without_weights(model: onnx_ir.Model) -> tuple[onnx.ModelProto, dict[str, onnx_ir.TensorProtocol]]:
    """The model as a message without its large weights, and these by name."""
    bare, large = model.clone(), {}
    for name, value in list(bare.graph.initializers.items()):
        if value.const_value is None or value.const_value.dtype is onnx_ir.DataType.STRING:
            continue
        if value.const_value.nbytes > _LARGE:
            large[name] = value.const_value
            del bare.graph.initializers[name]
    return onnx_ir.to_proto(bare), large


def _check_valid(bare: onnx.ModelProto, large: Mapping[str, onnx_ir.TensorProtocol]) -> None:
    """ONNX's full check, to which the values of large weights are nothing: they stand as inputs."""
    checked = onnx.ModelProto()
    checked.CopyFrom(bare)
    given = {value.name for value in bare.graph.input}
    for name, weight in large.items():
        if name in given:  # a default that a caller may override
            continue
        kind = onnx.helper.make_tensor_value_info(name, int(weight.dtype), weight.shape.numpy())
        checked.graph.input.append(kind)
    try:
        onnx.checker.check_model(checked, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        said = " ".join(str(error).split())
        newer = " More operators take bfloat16 from opset 22 on (--opset 22)." if "bfloat16" in said else ""
        raise ExportError(f"The exported model is not valid ONNX: {said}{newer}") from error


def _write_inline(bare: onnx.ModelProto, large: Mapping[str, onnx_ir.TensorProtocol], path: Path) -> None:
    """One file with all weights, written one after the other: to serialize the whole takes three copies of them."""
    graph = bare.graph.SerializeToString()
    entries = []
    for name, weight in large.items():
        head = onnx.TensorProto(dims=weight.shape.numpy(), data_type=int(weight.dtype), name=name).SerializeToString()
        head += bytes([_TENSOR_RAW_DATA]) + _varint(weight.nbytes)
        entries.append(bytes([_GRAPH_INITIALIZER]) + _varint(len(head) + weight.nbytes) + head)
    size = len(graph) + sum(map(len, entries)) + sum(weight.nbytes for weight in large.values())
    rest = onnx.ModelProto()
    rest.CopyFrom(bare)
    rest.ClearField("graph")
    with path.open("wb") as file:
        file.write(rest.SerializeToString() + bytes([_MODEL_GRAPH]) + _varint(size) + graph)
        for entry, weight in zip(entries, large.values(), strict=True):
            file.write(entry)
            file.write(weight.tobytes())


def _varint(number: int) -> bytes:
    """A number as protobuf writes lengths: seven bits a byte, the lowest first."""
    found = bytearray()
    while number > 127:
        found.append(number & 127 | 128)
        number >>= 7
    return bytes([*found, number])


def append_metadata(path: Path, metadata: Mapping[str, str]) -> None:
    """Add properties to a written ONNX file without reading it: protobuf messages merge when concatenated."""
    message = onnx.ModelProto()
    for key, value in metadata.items():
        message.metadata_props.add(key=key, value=value)
    with path.open("ab") as file:
        file.write(message.SerializeToString())


@contextmanager
def torch_onnx() -> Iterator[None]:
    """torch.onnx prints its progress and its libraries warn about their own; errors still raise. Small numbers stay
    (`small_numbers.py`)."""
    names = ("torch.onnx", "torch.onnx._internal.exporter._registration", "onnxscript", "onnx_ir")
    loggers = [logging.getLogger(name) for name in names]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with quiet(), small_numbers_kept(), contextlib.redirect_stdout(io.StringIO()) as printed:
            yield
        log.debug("torch.onnx: %s", printed.getvalue())
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


class OnnxWriter(Writer[OnnxOptions, OnnxBuild]):
    """Writes ONNX models, proved under onnxruntime on the CPU."""

    options_class: ClassVar[type[Options]] = OnnxOptions

    def check(self, *, dynamic_batch: bool, verify: bool) -> None:
        """Refuse a proof that nothing here can give: onnxruntime's CPU provider does not run bfloat16."""
        super().check(dynamic_batch=dynamic_batch, verify=verify)
        if verify:
            check_provider()
        if verify and self.options.dtype == "bfloat16":
            raise UsageError(
                "A bfloat16 artifact cannot be proved here: onnxruntime's CPU provider does not run it. Choose "
                "float16 or float32, or publish it without a proof (--no-verify; the manifest says so)."
            )
        if self.options.quantize_mode is not None:
            check_environment(self.options.quantize_mode, self.options.calibration)

    def build(self, reduced: Reduced | Program) -> OnnxBuild:
        """See `build_onnx`."""
        return build_onnx(reduced, self.options)

    def save(self, build: OnnxBuild, path: Path, *, with_decisions: bool) -> list[Path]:
        """See `save_onnx`."""
        return save_onnx(build.model if with_decisions else build.without_decisions(), path)

    def evidence(self, build: OnnxBuild, files: Sequence[Path]) -> Evidence:
        """The artifact under onnxruntime, twice where it does not give its decisions."""
        session = OnnxSession(files[-1])
        return Evidence(session, partial(OnnxSession, files[-1]), decision_session_of(session, build.decisions))

    def record(self, manifest: Mapping[str, Any], files: Sequence[Path]) -> None:
        """Into the model's metadata, with a hash of the whole behind it."""
        append_metadata(files[-1], {KEY: json.dumps(manifest, sort_keys=True)})
        seal_onnx(files[-1], {file.name: file for file in files[:-1]})

    def describe(self, build: OnnxBuild) -> dict[str, Any]:
        """With the hash of the calibration samples, in place of their path, and that the file ends with a seal."""
        samples = self.options.calibration
        digest = None if samples is None else sha256_file(samples)
        return {**super().describe(build), "calibration_sha256": digest, "sealed": True}
