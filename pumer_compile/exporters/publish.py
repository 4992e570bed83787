"""`export`: write an artifact, prove it, and publish it only then."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..analysis.outputs import artifact_outputs
from ..artifacts.engine import Engine
from ..artifacts.formats import FORMATS, find_format, suffixes
from ..artifacts.manifest import sidecar
from ..artifacts.options import Options
from ..artifacts.profile import Profile
from ..capture.capture import Program
from ..capture.samples import Samples, captured_batch, describe_samples, proof_batches, proof_sizes, resized_batch
from ..errors import ParityError, UsageError
from ..files import publish, sha256_file
from ..guards import check_prompts, without_constants
from ..parity.check import check, check_tolerances
from ..parity.noise import coarse_of
from ..parity.report import ParityReport
from ..plan import PromptPlace
from ..reduce import Reduced
from .base import Writer
from .chain import cast, program_of
from .manifest import make_manifest


@dataclass(frozen=True)
class Exported:
    """A published artifact.

    Attributes:
        path: of the artifact.
        manifest_path: of its manifest.
        manifest: what it says.
        report: of its parity check; None with `verify=False`.
    """

    path: Path
    manifest_path: Path
    manifest: dict[str, Any]
    report: ParityReport | None

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON holds it; the proof is in the manifest (`parity`)."""
        return {"path": str(self.path), "manifest_path": str(self.manifest_path), "manifest": self.manifest}


def export(
    reduced: Reduced | Program,
    path: str | os.PathLike[str],
    *,
    options: Options | None = None,
    with_decisions: bool = False,
    verify: bool = True,
    samples: Sequence[Mapping[str, Tensor]] | None = None,
    atol: float | Mapping[str, float] | None = None,
    rtol: float | Mapping[str, float] | None = None,
    progress: Callable[[str], None] = lambda text: None,
) -> Exported:
    """Write an artifact; the suffix of `path` picks the exporter.

    Everything is written under temporary names beside `path` and renamed when it is complete and proved: a failed or
    killed run leaves the old artifact as it was. (The manifest is renamed first; a kill between the two renames leaves
    an old artifact that is no longer the one described, and refused.)

    Args:
        reduced: from `reduce`, whose module is exported, or a captured program. Captured and reduced anew only where
            `options` ask for another dtype.
        path: of the artifact.
        options: of the exporter that the suffix picks.
        with_decisions: keep every reducer's decisions as extra outputs.
        verify: prove the artifact before publishing it.
        samples: batches for the proof besides the captured inputs; None makes random ones where it can.
        atol: absolute tolerance of the proof, for all outputs or by output; None follows the dtype.
        rtol: relative tolerance, in the same way.
        progress: told what is going on.

    Returns:
        Its path, its manifest, and the report of its proof.

    Raises:
        UsageError: an unknown suffix, a path that cannot be written, a tolerance for an unknown output, or something
            that this machine lacks; before any long work.
        ExportError: conversion failed.
        ParityError: the proof failed; the artifact is kept as `<path>.failed`.
    """
    path = Path(path)
    writer = _writer(path, options, progress)
    writer.check_path(path)
    program = program_of(reduced)
    writer.check(dynamic_batch=program.dynamic_batch, verify=verify)
    check_tolerances(artifact_outputs(reduced.module, program.inputs), atol, rtol)
    progress("converting")
    build = writer.build(reduced)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        files = writer.save(build, Path(folder) / path.name, with_decisions=with_decisions)
        report = None
        if verify:
            progress("proving")
            unproved = _manifest(writer, build, program, reduced, {"verified": False})
            report = _prove(writer, build, files, reduced, unproved, samples, atol, rtol)
        manifest = _manifest(writer, build, program, reduced, report.to_dict() if report else {"verified": False})
        writer.record(manifest, files)
        if report is not None and not report.passed:
            raise _refused(writer, path, files, report)
        beside = _publish(writer, path, files, manifest)
    return Exported(path, beside, manifest, report)


def _refused(writer: Writer[Any, Any], path: Path, files: Sequence[Path], report: ParityReport) -> ParityError:
    """The error of a failed proof; what was written is kept as `<path>.failed`."""
    failed = path.with_name(f"{path.name}.failed")
    publish([(f, failed if f == files[-1] else writer.companion(f, failed)) for f in files])
    advice = "raise --atol/--rtol only if the difference is acceptable for your task"
    return ParityError(
        f"Parity failed, so {path} was not written: {report.failures()}. The artifact is kept as {failed} for "
        f"inspection; {advice if report.only_too_far else 'no tolerance would let it pass'}.",
        report,
    )


def _publish(writer: Writer[Any, Any], path: Path, files: Sequence[Path], manifest: Mapping[str, Any]) -> Path:
    """Rename files, of which the artifact is the last, to their own names, the manifest beside them; gives its path."""
    beside = sidecar(path)
    companions = [(f, writer.companion(f, path)) for f in files[:-1]]
    described = {"artifact": path.name, "sha256": sha256_file(files[-1]), **manifest}
    if companions:
        described["companions"] = {final.name: sha256_file(f) for f, final in companions}
    written = files[-1].parent / "manifest.json"
    written.write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    # The artifact comes last: until then the old one stands, unless it would read the new companions.
    changed = any(final.exists() and sha256_file(final) != sha256_file(f) for f, final in companions)
    publish([*companions, (written, beside), (files[-1], path)], retire=path if changed else None)
    return beside


def _manifest(
    writer: Writer[Any, Any], build: Any, program: Program, reduced: Reduced | Program, parity: Mapping[str, Any]
) -> dict[str, Any]:
    schedule, plan = (reduced.schedule, reduced.plan) if isinstance(reduced, Reduced) else (None, None)
    return make_manifest(
        program,
        schedule,
        plan,
        inputs=build.inputs,
        outputs=build.outputs,
        decisions=build.decisions,
        options=writer.describe(build),
        parity=parity,
    )


