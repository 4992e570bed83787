"""Eliminate: compute only the positions that something reads. Exact, on any graph.

A classifier reads one token of the last hidden state, so the last layer needs one query: every other row of its
attention, output projection, norms and MLP is computed for nothing. Going backward from the outputs, each value gets a
demand: all of it, or one range along one dimension, the hull of what its readers want. `select` and `slice` are where
ranges are born. What an operator then asks of its inputs follows from the axes that `rules.py` gives it, for the
operators in `EXACT` alone; any other is asked for everything and asks for everything. Going forward, an operator whose
demand is a range gives that range only; values it shares with readers of more are cut for it.
"""

from __future__ import annotations

import copy
import logging
import operator
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from ..analysis.axes import same_size
from ..analysis.cost import multiply_adds, numbers, pays
from ..analysis.dead_code import drop_dead, may_be_changed
from ..analysis.narrow import (
    Cut,
    Narrow,
    Range,
    leaves,
    narrowing,
    positions,
    sliced_range,
)
from ..analysis.nodes import describe, values
from ..analysis.operators import CATS, NEW, PIECES, VIEWS, WORK, aten
from ..analysis.propagate import ModuleRuns, propagate
from ..analysis.rules import shape
from ..errors import PlanError, VerifyError
from ..rewrite.rewriter import keep_buffers_transient
from ..rewrite.sites import Insertions
from .manager import Pass, ReducedGraph, State

log = logging.getLogger("pumer_compile")

Plans = dict[fx.Node, Narrow]


def eliminate(module: fx.GraphModule, runs: ModuleRuns | None = None) -> int:
    """Remove what nothing reads from a graph, in place: dead nodes, and dead positions of what is left.

    Args:
        module: whose nodes know their values (`meta["val"]`), as after capture or `verify`.
        runs: what its modules gave for values of these shapes, if that is known.

    Returns:
        How many nodes were narrowed, and how many matrix products, attentions and convolutions removed.

    Raises:
        VerifyError: an output has another shape or dtype than before, a defect of this pass.
    """
    reducers, products, narrowed = _called(module), _products(module.graph), 0
    drop_dead(module.graph)
    # Again, because what is no longer there reads nothing.
    while plans := profitable(find(module.graph)):
        before = [(node.name, values(node)) for node in _outputs(module)]
        _emit(module.graph, plans)
        drop_dead(module.graph)
        _check(module, before, runs)
        narrowed += len(plans)
    for name in reducers - _called(module):
        module.delete_submodule(name)
    module.recompile()
    return narrowed + products - _products(module.graph)


def _products(graph: fx.Graph) -> int:
    return sum(node.target in WORK for node in graph.nodes)


def _outputs(module: fx.GraphModule) -> list[fx.Node]:
    return [leaf for leaf in leaves(module.graph.output_node().args) if isinstance(leaf, fx.Node)]


def _called(module: fx.GraphModule) -> set[str]:
    return {str(node.target) for node in module.graph.nodes if node.op == "call_module"}


# --- backward: what is wanted -----------------------------------------------------------------------------------


def find(graph: fx.Graph) -> Plans:
    """The operators of which only a range is read, and how each gives it."""
    shared = may_be_changed(graph)
    wants: dict[fx.Node, Range | None] = {}
    plans: Plans = {}
    for node in reversed(graph.nodes):
        if node.op in ("placeholder", "get_attr") or _is_piece(node):
            continue  # pieces go with what divides
        # Pieces are views, also of a part, and would follow a change; they are left alone as all else that may change.
        if node not in shared and node.target in PIECES:
            _narrow_pieces(node, wants, plans)
        elif node not in shared and (wanted := wants.get(node)) is not None:
            plan = narrowing(node, wanted)
            if plan is not None:
                plans[node] = plan
        for leaf in _demands(node, plans.get(node), node in shared):
            _join(wants, leaf)
    return plans


def _demands(node: fx.Node, plan: Narrow | None, shared: bool) -> list[fx.Node | Cut]:
    """What a node asks for: values in whole or in part."""
    if node.target in NEW:
        return []  # a dtype and a device
    if plan is not None:
        return leaves((plan.args, plan.kwargs))
    if node.target is aten.sym_size.int and isinstance(node.meta.get("val"), torch.SymInt):
        return []  # only sizes that are numbers change
    born = None if shared else sliced_range(node)
    source = node.args[0] if node.args else None
    return [Cut(x, born) if born and x is source else x for x in node.all_input_nodes]


