"""What the backend asks Dynamo about the compilation under way: which function, which models, whose graph.

A backend is given a graph and nothing else. The rest is read from the translator at work; where a version of PyTorch
no longer has it there, the answers are "unknown", and nothing but messages and `pumer_schedule` of a model's
configuration depends on them.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import fx, nn
from torch._guards import CompileContext

log = logging.getLogger("pumer_compile")

_REST_OF = "torch_dynamo_resume_in_"


def _translator() -> Any:
    """Dynamo's instruction translator of the frame being compiled, or None."""
    from torch._dynamo.symbolic_convert import InstructionTranslator

    try:
        return InstructionTranslator.current_tx()
    except AttributeError:
        return None


def callback() -> Any:
    """What stands for one call of `torch.compile`: the same object for all of its graphs. None where unknown."""
    output = getattr(_translator(), "output", None)
    found: Any = getattr(output, "compiler_fn", None)
    while hasattr(found, "_torchdynamo_orig_backend"):
        found = found._torchdynamo_orig_backend
    return found if hasattr(found, "compiler_fn") else None


def function() -> str:
    """The function being compiled, for messages."""
    root = getattr(getattr(_translator(), "output", None), "root_tx", None)
    code = getattr(root, "f_code", None)
    if code is None:
        return "a function"
    name, where = code.co_name, f"{code.co_filename}:{code.co_firstlineno}"
    if name.startswith(_REST_OF):
        name, _, line = name.removeprefix(_REST_OF).rpartition("_at_")
        return f"what is left of {name} after the graph break at {code.co_filename}:{line}"
    return f"{name} at {where}"


def break_after(module: fx.GraphModule) -> str:
    """A sentence on the graph break behind a graph, or ''."""
    reason: Any = getattr(module, "compile_subgraph_reason", None)
    if not getattr(reason, "graph_break", False):
        return ""
    where = "".join(f" at {frame.filename}:{frame.lineno}" for frame in reason.user_stack[-1:])
    why = next((line.strip() for line in reason.reason.splitlines() if line.strip()), "a graph break")
    return f"Dynamo splits the function behind it{where} ({why})."


def recompiles_left() -> int | None:
    """How many more times Dynamo will compile this function, or None where unknown."""
    current = CompileContext.current_compile_id()
    limit = getattr(torch._dynamo.config, "recompile_limit", None)
    count = getattr(current, "frame_compile_id", None)
    return limit - count - 1 if isinstance(limit, int) and isinstance(count, int) else None


def model_configs(graph: fx.Graph) -> Iterator[Any]:
    """The `config` of every module that the graph's parameters belong to, outer modules first.

    Args:
        graph: Dynamo's, whose placeholders know their sources.
    """
    output = getattr(_translator(), "output", None)
    names = {
        "L": getattr(output, "local_scope", None) or {},
        "G": getattr(output, "global_scope", None) or {},
    }
    seen: set[str] = set()
    for node in graph.find_nodes(op="placeholder"):
        for source in _owners(getattr(node, "_dynamo_source", None)):
            name = source.name() if callable(source.name) else source.name
            if name in seen:
                continue
            seen.add(name)
            try:
                # As Dynamo's own guards do it: the name of a source is the expression that reads it.
                owner = eval(name, dict(names))
            except Exception as error:
                log.debug("could not read %s: %s", name, error)
                continue
            if isinstance(owner, nn.Module) and getattr(owner, "config", None) is not None:
                yield owner.config


def _owners(source: Any) -> list[Any]:
    """What a source is read from, outermost first: `L['self']`, `L['self']._modules`, ..."""
    chain = []
    while source is not None:
        chain.append(source)
        source = getattr(source, "base", None)
    return chain[::-1]
