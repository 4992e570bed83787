"""Insert: where the method reduces, and what the rewriter writes there."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

from torch import fx

from ..analysis.annotate import Annotation
from ..analysis.attention import Attention
from ..errors import LocateError
from ..methods.base import Method
from ..plan import SitePlan
from ..rewrite.carried_weights import CarriedWeights
from ..rewrite.insert_reducer import InsertReducer
from ..rewrite.rewriter import Rewriter
from ..rewrite.sites import LocatedGraph, Site
from .prompt import Mark

Action = Callable[[Rewriter], fx.Node | None]


@dataclass
class Insertions:
    """What the rewriter does beside copying nodes.

    Attributes:
        sites: in execution order.
        after: what follows a captured node.
        instead: what takes the place of one.
    """

    sites: list[Site]
    after: dict[fx.Node, Action]
    instead: dict[fx.Node, Action]

    @property
    def done(self) -> list[tuple[Site, SitePlan]]:
        """Sites that were reduced, with their plans, in execution order."""
        return [(site, site.plan) for site in self.sites if site.plan is not None]


def plan_insertions(
    annotation: Annotation, attentions: list[Attention], method: Method, marks: Sequence[Mark] = ()
) -> Insertions:
    """Choose the sites of a method.

    Args:
        annotation: axes of the captured graph.
        attentions: every attention, in execution order.
        method: what is asked for.
        marks: where image tokens leave a vision tower for a prompt, or enter the prompt.

    Raises:
        LocateError: a site that does not exist, has no residual carrier or cannot be followed.
        PlanError: budgets for tokens that a site does not have.
    """
    if method.needs_prompt and not marks:
        raise LocateError(
            f"`method: {method.method}` keeps image tokens of a prompt, and nothing is scattered into one: looked "
            "for masked_scatter of a vision tower's features and found none. For models whose text and image meet in "
            "attention use `method: pumer`."
        )
    graph = LocatedGraph(annotation, attentions, tuple(marks))
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
