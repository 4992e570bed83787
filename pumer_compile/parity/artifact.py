"""Parity: prove an artifact against eager PyTorch, decisions first, then outputs.

A reducer's choice flips when two scores are nearly equal, and a flipped choice changes the outputs far more than
rounding does. So the choices are compared first (a differing one is allowed only where the eager scores are nearly
tied), then the outputs with the eager model made to follow the artifact's choices, then end to end on the samples
whose choices agree.
"""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from ..added_inputs import AddedInput
from ..artifacts.engine import Engine
from ..artifacts.manifest import read_manifest
from ..artifacts.profile import Profile
from ..artifacts.session import Exposing, comparable_decisions, decision_session_of, open_session, open_with_decisions
from ..capture.added import capture_with
from ..capture.capture import Program
from ..capture.image_size import fit_images
from ..capture.loading import LoadedModel, load_model
from ..capture.samples import Kinds, Samples, captured_batch, describe_samples, kinds_of, proof_batches, proof_sizes
from ..capture.weights import check_model
from ..errors import UsageError
from ..exporters.chain import cast_program
from ..guards import check_prompts, without_constants
from ..plan import PromptPlace
from ..reduce import reduce
from ..schedule import Schedule
from .check import check, check_tolerances, decisions_by_reducer
from .inside import FirstDifference, inner_values
from .inside import first_difference as first_difference_of
from .noise import Coarse, coarse_of
from .replay import Recorder, check_recording
from .report import ParityReport

__all__ = ["check", "check_tolerances", "parity"]


def parity(
    artifact: str | os.PathLike[str],
    model: nn.Module | ExportedProgram | LoadedModel | str | os.PathLike[str],
    samples: Sequence[Mapping[str, Tensor]] | Mapping[str, Tensor] | None = None,
    *,
    atol: float | Mapping[str, float] | None = None,
    rtol: float | Mapping[str, float] | None = None,
    provider: str | None = None,
    save_inputs: Path | None = None,
    save_outputs: Path | None = None,
    first_difference: bool = False,
) -> ParityReport:
    """Compare an artifact, under the runtime of its format, with the reduced model in eager PyTorch.

    Args:
        artifact: made by pumer-compile; its manifest says which schedule it was reduced by.
        model: the model it was compiled from, or its file.
        samples: inputs by name, one batch or several; None makes random batches with padding.
        atol: absolute tolerance, for all outputs or by output name; None follows the artifact's dtype.
        rtol: relative tolerance, in the same way.
        provider: onnxruntime's execution provider (`cpu`, `cuda`, `tensorrt`), for ONNX.
        save_inputs: JSON file for what the artifact was given, in Polygraphy's format, failed or not.
        save_outputs: JSON file for what it gave, in the same format.
        first_difference: look inside the artifact too, on the first batch, and say which value of eager PyTorch is the
            first that it does not have (`report.first_difference`); ONNX alone shows inner values.

    Returns:
        The report; `report.passed` is the verdict.

    Raises:
        UsageError: not an artifact of pumer-compile, one of a schedule that means something else today, a tolerance for
            an output that it lacks, inputs that do not fit it, or this machine cannot run it.
    """
    path, manifest = Path(artifact), read_manifest(Path(artifact))
    _check_revision(path, manifest)
    check_tolerances([name for name in manifest["outputs"] if name not in manifest["decisions"]], atol, rtol)
    loaded = load_model(Path(model)) if isinstance(model, str | os.PathLike) else model
    check_recording(manifest, save_inputs, save_outputs)
    batches, drawn = _batches(samples, manifest)
    check_model(manifest, loaded)
    fit_images(loaded.source if isinstance(loaded, LoadedModel) else loaded, batches[0])
    engine = _opened(path, provider, first_difference)
    check_model(manifest, program := recaptured(loaded, batches[0], manifest))
    if samples is None and "samples" not in manifest:  # an older artifact: now the graph tells more of its inputs
        batches, drawn = _batches_of_older(program, manifest)
    exact = cast_program(program, "float32") if program.model is not None else program
    eager = _reduced(exact, manifest)
    recorder = Recorder(engine, manifest) if save_inputs or save_outputs else None
    decisions = comparable_decisions(engine.session, manifest)
    how: dict[str, Any] = {"more": drawn or (), "model": exact.model, "added": tuple(program.added)}
    how |= {"reopen": partial(Engine, path, provider=provider), "coarse": _coarse(program, eager, manifest)}
    how |= {"open_with_decisions": decision_session_of(engine.session, decisions), "atol": atol, "rtol": rtol}
    dtype = manifest.get("quantize") or manifest["dtype"]
    report = check(recorder or engine, eager, exact.module, batches, dtype, decisions, **how)
    if first_difference:
        report.first_difference = str(_first_difference(path, manifest, provider, eager, batches[0]))
    if recorder is not None:
        recorder.save(save_inputs, save_outputs)
    report.notes += [*(drawn.notes() if drawn is not None else ()), *_notes(path, manifest, program, decisions)]
    return report


def _opened(path: Path, provider: str | None, inside: bool) -> Engine:
    """The artifact, ready to run; refused where inner values are asked for, and it shows none."""
    engine = Engine(path, provider=provider)
    if inside and not isinstance(engine.session, Exposing):
        raise UsageError(
            f"{path} shows no inner values, so --first-difference cannot look at them; ONNX artifacts do. Compile the "
            "same model and schedule to .onnx, and look there."
        )
    return engine