def _prove(
    writer: Writer[Any, Any],
    build: Any,
    files: Sequence[Path],
    reduced: Reduced | Program,
    manifest: Mapping[str, Any],
    samples: Sequence[Mapping[str, Tensor]] | None,
    atol: float | Mapping[str, float] | None,
    rtol: float | Mapping[str, float] | None,
) -> ParityReport:
    """Compare what was written with eager PyTorch, through the door that users take."""
    evidence = writer.evidence(build, files)
    eager, unreduced, model = _eager(reduced)
    program = program_of(reduced)
    prompts = reduced.plan.prompts if isinstance(reduced, Reduced) else ()
    if samples is not None:
        for sample in samples:
            check_prompts(manifest, sample)
        samples = [without_constants(manifest, sample) for sample in samples]
    batches, drawn, clipped = _proof_batches(program, samples, writer.options.profiles, prompts)
    report = check(
        Engine.over(evidence.session, manifest),
        eager,
        unreduced,
        batches,
        writer.options.tolerance,
        build.decisions,
        open_with_decisions=evidence.open_with_decisions,
        reopen=lambda: Engine.over(evidence.reopen(), manifest),
        more=drawn or (),
        model=model,
        added=tuple(program.added),
        atol=atol,
        rtol=rtol,
        coarse=coarse_of(
            program,
            reduced.schedule if isinstance(reduced, Reduced) else None,
            eager,
            writer.options.tolerance,
            getattr(writer.options, "quantize_mode", None),
        ),
    )
    report.artifact, report.stand_in = files[-1].name, evidence.stand_in
    if evidence.stand_in:
        report.notes.append(
            f"this is the report of {evidence.stand_in}; {files[-1].name} itself cannot run on this machine "
            f"({evidence.reason}). Prove it where it will: pumer-compile parity ARTIFACT --model MODEL"
        )
    return replace(report, notes=[*report.notes, *clipped, *(drawn.notes() if drawn else ())])


def exporter_options(path: Path, **options: Any) -> Options:
    """The options of the exporter that the suffix of `path` picks; None of a value leaves the exporter's default.

    Raises:
        UsageError: no exporter writes this suffix, or an option it does not have.
    """
    writer = _writer_class(path)
    given = {name: value for name, value in options.items() if value is not None}
    known = {field.name for field in fields(writer.options_class)}
    unknown = [name for name in given if name not in known]
    if unknown:
        flag, takers = _flag(unknown[0])
        raise UsageError(f"{flag} does not apply to {path.suffix} ({path}): it is for {takers}. Leave it out.")
    return writer.options_class(**given)


def _flag(name: str) -> tuple[str, str]:
    """An option as the command line has it, and the suffixes of the formats that take it."""
    flag = f"--{name.replace('_', '-')}"
    takers: list[str] = []
    for known in FORMATS:
        for option in fields(known.load_writer().options_class):
            if option.name == name:
                flag = option.metadata.get("flag", flag)
                takers += known.suffixes
    return flag, " and ".join(takers) or "no format"


def check_exporter(path: Path, options: Options, *, dynamic_batch: bool, verify: bool) -> None:
    """Refuse, before a model is loaded, what this machine cannot export; see `Writer.check`."""
    writer = _writer(path, options)
    writer.check_path(path)
    writer.check(dynamic_batch=dynamic_batch, verify=verify)


def _writer(
    path: Path, options: Options | None, progress: Callable[[str], None] = lambda text: None
) -> Writer[Any, Any]:
    writer = _writer_class(path)
    options = writer.options_class() if options is None else options
    if not isinstance(options, writer.options_class):
        raise UsageError(f"{path.suffix} takes {writer.options_class.__name__}, not {type(options).__name__}.")
    return writer(options, progress)


def _writer_class(path: Path) -> type[Writer[Any, Any]]:
    found = find_format(path)
    if found is None:
        raise UsageError(
            f"No exporter writes {path.suffix or 'a path without suffix'!r} ({path}); use model.onnx, or one of "
            f"{', '.join(suffixes(FORMATS))}."
        )
    writer: type[Writer[Any, Any]] = found.load_writer()
    return writer


def _proof_batches(
    program: Program,
    samples: Sequence[Mapping[str, Tensor]] | None,
    profiles: Sequence[Profile],
    prompts: Sequence[PromptPlace] = (),
) -> tuple[list[Mapping[str, Tensor]], Samples | None, list[str]]:
    """Batches for a proof in every batch size, what draws more of them, and what a reader should know of them."""
    kinds = describe_samples(program, prompts)
    sizes, left_out = proof_sizes(captured_batch(kinds), program.dynamic_batch, profiles)
    notes = []
    if left_out:
        notes.append(f"not proved at a batch of {', '.join(map(str, left_out))}: it would take too long")
    captured: list[Mapping[str, Tensor]] = [program.inputs, *(samples or ())]
    if program.dynamic_batch:
        captured = [resized_batch(captured, size) for size in (sizes if samples is not None else sizes[:1])]
    if samples is not None:
        return captured, None, notes
    drawn = Samples(kinds, prompts, captured=program.inputs)
    return [*captured, *proof_batches(drawn, sizes)], drawn, notes


def _eager(reduced: Reduced | Program) -> tuple[Any, Any, Any]:
    """The reduced and the captured module, and the model, in float32."""
    if isinstance(reduced, Reduced) and reduced.schedule.exact:
        reduced = reduced.program  # what is exact is judged against the model itself
    exact = cast(reduced, "float32")
    program = program_of(exact)
    return exact.module, program.module, program.model
