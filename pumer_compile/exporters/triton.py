"""Model repositories of Triton Inference Server, for ONNX models and TensorRT engines.

```
DIR/<name>/config.pbtxt
DIR/<name>/1/model.onnx (or model.plan), with its weights and its manifest
```
"""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import torch

from ..artifacts.engine import Engine
from ..artifacts.formats import ENGINE, ONNX, Format, find_format, format_of, suffixes
from ..artifacts.manifest import read_manifest, sidecar
from ..artifacts.options import EngineOptions, Options
from ..artifacts.profile import Profile
from ..artifacts.runtime import Size, TensorSpec
from ..errors import UsageError
from ..files import companion_of, publish, sha256_file
from ..runtimes.ort import external_files
from ..runtimes.tensorrt_library import load_library

# Triton needs a number where a batch is open without a profile; its dynamic batcher fills batches up to it.
DEFAULT_MAX_BATCH = 32
MARK = "pumer_compile.artifact_sha256"
_TYPES = {
    torch.bool: "TYPE_BOOL",
    torch.uint8: "TYPE_UINT8",
    torch.int8: "TYPE_INT8",
    torch.int32: "TYPE_INT32",
    torch.int64: "TYPE_INT64",
    torch.float16: "TYPE_FP16",
    torch.bfloat16: "TYPE_BF16",
    torch.float32: "TYPE_FP32",
    torch.float64: "TYPE_FP64",
}
# What Triton loads: its platform and backend, and the name of the file in a version's folder.
_LOADED: dict[Format, tuple[str, str, str]] = {
    ONNX: ("onnxruntime_onnx", "onnxruntime", "model.onnx"),
    ENGINE: ("tensorrt_plan", "tensorrt", "model.plan"),
}
_KINDS = {"onnxruntime-cpu": "KIND_CPU", "onnxruntime-cuda": "KIND_GPU"}


@dataclass(frozen=True)
class ServedModel:
    """What a `config.pbtxt` says.

    Attributes:
        name: of the model, and of its folder.
        format: of the artifact.
        inputs, outputs: by name; an open batch is a name in place of a number.
        max_batch_size: of Triton's batches; 0 where every call has the shapes as they are.
        profiles: of an engine's open batch.
        kind: where instances run.
        sha256: of the artifact.
    """

    name: str
    format: Format
    inputs: Mapping[str, TensorSpec]
    outputs: Mapping[str, TensorSpec]
    max_batch_size: int
    profiles: Sequence[Profile]
    kind: str
    sha256: str

    @property
    def engine(self) -> bool:
        """Whether it is a TensorRT engine."""
        return self.format is ENGINE

    def config(self) -> str:
        """The text of `config.pbtxt`."""
        platform, backend, _ = _LOADED[self.format]
        lines = [
            f"name: {json.dumps(self.name)}",
            f'platform: "{platform}"',
            f'backend: "{backend}"',
            f"max_batch_size: {self.max_batch_size}",
            *self._tensors("input", self.inputs),
            *self._tensors("output", self.outputs),
            *self._batching(),
            *self._instances(),
            "parameters {",
            f'  key: "{MARK}"',
            f'  value {{ string_value: "{self.sha256}" }}',
            "}",
        ]
        return "\n".join(lines) + "\n"

    def _tensors(self, what: str, specs: Mapping[str, TensorSpec]) -> Iterable[str]:
        for name, spec in specs.items():
            # Triton counts the batch apart; what is left of a vector with one number a sample has no size, which it
            # writes as one that is reshaped away.
            sizes = spec.shape[1:] if self.max_batch_size else spec.shape
            dims = ", ".join("-1" if isinstance(size, str) else str(size) for size in sizes or (1,))
            yield f"{what} {{"
            yield f"  name: {json.dumps(name)}"
            yield f"  data_type: {_TYPES[spec.dtype]}"
            yield f"  dims: [ {dims} ]"
            if not sizes:
                yield "  reshape { shape: [ ] }"
            yield "}"

    def _batching(self) -> Iterable[str]:
        if not self.max_batch_size:
            return
        yield "dynamic_batching {"
        # Waiting for a size pays only where one was tuned for.
        preferred = {p.optimum for p in self.profiles if p.optimum <= self.max_batch_size} if self.engine else set()
        if preferred:
            yield f"  preferred_batch_size: [ {', '.join(map(str, sorted(preferred)))} ]"
        yield "}"

    def _instances(self) -> Iterable[str]:
        yield "instance_group {"
        yield "  count: 1"
        yield f"  kind: {self.kind}"
        if self.engine and len(self.profiles) > 1:
            yield f"  profile: [ {', '.join(json.dumps(str(index)) for index in range(len(self.profiles)))} ]"
        yield "}"


