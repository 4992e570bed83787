"""ONNX artifacts under onnxruntime: on the CPU, on CUDA, through its TensorRT provider."""

from __future__ import annotations

import mmap
import os
import shutil
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto
from torch import Tensor

from ..artifacts.runtime import Runtime, Size, TensorSpec, open_sizes
from ..errors import ExportError, UsageError
from ..files import companion_of

_DTYPES = {
    "tensor(int64)": torch.int64,
    "tensor(int32)": torch.int32,
    "tensor(int8)": torch.int8,
    "tensor(uint8)": torch.uint8,
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(bfloat16)": torch.bfloat16,
    "tensor(double)": torch.float64,
    "tensor(bool)": torch.bool,
}
_ELEMENTS = {
    torch.int64: TensorProto.INT64,
    torch.int32: TensorProto.INT32,
    torch.int8: TensorProto.INT8,
    torch.uint8: TensorProto.UINT8,
    torch.float32: TensorProto.FLOAT,
    torch.float16: TensorProto.FLOAT16,
    torch.bfloat16: TensorProto.BFLOAT16,
    torch.float64: TensorProto.DOUBLE,
    torch.bool: TensorProto.BOOL,
}
CPU, CUDA, TENSORRT = "CPUExecutionProvider", "CUDAExecutionProvider", "TensorrtExecutionProvider"
_SHORT = {"cpu": CPU, "cuda": CUDA, "tensorrt": TENSORRT}
_DEVICES = {CPU: "cpu", CUDA: "cuda", TENSORRT: "cuda"}


def placement(provider: str | None, device: str | torch.device | None) -> tuple[str, torch.device]:
    """Which provider runs on which device; the CPU unless one of them is named.

    Args:
        provider: `cpu`, `cuda`, `tensorrt` or onnxruntime's own name; None follows the device.
        device: such as `cuda:1`; None follows the provider.

    Raises:
        UsageError: an unknown name, or a provider that does not run on the device.
    """
    wanted = None if device is None else torch.device(device)
    if provider is None:
        provider = CUDA if wanted is not None and wanted.type == "cuda" else CPU
    full = _SHORT.get(provider, provider)
    if full not in _DEVICES:
        raise UsageError(f"No provider {provider!r}: choose {', '.join(_SHORT)}, or onnxruntime's own name of one.")
    wanted = torch.device(_DEVICES[full]) if wanted is None else wanted
    if wanted.type != _DEVICES[full]:
        raise UsageError(f"{full} does not run on {wanted}. Leave one of provider and device out.")
    return full, wanted


