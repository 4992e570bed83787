"""The little of torch's CUDA that an engine needs: a device, a stream, captured graphs."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path

import torch

from ..errors import UsageError
from .tensorrt_library import cuda_device


class Cuda:
    """A device with a stream of its own: TensorRT is slower on the default stream, and graphs cannot be captured there.

    Attributes:
        device: where tensors are.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._stream = torch.cuda.Stream(device)

    @property
    def capability(self) -> str:
        """Such as `8.9`."""
        major, minor = torch.cuda.get_device_capability(self.device)
        return f"{major}.{minor}"

    @property
    def stream(self) -> int:
        """The handle of the stream."""
        return int(self._stream.cuda_stream)

    def active(self) -> AbstractContextManager[None]:
        """Libraries that ask for the current device find this one."""
        return torch.cuda.device(self.device)

    @contextmanager
    def ordered(self) -> Iterator[None]:
        """What is queued on the stream here comes after the caller's work so far, and before what the caller does next.

        So memory that torch gave the caller before, and takes back after, is safe to use meanwhile.
        """
        with self.active():
            current = torch.cuda.current_stream(self.device)
            self._stream.wait_stream(current)
            yield
            current.wait_stream(self._stream)

    def captured(self, launch: Callable[[], None]) -> Callable[[], None]:
        """What replays the work that `launch` queues on the stream; it is called twice, the first time to warm up."""
        with self.active():
            launch()
            self._stream.synchronize()
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, stream=self._stream):
                launch()

        def replay() -> None:
            with torch.cuda.stream(self._stream):
                graph.replay()

        return replay


def open_cuda(path: Path, device: str | torch.device | None) -> Cuda:
    """A device to run an engine on; None takes the current one.

    Raises:
        UsageError: no CUDA device, torch without CUDA, or a device of another kind.
    """
    wanted = torch.device("cuda" if device is None else device)
    if wanted.type != "cuda":
        raise UsageError(f"{path} is a TensorRT engine, which runs on an NVIDIA GPU and not on {wanted}.")
    if cuda_device() is None:
        raise UsageError(
            f"{path} is a TensorRT engine, which runs on an NVIDIA GPU, and there is no CUDA device here. Run it on a "
            "machine with one, or compile to ONNX (-o model.onnx), which runs on the CPU."
        )
    if not torch.cuda.is_available():
        found = (
            f"torch {torch.__version__} is a build without CUDA" if torch.version.cuda is None else "torch finds none"
        )
        raise UsageError(
            f"{path} needs torch to hold its tensors on the GPU. The driver has a device, but {found}. Install a CUDA "
            "build of torch that the driver supports."
        )
    if wanted.index is not None and wanted.index >= torch.cuda.device_count():
        raise UsageError(f"There is no device {wanted}: this machine has {torch.cuda.device_count()} CUDA device(s).")
    return Cuda(torch.device("cuda", torch.cuda.current_device() if wanted.index is None else wanted.index))
