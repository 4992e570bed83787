"""Rewrite: copy the captured graph with the reducers in it, every size following."""

from __future__ import annotations

import logging

from torch import fx

from ..analysis.attention import mask_kinds
from ..errors import AxisError, PlanError
from ..rewrite.rewriter import Rewriter
from ..rewrite.sites import Insertions, LocatedGraph, cross_modal_layers
from ..rewrite.token_outputs import restoring
from .manager import Pass, ReducedGraph, State

log = logging.getLogger("pumer_compile")


class Rewrite(Pass):
    """Gives the reduced graph."""

    name = "rewrite"
    requires = (LocatedGraph, Insertions)
    ensures = (Rewriter, ReducedGraph)

    def run(self, state: State) -> int:
        """See `Pass`; counts reducers."""
        insertions, attentions = state.insertions, state.attentions
        rewriter = Rewriter(
            state.captured,
            state.annotation,
            mask_kinds(attentions),
            sums=frozenset(node for attention in attentions for node in attention.sums),
            layers=cross_modal_layers(attentions),
        )
        instead = dict(insertions.instead)
        if state.method.outputs == "restored":
            instead |= restoring(state.captured)
        reduced = rewriter.run(insertions.after, instead)
        state.add(rewriter)
        state.add(ReducedGraph(reduced))
        if not insertions.done:
            raise PlanError("Every site of the schedule rounds to nothing pruned. Raise `prune`.")
        _check_alive(insertions, reduced)
        _check_one_pass(insertions)
        aligned, brought_back = rewriter.aligner.count, rewriter.unmerger.count
        log.info(
            "rewrite: %d literals changed, %d values aligned, %d brought back to their old places",
            rewriter.literals,
            aligned,
            brought_back,
        )
        return sum(len(site.reducers) for site, _ in insertions.done)


def _check_alive(insertions: Insertions, reduced: fx.GraphModule) -> None:
    """Something must read what a site reduces."""
    called = {str(node.target) for node in reduced.graph.nodes if node.op == "call_module"}
    for site, plan in insertions.done:
        if not any(name.startswith(f"reducer.{site.name}.") for name in called):
            raise PlanError(
                f"Site {site.described} reduces {' and '.join(site.reducers)} tokens that nothing reads "
                f"after it ({plan.before} to {plan.after}). Leave it out, or choose an earlier one."
            )


def _check_one_pass(insertions: Insertions) -> None:
    """A layer that runs again on other inputs must find them as it did the first time: a text encoded once and fused
    with each image in turn would come to the second one reduced for the first."""
    first: dict[tuple[str, bool], dict[str, int]] = {}
    for site in insertions.sites:
        before = first.setdefault((site.address, site.enters), site.passed)
        if before != site.passed:
            raise AxisError(
                f"Site {site.described} runs more than once (one pass for each image, say): the first time "
                f"its tokens have passed {before} reducers, and then {site.passed}. Its inputs were computed before "
                "both and reduced for the first. Reducing such a model is not supported."
            )
