"""What PyTorch and Python do again and again while models are captured and converted, and need not do for a test.

Nothing here changes a result. A test session converts hundreds of small models in one process, and then a quarter of
the time goes into work that one conversion of a large model does not feel.
"""

from __future__ import annotations

import copy
import functools
import gc
import inspect
import logging
import sys
import traceback
import types
import weakref
from pathlib import Path
from typing import Any

import torch._logging._internal as torch_logging
import torch.fx.traceback
import torch.onnx
import torch.utils._traceback as tracebacks
from torch.fx.proxy import _STACK_TRACE_ANCHORS
from torch.utils._traceback import CapturedTraceback


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
    """Each node of a traced graph gets the stack of calls it came from, of two hundred frames, pytest's among them, of
    which it keeps those of `forward`: only these are read here, and each line of source once."""
    frame = functools.lru_cache(100_000)(traceback.FrameSummary)

    def symbolized(found: Any, skip: int) -> traceback.StackSummary:
        stack = traceback.StackSummary()
        stack.extend(frame(f["filename"], f["line"], f["name"]) for f in reversed(found[skip:]))
        return stack

    tracebacks._extract_symbolized_tb = symbolized

    class Frames(CapturedTraceback):
        """The frames that a tracer keeps which keeps those of `forward` alone."""

        @staticmethod
        def extract(*, script: bool = False, cpp: bool = False, skip: int = 0) -> CapturedTraceback:
            caller = sys._getframe(1)
            if getattr(caller.f_locals.get("self"), "_record_forward_stack_traces_only", False):
                return Frames(caller)
            return CapturedTraceback.extract(script=script, cpp=cpp, skip=skip + 1)

        def summary(self) -> traceback.StackSummary:
            stack, found = traceback.StackSummary(), self.tb
            while found is not None:
                file, name = found.f_code.co_filename, found.f_code.co_name
                if name == "forward" or file.endswith("torch/__init__.py") or (file, name) in _STACK_TRACE_ANCHORS:
                    stack.append(frame(file, found.f_lineno, name))
                found = found.f_back
            stack.reverse()
            return stack

    torch.fx.proxy.CapturedTraceback = Frames  # type: ignore[misc]


def write_code_when_called() -> None:
    """`torch.export` writes the Python of a graph anew after each of a dozen steps, and most of it is called by nobody:
    here it is written when somebody calls or reads it. The graphs that others make, this package's among them, are
    written at once as ever: one that is changed after that and not written again must show in a test."""
    recompile = torch.fx.GraphModule.recompile
    folder = Path(torch.__file__).parent
    lazy = tuple(f"{folder}/{part}" for part in ("export/", "_export/", "fx/passes/split", "fx/experimental/proxy_"))
    inside = {f"{folder}/{part}.py" for part in ("fx/graph_module", "fx/_lazy_graph_module", "nn/modules/module")}

    def write(module: torch.fx.GraphModule) -> Any:
        if isinstance(vars(type(module)).get("forward"), Unwritten):
            del type(module).forward
        return recompile(module)

    class Unwritten:
        """`forward` of a graph module (each has a class of its own) whose code is not yet written."""

        def __init__(self, module: torch.fx.GraphModule) -> None:
            self.module = weakref.ref(module)

        def __get__(self, instance: torch.fx.GraphModule | None, owner: type[torch.fx.GraphModule]) -> Any:
            module = instance or self.module()
            assert module is not None
            write(module)
            return owner.forward if instance is None else instance.forward

    class Written:
        """An attribute that is set as code is written."""

        def __init__(self, name: str) -> None:
            self.name = name

        def __get__(self, instance: torch.fx.GraphModule | None, owner: type) -> Any:
            if instance is None:
                return self
            if isinstance(vars(type(instance)).get("forward"), Unwritten):
                write(instance)
            if self.name not in vars(instance):
                raise AttributeError(self.name)
            return vars(instance)[self.name]

        def __set__(self, instance: torch.fx.GraphModule, value: Any) -> None:
            vars(instance)[self.name] = value

    def recompile_later(self: torch.fx.GraphModule) -> Any:
        caller = sys._getframe(1)
        while caller.f_code.co_filename in inside and caller.f_back is not None:
            caller = caller.f_back
        if not caller.f_code.co_filename.startswith(lazy):
            return write(self)
        if isinstance(codegen := self._graph._codegen, torch.fx.graph._PyTreeCodeGen):
            self._in_spec, self._out_spec = codegen.pytree_info.in_spec, codegen.pytree_info.out_spec
        type(self).forward = Unwritten(self)  # type: ignore[assignment]
        return None

    for name in ("_code", "_lineno_map", "_prologue_start"):
        setattr(torch.fx.GraphModule, name, Written(name))
    torch.fx.GraphModule.recompile = recompile_later  # type: ignore[method-assign]


def read_sources_once() -> None:
    """transformers' exporter reads the source of sixty classes for each model, and Python looks for the end of each by
    its tokens (a twentieth of a capture)."""
    inspect.getsource = functools.lru_cache(1000)(inspect.getsource)


def trace_nothing() -> None:
    """torch writes graphs, stacks and guards of all it traces to a log where that has a reader, and pytest, which reads
    every log, is one. No test looks at it."""
    torch_logging.trace_log = logging.Logger("torch.__trace, which nobody reads")