def write_triton_repository(
    folder: str | os.PathLike[str],
    name: str,
    artifact: str | os.PathLike[str],
    *,
    max_batch_size: int | None = None,
) -> Path:
    """Put an artifact into a model repository.

    The model's folder appears complete or not at all. One that pumer-compile wrote before is replaced; any other is
    left alone. An engine is opened, to ask it for its outputs: do it on the machine it was built for.

    Args:
        folder: of the repository; made if it is not there.
        name: of the model.
        artifact: made by pumer-compile: ONNX, or an engine of TensorRT.
        max_batch_size: of Triton's batches, where the artifact's batch is open; None takes the largest of its profiles,
            or 32.

    Returns:
        The folder of the model.

    Raises:
        UsageError: an artifact that Triton does not load, a folder that is not ours, or a batch that does not fit.
    """
    folder, artifact = Path(folder), Path(artifact)
    manifest = read_manifest(artifact)
    check_triton(folder, name, artifact, manifest.get("builder"))
    model = _served(name, artifact, manifest, max_batch_size)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder, prefix=f".{name}.") as temporary:
            staged = Path(temporary) / name
            _fill(staged, model, artifact, manifest)
            _publish_folder(staged, folder / name, Path(temporary) / "before")
    except OSError as error:
        raise UsageError(
            f"The model repository {folder} cannot be written: {error.strerror or error}. Choose another folder, or "
            "change its permissions."
        ) from error
    return folder / name


def check_compilation(folder: Path, artifact: Path, options: Options) -> None:
    """Refuse, before a model is loaded, what the artifact of a compilation would be refused for.

    Args:
        folder: of the repository.
        artifact: that will be written; its stem is the name of the model.
        options: that it is compiled with.

    Raises:
        UsageError: see `write_triton_repository`.
    """
    builder = None
    if isinstance(options, EngineOptions):
        builder = options.builder or load_library().name
        if options.profiles:
            check_covered(artifact, options.profiles, max(profile.maximum for profile in options.profiles))
    check_triton(folder, artifact.stem, artifact, builder)


def check_triton(folder: Path, name: str, artifact: Path, builder: str | None) -> None:
    """Refuse, before any long work, what cannot go into a repository.

    Args:
        folder: of the repository.
        name: of the model.
        artifact: its suffix says the format; it need not be there yet.
        builder: of an engine.

    Raises:
        UsageError: see `write_triton_repository`.
    """
    if find_format(artifact) not in _LOADED:
        *others, last = suffixes(tuple(_LOADED))
        raise UsageError(
            f"A Triton repository is written for {', '.join(others)} and {last}, not for {artifact.suffix!r} "
            f"({artifact})."
        )
    if builder == "tensorrt-rtx":
        raise UsageError(
            "Triton's backend loads engines of TensorRT, and TensorRT-RTX is another library with engines of its own. "
            "Build with --builder tensorrt on a machine with the GPU, or serve ONNX (-o model.onnx)."
        )
    if not name or name.startswith(".") or "/" in name:
        raise UsageError(f"{name!r} cannot be the name of a model: it names a folder of the repository.")
    if folder.exists() and not folder.is_dir():
        raise UsageError(f"The model repository {folder} is not a directory.")
    model = folder / name
    if model.exists() and not _is_ours(model):
        raise UsageError(
            f"{model} is there and was not written by pumer-compile, or more was put into it; it is left as it is. "
            "Remove it, or choose another name or repository."
        )


def _is_ours(model: Path) -> bool:
    """Whether a folder holds what we wrote and nothing else, such as a second version."""
    try:
        marked = f'key: "{MARK}"' in (model / "config.pbtxt").read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return False
    return marked and {path.name for path in model.iterdir()} == {"config.pbtxt", "1"}


