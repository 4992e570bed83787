"""Count: the plan, with multiply-adds before and after each site."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from weakref import WeakKeyDictionary

from torch import Tensor, fx

from ..analysis.attention import Attention
from ..analysis.marks import Prompt
from ..analysis.nodes import ancestors
from ..analysis.propagate import ModuleRuns, count_multiply_adds
from ..plan import Plan
from ..reducers import Reducer
from ..rewrite.rewriter import Rewriter
from ..rewrite.sites import Insertions
from .manager import Pass, ReducedGraph, State


class Count(Pass):
    """Gives the plan of a reduced graph."""

    name = "count"
    requires = (ReducedGraph,)
    ensures = (Plan,)

    def run(self, state: State) -> int:
        """See `Pass`; counts sites."""
        insertions, prompt = state.find(Insertions), state.find(Prompt)
        if insertions is None:
            batch = next(iter(state.inputs.values())).shape[0]
            before, after = (
                _sections(module, counted, 0, lambda node: -1)
                for module, counted in (
                    (state.captured, _counted_once(state.captured, state.inputs)),
                    (state.reduced, count_multiply_adds(state.reduced, state.inputs)),
                )
            )
            state.add(Plan((), sum(before) // batch, sum(after) // batch))
            return 1
        layers = tokens_after_layers(state.attentions, insertions, state.rewriter)
        plan = count_plan(state.captured, state.reduced, insertions, state.inputs, layers, state.find(ModuleRuns))
        read = {signal.value for m in state.reduced.modules() if isinstance(m, Reducer) for signal in m.reads}
        places = tuple(prompt.places) if prompt else ()
        state.add(dataclasses.replace(plan, prompts=places, signals=tuple(sorted(read))))
        return len(plan.sites)


def tokens_after_layers(
    attentions: list[Attention], insertions: Insertions, rewriter: Rewriter
) -> dict[str, dict[str, int]]:
    """Tokens by stream after every attention node, by its address (and `@1` where its layer runs again)."""
    # What is reduced before an attention has fewer tokens in it already.
    after = {plan.name: plan.after for site, plan in insertions.done if not site.enters}
    layers: dict[str, dict[str, int]] = {}
    for attention in (a for a in attentions if a.query_axis.streams):
        counts: dict[str, int] = {}
        for axis, dim in ((attention.query_axis, attention.query_dim), (attention.key_axis, attention.key_dim)):
            # A prompt has text on both sides of an image.
            present: dict[str, int] = {}
            for segment in axis.segments:
                if segment.stream:
                    length = rewriter.epochs.length(segment, rewriter.epochs.at(dim))
                    present[segment.stream] = present.get(segment.stream, 0) + length
            counts.update(present)
        name = attention.address + (f"@{attention.call}" if attention.call else "")
        layers[name] = {**counts, **after.get(name, {})}
    return layers


def count_plan(
    captured: fx.GraphModule,
    reduced: fx.GraphModule,
    insertions: Insertions,
    inputs: dict[str, Tensor],
    layers: dict[str, dict[str, int]],
    runs: ModuleRuns | None = None,
) -> Plan:
    """The plan with one sample's multiply-adds before and after, in total and from each site to the next."""
    batch = next(iter(inputs.values())).shape[0]
    carriers = [site.opens for site, _ in insertions.done]
    prefixes = tuple(f"reducer.{site.name}." for site, _ in insertions.done)
    counted = _counted_once(captured, inputs)
    before = _sections(captured, counted, len(carriers), lambda node: carriers.index(node) if node in carriers else -1)
    counted = count_multiply_adds(reduced, inputs, runs)
    after = _sections(reduced, counted, len(carriers), lambda node: _site_of(node, prefixes))
    sites = [
        dataclasses.replace(plan, multiply_adds=(before[i + 1] // batch, after[i + 1] // batch))
        for i, (_, plan) in enumerate(insertions.done)
    ]
    return Plan(tuple(sites), sum(before) // batch, sum(after) // batch, layers)


def _site_of(node: fx.Node, prefixes: tuple[str, ...]) -> int:
    """The site whose reducers a node calls, or -1."""
    called = str(node.target) if node.op == "call_module" else ""
    return next((i for i, prefix in enumerate(prefixes) if called.startswith(prefix)), -1)


# One program is reduced by many schedules; a captured graph is not changed after that. By place and name: nodes would
# keep their module alive.
_captured: WeakKeyDictionary[fx.GraphModule, tuple[object, list[int]]] = WeakKeyDictionary()


def _counted_once(captured: fx.GraphModule, inputs: dict[str, Tensor]) -> dict[fx.Node, int]:
    nodes = list(captured.graph.nodes)
    key = ([node.format_node() for node in nodes], {name: tuple(tensor.shape) for name, tensor in inputs.items()})
    if captured not in _captured or _captured[captured][0] != key:
        counts = count_multiply_adds(captured, inputs)
        _captured[captured] = (key, [counts.get(node, 0) for node in nodes])
    return dict(zip(nodes, _captured[captured][1], strict=True))


def _sections(
    module: fx.GraphModule, counts: dict[fx.Node, int], sites: int, opens: Callable[[fx.Node], int]
) -> list[int]:
    """Multiply-adds of the whole batch before the first site, and from each site to the next. `opens` gives the site
    that a node belongs to, or -1; a site whose reducers nothing reads has none. A captured attention that no output
    needs is not counted: no runtime computes it."""
    totals, section, live = [0] * (sites + 1), 0, ancestors(module.graph.output_node())
    for node in module.graph.nodes:
        section = max(section, opens(node) + 1)
        totals[section] += counts.get(node, 0) if node in live else 0
    return totals
