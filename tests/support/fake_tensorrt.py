"""Stands in for TensorRT and for CUDA, so that what a session asks of them can be tested without a GPU.

An "engine" is an ONNX model, executed by onnxruntime on the CPU out of the memory at the bound addresses. So this tests
our logic (bindings, profiles, casts, graphs, refusals), not TensorRT and not a device. The fake is strict where
TensorRT is: a call out of order, a shape outside the profile or another stream is refused.
"""

from __future__ import annotations

import contextlib
import ctypes
import enum
import json
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest
import torch

from pumer_compile.artifacts.manifest import read_manifest
from pumer_compile.files import sha256_file

STREAM = 4242
VERSION = "1.7.1.116"


class DataType(enum.Enum):
    FLOAT = np.dtype(np.float32)
    HALF = np.dtype(np.float16)
    INT64 = np.dtype(np.int64)
    INT32 = np.dtype(np.int32)
    BOOL = np.dtype(bool)
    FP8 = np.dtype(np.uint8)


class TensorIOMode(enum.Enum):
    INPUT = 1
    OUTPUT = 2


class EngineValidity(enum.IntEnum):
    VALID = 0
    SUBOPTIMAL = 1
    INVALID = 2


class EngineInvalidityDiagnostics(enum.IntFlag):
    VERSION_MISMATCH = 1
    UNSUPPORTED_CC = 2
    OLD_CUDA_DRIVER = 4


class ILogger:
    INTERNAL_ERROR, ERROR, WARNING, INFO, VERBOSE = range(5)


_TYPES = {
    "tensor(float)": DataType.FLOAT,
    "tensor(float16)": DataType.HALF,
    "tensor(int64)": DataType.INT64,
    "tensor(bool)": DataType.BOOL,
}