def _served(name: str, artifact: Path, manifest: Mapping[str, Any], max_batch_size: int | None) -> ServedModel:
    form = format_of(artifact)
    engine = form is ENGINE
    inputs, outputs = _engine_specs(artifact) if engine else _onnx_specs(artifact)
    profiles = [Profile.parse(text) for text in manifest.get("profiles") or ()]
    # Triton's batches need the batch in front of every tensor, and nowhere else.
    specs = [*inputs.values(), *outputs.values()]
    batched = all(
        spec.shape and isinstance(spec.shape[0], str) and not any(isinstance(size, str) for size in spec.shape[1:])
        for spec in specs
    )
    largest = max((profile.maximum for profile in profiles), default=DEFAULT_MAX_BATCH)
    if max_batch_size is not None:
        if max_batch_size < 1:
            raise UsageError(f"A batch of at most {max_batch_size} is none; give 1 or more.")
        if not batched:
            raise UsageError(
                f"{artifact} has a fixed batch, so Triton cannot batch for it. Leave the maximum out, or compile with "
                "--dynamic-batch or --profile."
            )
        if profiles and max_batch_size > largest:
            raise UsageError(f"A batch of {max_batch_size} is in no profile of {artifact}; its largest is {largest}.")
        largest = max_batch_size
    if engine and batched:
        check_covered(artifact, profiles, largest)
    kind = "KIND_GPU" if engine else _KINDS.get(str(manifest.get("target")), "KIND_AUTO")
    return ServedModel(name, form, inputs, outputs, largest if batched else 0, profiles, kind, sha256_file(artifact))


def check_covered(artifact: Path, profiles: Sequence[Profile], largest: int) -> None:
    """Triton sends every batch size up to the largest.

    Raises:
        UsageError: no profile contains one of them.
    """
    for size in range(1, largest + 1):
        if not any(profile.minimum <= size <= profile.maximum for profile in profiles):
            raise UsageError(
                f"Triton sends batches of any size up to {largest}, and no profile of {artifact} contains {size}. "
                f"Compile with a --profile from 1 on, such as batch=1:{largest}:{largest}."
            )


def _engine_specs(artifact: Path) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
    engine = Engine(artifact)
    return engine.input_specs, engine.output_specs


def _onnx_specs(artifact: Path) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
    graph = onnx.load(str(artifact), load_external_data=False).graph
    inputs, outputs = ({value.name: _onnx_spec(value) for value in values} for values in (graph.input, graph.output))
    return inputs, outputs


def _onnx_spec(value: onnx.ValueInfoProto) -> TensorSpec:
    tensor = value.type.tensor_type
    sizes: list[Size] = [d.dim_value if d.HasField("dim_value") else d.dim_param or "?" for d in tensor.shape.dim]
    numpy = onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type)
    return TensorSpec(tuple(sizes), getattr(torch, str(numpy)))


def _fill(staged: Path, model: ServedModel, artifact: Path, manifest: Mapping[str, Any]) -> None:
    version = staged / "1"
    version.mkdir(parents=True)
    placed = version / _LOADED[model.format][-1]
    shutil.copyfile(artifact, placed)
    for companion in () if model.engine else external_files(artifact):
        shutil.copyfile(companion_of(artifact, companion), version / companion)
    # So that `parity`, `bench` and `Engine` take the artifact from here too.
    described = {**manifest, "artifact": placed.name, "sha256": model.sha256}
    sidecar(placed).write_text(json.dumps(described, indent=2) + "\n", encoding="utf-8")
    (staged / "config.pbtxt").write_text(model.config(), encoding="utf-8")
    for path in [*version.iterdir(), version, staged / "config.pbtxt"]:
        _sync(path)


def _publish_folder(staged: Path, final: Path, aside: Path) -> None:
    """Rename a folder into place; a folder cannot be renamed onto a full one, so that one goes aside first."""
    replaces = final.exists()
    if replaces:
        os.rename(final, aside)
    try:
        publish([(staged, final)])
    except BaseException:
        if replaces:
            os.rename(aside, final)
        raise


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
