"""Whether an engine can run here: its builder's library and version, and the GPU it was built for."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ..errors import UsageError
from .cuda import open_cuda
from .tensorrt_library import Library, load_library


def engine_library(path: Path, manifest: Mapping[str, Any]) -> Library:
    """The library that loads an engine: the one that built it, in a version that reads it.

    Args:
        path: of the engine.
        manifest: with `builder`, `builder_version` and `version_compatible`.

    Raises:
        UsageError: a manifest of no engine, the library is not installed, or is another version.
    """
    builder, version = str(manifest.get("builder")), str(manifest.get("builder_version"))
    if builder not in ("tensorrt", "tensorrt-rtx"):
        raise UsageError(
            f"The manifest of {path} does not say that TensorRT or TensorRT-RTX built it (builder: "
            f"{manifest.get('builder')!r}). Compile it again with -o {path.name}."
        )
    try:
        library = load_library(builder)
    except UsageError as error:
        raise UsageError(f"{path} was built by {builder} {version}, and no other library loads it. {error}") from error
    flagged = bool(manifest.get("version_compatible"))
    if not _reads(library.version, version, flagged):
        hint = "a later minor version would do" if flagged else "an engine is for one version alone"
        raise UsageError(
            f"{path} was built by {builder} {version}, and {library.version} is installed; {hint}. Install {builder} "
            f"{version}, or compile again here."
        )
    return library


def _reads(installed: str, built: str, flagged: bool) -> bool:
    # The fourth number is a build of the same version; the library itself judges that.
    here, there = ([int(part) for part in v.split(".")[:3] if part.isdigit()] for v in (installed, built))
    if not there:
        return False
    return here[:1] == there[:1] and here >= there if flagged else here == there


def check_engine(path: Path, manifest: Mapping[str, Any], device: str | torch.device | None = None) -> None:
    """Refuse an engine that cannot run here, without reading it.

    Raises:
        UsageError: no device, torch without CUDA, another library or version, another GPU.
    """
    # The device first: standard TensorRT does not survive an import without one.
    cuda = open_cuda(path, device)
    engine_library(path, manifest)
    check_device(path, manifest, cuda.capability)


def check_device(path: Path, manifest: Mapping[str, Any], capability: str) -> None:
    """Refuse a GPU that an engine was not built for.

    Args:
        path: of the engine.
        manifest: with `compute_capabilities` (none is portable), and for TensorRT the `device_capability` it was tuned
            on.
        capability: of the device here, such as `8.9`.

    Raises:
        UsageError: another compute capability.
    """
    targets = [str(target) for target in manifest.get("compute_capabilities") or ()]
    if not targets and manifest["builder"] == "tensorrt" and manifest.get("device_capability"):
        targets = [str(manifest["device_capability"])]
    if targets and capability not in targets:
        raise UsageError(
            f"{path} was built for compute capability {', '.join(targets)}, and the GPU here has {capability}. Compile "
            "it again on this machine, or with --builder tensorrt-rtx for several GPUs "
            f"(--compute-capability {','.join([*targets, capability])})."
        )


def check_validity(path: Path, library: Library, runtime: Any, plan: bytes) -> None:
    """Refuse an engine that TensorRT-RTX itself says cannot run here; TensorRT has no such question.

    Raises:
        UsageError: with the library's own diagnostics.
    """
    if not hasattr(runtime, "get_engine_validity"):
        return
    validity, diagnostics = runtime.get_engine_validity(plan)
    if validity != library.trt.EngineValidity.INVALID:
        return
    kinds = library.trt.EngineInvalidityDiagnostics
    found = [name for name, kind in kinds.__members__.items() if int(kind) & int(diagnostics)]
    reasons = ", ".join(name.lower().replace("_", " ") for name in found) or "no reason given"
    raise UsageError(
        f"{library.name} {library.version} says that {path} is not valid here: {reasons}. "
        "Compile it again for this GPU, driver and version."
    )
