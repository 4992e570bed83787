"""TensorRT and TensorRT-RTX engines: bindings by name, torch's memory, a stream, a profile for each batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..artifacts.profile import Profile
from ..artifacts.runtime import Runtime, TensorSpec, open_sizes
from ..errors import ExportError, UsageError
from .compatibility import check_device, check_engine, check_validity, engine_library
from .cuda import open_cuda
from .tensorrt_library import make_logger

# The only size that is open in an engine of ours; engines have -1 there.
BATCH = "batch"
_DTYPES = {
    "FLOAT": torch.float32,
    "HALF": torch.float16,
    "BF16": torch.bfloat16,
    "INT64": torch.int64,
    "INT32": torch.int32,
    "INT8": torch.int8,
    "UINT8": torch.uint8,
    "BOOL": torch.bool,
}


@dataclass(frozen=True)
class _Captured:
    """A CUDA graph with the memory it reads and writes, and the context that it belongs to."""

    inputs: dict[str, Tensor]
    outputs: dict[str, Tensor]
    replay: Callable[[], None]
    context: Any


class TensorRtSession(Runtime):
    """An open engine.

    With `cuda_graph` the first call with a batch size captures a graph, with memory and a context of its own.

    Args:
        path: the engine.
        manifest: of it; says which library and device it was built for.
        device: such as `cuda:1`; None takes the current one.
        cuda_graph: replay a captured graph.

    Raises:
        UsageError: the library is missing or another version, there is no CUDA device, torch has no CUDA, or the engine
            is for another GPU.
        ExportError: the library refuses the engine.
    """

    def __init__(
        self,
        path: Path,
        manifest: Mapping[str, Any],
        *,
        device: str | torch.device | None = None,
        cuda_graph: bool = False,
    ) -> None:
        self.path = path
        # The device first: standard TensorRT does not survive an import without one.
        self._cuda = open_cuda(path, device)
        self.device = self._cuda.device
        self._library = engine_library(path, manifest)
        self.provider = self._library.name
        check_device(path, manifest, self._cuda.capability)
        self._logger = make_logger(self._library)
        self._engine = self._deserialized(host_code=bool(manifest.get("version_compatible")))
        self._read_bindings()
        self.profiles = self._read_profiles()
        _check_profiles(path, self.profiles, manifest)
        self._context = self._new_context()
        self._wants_graph = cuda_graph
        self._graphs: dict[int, _Captured] = {}

    @classmethod
    def open(cls, path: Path, manifest: Mapping[str, Any], **options: Any) -> TensorRtSession:
        """See `Runtime`."""
        return cls(path, manifest, **options)

    @classmethod
    def check(cls, path: Path, manifest: Mapping[str, Any], **options: Any) -> None:
        """See `check_engine`."""
        check_engine(path, manifest, **options)

    # --- What is in the engine ---

    def _deserialized(self, *, host_code: bool) -> Any:
        plan = self.path.read_bytes()
        with self._cuda.active():
            self._runtime = self._library.trt.Runtime(self._logger)
            # A version compatible engine brings the code that runs it; its hash has been checked.
            self._runtime.engine_host_code_allowed = host_code
            check_validity(self.path, self._library, self._runtime, plan)
            engine = self._runtime.deserialize_cuda_engine(plan)
        if engine is None:
            raise self._failure("could not load")
        return engine

    def _read_bindings(self) -> None:
        engine, given = self._engine, self._library.trt.TensorIOMode.INPUT
        self.input_specs, self.output_specs = {}, {}
        for index in range(engine.num_io_tensors):
            name = engine.get_tensor_name(index)
            dtype = engine.get_tensor_dtype(name).name
            if dtype not in _DTYPES:
                raise ExportError(f"{self.path} has a binding {name} of type {dtype}, which torch has no tensor for.")
            shape = tuple(BATCH if size == -1 else int(size) for size in engine.get_tensor_shape(name))
            specs = self.input_specs if engine.get_tensor_mode(name) == given else self.output_specs
            specs[name] = TensorSpec(shape, _DTYPES[dtype])

    def _read_profiles(self) -> list[Profile]:
        """Batch sizes of each optimization profile; none where the batch is fixed."""
        name = next((name for name, spec in self.input_specs.items() if BATCH in spec.shape), None)
        if name is None:
            return []
        axis, found = self.input_specs[name].shape.index(BATCH), []
        for index in range(self._engine.num_optimization_profiles):
            shapes = self._engine.get_tensor_profile_shape(name, index)
            found.append(Profile(*(int(tuple(shape)[axis]) for shape in shapes)))
        return found

    def _new_context(self) -> Any:
        with self._cuda.active():
            context = self._engine.create_execution_context()
        if context is None:
            raise self._failure("could not make an execution context for")
        return context

    # --- Running ---

    def _release(self) -> None:
        self._graphs.clear()
        del self._context, self._engine  # in this order

    def _execute(self, feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        size = open_sizes(feed, self.input_specs).get(BATCH, 0)
        profile = choose_profile(self.profiles, size) if self.profiles else 0
        if self._wants_graph:
            return self._replayed(feed, profile, size)
        outputs = self._outputs(size)
        with self._cuda.ordered():
            self._bind(self._context, profile, feed, outputs)
            self._enqueue(self._context)
        return outputs

    def _outputs(self, size: int) -> dict[str, Tensor]:
        made = {}
        for name, spec in self.output_specs.items():
            shape = spec.resolved({BATCH: size})
            assert shape is not None  # BATCH is the only open size
            made[name] = torch.empty(shape, dtype=spec.dtype, device=self.device)
        return made

    def _bind(self, context: Any, profile: int, feed: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
        if context.active_optimization_profile != profile:
            self._done(context.set_optimization_profile_async(profile, self._cuda.stream), f"set profile {profile} of")
        for name, tensor in feed.items():
            self._done(context.set_input_shape(name, tuple(tensor.shape)), f"set the shape of {name} in")
        for name, tensor in [*feed.items(), *outputs.items()]:
            self._done(context.set_tensor_address(name, tensor.data_ptr()), f"bind {name} of")
        for name, tensor in outputs.items():
            shape = tuple(int(extent) for extent in context.get_tensor_shape(name))
            if shape != tuple(tensor.shape):
                raise ExportError(
                    f"{self.path} gives {name} as {list(shape)} for this batch, where {list(tensor.shape)} follows "
                    "from its declared shape: a size other than the batch is open. Compile it again."
                )

    def _enqueue(self, context: Any) -> None:
        self._done(context.execute_async_v3(self._cuda.stream), "run")

    def _replayed(self, feed: Mapping[str, Tensor], profile: int, size: int) -> dict[str, Tensor]:
        if size not in self._graphs:
            self._graphs[size] = self._capture(feed, profile, size)
        captured = self._graphs[size]
        for name, tensor in feed.items():
            captured.inputs[name].copy_(tensor)
        with self._cuda.ordered():
            captured.replay()
        # The next replay writes over the graph's own memory.
        return {name: tensor.clone() for name, tensor in captured.outputs.items()}

    def _capture(self, feed: Mapping[str, Tensor], profile: int, size: int) -> _Captured:
        # A graph holds addresses of its context's scratch memory, which other shapes in the same context would move.
        context = self._new_context()
        inputs = {name: tensor.clone() for name, tensor in feed.items()}
        outputs = self._outputs(size)
        with self._cuda.ordered():
            self._bind(context, profile, inputs, outputs)
            capturable = getattr(context, "is_stream_capturable", None)  # TensorRT-RTX alone asks
            if capturable is not None and not capturable(self._cuda.stream):
                raise UsageError(f"{self.provider} cannot capture {self.path} as a CUDA graph. Leave cuda_graph out.")
            replay = self._cuda.captured(lambda: self._enqueue(context))
        return _Captured(inputs, outputs, replay, context)

    def _done(self, succeeded: bool, what: str) -> None:
        if not succeeded:
            raise self._failure(f"could not {what}")

    def _failure(self, what: str) -> ExportError:
        said = self._logger.errors or "it gave no reason"
        self._logger.messages.clear()
        return ExportError(f"{self._library.name} {self._library.version} {what} {self.path}: {said}")


def choose_profile(profiles: list[Profile], size: int) -> int:
    """The profile that contains a batch size; of several the one tuned for the nearest size.

    Raises:
        UsageError: none contains it.
    """
    fitting = [index for index, p in enumerate(profiles) if p.minimum <= size <= p.maximum]
    if not fitting:
        raise UsageError(
            f"No profile of the engine contains a batch of {size}; it has {', '.join(map(str, profiles))}. Split or "
            "pad the batch, or compile with another --profile."
        )
    return min(fitting, key=lambda index: abs(profiles[index].optimum - size))


def _check_profiles(path: Path, found: list[Profile], manifest: Mapping[str, Any]) -> None:
    said = list(manifest.get("profiles") or ())
    if said != [str(profile) for profile in found]:
        raise ExportError(
            f"{path} is not what its manifest describes: that names the profiles {', '.join(said) or 'none'}, and the "
            f"engine has {', '.join(map(str, found)) or 'none'}. Compile it again."
        )
