"""What an artifact says of itself: how it was made, from what, and whether it was proved."""

from __future__ import annotations

import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx
from torch import Tensor

from ..capture import Program
from ..errors import UsageError
from ..files import sha256_file
from ..plan import Plan
from ..schedule import Schedule

KEY = "pumer_compile.manifest"
SIDECAR = "manifest.json"
FORMAT = 1
_PACKAGES = (
    "pumer-compile",
    "torch",
    "transformers",
    "onnx",
    "onnxscript",
    "onnx-ir",
    "onnxruntime",
    "onnxruntime-gpu",
    "openvino",
)


def library_versions() -> dict[str, str]:
    """Versions of the installed packages that shape an artifact."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


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
        "tokens": plan.tokens() if plan else None,
        "plan": plan.to_dict() if plan else None,
        "checkpoint_sha256": program.checkpoint_sha256,
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


def sidecar(path: Path) -> Path:
    """Where the manifest beside an artifact goes.

    `manifest.json`, or `<stem>.manifest.json` where that is another artifact's or somebody else's, or else
    `<name>.manifest.json`.
    """
    *shared, own = _sidecars(path)
    return next((candidate for candidate in shared if _free(candidate, path)), own)


def _sidecars(path: Path) -> tuple[Path, Path, Path]:
    return path.with_name(SIDECAR), path.with_name(f"{path.stem}.{SIDECAR}"), path.with_name(f"{path.name}.{SIDECAR}")


def _free(candidate: Path, path: Path) -> bool:
    """Whether there is no manifest there, or one of this artifact, or of one that is gone."""
    try:
        described = json.loads(candidate.read_text(encoding="utf-8"))["artifact"]
    except FileNotFoundError:
        return True
    except (OSError, ValueError, TypeError, KeyError):
        return False  # somebody else's
    return described == path.name or not candidate.with_name(str(described)).exists()


def _dtype(tensor: Tensor, options: Mapping[str, Any]) -> str:
    """What the artifact takes: floating-point inputs follow its own dtype, where it does not say otherwise."""
    return (
        str(options.get("input_dtype", options["dtype"]))
        if tensor.is_floating_point()
        else str(tensor.dtype).removeprefix("torch.")
    )


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of an artifact: from an ONNX model's metadata, for any other format from the file beside it.

    Raises:
        UsageError: no such file, not made by pumer-compile, or not the file that the manifest describes.
    """
    if not path.is_file():
        raise UsageError(f"No artifact at {path}.")
    manifest = _inner(path) if path.suffix == ".onnx" else _beside(path)
    if manifest.get("format") != FORMAT:
        raise UsageError(f"{path} has a manifest of format {manifest.get('format')}; this reads {FORMAT}.")
    return manifest


def _inner(path: Path) -> dict[str, Any]:
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:
        # protobuf's DecodeError is not part of its public interface.
        raise UsageError(f"{path} is not an ONNX model: {' '.join(str(error).split())}") from error
    for entry in model.metadata_props:
        if entry.key == KEY:
            try:
                return dict(json.loads(entry.value))
            except (ValueError, TypeError) as error:
                raise UsageError(f"The manifest in {path} cannot be read: {error}.") from error
    raise UsageError(f"{path} was not made by pumer-compile: its metadata has no {KEY}.")


def _beside(path: Path) -> dict[str, Any]:
    """The manifest that names this artifact, and describes these very bytes."""
    candidates, outdated = _sidecars(path), None
    for candidate in reversed(candidates):
        try:
            found = dict(json.loads(candidate.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            continue
        if found.get("artifact") != path.name:
            continue
        if found.get("sha256") == sha256_file(path):
            _check_companions(path, candidate, found)
            return found
        outdated = candidate
    if outdated is not None:
        raise UsageError(
            f"{path} is not the file that {outdated} describes: its SHA-256 differs. Compile it again, or put back the "
            "manifest that was written with it."
        )
    raise UsageError(
        f"No manifest describes {path}: looked for {', '.join(c.name for c in candidates)} beside it. It was not made "
        "by pumer-compile, or was moved without its manifest."
    )


def _check_companions(path: Path, sidecar: Path, manifest: Mapping[str, Any]) -> None:
    for name, digest in dict(manifest.get("companions", {})).items():
        companion = path.with_name(name)
        if not companion.is_file() or sha256_file(companion) != digest:
            raise UsageError(
                f"{companion} does not belong to {path}: it is missing, or its SHA-256 is not the one in {sidecar}. "
                "Compile the artifact again, or put back the file that was written with it."
            )
