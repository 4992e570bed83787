"""What PyTorch and Python do again and again while models are captured and converted, and need not do for a test.

Nothing here changes a result. A test session converts hundreds of small models in one process, and then a quarter of
the time goes into work that one conversion of a large model does not feel.
"""

from __future__ import annotations

import copy
import functools
import gc
import logging
import traceback
import types
from typing import Any

import torch._logging._internal as torch_logging
import torch.fx.traceback
import torch.onnx
import torch.utils._traceback as tracebacks


def collect_garbage_seldom() -> None:
    """Graphs are many objects that live long: looking for cycles after every 700 new ones finds next to nothing."""
    gc.set_threshold(50_000, 20, 50)


def keep_what_is_imported() -> None:
    """Modules and collected tests are no garbage: from here on the collector does not look at them."""
    gc.collect()
    gc.freeze()


def convert_faster() -> None:
    """Take out of `torch.onnx.export` what it does anew for every model, when it is first called: it imports much."""
    export = torch.onnx.export

    def first(*args: Any, **kwargs: Any) -> Any:
        torch.onnx.export = export
        _convert_with_one_registry()
        _try_rules_where_their_operator_stands()
        return export(*args, **kwargs)

    torch.onnx.export = functools.wraps(export)(first)


def _convert_with_one_registry() -> None:
    """`torch.onnx` reads the signatures of all its functions anew for every conversion (a third of a second)."""
    from torch.onnx._internal.exporter._registration import ONNXRegistry

    made = functools.cache(ONNXRegistry.from_torchlib.__func__)  # type: ignore[attr-defined]

    def from_torchlib(cls: type[ONNXRegistry], *args: Any, **kwargs: Any) -> ONNXRegistry:
        kept, registry = made(cls, *args, **kwargs), cls()
        registry._opset_version = kept._opset_version
        registry.functions = {name: list(found) for name, found in kept.functions.items()}  # callers may register more
        return registry

    ONNXRegistry.from_torchlib = classmethod(from_torchlib)  # type: ignore[assignment]


def _try_rules_where_their_operator_stands() -> None:
    """onnxscript's optimizer tries each of a hundred rules at each node, and for some reads the whole graph to do so
    (a fifth of a conversion); that the node has another operator than the rule's is seen first here."""
    from onnxscript.rewriter._basics import MatchResult
    from onnxscript.rewriter._matcher import SimplePatternMatcher

    match = SimplePatternMatcher.match

    def match_or_not(self: Any, model: Any, graph: Any, node: Any, **options: Any) -> Any:
        wanted = self.pattern.output_nodes[0]
        if wanted.op.matches(node.op_type) and wanted.domain.matches(node.domain):
            return match(self, model, graph, node, **options)
        return MatchResult().fail("OpType or domain mismatch.", node)

    SimplePatternMatcher.match = match_or_not


def share_provenance() -> None:
    """`torch.fx` copies the whole history of a node for each node made from it; nobody changes a history."""

    class Shallow(types.ModuleType):
        def __getattr__(self, name: str) -> Any:
            return getattr(copy, name)

        @staticmethod
        def deepcopy(value: Any, memo: Any = None) -> Any:
            return list(value) if isinstance(value, list) else copy.deepcopy(value, memo)

    torch.fx.traceback.copy = Shallow("copy")  # type: ignore[attr-defined]


def name_frames_once() -> None:
    """Each node of a traced graph gets the stack of calls it came from, of a hundred frames that are the same again and
    again; a summary of one is not changed, and reads its line of source once."""
    frame = functools.lru_cache(100_000)(traceback.FrameSummary)

    def symbolized(found: Any, skip: int) -> traceback.StackSummary:
        stack = traceback.StackSummary()
        stack.extend(frame(f["filename"], f["line"], f["name"]) for f in reversed(found[skip:]))
        return stack

    tracebacks._extract_symbolized_tb = symbolized


def trace_nothing() -> None:
    """torch writes graphs, stacks and guards of all it traces to a log where that has a reader, and pytest, which reads
    every log, is one. No test looks at it."""
    torch_logging.trace_log = logging.Logger("torch.__trace, which nobody reads")
