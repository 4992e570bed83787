"""Tokens and multiply-adds layer by layer."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor, fx

from ..analysis.nodes import ancestors, module_path
from ..analysis.propagate import count_multiply_adds
from ..plan import Plan
from ..reduce import Reduced
from .data import Layer, Tokens

REDUCERS = "the reducers themselves"


def layer_of(node: fx.Node) -> str:
    """The layer that a node is in: the path of its module down to the first number (`encoder.layer.3`), or to the
    second part where there is none."""
    if node.op == "call_module" and str(node.target).startswith("reducer."):
        return REDUCERS
    path = module_path(node)
    numbered = re.match(r"(.*?\.\d+)(\.|$)", path)
    return numbered[1] if numbered else ".".join(path.split(".")[:2])


def _costs(module: fx.GraphModule, inputs: Mapping[str, Tensor]) -> dict[str, int]:
    """Multiply-adds of the whole batch by layer, of what some output needs."""
    live = ancestors(module.graph.output_node())
    found: dict[str, int] = {}
    for node, count in count_multiply_adds(module, inputs).items():
        if count and node in live:
            found[layer_of(node)] = found.get(layer_of(node), 0) + count
    return found


def layers_of(reduced: Reduced) -> list[Layer]:
    """Multiply-adds of each layer for one sample, before and after, in execution order."""
    inputs = reduced.program.inputs
    batch = next(iter(inputs.values())).shape[0]
    before, after = (_costs(module, inputs) for module in (reduced.program.module, reduced.module))
    return [
        Layer(name or "elsewhere", before.get(name, 0) // batch, after.get(name, 0) // batch)
        for name in dict.fromkeys([*before, *after])
    ]


def tokens_of(plan: Plan) -> list[Tokens]:
    """Tokens of each stream after each attention, and how many it has where nothing is reduced."""
    whole: dict[str, int] = {}
    for site in plan.sites:
        for stream, count in site.before.items():
            whole.setdefault(stream, count)
    for counts in plan.layers.values():
        for stream, count in counts.items():
            whole.setdefault(stream, count)
    return [
        Tokens(site, stream, whole[stream], count)
        for site, counts in plan.layers.items()
        for stream, count in counts.items()
    ]
