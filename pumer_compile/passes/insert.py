"""Insert: where the method reduces, and what the rewriter writes there."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from torch import fx

from ..analysis.operators import aten
from ..errors import LocateError
from ..methods.base import Method
from ..rewrite.carried_weights import CarriedWeights
from ..rewrite.insert_reducer import InsertReducer
from ..rewrite.rewriter import Rewriter
from ..rewrite.sites import Insertions, LocatedGraph
from .manager import Pass, State


class Insert(Pass):
    """Chooses the sites of a method."""

    name = "insert"
    requires = (LocatedGraph,)
    ensures = (Insertions,)

    def run(self, state: State) -> int:
        """See `Pass`; counts sites."""
        insertions = plan_insertions(state.get(LocatedGraph), state.method)
        state.add(insertions)
        return len(insertions.sites)


def plan_insertions(graph: LocatedGraph, method: Method) -> Insertions:
    """The sites of a method, and what the rewriter writes there.

    Args:
        graph: captured.
        method: what is asked for.

    Raises:
        LocateError: a site that does not exist, has no residual carrier or cannot be followed.
        PlanError: budgets for tokens that a site does not have.
    """
    if method.marks is not None and not graph.marks:
        scattered = any(node.target is aten.masked_scatter.default for node in graph.annotation.constraints)
        if method.marks.votes and scattered:
            raise LocateError(
                f"`method: {method.method}` reads the attention of a vision tower, and what is scattered into the "
                "prompt comes from none (patches that are projected straight into it, a convolutional tower). "
                "`method: fastv` reads the language model's own attention."
            )
        raise LocateError(
            f"`method: {method.method}` keeps image tokens of a prompt, and nothing is scattered into one: looked "
            "for masked_scatter of a vision tower's features and found none. For models whose text and image meet in "
            "attention use `method: pumer`."
        )
    sites, carried = method.find_sites(graph), CarriedWeights()
    insertions = Insertions(sites, {}, {})
    for node, write in method.replacements(graph, sites).items():
        insertions.instead[node] = partial(_replaced, write, carried)
    for site in sites:
        inserter = InsertReducer(method, graph, site, carried)
        insertions.after |= inserter.after()
        insertions.instead |= inserter.instead()
    return insertions


def _replaced(
    write: Callable[[Rewriter, CarriedWeights], fx.Node | None], carried: CarriedWeights, rewriter: Rewriter
) -> fx.Node | None:
    return write(rewriter, carried)
