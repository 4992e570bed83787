"""The outputs of a captured graph by name: which there are, and keeping only some; and inputs that it does not read."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import fx
from torch.utils._pytree import tree_leaves, tree_structure, tree_unflatten
from transformers.exporters.utils import get_leaf_tensors

from .errors import UsageError


def output_nodes(module: fx.GraphModule) -> dict[str, fx.Node]:
    """The nodes whose tensors a graph module returns, by name: the key or field of the model's output that holds each
    (`logits`, `hidden_states.0`), or `output_<i>` where it has none."""
    leaves = tree_leaves(module.graph.output_node().args[0])
    markers = [torch.empty(0) if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
    nodes = {id(m): leaf for m, leaf in zip(markers, leaves, strict=True) if isinstance(leaf, fx.Node)}
    info = getattr(module.graph._codegen, "pytree_info", None)
    spec = None if info is None else info.out_spec
    named = get_leaf_tensors(markers if spec is None else tree_unflatten(markers, spec))
    return {name or f"output_{i}": nodes[id(marker)] for i, (name, marker) in enumerate(named.items())}


def artifact_outputs(module: fx.GraphModule, inputs: Collection[str]) -> list[str]:
    """The names that an artifact gives the outputs of a graph module: a graph may not name an output like an input."""
    return [f"output.{name}" if name in inputs else name for name in output_nodes(module)]


def set_outputs(module: fx.GraphModule, outputs: Mapping[str, Any]) -> None:
    """Make a graph module return a dictionary of given nodes."""
    module.graph.output_node().args = (tuple(outputs.values()),)
    set_output_names(module.graph, list(outputs))
    module.graph.eliminate_dead_code()
    module.recompile()


def set_output_names(graph: fx.Graph, names: list[str]) -> None:
    """Say that the values a graph returns are those of a dictionary with these keys, in order."""
    codegen = graph._codegen
    if hasattr(codegen, "pytree_info"):
        spec = tree_structure(dict.fromkeys(names, 0))
        codegen.pytree_info = codegen.pytree_info._replace(out_spec=spec)


def without_inputs(module: fx.GraphModule, names: Collection[str]) -> None:
    """Let a graph module no longer take given inputs (by keyword), which it does not read; in place."""
    if not names:
        return
    info = vars(module.graph._codegen)["pytree_info"]
    placeholders = module.graph.find_nodes(op="placeholder")
    args, kwargs = tree_unflatten(list(placeholders), info.in_spec)
    for name in names:
        module.graph.erase_node(kwargs.pop(name))
    spec = tree_structure((args, kwargs))
    vars(module.graph._codegen)["pytree_info"] = info._replace(
        in_spec=spec, orig_args=[name for name in info.orig_args if name not in names]
    )
    module.recompile()


def select_outputs(module: fx.GraphModule, wanted: Iterable[str]) -> None:
    """Keep only some outputs; the module then returns a dictionary of them.

    Args:
        module: changed in place.
        wanted: names of outputs; `hidden_states` keeps all of `hidden_states.0`, `hidden_states.1`, ...

    Raises:
        UsageError: the model has no such output; the message lists those it has.
    """
    there, kept = output_nodes(module), {}
    for want in wanted:
        found = {name: node for name, node in there.items() if name == want or name.startswith(f"{want}.")}
        if not found:
            raise UsageError(f"The model has no output {want!r}; it gives {', '.join(there)}.")
        kept.update(found)
    set_outputs(module, {name: node for name, node in there.items() if name in kept})