def _join(wants: dict[fx.Node, Range | None], leaf: fx.Node | Cut) -> None:
    if isinstance(leaf, fx.Node):
        wants[leaf] = None
        return
    hull = _hull(wants[leaf.node], leaf.range) if leaf.node in wants else leaf.range
    whole = hull is None or hull.length == shape(leaf.node)[hull.dim]
    wants[leaf.node] = None if whole else hull


def _hull(a: Range | None, b: Range | None) -> Range | None:
    """The range that holds both; None (everything) where there is none along one dimension."""
    if a is None or b is None or a.dim != b.dim:
        return None
    return Range(a.dim, min(a.start, b.start), max(a.stop, b.stop))


def _is_piece(node: fx.Node) -> bool:
    source = node.args[0] if node.target is operator.getitem else None
    return isinstance(source, fx.Node) and source.target in PIECES


def _narrow_pieces(node: fx.Node, wants: dict[fx.Node, Range | None], plans: Plans) -> None:
    """A value divided along one dimension and wanted, in every piece, in a range of another."""
    pieces = list(node.users)
    hull = wants.get(pieces[0]) if pieces else None
    for piece in pieces:
        hull = _hull(hull, wants.get(piece))
    if hull is None or not all(map(_is_piece, pieces)) or hull.length == shape(pieces[0])[hull.dim]:
        return
    plan = narrowing(node, hull)
    if plan is not None:
        plans[node] = plan
        plans.update({piece: Narrow(plan.range, piece.args, piece.kwargs) for piece in pieces})


# --- what is worth it -------------------------------------------------------------------------------------------


