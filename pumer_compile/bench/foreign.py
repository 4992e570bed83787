"""ONNX models that others made, to measure artifacts beside."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import onnx
import torch
from torch import Tensor

from ..artifacts.engine import Engine
from ..artifacts.manifest import KEY, read_manifest, sidecar
from ..errors import UsageError
from ..runtimes.ort import OnnxSession


def is_foreign(path: Path) -> bool:
    """Whether an ONNX model has no manifest of ours, neither inside nor beside it."""
    if path.suffix != ".onnx" or not path.is_file() or sidecar(path).exists():
        return False
    try:
        model = onnx.load(str(path), load_external_data=False)
    except Exception:  # no ONNX model: `read_manifest` says so
        return False
    return KEY not in {entry.key for entry in model.metadata_props}


def manifest_of(path: Path) -> dict[str, Any]:
    """The manifest of an artifact; of a foreign model, what its graph says.

    Raises:
        UsageError: see `read_manifest`.
    """
    if not is_foreign(path):
        return read_manifest(path)
    session = OnnxSession(path)
    inputs: dict[str, dict[str, Any]] = {
        name: {"shape": list(spec.shape), "dtype": str(spec.dtype).removeprefix("torch.")}
        for name, spec in session.input_specs.items()
    }
    session.close()
    floats = {said["dtype"] for said in inputs.values() if "float" in said["dtype"]}
    return {"foreign": True, "inputs": inputs, "schedule": None, "dtype": "/".join(sorted(floats)) or "?"}


def opened(path: str | os.PathLike[str], **options: Any) -> Engine:
    """An engine on an artifact or a foreign model.

    Raises:
        UsageError: see `Engine`.
    """
    if not is_foreign(Path(path)):
        return Engine(path, **options)
    session = OnnxSession(Path(path), **options)
    engine = Engine.over(session, manifest_of(Path(path)))
    return engine


def feed_for(
    path: str, manifest: Mapping[str, Any], first: Mapping[str, Any], feed: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """What a foreign model takes of a batch for an artifact; what the artifact was compiled without, at the value that
    is as good as that.

    Raises:
        UsageError: it takes an input that the artifact does not have.
    """
    found = {}
    for name, said in manifest["inputs"].items():
        constant = (first.get("constant_inputs") or {}).get(name)
        if name in feed:
            found[name] = feed[name]
        elif constant is not None and "input_ids" in feed:
            shape = feed["input_ids"].shape if len(said["shape"]) == 2 else (len(feed["input_ids"]), *said["shape"][1:])
            found[name] = torch.full(tuple(shape), constant, dtype=getattr(torch, said["dtype"]))
        else:
            raise UsageError(
                f"{path} takes an input {name}, and the artifact takes {', '.join(first['inputs'])}: no batch fits "
                "both. Compare models that take the same inputs."
            )
    return found
