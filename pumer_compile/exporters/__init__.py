"""Write artifacts that a deployment runtime loads, and publish only what was proved."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from ..capture import Program
from ..errors import ParityError, UsageError
from ..files import check_writable, publish, sha256_file
from ..parity import ParityReport, check, deciding, random_batches
from ..reduce import Reduced
from .manifest import KEY, make_manifest
from .onnx import OnnxBuild, OnnxOptions, append_metadata, build_onnx, in_precision, save_onnx
from .session import OnnxSession

__all__ = ["Exported", "OnnxOptions", "OnnxSession", "export", "exporter_options"]

SIDECAR = "manifest.json"


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


def export(
    reduced: Reduced | Program,
    path: str | os.PathLike[str],
    *,
    options: OnnxOptions | None = None,
    with_decisions: bool = False,
    verify: bool = True,
    samples: Sequence[Mapping[str, Tensor]] | None = None,
    atol: float | Mapping[str, float] | None = None,
    rtol: float | Mapping[str, float] | None = None,
) -> Exported:
    """Write an artifact; the suffix of `path` picks the exporter (`.onnx`).

    Everything is written under temporary names beside `path` and renamed when it is complete and proved: a failed or
    killed run leaves the old artifact as it was.

    Args:
        reduced: from `reduce`, or a captured program to export as it is.
        path: of the artifact.
        options: opset, dtype, target.
        with_decisions: keep every reducer's decisions as extra outputs.
        verify: prove the artifact before publishing it.
        samples: batches for the proof besides the captured inputs; None makes random ones where it can.
        atol, rtol: tolerances of the proof; defaults follow the dtype.

    Raises:
        UsageError: an unknown suffix or a path that cannot be written; before any long work.
        ExportError: conversion failed.
        ParityError: the proof failed; the artifact is kept as `<path>.failed`.
    """
    path = Path(path)
    options = options or exporter_options(path)
    check_writable(path)
    program, schedule, plan = (
        (reduced.program, reduced.schedule, reduced.plan) if isinstance(reduced, Reduced) else (reduced, None, None)
    )
    build = build_onnx(program, schedule, options)
    with tempfile.TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as folder:
        model = build.model if with_decisions else build.without_decisions()
        files = save_onnx(model, Path(folder) / path.name)
        report = None
        if verify:
            batches = _proof_batches(program, samples)
            report = _prove(files[-1], build, reduced, batches, options.dtype, atol, rtol)
        manifest = make_manifest(
            program,
            schedule,
            plan,
            inputs=[str(value.name) for value in model.graph.inputs],
            outputs=build.outputs,
            decisions=build.decisions,
            options=asdict(options),
            parity=report.to_dict() if report else {"verified": False},
        )
        append_metadata(files[-1], {KEY: json.dumps(manifest, sort_keys=True)})
        if report is not None and not report.passed:
            failed = path.with_name(f"{path.name}.failed")
            publish([(f, failed if f == files[-1] else path.with_name(f.name)) for f in files])
            raise ParityError(
                f"Parity failed, so {path} was not written: {report.failures()}. The artifact is kept as {failed} for "
                "inspection; raise --atol/--rtol only if the difference is acceptable for your task.",
                report,
            )
        sidecar = _sidecar(path)
        described = {"artifact": path.name, "sha256": sha256_file(files[-1]), **manifest}
        (Path(folder) / SIDECAR).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
        # The artifact comes last: until then the old one stands, and the manifest inside it is the one that counts.
        companions = [(f, path.with_name(f.name)) for f in files[:-1]]
        publish([*companions, (Path(folder) / SIDECAR, sidecar), (files[-1], path)])
    return Exported(path, sidecar, manifest, report)


def exporter_options(path: Path, **options: Any) -> OnnxOptions:
    """The options of the exporter that the suffix of `path` picks.

    Raises:
        UsageError: no exporter writes this suffix, or an option it does not have.
    """
    if path.suffix != ".onnx":
        raise UsageError(f"No exporter writes {path.suffix or 'a path without suffix'!r} ({path}); use model.onnx.")
    return OnnxOptions(**options)


def _sidecar(path: Path) -> Path:
    """`manifest.json` beside the artifact, or `<stem>.manifest.json` where that name is taken by something else."""
    plain, named = path.with_name(SIDECAR), path.with_name(f"{path.stem}.{SIDECAR}")
    try:
        described = json.loads(plain.read_text(encoding="utf-8"))["artifact"]
    except FileNotFoundError:
        return plain
    except (OSError, ValueError, TypeError, KeyError):
        return named  # somebody else's manifest.json
    other = described != path.name and plain.with_name(str(described)).exists()
    return named if other else plain


def _proof_batches(program: Program, samples: Sequence[Mapping[str, Tensor]] | None) -> list[Mapping[str, Tensor]]:
    batches: list[Mapping[str, Tensor]] = [program.inputs]
    if samples is not None:
        return [*batches, *samples]
    if program.model is None or not hasattr(program.model, "config"):
        return batches
    shapes = {name: tuple(tensor.shape) for name, tensor in program.inputs.items()}
    dtypes = {name: str(tensor.dtype).removeprefix("torch.") for name, tensor in program.inputs.items()}
    try:
        return [*batches, *random_batches(program.model, shapes, dtypes)]
    except UsageError:  # inputs that nobody can make up
        return batches


def _prove(
    artifact: Path,
    build: OnnxBuild,
    reduced: Reduced | Program,
    batches: list[Mapping[str, Tensor]],
    dtype: str,
    atol: float | Mapping[str, float] | None,
    rtol: float | Mapping[str, float] | None,
) -> ParityReport:
    eager, unreduced = _eager(reduced)
    session = OnnxSession(artifact)
    decide = deciding(session, build.decisions)
    return check(session, eager, unreduced, batches, dtype, build.decisions, decide=decide, atol=atol, rtol=rtol)


def _eager(reduced: Reduced | Program) -> tuple[Any, Any]:
    """The reduced and the captured module, in float32."""
    from ..reduce import reduce

    program = reduced.program if isinstance(reduced, Reduced) else reduced
    exact = in_precision(program, "float32")
    if not isinstance(reduced, Reduced):
        return exact.module, exact.module
    if exact is program:
        return reduced.module, program.module
    return reduce(exact, reduced.schedule).module, exact.module
