"""Locate: find every attention, its masks, and the residual value that carries its output."""

from __future__ import annotations

from ..analysis.annotate import Annotation
from ..analysis.attention import locate
from ..analysis.marks import Prompt
from ..rewrite.sites import LocatedGraph
from .manager import Pass, State


class Locate(Pass):
    """Gives the attentions of the annotated graph, which is not changed."""

    name = "locate"
    requires = (Annotation,)
    ensures = (LocatedGraph,)

    def run(self, state: State) -> int:
        """See `Pass`; counts attentions."""
        attentions, prompt = locate(state.captured, state.annotation, state.inputs), state.find(Prompt)
        state.add(LocatedGraph(state.annotation, attentions, tuple(prompt.marks) if prompt else (), state.inputs))
        return len(attentions)
