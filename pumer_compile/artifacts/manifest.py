"""What an artifact says of itself, read and checked; `exporters/manifest.py` writes it down."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import onnx

from ..errors import UsageError
from ..files import companion_of, sha256_file
from ..schedule import Schedule
from .formats import find_format

KEY = "pumer_compile.manifest"
SEAL = "pumer_compile.seal"
"""Key of the last entry in an ONNX file: hashes of what is before it, and of the weights beside it."""
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


def reduced_by(manifest: Mapping[str, Any]) -> str:
    """What reduced it, in words, such as `pumer, semantics safe`; `not reduced` where nothing is."""
    schedule = manifest.get("schedule")
    return Schedule.from_manifest(schedule).described if schedule else "not reduced"


def sidecar(path: Path) -> Path:
    """The manifest beside an artifact: `<artifact>.manifest.json`, suffix of the artifact included."""
    return path.with_name(f"{path.name}.{SIDECAR}")


def _sidecars(path: Path) -> tuple[Path, Path, Path]:
    """Where a manifest may lie; the later names are of artifacts made before."""
    return sidecar(path), path.with_name(f"{path.stem}.{SIDECAR}"), path.with_name(SIDECAR)


def artifact_bytes(path: Path) -> int:
    """The size of an artifact with the files that go with it, such as weights, as its manifest beside it names them."""
    total = path.stat().st_size
    for candidate in _sidecars(path):
        try:
            said = dict(json.loads(candidate.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            continue
        if said.get("artifact") == path.name:
            companions = [path.with_name(name) for name in dict(said.get("companions", {}))]
            return total + sum(companion.stat().st_size for companion in companions if companion.is_file())
    return total


def seal_onnx(path: Path, companions: Mapping[str, Path] | None = None) -> None:
    """End a written ONNX file with the SHA-256 of all that it holds and of the files that belong to it, so that it can
    be checked alone. What is appended merges into the model's metadata.

    Args:
        path: of the file, complete.
        companions: files of weights, by the names under which the graph looks for them.
    """
    hashes = {name: sha256_file(file) for name, file in (companions or {}).items()}
    value = json.dumps({"sha256": sha256_file(path), "companions": hashes}, sort_keys=True)
    with path.open("ab") as file:
        file.write(_sealing(value))


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest of an artifact: from an ONNX model's metadata, for any other format from the file beside it.

    The artifact is compared with the SHA-256 in the manifest beside it. An ONNX file may also come alone: then with the
    one at its own end (`seal_onnx`). Those made before there was one are read as they are; their manifest does not say
    `sealed`.

    Raises:
        UsageError: no such file, not made by pumer-compile, or not the file that the manifest describes.
    """
    if not path.is_file():
        raise UsageError(f"No artifact at {path}.")
    known = find_format(path)
    manifest = _checked_inner(path) if known is not None and known.embeds_manifest else _beside(path)
    if manifest.get("format") != FORMAT:
        raise UsageError(f"{path} has a manifest of format {manifest.get('format')}; this reads {FORMAT}.")
    return manifest


def _checked_inner(path: Path) -> dict[str, Any]:
    found = _sidecar_of(path)
    metadata = read_sealed(path, vouched=found is not None)
    if KEY not in metadata:
        raise UsageError(f"{path} was not made by pumer-compile: its metadata has no {KEY}.")
    try:
        manifest = dict(json.loads(metadata[KEY]))
    except (ValueError, TypeError) as error:
        raise UsageError(f"The manifest in {path} cannot be read: {error}.") from error
    if SEAL not in metadata and manifest.get("sealed"):
        raise _changed(path)
    if SEAL not in metadata and found is not None:
        _check_companions(path, str(found[0]), found[1].get("companions", {}))
    return manifest


def read_sealed(path: Path, *, vouched: bool = False) -> dict[str, str]:
    """The metadata of an ONNX file, which is compared with its seal where it has one.

    Args:
        path: of the file.
        vouched: whether its bytes have been compared with another hash; then only the files that belong to it are.

    Raises:
        UsageError: no ONNX model, or it or its weights were changed since.
    """
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception as error:
        # protobuf's DecodeError is not part of its public interface.
        raise UsageError(f"{path} is not an ONNX model: {' '.join(str(error).split())}") from error
    metadata = {str(entry.key): str(entry.value) for entry in model.metadata_props}
    if SEAL in metadata:
        try:
            said = json.loads(metadata[SEAL])
            digest, companions = str(said["sha256"]), {str(n): str(h) for n, h in said["companions"].items()}
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise _changed(path) from error
        if not vouched and _sealed_part(path, _sealing(metadata[SEAL])) != digest:
            raise _changed(path)
        _check_companions(path, "its metadata", companions)
    return metadata


def _changed(path: Path) -> UsageError:
    return UsageError(
        f"{path} was changed since it was written: the SHA-256 at its end ({SEAL} in its metadata) is not that of what "
        "is before it. Compile it again, or put back the file that was written. What another tool made of it is "
        "another model, which nothing has proved."
    )


def _sealing(value: str) -> bytes:
    entry = onnx.StringStringEntryProto(key=SEAL, value=value)
    return bytes(onnx.ModelProto(metadata_props=[entry]).SerializeToString())


def _sealed_part(path: Path, seal: bytes) -> str:
    """The SHA-256 of a file without the seal that it ends with; '' where it ends with something else."""
    digest, left = hashlib.sha256(), path.stat().st_size - len(seal)
    with path.open("rb") as file:
        while left > 0 and (block := file.read(min(left, 2**20))):
            digest.update(block)
            left -= len(block)
        return digest.hexdigest() if file.read() == seal else ""


def _beside(path: Path) -> dict[str, Any]:
    """The manifest that names this artifact, and describes these very bytes."""
    found = _sidecar_of(path)
    if found is None:
        raise UsageError(
            f"No manifest describes {path}: looked for {', '.join(c.name for c in _sidecars(path))} beside it. It was "
            "not made by pumer-compile, or was moved without its manifest."
        )
    _check_companions(path, str(found[0]), found[1].get("companions", {}))
    return found[1]


def _sidecar_of(path: Path) -> tuple[Path, dict[str, Any]] | None:
    """The manifest beside an artifact that describes these very bytes; None where none names it.

    Raises:
        UsageError: one names it, and describes other bytes.
    """
    outdated, digest = None, ""
    for candidate in _sidecars(path):
        try:
            found = dict(json.loads(candidate.read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError):
            continue
        if found.get("artifact") != path.name:
            continue
        digest = digest or sha256_file(path)
        if found.get("sha256") == digest:
            return candidate, found
        outdated = candidate
    if outdated is not None:
        raise UsageError(
            f"{path} is not the file that {outdated} describes: its SHA-256 differs. Compile it again, or put back the "
            "manifest that was written with it."
        )
    return None


def _check_companions(path: Path, described: str, companions: Mapping[str, str]) -> None:
    for name, digest in companions.items():
        companion = companion_of(path, name)
        if not companion.is_file() or sha256_file(companion) != digest:
            raise UsageError(
                f"{path.with_name(name)} does not belong to {path}: it is missing, or its SHA-256 is not the one in "
                f"{described}. Compile the artifact again, or put back the file that was written with it."
            )
