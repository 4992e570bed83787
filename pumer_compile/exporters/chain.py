"""A captured graph, reduced or not, as what transformers' exporters convert.

`export(reduced)` exports `reduced.module`: a compile captures once and reduces once (twice for half precision, whose
graph has its dtype written into it). transformers' exporters trace a model, and then convert what they traced;
`GraphStep` takes the place of the trace and exports the graph that it is given, in their context: their patches of
torch's functions reach it (`torch_calls.py`), their repairs of the exported program, translations and fusions follow.
What they patch in the code of single models while they trace is not in it: the capture had to do without.
"""

from __future__ import annotations

import copy
from collections.abc import MutableMapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from transformers.exporters.exporter_dynamo import DynamoExporter

from ..analysis.outputs import artifact_outputs, outputs_apart, without_inputs
from ..artifacts.options import Precision
from ..capture.added import capture_with
from ..capture.capture import Program, batch_inputs
from ..capture.model_state import restoring_model_state, set_for_inference
from ..errors import UsageError
from ..reduce import Reduced, reduce_graph, with_decisions
from ..schedule import Schedule
from .masked_writes import lower_masked_writes
from .plain_forms import use_plain_forms
from .routers import lower_routers
from .slice_writes import lower_slice_writes
from .torch_calls import call_torch


@dataclass(frozen=True)
class Prepared:
    """A graph as converters take it.

    Attributes:
        module: takes `inputs` by keyword; returns a dictionary of the outputs, then of the decisions.
        inputs: sample inputs that the graph reads, in the order of the model's.
        dynamic_shapes: what `torch.export` is told of their sizes.
        outputs: names of the model's own outputs.
        decisions: names of the extra ones.
    """

    module: fx.GraphModule
    inputs: dict[str, Tensor]
    dynamic_shapes: dict[str, Any] | None
    outputs: list[str]
    decisions: list[str]

    def export(self) -> ExportedProgram:
        """The graph as `torch.export` has it, in the form that the converters take."""
        with restoring_model_state(self.module):
            set_for_inference(self.module)
            return torch.export.export(
                self.module, args=(), kwargs=self.inputs, dynamic_shapes=self.dynamic_shapes, strict=False
            )


def prepare(reduced: Reduced | Program) -> Prepared:
    """The graph of a reduced program, or of one that is exported as it is, for a converter; what is given stays as it
    was."""
    program = program_of(reduced)
    module = reduced.module
    names = artifact_outputs(module, program.inputs)
    twin, decisions = with_decisions(module, names)
    without_inputs(twin, program.fixed)
    outputs_apart(twin)
    use_plain_forms(twin)
    lower_routers(twin)
    lower_slice_writes(twin)
    lower_masked_writes(twin)
    call_torch(twin)
    read = {name: tensor for name, tensor in program.inputs.items() if name not in program.fixed}
    return Prepared(twin, read, dynamic_shapes(program), names, decisions)


def program_of(reduced: Reduced | Program) -> Program:
    """The captured program."""
    return reduced.program if isinstance(reduced, Reduced) else reduced


def schedule_of(reduced: Reduced | Program) -> Schedule | None:
    """What the program was reduced by; None where it is exported as it is."""
    return reduced.schedule if isinstance(reduced, Reduced) else None


class GraphStep(DynamoExporter):
    """The step of transformers' exporters that traces a model, for a graph that was captured before.

    The exporters are given a stand-in for the model (`convert`), which has its names and no weights.
    """

    prepared: Prepared

    def convert(self, prepared: Prepared, config: Any) -> Any:
        """What the exporter makes of a graph."""
        self.prepared = prepared
        names = _Names([*prepared.outputs, *prepared.decisions])
        if hasattr(DynamoExporter, "export_program"):
            return self.export_program(names, prepared.inputs, config)[0]
        converted: Any = self.export(names, prepared.inputs, config)  # transformers 5.17
        return converted.model

    def export_program(
        self, model: nn.Module, sample_inputs: MutableMapping[str, Any], config: Any
    ) -> tuple[ExportedProgram, Any]:
        """The graph, and what it takes and gives as metadata."""
        from transformers.exporters.metadata import build_export_metadata

        exported = self.export(model, sample_inputs, config)
        return exported, build_export_metadata(model, sample_inputs, exported, self.required_packages)

    def export(  # type: ignore[override]
        self, model: nn.Module, sample_inputs: MutableMapping[str, Any], config: Any
    ) -> ExportedProgram:
        """The same step under its name in older versions of transformers (5.17), without the metadata."""
        model.forward(**sample_inputs)  # where the exporters look for names
        return self.prepared.export()


class _Names(nn.Module):
    """Stands for a model where transformers' exporters look for the names of what it takes and gives."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self.names = names

    def forward(self, **inputs: Tensor) -> dict[str, Tensor]:
        return {name: torch.empty(0) for name in self.names}


def cast(reduced: Reduced | Program, dtype: Precision) -> Reduced | Program:
    """The same in another dtype: captured and reduced anew where it is not of this dtype already.

    Raises:
        UsageError: see `cast_program`.
    """
    if not isinstance(reduced, Reduced):
        return cast_program(reduced, dtype)
    program = cast_program(reduced.program, dtype)
    if program is reduced.program:
        return reduced
    return replace(reduced, program=program, module=reduce_graph(program, reduced.schedule))


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
    return capture_with(
        model,
        inputs,
        program.added,
        dynamic_batch=program.dynamic_batch,
        streams=program.streams,
        outputs=program.outputs,
        padding=not program.unpadded,
    )


def dynamic_shapes(program: Program) -> dict[str, Any] | None:
    """What `torch.export` is told of the sizes of inputs that the graph reads: the batch alone may be open."""
    if not program.dynamic_batch:
        return None
    batch = torch.export.Dim("batch")
    batched = batch_inputs(program.inputs)
    return {name: {0: batch} if name in batched else None for name in program.inputs if name not in program.fixed}
