"""The formats of artifacts: one record each, and `FORMATS`, which everything that depends on a suffix asks.

A format of your own needs a writer (`exporters/base.py`), a runtime (`artifacts/runtime.py`) and a record here.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import UsageError

if TYPE_CHECKING:
    from .runtime import Runtime


@dataclass(frozen=True)
class Format:
    """A format of artifacts.

    Attributes:
        name: in the plural, as messages say it.
        suffixes: of its artifacts, the usual one first.
        writer: the class that writes them. It and `runtime` are `module:class` in this package, loaded when they are
            needed: a format whose libraries are not installed is in nobody's way.
        runtime: the class that runs them, a `Runtime`.
        options: of `open_session` that the runtime has.
        embeds_manifest: whether the manifest lies in the artifact; else it lies beside it.
    """

    name: str
    suffixes: tuple[str, ...]
    writer: str
    runtime: str
    options: tuple[str, ...] = ()
    embeds_manifest: bool = False

    def load_writer(self) -> Any:
        """The class that writes artifacts; its type is of a later stage (`exporters.base.Writer`)."""
        return _loaded(self.writer)

    def load_runtime(self) -> type[Runtime]:
        """The class that runs artifacts."""
        found: type[Runtime] = _loaded(self.runtime)
        return found


def _loaded(place: str) -> Any:
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(f"pumer_compile.{module}"), name)


ONNX = Format(
    "ONNX artifacts under onnxruntime",
    (".onnx",),
    writer="exporters.onnx:OnnxWriter",
    runtime="runtimes.ort:OnnxSession",
    options=("provider", "device", "expose"),
    embeds_manifest=True,
)
ENGINE = Format(
    "TensorRT engines",
    (".engine", ".plan"),
    writer="exporters.tensorrt:EngineWriter",
    runtime="runtimes.tensorrt:TensorRtSession",
    options=("device", "cuda_graph"),
)
OPENVINO = Format(
    "OpenVINO models",
    (".xml",),
    writer="exporters.openvino:OpenVinoWriter",
    runtime="runtimes.openvino:OpenVinoSession",
)
FORMATS = (ONNX, ENGINE, OPENVINO)


def find_format(path: Path) -> Format | None:
    """The format that the suffix of a path says; None where there is none of that suffix."""
    return next((known for known in FORMATS if path.suffix in known.suffixes), None)


def format_of(path: Path) -> Format:
    """The format of an artifact.

    Raises:
        UsageError: none has its suffix.
    """
    found = find_format(path)
    if found is None:
        raise UsageError(
            f"Nothing here runs {path.suffix or 'a file without suffix'!r} ({path}); {', '.join(suffixes(FORMATS))}."
        )
    return found


def suffixes(formats: tuple[Format, ...]) -> list[str]:
    """The suffixes of these formats, in order."""
    return [suffix for known in formats for suffix in known.suffixes]


def check_options(path: Path, **given: Any) -> dict[str, Any]:
    """The options of `open_session` that were given, if the artifact's format has them all.

    Raises:
        UsageError: an option of other formats; or no format has the artifact's suffix.
    """
    chosen = {name: value for name, value in given.items() if value or value == ""}
    known = format_of(path).options
    for name in chosen:
        if name not in known:
            raise UsageError(f"{name} is for {takers(name)}, and {path} is none. Leave it out.")
    return chosen


def takers(option: str) -> str:
    """The formats that have an option of `open_session`, in words."""
    return " and ".join(known.name for known in FORMATS if option in known.options)