class OnnxSession(Runtime):
    """An open onnxruntime session.

    Args:
        path: the model.
        provider: execution provider (`cpu`, `cuda`, `tensorrt` or its full name); it must be the one in use, since
            onnxruntime falls back without a word.
        device: where it runs; None follows the provider.
        expose: inner values to give as extra outputs, by name.
        io_binding: give onnxruntime the tensors where they lie, instead of arrays on the CPU; None does so where the
            device is not the CPU.

    Raises:
        UsageError: onnxruntime is not installed, or does not have the provider.
        ExportError: onnxruntime refuses the model.
    """

    def __init__(
        self,
        path: Path,
        provider: str | None = None,
        *,
        device: str | torch.device | None = None,
        expose: Sequence[str] = (),
        io_binding: bool | None = None,
    ) -> None:
        self.path = Path(path)
        self.provider, self.device = placement(provider, device)
        self._session = _opened(self.path, self.provider, self.device, expose)
        self._binds = self.device.type != "cpu" if io_binding is None else io_binding
        self._exposed = frozenset(expose)
        self.input_specs = {str(s.name): _spec(s) for s in self._session.get_inputs()}
        self.output_specs = {str(s.name): _spec(s) for s in self._session.get_outputs()}

    @classmethod
    def open(cls, path: Path, manifest: Mapping[str, Any], **options: Any) -> OnnxSession:
        """See `Runtime`."""
        return cls(path, **options)

    @classmethod
    def check(cls, path: Path, manifest: Mapping[str, Any], **options: Any) -> None:
        """See `check_provider`."""
        check_provider(**options)

    def inner_values(self) -> list[str]:
        """Names of what the nodes of the graph give, in order, outputs left out."""
        graph = onnx.load(str(self.path), load_external_data=False).graph
        outputs = {value.name for value in graph.output}
        return [name for node in graph.node for name in node.output if name and name not in outputs]

    def exposing(self, names: Sequence[str]) -> OnnxSession:
        """A second session on the same artifact that gives inner values as outputs too."""
        return OnnxSession(self.path, self.provider, device=self.device, expose=names)

    def _release(self) -> None:
        del self._session

    def _execute(self, feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        try:
            return self._bound(feed) if self._binds else self._on_cpu(feed)
        except Exception as error:
            # onnxruntime raises its own exception types, which share no base class of their own.
            raise ExportError(f"onnxruntime failed on {self.path}: {' '.join(str(error).split())}") from error

    def _on_cpu(self, feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        outputs = self._session.run(None, {name: tensor.numpy() for name, tensor in feed.items()})
        return {name: torch.from_numpy(np.asarray(o)) for name, o in zip(self.outputs, outputs, strict=True)}

    def _bound(self, feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """With inputs and outputs in torch's memory, on the device; an output of unknown size comes over the CPU."""
        binding, place = self._session.io_binding(), (self.device.type, self.device.index or 0)
        for name, tensor in feed.items():
            binding.bind_input(name, *place, _ELEMENTS[tensor.dtype], list(tensor.shape), tensor.data_ptr())
        sizes = open_sizes(feed, self.input_specs)
        held: dict[str, Tensor] = {}
        for name, spec in self.output_specs.items():
            shape = None if name in self._exposed else spec.resolved(sizes)
            if shape is None:
                binding.bind_output(name, "cpu")
                continue
            held[name] = torch.empty(shape, dtype=spec.dtype, device=self.device)
            binding.bind_output(name, *place, _ELEMENTS[spec.dtype], list(shape), held[name].data_ptr())
        if self.device.type == "cuda":  # onnxruntime has a stream of its own
            torch.cuda.current_stream(self.device).synchronize()
        self._session.run_with_iobinding(binding)
        binding.synchronize_outputs()
        values = dict(zip(self.outputs, binding.get_outputs(), strict=True))
        return {
            name: held[name] if name in held else torch.from_numpy(value.numpy().copy()).to(self.device)
            for name, value in values.items()
        }


def _spec(value: Any) -> TensorSpec:
    # An unnamed open size is unlike any other.
    sizes: list[Size] = [s if isinstance(s, int | str) else f"{value.name}.{i}" for i, s in enumerate(value.shape)]
    if value.type not in _DTYPES:
        raise ExportError(f"{value.name} is a {value.type}, which torch has no tensor for.")
    return TensorSpec(tuple(sizes), _DTYPES[value.type])


def check_provider(provider: str | None = None, device: str | torch.device | None = None) -> Any:
    """onnxruntime, if it can run on this provider.

    Raises:
        UsageError: it is not installed or lacks the provider, or torch has no CUDA for it.
    """
    full, placed = placement(provider, device)
    try:
        import onnxruntime
    except ImportError as error:
        raise UsageError(
            "onnxruntime is not installed, and running an ONNX artifact needs it. Install the extra: "
            "pip install 'pumer-compile[cpu]' (or [gpu], never both)."
        ) from error
    if full not in onnxruntime.get_available_providers():
        raise UsageError(
            f"This build of onnxruntime ({onnxruntime.__version__}) does not have {full}; it has "
            f"{', '.join(onnxruntime.get_available_providers())}. Install the extra pumer-compile[gpu] in place of "
            "[cpu], or choose another provider."
        )
    if placed.type == "cuda":
        _check_cuda(full)
    return onnxruntime


def _opened(path: Path, provider: str, device: torch.device, expose: Sequence[str]) -> Any:
    onnxruntime = check_provider(provider, device)
    if device.type == "cuda" and hasattr(onnxruntime, "preload_dlls"):
        onnxruntime.preload_dlls()  # finds the CUDA libraries that torch came with
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only; warnings are about optimisations that do not concern the user
    chosen: dict[str, dict[str, Any]] = {provider: {}}
    if device.type == "cuda":
        chosen[provider] = {"device_id": device.index or 0}
        # What TensorRT does not take runs on the same device. Products in TF32 would flip the reducers' decisions.
        chosen[CUDA] = {"device_id": device.index or 0, "use_tf32": 0}
    with _exposing(path, expose) if expose else nullcontext((_beside_weights(path), None)) as (model, folder):
        if folder is not None:  # weights beside the model are not beside its copy
            options.add_session_config_entry("session.model_external_initializers_file_folder_path", str(folder))
        try:
            session = onnxruntime.InferenceSession(str(model), options, providers=list(chosen.items()))
        except Exception as error:
            # onnxruntime raises its own exception types, which share no base class of their own.
            raise ExportError(f"onnxruntime cannot open {path}: {' '.join(str(error).split())}") from error
    used = str(session.get_providers()[0])
    if used != provider:
        raise UsageError(
            f"onnxruntime fell back to {used}: {provider} cannot be used on this machine, though this build has it. "
            "Its libraries (CUDA, cuDNN, TensorRT 10) or a device are missing; its standard error says which."
        )
    session.disable_fallback()
    return session


def _check_cuda(provider: str) -> None:
    if not torch.cuda.is_available():
        what = "torch is a build without CUDA" if torch.version.cuda is None else "torch finds no CUDA device"
        raise UsageError(
            f"{provider} runs on tensors on a GPU, and {what}. Use a machine with an NVIDIA GPU and a CUDA build of "
            "torch, or the CPU provider."
        )


@contextmanager
def _exposing(path: Path, names: Sequence[str]) -> Iterator[tuple[Path, Path | None]]:
    """A copy of the file with inner values as extra outputs, for as long as it is read, and the folder of its weights;
    on disk, since it may hold all weights. Protobuf messages merge when concatenated."""
    outputs = onnx.GraphProto(output=[onnx.ValueInfoProto(name=name) for name in names])
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / "model.onnx"
        try:
            weights = _copy_graph(path, copy)
            with copy.open("ab") as file:
                file.write(onnx.ModelProto(graph=outputs).SerializeToString())
        except OSError as error:
            raise UsageError(
                f"To see the decisions inside {path}, a copy of it is needed in {tempfile.gettempdir()}, and that "
                f"failed: {error}. Set TMPDIR to a folder with room for it, or compile --with-decisions."
            ) from error
        yield copy, weights


def _copy_graph(path: Path, copy: Path) -> Path | None:
    """Copy a model without the weights beside it, and give the folder where these are; None where it has none.

    onnxruntime takes weights from one folder and follows no link out of it. In a cache of links (that of the Hub) the
    copy therefore names the files that the links lead to.
    """
    names = external_files(path)
    files = {name: companion_of(path, name).resolve() for name in names}
    folders = sorted({file.parent for file in files.values()})
    if len(folders) > 1:
        raise UsageError(
            f"The weights of {path} are in {len(folders)} folders ({', '.join(map(str, folders))}), and onnxruntime "
            "takes them from one to show the decisions inside the model. Put them beside it, or compile "
            "--with-decisions."
        )
    if all(file.name == name for name, file in files.items()):
        shutil.copyfile(path, copy)
    else:
        model = onnx.load(str(path), load_external_data=False)
        for entry in _locations(model):
            entry.value = files[entry.value].name
        onnx.save(model, str(copy))
    return folders[0] if folders else None


def external_files(path: Path) -> list[str]:
    """The names under which an ONNX model looks for the files of weights beside it."""
    with path.open("rb") as file:
        if not os.fstat(file.fileno()).st_size:
            return []
        with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
            if content.find(b"location") < 0:  # most models, which may hold gigabytes
                return []
    return sorted({entry.value for entry in _locations(onnx.load(str(path), load_external_data=False))})


def _locations(model: onnx.ModelProto) -> Iterator[onnx.StringStringEntryProto]:
    """Where the tensors of a model say that they are kept."""
    graphs = [model.graph]
    while graphs:
        graph = graphs.pop()
        attributes = [a for node in graph.node for a in node.attribute]
        graphs += [g for a in attributes for g in (a.g, *a.graphs) if g.node or g.initializer]
        inner = [t for a in attributes for t in (a.t, *a.tensors)]
        for tensor in (*graph.initializer, *inner):
            yield from (entry for entry in tensor.external_data if entry.key == "location")


def _beside_weights(path: Path) -> Path:
    """The path of a model whose weights are beside it: that which it links to, where they are only there."""
    if not path.is_symlink() or all(path.with_name(name).is_file() for name in external_files(path)):
        return path
    return path.resolve()
