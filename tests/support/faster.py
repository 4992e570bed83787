"""What PyTorch and Python do again and again while models are captured and converted, and need not do for a test.

Nothing here changes a result. A test session converts hundreds of small models in one process, and then a quarter of
the time goes into work that one conversion of a large model does not feel.
"""

from __future__ import annotations

import copy
import functools
import gc
import sys
import types
from typing import Any

import torch.fx.traceback


def collect_garbage_seldom() -> None:
    """Graphs are many objects that live long: looking for cycles after every 700 new ones finds next to nothing."""
    gc.set_threshold(50_000, 20, 50)


def keep_what_is_imported() -> None:
    """Modules and collected tests are no garbage: from here on the collector does not look at them."""
    gc.collect()
    gc.freeze()


def convert_with_one_registry() -> None:
    """`torch.onnx` reads the signatures of all its functions anew for every conversion (a third of a second).

    Where no test that was collected has imported it there is nothing to do.
    """
    if "torch.onnx._internal.exporter._registration" not in sys.modules:
        return
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    made = functools.cache(ONNXRegistry.from_torchlib.__func__)  # type: ignore[attr-defined]

    def from_torchlib(cls: type[ONNXRegistry], *args: Any, **kwargs: Any) -> ONNXRegistry:
        kept, registry = made(cls, *args, **kwargs), cls()
        registry._opset_version = kept._opset_version
        registry.functions = {name: list(found) for name, found in kept.functions.items()}  # callers may register more
        return registry

    ONNXRegistry.from_torchlib = classmethod(from_torchlib)  # type: ignore[assignment]


def share_provenance() -> None:
    """`torch.fx` copies the whole history of a node for each node made from it; nobody changes a history."""

    class Shallow(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            return getattr(copy, name)

        @staticmethod
        def deepcopy(value: Any, memo: Any = None) -> Any:
            return list(value) if isinstance(value, list) else copy.deepcopy(value, memo)

    torch.fx.traceback.copy = Shallow("copy")  # type: ignore[attr-defined]