class Context:
    """An execution context."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.active_optimization_profile = 0
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.addresses: dict[str, int] = {}

    def set_optimization_profile_async(self, index: int, stream: int) -> bool:
        assert stream == STREAM and 0 <= index < self.engine.num_optimization_profiles
        self.active_optimization_profile = index
        self.engine.library.calls.append(("profile", index))
        self.shapes.clear()
        return True

    def set_input_shape(self, name: str, shape: tuple[int, ...]) -> bool:
        low, _, high = self.engine.get_tensor_profile_shape(name, self.active_optimization_profile)
        if not all(a <= b <= c for a, b, c in zip(low, shape, high, strict=True)):
            self.engine.library.say(ILogger.ERROR, f"{name}: {shape} is outside of {low} to {high}")
            return False
        self.shapes[name] = shape
        return True

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        assert set(self.shapes) == set(self.engine.inputs)
        batch = next(iter(self.shapes.values()))[0]
        return tuple(batch if size == -1 else size for size in self.engine.get_tensor_shape(name))

    def set_tensor_address(self, name: str, address: int) -> bool:
        assert name in self.engine.order and address
        self.addresses[name] = address
        return True

    def execute_async_v3(self, stream: int) -> bool:
        assert stream == STREAM and set(self.addresses) == set(self.engine.order)
        if self.engine.library.broken:
            self.engine.library.say(ILogger.ERROR, "an illegal memory access was encountered")
            return False
        feed = {name: self._memory(name).copy() for name in self.engine.inputs}
        for name, value in zip(self.engine.outputs, self.engine.session.run(None, feed), strict=True):
            self._memory(name)[...] = value
        self.engine.library.calls.append(("run", self.shapes[next(iter(self.engine.inputs))][0]))
        return True

    def _memory(self, name: str) -> np.ndarray:
        dtype, shape = self.engine.get_tensor_dtype(name).value, self.get_tensor_shape(name)
        size = int(np.prod(shape)) * dtype.itemsize
        memory = (ctypes.c_char * size).from_address(self.addresses[name])
        return np.frombuffer(memory, dtype=dtype).reshape(shape)


class Engine:
    """An ONNX model that behaves as an engine."""

    def __init__(self, library: FakeLibrary, plan: bytes) -> None:
        self.library = library
        options = onnxruntime.SessionOptions()
        options.log_severity_level = 3
        self.session = onnxruntime.InferenceSession(plan, options, providers=["CPUExecutionProvider"])
        self.inputs = {value.name: value for value in self.session.get_inputs()}
        self.outputs = {value.name: value for value in self.session.get_outputs()}
        self.order = [*self.inputs, *self.outputs]
        self.num_io_tensors = len(self.order)
        self.profiles = library.profiles
        self.num_optimization_profiles = max(1, len(self.profiles))

    def get_tensor_name(self, index: int) -> str:
        return self.order[index]

    def get_tensor_mode(self, name: str) -> TensorIOMode:
        return TensorIOMode.INPUT if name in self.inputs else TensorIOMode.OUTPUT

    def get_tensor_dtype(self, name: str) -> DataType:
        return self.library.odd.get(name) or _TYPES[(self.inputs | self.outputs)[name].type]

    def get_tensor_shape(self, name: str) -> tuple[int, ...]:
        return tuple(s if isinstance(s, int) else -1 for s in (self.inputs | self.outputs)[name].shape)

    def get_tensor_profile_shape(self, name: str, index: int) -> list[tuple[int, ...]]:
        shape = self.get_tensor_shape(name)
        sizes = self.profiles[index] if self.profiles else (1, 1, 1)
        return [tuple(size if s == -1 else s for s in shape) for size in sizes]

    def create_execution_context(self) -> Context | None:
        self.library.calls.append(("context",))
        return None if self.library.no_memory else Context(self)


class FakeLibrary(types.ModuleType):
    """The module: `tensorrt_rtx` or `tensorrt`.

    Attributes:
        calls: what was asked, in order.
        profiles: `(min, opt, max)` of the engine's batch.
        validity: what `get_engine_validity` answers (TensorRT-RTX only).
        refuses, broken, no_memory: deserialization, execution or a context fails.
        odd: another dtype of a binding, by name.
    """

    def __init__(self, name: str, version: str = VERSION, profiles: list[tuple[int, int, int]] | None = None) -> None:
        super().__init__(name)
        self.__version__ = version
        self.profiles = profiles or []
        self.calls: list[tuple[Any, ...]] = []
        self.validity: tuple[EngineValidity, int] = (EngineValidity.VALID, 0)
        self.refuses = self.broken = self.no_memory = False
        self.odd: dict[str, DataType] = {}
        self.Builder = object  # what tells a whole package from a stub
        self.DataType, self.TensorIOMode, self.ILogger = DataType, TensorIOMode, ILogger
        self.EngineValidity, self.EngineInvalidityDiagnostics = EngineValidity, EngineInvalidityDiagnostics
        self.Runtime = self._runtime
        self.logger: Any = None

    def say(self, severity: int, text: str) -> None:
        self.logger.log(severity, text)

    def _runtime(self, logger: Any) -> Any:
        assert isinstance(logger, ILogger)
        self.logger = logger
        runtime = types.SimpleNamespace(deserialize_cuda_engine=self._deserialized)
        if self.__name__ == "tensorrt_rtx":
            runtime.get_engine_validity = lambda plan: self.validity
        return runtime

    def _deserialized(self, plan: bytes) -> Engine | None:
        if self.refuses:
            self.say(ILogger.ERROR, "Serialization assertion failed")
            return None
        return Engine(self, plan)


class HostCuda:
    """Memory of the CPU in place of a GPU's; the "stream" runs at once, and a captured launch runs again."""

    def __init__(self, capability: str = "8.9") -> None:
        self.device, self.capability, self.stream = torch.device("cpu"), capability, STREAM

    def active(self) -> contextlib.AbstractContextManager[None]:
        return contextlib.nullcontext()

    @contextlib.contextmanager
    def ordered(self) -> Iterator[None]:
        yield

    def captured(self, launch: Callable[[], None]) -> Callable[[], None]:
        launch()
        launch()
        return launch


def install(
    monkeypatch: pytest.MonkeyPatch, name: str = "tensorrt_rtx", capability: str = "8.9", **options: Any
) -> FakeLibrary:
    """Put the fakes where the runtime looks for the library and for the device."""
    library = FakeLibrary(name, **options)
    for module in ("tensorrt", "tensorrt_rtx", "tensorrt_rtx_bindings"):
        monkeypatch.setitem(__import__("sys").modules, module, library if module == name else None)
    for user in ("tensorrt", "compatibility"):
        monkeypatch.setattr(f"pumer_compile.runtimes.{user}.open_cuda", lambda path, device: HostCuda(capability))
    device = tuple(int(part) for part in capability.split("."))
    monkeypatch.setattr("pumer_compile.runtimes.tensorrt_library.cuda_device", lambda: device)
    return library


def engine_of(onnx: Path, folder: Path, suffix: str = ".engine", **manifest: Any) -> Path:
    """An "engine" of an ONNX artifact of ours, with the manifest that the exporter writes beside engines."""
    path = folder / f"model{suffix}"
    path.write_bytes(onnx.read_bytes())
    said = {
        **read_manifest(onnx),
        "builder": "tensorrt-rtx",
        "builder_version": VERSION,
        "compute_capabilities": [],
        "device_capability": "8.9",
        "version_compatible": False,
        "profiles": [],
        **manifest,
    }
    described = {"artifact": path.name, "sha256": sha256_file(path), **said}
    path.with_name(f"{path.name}.manifest.json").write_text(json.dumps(described), encoding="utf-8")
    return path
