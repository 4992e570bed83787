"""What an artifact says of itself: how it was made, from what, and whether it was proved."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from ..artifacts.manifest import FORMAT, library_versions
from ..capture.capture import Program
from ..capture.samples import describe_samples
from ..capture.weights import read_weights
from ..plan import Plan
from ..schedule import Schedule


def make_manifest(
    program: Program,
    schedule: Schedule | None,
    plan: Plan | None,
    *,
    inputs: list[str],
    outputs: list[str],
    decisions: list[str],
    options: Mapping[str, Any],
    parity: Mapping[str, Any],
) -> dict[str, Any]:
    """Everything needed to reproduce and to check an artifact.

    Args:
        program: captured.
        schedule: None where nothing is reduced.
        plan: its plan.
        inputs, outputs, decisions: names in the artifact; decisions are outputs too, or inner values.
        options: opset, dtype, target.
        parity: the report, or `{"verified": false}`.
    """
    return {
        "format": FORMAT,
        "schedule": schedule.model_dump(mode="json", exclude_none=True) if schedule else None,
        "schedule_sha256": schedule.sha256 if schedule else None,
        "schedule_revision": schedule.revision if schedule else None,
        "tokens": plan.tokens() if plan else None,
        "plan": plan.to_dict() if plan else None,
        "checkpoint_sha256": program.checkpoint_sha256,
        "weights": read_weights(program.module),
        "inputs": {
            name: {"shape": list(tensor.shape), "dtype": _dtype(tensor, options)}
            for name, tensor in ((name, program.inputs[name]) for name in inputs)
        },
        "unread_inputs": {
            name: {"shape": list(tensor.shape), "dtype": _dtype(tensor, options)}
            for name, tensor in program.inputs.items()
            if name not in inputs
        },
        "fixed_inputs": {n: program.inputs[n].tolist() for n in program.fixed if n not in program.unpadded},
        "unpadded_inputs": list(program.unpadded),
        "counted_masks": list(program.counted),
        "guards": [guard.to_dict() for guard in program.guards],
        "samples": {n: kind.to_dict() for n, kind in describe_samples(program, plan.prompts if plan else ()).items()},
        "constant_inputs": dict(program.constant),
        "outputs": outputs,
        "decisions": decisions,
        "dynamic_batch": program.dynamic_batch,
        "streams": program.streams,
        "kept_outputs": list(program.outputs),
        **options,
        "versions": library_versions(),
        "parity": dict(parity),
    }


def _dtype(tensor: Tensor, options: Mapping[str, Any]) -> str:
    """What the artifact takes: floating-point inputs follow its own dtype, where it does not say otherwise."""
    return (
        str(options.get("input_dtype", options["dtype"]))
        if tensor.is_floating_point()
        else str(tensor.dtype).removeprefix("torch.")
    )
