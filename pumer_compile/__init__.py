"""pumer-compile: a compiler that makes vision-language transformers cheap to serve.

```python
import pumer_compile as pumer

program = pumer.capture(model, inputs)          # inputs: tensors by forward argument
reduced = pumer.reduce(program, "vilt-vqa")     # reduced.module runs and trains in eager PyTorch
pumer.export(reduced, "model.onnx")             # proved before it is published
report = pumer.parity("model.onnx", model)
outputs = pumer.Engine("model.onnx")(**inputs)  # runs any artifact
```
"""

from __future__ import annotations

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from .errors import PumerError

if TYPE_CHECKING:
    from .artifacts.engine import Engine
    from .artifacts.options import OnnxOptions
    from .capture.capture import Program, capture
    from .capture.image_size import resize_images
    from .distill import Teacher, distillation_loss
    from .exporters import Exported, export
    from .parity.artifact import parity
    from .parity.report import ParityReport
    from .plan import Plan
    from .reduce import Reduced, reduce
    from .report.build import Report, report
    from .runtimes.ort import OnnxSession
    from .schedule import Schedule

__version__ = "0.2.0"

__all__ = [
    "Engine",
    "Exported",
    "OnnxOptions",
    "OnnxSession",
    "ParityReport",
    "Plan",
    "Program",
    "PumerError",
    "Reduced",
    "Report",
    "Schedule",
    "Teacher",
    "capture",
    "distillation_loss",
    "export",
    "parity",
    "reduce",
    "report",
    "resize_images",
]

# Names are imported when they are first asked for (PEP 562): torch and transformers take seconds to load.
_MODULES = {
    "Engine": "artifacts.engine",
    "Exported": "exporters",
    "OnnxOptions": "artifacts.options",
    "OnnxSession": "runtimes.ort",
    "ParityReport": "parity.report",
    "Plan": "plan",
    "Program": "capture.capture",
    "Reduced": "reduce",
    "Report": "report.build",
    "Schedule": "schedule",
    "Teacher": "distill",
    "capture": "capture.capture",
    "distillation_loss": "distill",
    "export": "exporters",
    "parity": "parity.artifact",
    "reduce": "reduce",
    "report": "report.build",
    "resize_images": "capture.image_size",
}
_SUBMODULES = ("exporters",)


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        value = globals()[name] = getattr(importlib.import_module(f".{_MODULES[name]}", __name__), name)
        return value
    if name in _SUBMODULES:
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_SUBMODULES})


class _Package(ModuleType):
    """The type of this module. Importing a submodule binds its name in the package, and three of them have the name of
    a public function (`capture`, `parity`, `reduce`): that name stays the function's."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _MODULES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
