"""TensorRT and TensorRT-RTX: which of the two is installed, and what device is there.

Both have the same Python interface. TensorRT tunes an engine for the device it is built on and crashes without one;
TensorRT-RTX builds anywhere and tunes where the engine is loaded.
"""

from __future__ import annotations

import ctypes
import importlib
import importlib.util
import logging
import sys
from dataclasses import dataclass
from typing import Any, Literal, get_args

from ..errors import UsageError

log = logging.getLogger("pumer_compile")

LibraryName = Literal["tensorrt", "tensorrt-rtx"]

# The bindings of TensorRT-RTX alone are enough; the small package `tensorrt_rtx` only imports them.
_MODULES: dict[LibraryName, tuple[str, ...]] = {
    "tensorrt": ("tensorrt",),
    "tensorrt-rtx": ("tensorrt_rtx", "tensorrt_rtx_bindings"),
}
_EXTRAS: dict[LibraryName, str] = {"tensorrt": "tensorrt", "tensorrt-rtx": "rtx"}


@dataclass(frozen=True)
class Library:
    """An importable TensorRT.

    Attributes:
        name: which of the two.
        trt: the module.
    """

    name: LibraryName
    trt: Any

    @property
    def version(self) -> str:
        """Such as `1.7.1.116`."""
        return str(self.trt.__version__)


def load_library(name: str | None = None) -> Library:
    """The library of this name, or the one that can work here.

    Args:
        name: `tensorrt` or `tensorrt-rtx`; None takes TensorRT where it is installed and a device is there, else
            TensorRT-RTX.

    Raises:
        UsageError: another name; not installed; TensorRT without a CUDA device.
    """
    if name is None:
        if cuda_device() is not None and (found := _imported("tensorrt")) is not None:
            return Library("tensorrt", found)
        if (found := _imported("tensorrt-rtx")) is not None:
            return Library("tensorrt-rtx", found)
        raise UsageError(
            "No TensorRT is installed, and engines need one. Install an extra: pip install 'pumer-compile[rtx]' "
            "(TensorRT-RTX, builds without a GPU) or 'pumer-compile[tensorrt]' (on a machine with a GPU)."
        )
    known = get_args(LibraryName)
    if name not in known:
        raise UsageError(f"No builder {name!r}: choose {' or '.join(known)}.")
    library: LibraryName = name  # type: ignore[assignment]  # checked above
    # Standard TensorRT does not survive without a device, so it is not even imported there.
    if library == "tensorrt" and _installed(library) and cuda_device() is None:
        raise UsageError(
            "TensorRT tunes an engine on the GPU it will run on, and there is no CUDA device here. Use a machine with "
            "one, or --builder tensorrt-rtx, which builds without."
        )
    found = _imported(library)
    if found is None:
        raise UsageError(
            f"{name} is not installed. Install the extra: pip install 'pumer-compile[{_EXTRAS[library]}]'."
        )
    return Library(library, found)


def _installed(name: LibraryName) -> bool:
    """Whether there is such a package, without importing it."""
    return any(
        sys.modules[module] is not None if module in sys.modules else importlib.util.find_spec(module) is not None
        for module in _MODULES[name]
    )


def _imported(name: LibraryName) -> Any:
    for module in _MODULES[name]:
        try:
            found = importlib.import_module(module)
        except ImportError:
            continue
        if hasattr(found, "Builder"):
            return found
    return None


def cuda_device() -> tuple[int, int] | None:
    """The compute capability of the first CUDA device, such as (8, 9); None where there is none.

    Asks the driver itself, since torch may be a build without CUDA.
    """
    try:
        cuda = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None
    count, device, major, minor = (ctypes.c_int(0) for _ in range(4))
    if cuda.cuInit(0) != 0 or cuda.cuDeviceGetCount(ctypes.byref(count)) != 0 or count.value == 0:
        return None
    if cuda.cuDeviceGet(ctypes.byref(device), 0) != 0:
        return None
    # 75 and 76: CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR and _MINOR
    for attribute, value in ((75, major), (76, minor)):
        if cuda.cuDeviceGetAttribute(ctypes.byref(value), attribute, device) != 0:
            return None
    return major.value, minor.value


def make_logger(library: Library) -> Any:
    """What a builder or a runtime of the library writes to: `errors` holds its errors in its own words."""
    trt = library.trt

    class Logger(trt.ILogger):  # type: ignore[misc, name-defined]  # the bindings have no types
        """Errors are kept for the exception, warnings are said with `-v`, the rest is for debugging."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self.messages: list[str] = []

        @property
        def errors(self) -> str:
            return " ".join(" ".join(self.messages[-3:]).split())

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self.messages.append(message)
            level = logging.INFO if severity == trt.ILogger.WARNING else logging.DEBUG
            log.log(level, "%s: %s", library.name, message.strip())

    return Logger()
