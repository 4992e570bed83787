"""The passes in order: what each requires and ensures, checked, and a history of what each did."""

from __future__ import annotations

import copy
import dataclasses
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from torch import Tensor, fx

from ..analysis.annotate import Annotation, annotate
from ..analysis.attention import Attention, locate, mask_kinds
from ..analysis.nodes import ancestors, describe, values
from ..analysis.propagate import propagate
from ..errors import AxisError, PlanError, PumerError, VerifyError
from ..methods.base import Method
from ..plan import Plan
from ..rewrite.rewriter import Rewriter, keep_buffers_transient
from ..rewrite.sites import cross_modal_layers
from ..rewrite.token_outputs import check_outputs, restoring
from .absorb_single_query import one_query
from .eliminate import eliminate
from .insert import Insertions, plan_insertions
from .lower_einsum import spell_out_einsum
from .prompt import Prompt, spell_out
from .verify import verify

log = logging.getLogger("pumer_compile")


@dataclass
class State:
    """What the passes work on: the captured graph and what each pass adds."""

    captured: fx.GraphModule
    schedule: Method
    inputs: dict[str, Tensor]
    streams: dict[str, str]
    prompt: Prompt | None = None
    annotation: Annotation | None = None
    attentions: list[Attention] | None = None
    insertions: Insertions | None = None
    walk: Rewriter | None = None
    reduced: fx.GraphModule | None = None
    plan: Plan | None = None


@dataclass(frozen=True)
class Pass:
    """A step: what it requires and ensures of `State`, and a function that gives its number of matches; none is an
    error, unless the step is `optional`."""

    name: str
    requires: tuple[str, ...]
    ensures: tuple[str, ...]
    run: Callable[[State], int]
    optional: bool = False


@dataclass(frozen=True)
class Record:
    """What a pass did: matches, graph nodes before and after, seconds."""

    name: str
    matches: int
    nodes_before: int
    nodes_after: int
    seconds: float


@dataclass
class History:
    """Records in order."""

    records: list[Record] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{'pass':<12}{'matches':>9}{'nodes':>14}{'seconds':>9}"]
        for r in self.records:
            lines.append(f"{r.name:<12}{r.matches:>9}{f'{r.nodes_before} -> {r.nodes_after}':>14}{r.seconds:>9.2f}")
        return "\n".join(lines)


def _einsum(state: State) -> int:
    state.captured, matches = spell_out_einsum(state.captured)
    return matches


def _prompt(state: State) -> int:
    if not state.schedule.needs_prompt:
        return 0  # what else is reduced, it is reduced in the graph as it was captured
    state.prompt = spell_out(state.captured, state.inputs, in_tower=state.schedule.reads_tower)
    if state.prompt is None:
        return 0
    state.captured = state.prompt.module
    return len(state.prompt.marks)


def _annotate(state: State) -> int:
    state.annotation = annotate(state.captured, state.streams)
    return len(state.annotation.streams)


def _locate(state: State) -> int:
    assert state.annotation is not None
    state.attentions = locate(state.captured, state.annotation, state.inputs)
    return len(state.attentions)


def _insert(state: State) -> int:
    assert state.annotation is not None and state.attentions is not None
    marks = state.prompt.marks if state.prompt else []
    state.insertions = plan_insertions(state.annotation, state.attentions, state.schedule, marks)
    return len(state.insertions.sites)


def _rewrite(state: State) -> int:
    assert state.annotation is not None and state.attentions is not None and state.insertions is not None
    insertions = state.insertions
    state.walk = Rewriter(
        state.captured,
        state.annotation,
        mask_kinds(state.attentions),
        sums=frozenset(node for attention in state.attentions for node in attention.sums),
        layers=cross_modal_layers(state.attentions),
    )
    instead = dict(insertions.instead)
    if state.schedule.outputs == "restored":
        instead |= restoring(state.captured)
    state.reduced = state.walk.run(insertions.after, instead)
    if not insertions.done:
        raise PlanError("Every site of the schedule rounds to nothing pruned. Raise `prune`.")
    _check_alive(insertions, state.reduced)
    _check_one_pass(insertions)
    log.info("rewrite: %d literals changed, %d values aligned", state.walk.literals, state.walk.aligner.count)
    return sum(len(site.reducers) for site, _ in insertions.done)


def _check_alive(insertions: Insertions, reduced: fx.GraphModule) -> None:
    """Something must read what a site reduces."""
    called = {str(node.target) for node in reduced.graph.nodes if node.op == "call_module"}
    for site, plan in insertions.done:
        if not any(name.startswith(f"reducer.{site.attention.name}.") for name in called):
            raise PlanError(
                f"Site {site.attention.described} reduces {' and '.join(site.reducers)} tokens that nothing reads "
                f"after it ({plan.before} to {plan.after}). Leave it out, or choose an earlier one."
            )


