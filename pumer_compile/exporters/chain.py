"""Our reduction as one step of transformers' export chain, for every format that is converted from a `torch.export`
program.

transformers traces the model again in its chain; `ReduceStep` captures what it traced, as the user's program was
captured, and hands the reduced program on.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.export import ExportedProgram
from transformers import PreTrainedModel
from transformers.exporters.exporter_dynamo import DynamoExporter

from ..analysis.outputs import artifact_outputs, outputs_apart, renames_outputs, without_inputs
from ..capture.capture import Program, batch_inputs, capture
from ..errors import UsageError
from ..reduce import reduce_graph, with_decisions
from ..schedule import Schedule
from .base import Precision
from .masked_writes import lower_masked_writes


class ReduceStep(DynamoExporter):
    """transformers' dynamo exporter, then our passes (none without a schedule)."""

    schedule: Schedule | None = None
    streams: Mapping[str, str] = {}
    outputs: Sequence[str] = ()
    padding: bool = True
    output_names: list[str]
    decision_names: list[str]

    def follow(self, program: Program, schedule: Schedule | None) -> None:
        """Capture as this program was captured, and reduce by this schedule."""
        self.schedule, self.streams = schedule, dict(program.streams)
        self.outputs, self.padding = tuple(program.outputs), not program.unpadded

    def export_program(
        self, model: PreTrainedModel, sample_inputs: MutableMapping[str, Any], config: Any
    ) -> tuple[ExportedProgram, Any]:
        given = dict(sample_inputs)  # the exporter puts numbers in place of some tensors
        with _plain_scatter() if self.schedule is not None else contextlib.nullcontext():
            exported, metadata = super().export_program(model, sample_inputs, config)
        return self._reduced(exported, sample_inputs, given, config), metadata

    def export(self, model: PreTrainedModel, sample_inputs: MutableMapping[str, Any], config: Any) -> Any:
        """The step of older exporters (transformers 5.17), where it gives the program; later ones come back here with a
        finished model."""
        given = dict(sample_inputs)
        with _plain_scatter() if self.schedule is not None else contextlib.nullcontext():
            exported = super().export(model, sample_inputs, config)
        if not isinstance(exported, ExportedProgram):
            return exported
        return self._reduced(exported, sample_inputs, given, config)

    def _reduced(
        self, exported: ExportedProgram, sample_inputs: MutableMapping[str, Any], given: dict[str, Any], config: Any
    ) -> ExportedProgram:
        self.output_names, self.decision_names = [], []
        if self.schedule is not None or self.outputs or not self.padding or renames_outputs(exported):
            program = capture(exported, given, streams=self.streams, outputs=self.outputs, padding=self.padding)
            for name in program.fixed:
                sample_inputs.pop(name)
            exported, self.output_names, self.decision_names = reduced_export(
                program, self.schedule, config.dynamic_shapes
            )
        return exported


@contextmanager
def _plain_scatter() -> Iterator[None]:
    """Trace `masked_scatter` as it is, which our prompt pass spells out, and not as the gather that transformers'
    ONNX exporter puts in its place."""
    with mock.patch.object(torch.Tensor, "masked_scatter", torch._C.TensorBase.masked_scatter):
        yield


def reduced_export(
    program: Program, schedule: Schedule | None, dynamic_shapes: dict[str, Any] | None
) -> tuple[ExportedProgram, list[str], list[str]]:
    """Reduce a program (None: not at all), and export it again with its decisions as extra outputs.

    Returns:
        The exported program, the names of its own outputs and those of the extra ones.
    """
    module = program.module if schedule is None else reduce_graph(program, schedule)
    names = artifact_outputs(module, program.inputs)
    twin, decisions = with_decisions(module, names)
    without_inputs(twin, program.fixed)
    outputs_apart(twin)
    lower_masked_writes(twin)
    read = {name: tensor for name, tensor in program.inputs.items() if name not in program.fixed}
    exported = torch.export.export(twin, args=(), kwargs=read, dynamic_shapes=dynamic_shapes, strict=False)
    return exported, names, decisions


def cast_program(program: Program, dtype: Precision) -> Program:
    """The program with weights and floating-point inputs in `dtype`; the user's model stays as it is.

    Raises:
        UsageError: the program has no model to convert (a torch.export archive).
    """
    wanted = getattr(torch, dtype)
    if all(p.dtype == wanted for p in program.module.parameters() if p.is_floating_point()):
        return program
    if program.model is None:
        raise UsageError(
            f"A torch.export archive cannot be converted to {dtype}: its graph has the dtype written into it. "
            "Compile from the checkpoint or export the archive from a converted model."
        )
    model = copy.deepcopy(program.model).to(wanted)
    inputs = {k: v.to(wanted) if v.is_floating_point() else v for k, v in program.inputs.items()}
    return capture(
        model,
        inputs,
        dynamic_batch=program.dynamic_batch,
        streams=program.streams,
        outputs=program.outputs,
        padding=not program.unpadded,
    )


def dynamic_shapes(program: Program) -> dict[str, Any] | None:
    """What `torch.export` is told of the inputs' sizes: the batch alone may be open."""
    if not program.dynamic_batch:
        return None
    batch = torch.export.Dim("batch")
    batched = batch_inputs(program.inputs)
    return {name: {0: batch} if name in batched else None for name in program.inputs}


def own_name(name: str, program: Program) -> str:
    """The model's name for an input, which transformers' exporters call `input.<name>` where an output has its name."""
    own = name.removeprefix("input.")
    return own if name not in program.inputs and own in program.inputs else name