def profitable(plans: Plans) -> Plans:
    """The plans of those regions whose matrix products shrink by more than what cutting at their borders costs."""
    kept: Plans = {}
    for region in _regions(plans):
        saved = sum(multiply_adds(n) * (1 - plans[n].range.length / shape(n)[plans[n].range.dim]) for n in region)
        saved += sum(map(multiply_adds, _dead_producers(region, plans)))
        cuts = {
            leaf
            for node in region
            for leaf in leaves((plans[node].args, plans[node].kwargs))
            if isinstance(leaf, Cut) and (leaf.node not in plans or plans[leaf.node].range != leaf.range)
        }
        copied = sum(numbers(cut.node) // shape(cut.node)[cut.range.dim] * cut.range.length for cut in cuts)
        if pays(saved, copied=copied):
            kept.update({node: plans[node] for node in region})
    return kept


def _dead_producers(region: set[fx.Node], plans: Plans) -> set[fx.Node]:
    """What is computed for the parts of joined values that a region does not take, and for nothing else."""
    reads = {n: {x.node if isinstance(x, Cut) else x for x in leaves((plans[n].args, plans[n].kwargs))} for n in region}
    found: set[fx.Node] = set()
    stack = [x for node in region for x in node.all_input_nodes]
    while stack:
        node = stack.pop()
        if node not in found and all(user in found or node not in reads.get(user, (node,)) for user in node.users):
            found.add(node)
            stack.extend(node.all_input_nodes)
    return found


def _regions(plans: Plans) -> Iterator[set[fx.Node]]:
    """Narrowed operators that read one another."""
    left = dict.fromkeys(plans)
    while left:
        region: set[fx.Node] = set()
        stack = [next(iter(left))]
        while stack:
            node = stack.pop()
            if node in left:
                del left[node]
                region.add(node)
                stack.extend([*node.all_input_nodes, *node.users])
        yield region


# --- forward: emitting ------------------------------------------------------------------------------------------


def _emit(graph: fx.Graph, plans: Plans) -> None:
    slices: dict[Cut, fx.Node] = {}
    trivial = []
    for node in list(graph.nodes):
        born = sliced_range(node)
        if node in plans:
            plan = plans[node]
            with graph.inserting_before(node):
                take = partial(_materialize_cut, node=node, plans=plans, slices=slices)
                node.args, node.kwargs = map_aggregate((plan.args, plan.kwargs), take)
            if node.target in VIEWS:
                node.target = aten.reshape.default  # a slice has other strides
            if (born is not None and born.dim == plan.range.dim) or (node.target in CATS and len(node.args[0]) == 1):
                trivial.append(node)
        elif born is not None and node.args[0] in plans and _shift(node, born, plans[node.args[0]].range):
            trivial.append(node)
    for node in trivial:
        source = node.args[0] if isinstance(node.args[0], fx.Node) else node.args[0][0]
        node.replace_all_uses_with(source)


def _materialize_cut(leaf: Any, node: fx.Node, plans: Plans, slices: dict[Cut, fx.Node]) -> Any:
    """What a narrowed node reads for a `Cut`."""
    if not isinstance(leaf, Cut):
        return leaf
    source, (dim, start, stop) = leaf.node, leaf.range
    if source in plans:
        have = plans[source].range
        if have == leaf.range:
            return source
        start, stop = start - have.start, stop - have.start
    if leaf not in slices:
        slices[leaf] = node.graph.call_function(aten.slice.Tensor, (source, dim, start, stop))
        slices[leaf].meta.update({k: v for k, v in node.meta.items() if k in ("stack_trace", "nn_module_stack")})
    return slices[leaf]


def _shift(node: fx.Node, born: Range, have: Range) -> bool:
    """Let a `select` or `slice` read a value of which only the range `have` is there; whether it reads all of it."""
    x, read = node.args[0], positions(node)
    if node.target is aten.select.int:
        node.args, node.kwargs = (x, born.dim, born.start - have.start), {}
        return False
    node.args = (x, born.dim, born.start - have.start, born.stop - have.start, read.step)
    node.kwargs = {}
    return born == have and read.step == 1


def _check(module: fx.GraphModule, before: list[tuple[str, Sequence[Tensor]]], runs: ModuleRuns | None) -> None:
    """Propagate shapes through the result, note them, and compare the outputs."""
    inputs = {str(n.target): values(n)[0] for n in module.graph.nodes if n.op == "placeholder" and values(n)}
    found = propagate(module, inputs, runs)
    for node, value in found.items():
        if isinstance(value, Tensor) or (node.op == "call_function" and isinstance(value, list | tuple)):
            node.meta["val"] = value
    for (name, old), node in zip(before, _outputs(module), strict=True):
        new = values(node)
        same = len(old) == len(new) and all(
            a.dtype == b.dtype and len(a.shape) == len(b.shape) and all(map(same_size, a.shape, b.shape))
            for a, b in zip(old, new, strict=True)
        )
        if not same:
            raise VerifyError(
                f"The output {name} ({describe(node)}) was {[list(v.shape) for v in old]} and is "
                f"{[list(v.shape) for v in new]} without its dead tokens. This is a defect of passes/eliminate.py."
            )


# --- the passes -------------------------------------------------------------------------------------------------------


class Eliminate(Pass):
    """Leaves out of a reduced graph what nothing reads."""

    name = "eliminate"
    requires = (ReducedGraph, Insertions)
    optional = True

    def run(self, state: State) -> int:
        """See `Pass`; counts narrowed and removed nodes."""
        matches = eliminate(state.reduced, state.find(ModuleRuns))
        called = _called(state.reduced)
        for site, _ in state.insertions.done:
            if not any(name.startswith(f"reducer.{site.name}.") for name in called):
                log.warning("Site %s has no effect: nothing reads the tokens it reduces. Leave it out.", site.address)
        return matches


class EliminateAlone(Pass):
    """The same without reducers: on a copy of the captured graph, which shares its parameters."""

    name = "eliminate"
    ensures = (ReducedGraph,)

    def run(self, state: State) -> int:
        """See `Pass`; counts narrowed and removed nodes.

        Raises:
            PlanError: there is nothing to leave out.
        """
        graph, new = fx.Graph(), dict[fx.Node, fx.Node]()
        for node in state.captured.graph.nodes:
            new[node] = graph.node_copy(node, new.__getitem__)
        graph.set_codegen(copy.copy(state.captured.graph._codegen))
        reduced = fx.GraphModule(state.captured, graph, class_name="ReducedModule")
        keep_buffers_transient(reduced, state.captured)
        state.add(ReducedGraph(reduced))
        matches = eliminate(reduced)
        if matches == 0:
            raise PlanError(
                f"`method: {state.method.method}` found nothing to leave out: it looked for values that no output "
                "needs, such as the last layer's tokens beside the one that a classifier reads, and this model's "
                "outputs need everything. Keep fewer outputs (--outputs, capture(outputs=...)), name a schedule that "
                "reduces tokens, or compile with `none`."
            )
        return matches
