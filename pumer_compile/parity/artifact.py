"""Parity: prove an artifact against eager PyTorch, decisions first, then outputs.

A reducer's choice flips when two scores are nearly equal, and a flipped choice changes the outputs far more than
rounding does. So the choices are compared first (a differing one is allowed only where the eager scores are nearly
tied), then the outputs with the eager model made to follow the artifact's choices, then end to end on the samples
whose choices agree.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from torch.export import ExportedProgram

from ..artifacts.engine import Engine
from ..artifacts.manifest import read_manifest
from ..artifacts.profile import Profile
from ..artifacts.session import comparable_decisions, decision_model_of
from ..capture.capture import Program, capture
from ..capture.loading import LoadedModel, load_model
from ..capture.samples import Kinds, Samples, captured_batch, describe_samples, kinds_of, proof_batches, proof_sizes
from ..capture.weights import check_model
from ..exporters.chain import cast_program
from ..guards import check_prompts, without_constants
from ..plan import PromptPlace
from ..reduce import reduce
from ..schedule import Schedule
from .check import check, check_tolerances
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
) -> ParityReport:
    """Compare an artifact, under the runtime of its format, with the reduced model in eager PyTorch.

    Args:
        artifact: made by pumer-compile; its manifest says which schedule it was reduced by.
        model: the model it was compiled from, or its file.
        samples: inputs by name, one batch or several; None makes random batches with padding.
        atol, rtol: tolerances, for all outputs or by output name; defaults follow the artifact's dtype.
        provider: onnxruntime's execution provider (`cpu`, `cuda`, `tensorrt`), for ONNX.
        save_inputs, save_outputs: write what the artifact was given and gave in Polygraphy's format, failed or not.

    Returns:
        The report; `report.passed` is the verdict.

    Raises:
        UsageError: not an artifact of pumer-compile, inputs that do not fit it, or this machine cannot run it.
    """
    path = Path(artifact)
    manifest = read_manifest(path)
    loaded = load_model(Path(model)) if isinstance(model, str | os.PathLike) else model
    check_recording(manifest, save_inputs, save_outputs)
    given = [samples] if isinstance(samples, Mapping) else samples
    batches, drawn = _batches(given, manifest)
    for batch in batches:
        check_prompts(manifest, batch)
    batches = [without_constants(manifest, batch) for batch in batches]
    check_model(manifest, loaded)
    engine = Engine(path, provider=provider)
    program = _recaptured(loaded, batches[0], manifest)
    check_model(manifest, program)
    if given is None and "samples" not in manifest:  # an older artifact: now the graph tells more of its inputs
        drawn = Samples(describe_samples(program, _prompts(manifest)), _prompts(manifest))
        batches = proof_batches(drawn, _sizes(manifest, drawn.kinds))
    exact = cast_program(program, "float32") if program.model is not None else program
    schedule = Schedule.from_manifest(manifest["schedule"]) if manifest["schedule"] else None
    # What is exact is judged against the model itself.
    reducing = schedule is not None and not schedule.exact
    eager = reduce(exact, schedule).module if schedule is not None and reducing else exact.module
    recorder = Recorder(engine, manifest) if save_inputs or save_outputs else None
    decisions = comparable_decisions(engine.session, manifest)
    report = check(
        recorder or engine,
        eager,
        exact.module,
        batches,
        manifest.get("quantize") or manifest["dtype"],
        decisions,
        decide=decision_model_of(engine.session, decisions),
        reopen=partial(Engine, path, provider=provider),
        more=drawn or (),
        model=exact.model,
        atol=atol,
        rtol=rtol,
    )
    if recorder is not None:
        recorder.save(save_inputs, save_outputs)
    if drawn is not None:
        report.notes += drawn.notes()
    if manifest["decisions"] and not decisions:
        report.notes.append(
            f"decisions of {path.suffix} can be compared where it was compiled --with-decisions; here a near-tie that "
            "went the other way counts as an error of the outputs"
        )
    if manifest["checkpoint_sha256"] and program.checkpoint_sha256 not in (
        None,
        manifest["checkpoint_sha256"],
    ):
        report.notes.append("the artifact was compiled from another checkpoint (its hash differs)")
    return report


def _recaptured(
    model: nn.Module | ExportedProgram | LoadedModel, inputs: Mapping[str, Tensor], manifest: Mapping[str, Any]
) -> Program:
    """The model captured as the artifact was."""
    return capture(
        model,
        inputs,
        dynamic_batch=bool(manifest["dynamic_batch"]),
        streams=manifest["streams"],
        outputs=manifest.get("kept_outputs"),
        padding=not manifest.get("unpadded_inputs"),
    )


def _batches(
    samples: Sequence[Mapping[str, Tensor]] | None, manifest: Mapping[str, Any]
) -> tuple[list[dict[str, Tensor]], Samples | None]:
    """The batches to compare on, and what draws more of them where they are made up."""
    if samples is not None:
        return [dict(sample) for sample in samples], None
    drawn = Samples(kinds_of(manifest), _prompts(manifest))
    return proof_batches(drawn, _sizes(manifest, drawn.kinds)), drawn


def _prompts(manifest: Mapping[str, Any]) -> list[PromptPlace]:
    return [PromptPlace(**place) for place in (manifest.get("plan") or {}).get("prompts", ())]


def _sizes(manifest: Mapping[str, Any], kinds: Kinds) -> list[int]:
    profiles = [Profile.parse(text) for text in manifest.get("profiles") or ()]
    return proof_sizes(captured_batch(kinds), bool(manifest["dynamic_batch"]), profiles)[0]