def _batches_of_older(program: Program, manifest: Mapping[str, Any]) -> tuple[list[dict[str, Tensor]], Samples]:
    """Of an artifact whose manifest does not describe its samples: now the graph tells more of its inputs."""
    drawn = Samples(describe_samples(program, _prompts(manifest)), _prompts(manifest))
    return proof_batches(drawn, _sizes(manifest, drawn.kinds)), drawn


def added_by(manifest: Mapping[str, Any]) -> Mapping[str, AddedInput]:
    """Inputs that the schedule of an artifact adds to those of its model."""
    return Schedule.from_manifest(manifest["schedule"]).adds if manifest["schedule"] else {}


def _check_revision(path: Path, manifest: Mapping[str, Any]) -> None:
    """Refuse to judge an artifact by what its schedule has come to mean since.

    Raises:
        UsageError: it means something else today.
    """
    if not manifest["schedule"]:
        return
    schedule, made_with = Schedule.from_manifest(manifest["schedule"]), manifest.get("schedule_revision", 1)
    if made_with != schedule.revision:
        raise UsageError(
            f"{path} was compiled when {schedule.described} meant something else (schedule_revision {made_with} in its "
            f"manifest, absent counts as 1; this version computes {schedule.revision}). It still runs, and computes "
            "what it was proved to compute then, but this version has no such model to compare it with. Compile it "
            "again, or run parity with the version that made it."
        )


def _reduced(program: Program, manifest: Mapping[str, Any]) -> fx.GraphModule:
    """What an artifact is judged by: the program reduced as it was; what is exact, by the model itself."""
    schedule = Schedule.from_manifest(manifest["schedule"]) if manifest["schedule"] else None
    return program.module if schedule is None or schedule.exact else reduce(program, schedule).module


def _first_difference(
    path: Path, manifest: Mapping[str, Any], provider: str | None, eager: fx.GraphModule, batch: Mapping[str, Tensor]
) -> FirstDifference:
    """Where the artifact parts from the reduced module, made to follow its decisions; see `inside`."""
    session = open_session(path, manifest, provider=provider)
    assert isinstance(session, Exposing)
    fed = {name: batch[name] for name in session.inputs}
    decisions = [str(name) for name in manifest["decisions"]]
    shown = open_with_decisions(session, decisions)
    given = shown.run(fed)
    chosen = decisions_by_reducer(eager, {name: given[name] for name in decisions}) if decisions else {}
    names, outputs = session.inner_values(), [given[name] for name in session.outputs if name in given]
    values = itertools.chain((value for value in outputs if value.dtype.kind == "f"), inner_values(session, names, fed))
    return first_difference_of(eager, batch, chosen, values, manifest.get("quantize") or manifest["dtype"])


def _coarse(program: Program, eager: fx.GraphModule, manifest: Mapping[str, Any]) -> Coarse | None:
    """The reduced module in the artifact's precision; see `noise`."""
    schedule = Schedule.from_manifest(manifest["schedule"]) if manifest["schedule"] else None
    how = manifest.get("quantize") or manifest["dtype"]
    return coarse_of(program, schedule, eager, how, manifest.get("quantize_mode"))


def _notes(path: Path, manifest: Mapping[str, Any], program: Program, decisions: Sequence[str]) -> Iterator[str]:
    """What a reader of the report should know of an artifact."""
    if manifest["decisions"] and not decisions:
        yield (
            f"decisions of {path.suffix} can be compared where it was compiled --with-decisions; here a near-tie that "
            "went the other way counts as an error of the outputs"
        )
    compiled_from = manifest["checkpoint_sha256"]
    if compiled_from and program.checkpoint_sha256 not in (None, compiled_from):
        yield "the artifact was compiled from another checkpoint (its hash differs)"


def recaptured(
    model: nn.Module | ExportedProgram | LoadedModel, inputs: Mapping[str, Tensor], manifest: Mapping[str, Any]
) -> Program:
    """The model captured as the artifact was."""
    return capture_with(
        model,
        inputs,
        added_by(manifest),
        dynamic_batch=bool(manifest["dynamic_batch"]),
        streams=manifest["streams"],
        outputs=manifest.get("kept_outputs"),
        padding=not manifest.get("unpadded_inputs"),
    )


def _batches(
    samples: Sequence[Mapping[str, Tensor]] | Mapping[str, Tensor] | None, manifest: Mapping[str, Any]
) -> tuple[list[dict[str, Tensor]], Samples | None]:
    """The batches to compare on, and what draws more of them where they are made up.

    Raises:
        UsageError: images stand elsewhere in a prompt than in the artifact's.
    """
    drawn = None
    if samples is None:
        drawn = Samples(kinds_of(manifest), _prompts(manifest))
        samples = proof_batches(drawn, _sizes(manifest, drawn.kinds))
    samples = [samples] if isinstance(samples, Mapping) else samples
    for sample in samples:
        check_prompts(manifest, sample)
    return [without_constants(manifest, sample) for sample in samples], drawn


def _prompts(manifest: Mapping[str, Any]) -> list[PromptPlace]:
    return [PromptPlace(**place) for place in (manifest.get("plan") or {}).get("prompts", ())]


def _sizes(manifest: Mapping[str, Any], kinds: Kinds) -> list[int]:
    profiles = [Profile.parse(text) for text in manifest.get("profiles") or ()]
    return proof_sizes(captured_batch(kinds), bool(manifest["dynamic_batch"]), profiles)[0]
