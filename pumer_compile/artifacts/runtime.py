"""What every runtime has in common: tensors by name in and out, checked against what the artifact takes."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..errors import UsageError

Size = int | str


@dataclass(frozen=True)
class TensorSpec:
    """An input or output of an artifact.

    Attributes:
        shape: an open size (the batch) is a name.
        dtype: of its elements.
    """

    shape: tuple[Size, ...]
    dtype: torch.dtype

    def resolved(self, sizes: Mapping[str, int]) -> tuple[int, ...] | None:
        """The shape with its open sizes filled in; None where one is unknown."""
        found = [sizes.get(size) if isinstance(size, str) else size for size in self.shape]
        return None if None in found else tuple(size for size in found if size is not None)


class Runtime(ABC):
    """An open artifact on a device. It is a `Session`; not for several threads at a time.

    Attributes:
        path: of the artifact.
        provider: what executes it, such as `CPUExecutionProvider` or `tensorrt-rtx`.
        device: where outputs of `call` are.
        input_specs, output_specs: by name, in order.
        closed: whether it was closed.
        pads: whether shorter inputs may be padded to its shapes, as far as its manifest says.
    """

    path: Path
    provider: str
    device: torch.device
    input_specs: dict[str, TensorSpec]
    output_specs: dict[str, TensorSpec]
    closed: bool = False
    pads: bool = True

    @classmethod
    @abstractmethod
    def open(cls, path: Path, manifest: Mapping[str, Any], **options: Any) -> Runtime:
        """Open an artifact.

        Args:
            path: of the artifact.
            manifest: of it.
            **options: those that its format has.

        Raises:
            UsageError: this machine lacks a library or a device.
            ExportError: the runtime refuses the artifact.
        """

    @classmethod
    @abstractmethod
    def check(cls, path: Path, manifest: Mapping[str, Any], **options: Any) -> None:
        """Refuse, without reading the artifact, what `open` would refuse for want of a library or a device.

        Raises:
            UsageError: see `open`.
        """

    @property
    def inputs(self) -> list[str]:
        """Names of the inputs."""
        return list(self.input_specs)

    @property
    def outputs(self) -> list[str]:
        """Names of the outputs."""
        return list(self.output_specs)

    def call(self, batch: Mapping[str, Tensor | np.ndarray[Any, Any]]) -> dict[str, Tensor]:
        """Outputs by name on `device`, from tensors or arrays by input name (cast to the artifact's dtypes, moved to
        `device`).

        Raises:
            UsageError: an input is missing, or has another shape or kind of dtype than the artifact takes; or it was
                closed.
            ExportError: the runtime failed.
        """
        if self.closed:
            raise UsageError(f"{self.path} was closed. Open it again to run it.")
        return self._execute(fitted(as_tensors(batch), self.input_specs, self.device, pads=self.pads))

    def run(self, batch: Mapping[str, Tensor | np.ndarray[Any, Any]]) -> dict[str, np.ndarray[Any, Any]]:
        """`call` with arrays as outputs; bfloat16, which numpy lacks, comes as float32."""
        return {name: to_numpy(tensor) for name, tensor in self.call(batch).items()}

    def close(self) -> None:
        """Give the memory of weights back; nothing runs afterwards."""
        if not self.closed:
            self.closed = True
            self._release()

    @abstractmethod
    def _release(self) -> None:
        """Let go of what the runtime holds."""

    @abstractmethod
    def _execute(self, feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run inputs that were checked, lie on `device`, are contiguous and in the artifact's dtypes."""


def to_numpy(tensor: Tensor) -> np.ndarray[Any, Any]:
    """A tensor's values on the CPU; bfloat16, which numpy lacks, as float32."""
    values = tensor.detach().cpu()
    array: np.ndarray[Any, Any] = (values.float() if values.dtype == torch.bfloat16 else values).numpy()
    return array


def as_tensors(batch: Mapping[str, Tensor | np.ndarray[Any, Any]]) -> dict[str, Tensor]:
    """A batch of tensors and NumPy arrays as tensors; an array's memory is shared where it can be.

    Raises:
        UsageError: a value is neither, or an array of what torch has no dtype for.
    """
    return {name: _as_tensor(name, value) for name, value in batch.items()}


def _as_tensor(name: str, value: Tensor | np.ndarray[Any, Any]) -> Tensor:
    if isinstance(value, Tensor):
        return value
    if not isinstance(value, np.ndarray | np.generic):
        raise UsageError(f"Input {name} is {type(value).__name__}; give a torch tensor or a NumPy array.")
    array = np.asarray(value)
    # torch takes neither negative strides nor the other byte order, and warns of memory that it must not write to.
    if not array.flags.writeable or min(array.strides, default=0) < 0:
        array = array.copy(order="C")
    array = array.astype(array.dtype.newbyteorder("="), copy=False)
    try:
        return torch.from_numpy(array)
    except TypeError as error:
        raise UsageError(f"Input {name} is an array of {array.dtype}, which torch has no dtype for.") from error


def fitted(
    batch: Mapping[str, Tensor],
    specs: Mapping[str, TensorSpec],
    device: torch.device | str = "cpu",
    *,
    pads: bool = True,
) -> dict[str, Tensor]:
    """The inputs of an artifact out of a batch: in its dtypes, contiguous, on its device.

    `pads` says whether shorter inputs may be padded to the artifact's shapes, which is then advised.

    Raises:
        UsageError: one is missing, has another shape, is floating point where whole numbers are taken, or sizes that
            are open but equal differ.
    """
    feed = {}
    for name, spec in specs.items():
        if name not in batch:
            raise UsageError(f"The artifact takes an input {name}; given were {', '.join(batch)}.")
        tensor = batch[name]
        _check_shape(name, tuple(tensor.shape), spec, pads)
        if tensor.is_floating_point() and not spec.dtype.is_floating_point:
            raise UsageError(
                f"Input {name} is {_plain(tensor.dtype)}; the artifact takes {_plain(spec.dtype)}, and rounding would "
                "hide a mistake. Give whole numbers."
            )
        feed[name] = tensor.detach().to(device=device, dtype=spec.dtype).contiguous()
    open_sizes(feed, specs)
    return feed


def _check_shape(name: str, shape: tuple[int, ...], spec: TensorSpec, pads: bool) -> None:
    fits = len(spec.shape) == len(shape) and all(
        isinstance(want, str) or want == have for want, have in zip(spec.shape, shape, strict=True)
    )
    if not fits:
        raise UsageError(
            f"Input {name} has shape {list(shape)}; the artifact was compiled for {list(spec.shape)}. "
            f"Compile again with inputs of this shape{', or pad' if pads else ''}."
        )


def open_sizes(feed: Mapping[str, Tensor], specs: Mapping[str, TensorSpec]) -> dict[str, int]:
    """The open sizes (the batch) by name, from inputs that fit.

    Raises:
        UsageError: two inputs disagree.
    """
    sizes: dict[str, int] = {}
    for name, spec in specs.items():
        for symbol, size in zip(spec.shape, feed[name].shape, strict=True):
            if isinstance(symbol, str) and sizes.setdefault(symbol, size) != size:
                raise UsageError(
                    f"Input {name} has a batch of {size}, another input one of {sizes[symbol]}. Give all inputs the "
                    "same batch."
                )
    return sizes


def _plain(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