def _check_one_pass(insertions: Insertions) -> None:
    """A layer that runs again on other inputs must find them as it did the first time: a text encoded once and fused
    with each image in turn would come to the second one reduced for the first."""
    first: dict[str, dict[str, int]] = {}
    for site in insertions.sites:
        before = first.setdefault(site.attention.site, site.passed)
        if before != site.passed:
            raise AxisError(
                f"Site {site.attention.described} runs more than once (one pass for each image, say): the first time "
                f"its tokens have passed {before} reducers, and then {site.passed}. Its inputs were computed before "
                "both and reduced for the first. Reducing such a model is not supported."
            )


def _verify(state: State) -> int:
    assert state.reduced is not None and state.walk is not None
    if state.schedule.outputs == "refused":
        check_outputs(state.walk)
    return verify(state.reduced, state.walk)


def _eliminate(state: State) -> int:
    assert state.reduced is not None and state.insertions is not None
    matches = eliminate(state.reduced)
    called = {str(node.target) for node in state.reduced.graph.nodes if node.op == "call_module"}
    for site, _ in state.insertions.done:
        if not any(name.startswith(f"reducer.{site.attention.name}.") for name in called):
            log.warning(
                "Site %s has no effect: nothing reads the tokens it reduces. Leave it out.", site.attention.site
            )
    return matches


def _one_query(state: State) -> int:
    assert state.reduced is not None
    return one_query(state.reduced)


def _eliminate_alone(state: State) -> int:
    """Without reducers: on a copy of the captured graph, which shares its parameters."""
    graph, new = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in state.captured.graph.nodes:
        new[node] = graph.node_copy(node, new.__getitem__)
    graph.set_codegen(copy.copy(state.captured.graph._codegen))
    state.reduced = fx.GraphModule(state.captured, graph, class_name="ReducedModule")
    keep_buffers_transient(state.reduced, state.captured)
    matches = eliminate(state.reduced)
    if matches == 0:
        raise PlanError(
            f"`method: {state.schedule.method}` found nothing to leave out: it looked for values that no output needs, "
            "such as the last layer's tokens beside the one that a classifier reads, and this model's outputs need "
            "everything. Keep fewer outputs (--outputs, capture(outputs=...)), name a schedule that reduces tokens, or "
            "compile with `none`."
        )
    return matches


