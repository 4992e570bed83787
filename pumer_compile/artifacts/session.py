"""Open an artifact of any format, and find what gives its reducers' decisions."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from ..errors import ExportError, ParityError
from .formats import check_options, format_of
from .manifest import read_manifest
from .runtime import Runtime


class Session(Protocol):
    """An open artifact: inputs by name in, outputs by name out."""

    @property
    def path(self) -> Path:
        """Of the artifact."""

    @property
    def provider(self) -> str:
        """What executes it, such as `CPUExecutionProvider` or `TensorRT-RTX`."""

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs."""

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs."""

    def run(self, batch: Mapping[str, Tensor]) -> dict[str, np.ndarray[Any, Any]]:
        """Outputs by name, from tensors by input name (cast to the artifact's dtypes)."""

    def close(self) -> None:
        """Give the memory of weights back; nothing runs afterwards."""


@runtime_checkable
class Exposing(Protocol):
    """A session whose artifact can give inner values."""

    def exposing(self, names: Sequence[str]) -> Session:
        """A second session on the same artifact that gives these values as outputs too."""

    def inner_values(self) -> list[str]:
        """Their names, in the order in which they are computed."""


def check_runtime(path: Path, manifest: Mapping[str, Any], *, provider: str | None = None) -> None:
    """Refuse, before a model is loaded, what `open_session` would refuse for want of a library or a device.

    Args:
        path: of the artifact.
        manifest: what `read_manifest` gives.
        provider: of onnxruntime.

    Raises:
        UsageError: see `open_session`.
    """
    format_of(path).load_runtime().check(path, manifest, **check_options(path, provider=provider))


def open_session(
    path: Path,
    manifest: Mapping[str, Any] | None = None,
    *,
    provider: str | None = None,
    device: str | torch.device | None = None,
    cuda_graph: bool = False,
    expose: Sequence[str] = (),
) -> Session:
    """Open an artifact; its suffix picks the runtime.

    Args:
        path: of the artifact.
        manifest: what `read_manifest` gives; None reads it.
        provider: onnxruntime's execution provider (`cpu`, `cuda`, `tensorrt`); for ONNX alone.
        device: where to run; None is the CPU for ONNX and the current GPU for engines.
        cuda_graph: replay a captured CUDA graph; for engines alone.
        expose: inner values to give as extra outputs, by name; for ONNX alone.

    Raises:
        UsageError: not made by pumer-compile, an option that the format does not have, or something that this machine
            lacks.
        ExportError: the runtime refuses the artifact, or it is not what its manifest says.
    """
    manifest = read_manifest(path) if manifest is None else manifest
    options = check_options(path, provider=provider, device=device, cuda_graph=cuda_graph, expose=expose)
    session = format_of(path).load_runtime().open(path, manifest, **options)
    _check_agreement(session, manifest)
    session.pads = not (manifest.get("unpadded_inputs") or (manifest.get("plan") or {}).get("prompts"))
    return session


def _check_agreement(session: Runtime, manifest: Mapping[str, Any]) -> None:
    """The manifest speaks of this very artifact: names, shapes, dtypes."""
    inputs, outputs = dict(manifest["inputs"]), list(manifest["outputs"])
    if set(session.inputs) != set(inputs):
        raise _mismatch(session, f"inputs {', '.join(inputs)}", ", ".join(session.inputs))
    missing = [name for name in outputs if name not in session.outputs]
    if missing:
        raise _mismatch(session, f"an output {missing[0]}", ", ".join(session.outputs))
    for name, said in inputs.items():
        spec = session.input_specs[name]
        dtype, open_batch = str(spec.dtype).removeprefix("torch."), manifest.get("dynamic_batch", False)
        fits = len(said["shape"]) == len(spec.shape) and all(
            open_batch if isinstance(size, str) else size == want
            for size, want in zip(spec.shape, said["shape"], strict=True)
        )
        if not fits or dtype != said["dtype"]:
            raise _mismatch(session, f"{name} as {said['dtype']} {said['shape']}", f"{dtype} {list(spec.shape)}")


def _mismatch(session: Runtime, said: str, found: str) -> ExportError:
    return ExportError(
        f"{session.path} is not what its manifest describes: that names {said}, and the artifact has {found}. Compile "
        "it again, or put back the manifest that was written with it."
    )


def comparable_decisions(session: Session, manifest: Mapping[str, Any]) -> list[str]:
    """The decisions that an artifact can be asked for; only ONNX models show inner values."""
    named = [str(name) for name in manifest["decisions"]]
    shown = isinstance(session, Exposing) or all(name in session.outputs for name in named)
    return named if shown else []


def decision_session_of(session: Session, decisions: Sequence[str]) -> Callable[[], Session] | None:
    """What opens the decision session of a session; None where it gives these decisions itself."""
    hidden = any(name not in session.outputs for name in decisions)
    return partial(open_with_decisions, session, decisions) if hidden else None


def open_with_decisions(session: Session, decisions: Sequence[str]) -> Session:
    """The session if it gives these decisions, else a second one on the same artifact that does.

    Raises:
        ParityError: the artifact has no such decisions.
    """
    hidden = [name for name in decisions if name not in session.outputs]
    if not hidden:
        return session
    if not isinstance(session, Exposing):
        raise ParityError(
            f"{session.path} gives no decisions, and its format shows no inner values. Compile it with "
            "--with-decisions."
        )
    try:
        return session.exposing(hidden)
    except ExportError as error:
        raise ParityError(f"{session.path} does not have the decisions that its manifest names: {error}") from error
