"""Inputs that a method adds to those of a model (`Method.adds`): the graph takes them, and the model does not."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from ..added_inputs import AddedInput
from ..analysis.nodes import copied, keep_parameters, values
from ..analysis.outputs import with_inputs
from ..errors import UsageError
from .capture import Program, batch_inputs, capture
from .loading import LoadedModel


def capture_with(
    model: nn.Module | ExportedProgram | LoadedModel,
    inputs: Mapping[str, Tensor],
    added: Mapping[str, AddedInput],
    **how: Any,
) -> Program:
    """`capture`, with inputs that a method adds.

    Args:
        model: see `capture`.
        inputs: of the model, and samples of the added ones, where there are any.
        added: by name.
        how: further arguments of `capture`.

    Raises:
        UsageError: see `capture` and `with_added_inputs`.
    """
    own = {name: tensor for name, tensor in inputs.items() if name not in added}
    given = {name: tensor for name, tensor in inputs.items() if name in added}
    return with_added_inputs(capture(model, own, **how), added, given)


def with_added_inputs(
    program: Program, added: Mapping[str, AddedInput], given: Mapping[str, Tensor] | None = None
) -> Program:
    """The program with inputs that its model does not take; it stays as it is.

    Args:
        program: captured.
        added: by name; those that it has already stay as they are.
        given: samples of them; others are made up.

    Raises:
        UsageError: a sample of another form, or of another batch.
    """
    added = {name: what for name, what in added.items() if name not in program.added}
    if not added:
        return program
    (first, *_) = batch_inputs(program.inputs)
    placeholders = {str(node.target): node for node in program.module.graph.find_nodes(op="placeholder")}
    like, batch = values(placeholders[first])[0], int(program.inputs[first].shape[0])
    floats = next((p.dtype for p in program.module.parameters() if p.is_floating_point()), torch.float32)
    samples, shown = {}, {}
    for name, what in added.items():
        sample = what.sample(batch) if name not in (given or {}) else (given or {})[name]
        if sample.shape[0] == 1 < batch and program.dynamic_batch:
            sample = sample.expand(batch, *sample.shape[1:])
        _check(name, what, sample, batch)
        samples[name] = sample.to(program.inputs[first].device, floats if what.ids is None else torch.int64)
        shown[name] = like.new_empty((like.shape[0], *sample.shape[1:]), dtype=samples[name].dtype)
    module = fx.GraphModule(program.module, copied(program.module.graph))
    keep_parameters(program.module, module)
    with_inputs(module, shown)
    return replace(program, module=module, inputs={**program.inputs, **samples}, added={**program.added, **added})


def _check(name: str, what: AddedInput, sample: Tensor, batch: int) -> None:
    numbers = what.ids is None
    sizes: Sequence[object] = [batch, *("any" for _ in what.shape[:-1]), what.shape[-1] if numbers else "any"]
    given = list(sample.shape)
    fits = len(given) == len(sizes) and all(want in ("any", size) for want, size in zip(sizes, given, strict=True))
    if not fits or sample.is_floating_point() != numbers:
        raise UsageError(
            f"The input {name} is {sample.dtype} {list(sample.shape)}; the schedule adds it to those of the model, as "
            f"{'numbers' if numbers else 'ids'} [{', '.join(map(str, sizes))}]."
        )