def _count(state: State) -> int:
    assert state.reduced is not None
    if state.insertions is None:
        batch = next(iter(state.inputs.values())).shape[0]
        before, after = (_sections(m, state.inputs, 0, lambda node: -1) for m in (state.captured, state.reduced))
        state.plan = Plan((), sum(before) // batch, sum(after) // batch)
        return 1
    assert state.attentions is not None and state.walk is not None
    layers = tokens_after_layers(state.attentions, state.insertions, state.walk)
    plan = count_plan(state.captured, state.reduced, state.insertions, state.inputs, layers)
    state.plan = dataclasses.replace(plan, prompts=tuple(state.prompt.places) if state.prompt else ())
    return len(state.plan.sites)


PASSES: tuple[Pass, ...] = (
    Pass("einsum", ("captured",), (), _einsum, optional=True),
    Pass("prompt", ("captured",), (), _prompt, optional=True),
    Pass("annotate", ("captured",), ("annotation",), _annotate),
    Pass("locate", ("annotation",), ("attentions",), _locate),
    Pass("insert", ("attentions",), ("insertions",), _insert),
    Pass("rewrite", ("insertions",), ("walk", "reduced"), _rewrite),
    Pass("verify", ("walk", "reduced"), (), _verify),
    Pass("eliminate", ("reduced",), (), _eliminate, optional=True),
    Pass("one_query", ("reduced",), (), _one_query, optional=True),
    Pass("count", ("reduced",), ("plan",), _count),
)
LOSSLESS: tuple[Pass, ...] = (
    Pass("eliminate", ("captured",), ("reduced",), _eliminate_alone),
    Pass("one_query", ("reduced",), (), _one_query, optional=True),
    Pass("count", ("reduced",), ("plan",), _count),
)
"""The exact passes alone."""


def passes_of(schedule: Method) -> tuple[Pass, ...]:
    """The passes of a schedule's method, in order."""
    return LOSSLESS if schedule.exact else PASSES


def _unforeseen(step: Pass, error: Exception) -> PumerError:
    """What a pass has met that it does not know, with the node it was looking at."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    node, trace = None, error.__traceback__
    while trace is not None:  # the innermost frame that has one
        found = trace.tb_frame.f_locals.get("node")
        node = found if isinstance(found, fx.Node) else node
        trace = trace.tb_next
    at = f" at {describe(node)}" if node is not None else ""
    return PumerError(
        f"Pass {step.name} met something it does not know{at}: {type(error).__name__}: {said.rstrip('.')}. Compile a "
        "part of the model without it (--component, --outputs), or report it with this message and its traceback (-v)."
    )


def run_passes(state: State, passes: tuple[Pass, ...] = PASSES, dump: Path | None = None) -> History:
    """Run passes in order, check what each promises, and record what it did.

    Args:
        state: changed in place.
        passes: which, in order.
        dump: folder to which the graph is written as Python after each pass.

    Raises:
        PumerError: from a pass; VerifyError where a pass breaks its own promise or matches nothing.
    """
    history = History()
    for step in passes:
        missing = [name for name in step.requires if getattr(state, name) is None]
        if missing:
            raise PumerError(f"Pass {step.name} requires {', '.join(missing)}, which no earlier pass gave.")
        before, start = len(_graph(state).nodes), time.perf_counter()
        try:
            matches = step.run(state)
        except PumerError:
            raise
        except Exception as error:
            raise _unforeseen(step, error) from error
        seconds = time.perf_counter() - start
        if matches == 0 and step.optional:
            continue
        broken = [name for name in step.ensures if getattr(state, name) is None]
        if broken or matches == 0:
            why = f"did not give {', '.join(broken)}" if broken else "matched nothing"
            raise VerifyError(f"Pass {step.name} {why}; the graph has {before} nodes.")
        _graph(state).lint()
        history.records.append(Record(step.name, matches, before, len(_graph(state).nodes), seconds))
        log.info("pass %s: %d matches in %.2f s", step.name, matches, seconds)
        if dump is not None:
            _dump(state, dump / f"{len(history.records)}_{step.name}.py")
    return history


def _graph(state: State) -> fx.Graph:
    return (state.reduced or state.captured).graph


def _dump(state: State, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    module = state.reduced or state.captured
    lines = [module.print_readable(print_output=False)]
    if state.annotation is not None and state.reduced is None:
        for node in state.captured.graph.nodes:
            if node.op == "call_function" and values(node):
                axes = ", ".join(map(str, state.annotation.axes(node)))
                lines.append(f"# {node.name}: ({axes})")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def tokens_after_layers(
    attentions: list[Attention], insertions: Insertions, walk: Rewriter
) -> dict[str, dict[str, int]]:
    """Tokens by stream after every attention node, by its address (and `@1` where its layer runs again)."""
    after = {plan.name: plan.after for _, plan in insertions.done}
    layers: dict[str, dict[str, int]] = {}
    for attention in (a for a in attentions if a.query_axis.streams):
        counts: dict[str, int] = {}
        for axis, dim in ((attention.query_axis, attention.query_dim), (attention.key_axis, attention.key_dim)):
            # A prompt has text on both sides of an image.
            present: dict[str, int] = {}
            for segment in axis.segments:
                if segment.stream:
                    length = walk.history.length(segment, walk.history.at(dim))
                    present[segment.stream] = present.get(segment.stream, 0) + length
            counts.update(present)
        name = attention.site + (f"@{attention.call}" if attention.call else "")
        layers[name] = {**counts, **after.get(name, {})}
    return layers


def count_plan(
    captured: fx.GraphModule,
    reduced: fx.GraphModule,
    insertions: Insertions,
    inputs: dict[str, Tensor],
    layers: dict[str, dict[str, int]],
) -> Plan:
    """The plan with one sample's multiply-adds before and after, in total and from each site to the next."""
    batch = next(iter(inputs.values())).shape[0]
    carriers = [site.attention.carrier for site, _ in insertions.done]
    prefixes = tuple(f"reducer.{site.attention.name}." for site, _ in insertions.done)
    before = _sections(captured, inputs, len(carriers), lambda node: carriers.index(node) if node in carriers else -1)
    after = _sections(reduced, inputs, len(carriers), lambda node: _site_of(node, prefixes))
    sites = [
        dataclasses.replace(plan, multiply_adds=(before[i + 1] // batch, after[i + 1] // batch))
        for i, (_, plan) in enumerate(insertions.done)
    ]
    return Plan(tuple(sites), sum(before) // batch, sum(after) // batch, layers)


def _site_of(node: fx.Node, prefixes: tuple[str, ...]) -> int:
    """The site whose reducers a node calls, or -1."""
    called = str(node.target) if node.op == "call_module" else ""
    return next((i for i, prefix in enumerate(prefixes) if called.startswith(prefix)), -1)


def _sections(
    module: fx.GraphModule, inputs: dict[str, Tensor], sites: int, opens: Callable[[fx.Node], int]
) -> list[int]:
    """Multiply-adds of the whole batch before the first site, and from each site to the next. `opens` gives the site
    that a node belongs to, or -1; a site whose reducers nothing reads has none. A captured attention that no output
    needs is not counted: no runtime computes it."""
    _, counts = propagate(module, inputs)
    totals, section, live = [0] * (sites + 1), 0, ancestors(module.graph.output_node())
    for node in module.graph.nodes:
        section = max(section, opens(node) + 1)
        totals[section] += counts.get(node, 0) if node in live else 0
    return totals
