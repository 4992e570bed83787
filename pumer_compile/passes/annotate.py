"""Annotate: find the token axes of every value."""

from __future__ import annotations

from ..analysis.annotate import Annotation, annotate
from .manager import Pass, State


class Annotate(Pass):
    """Gives the axes of the captured graph, which is not changed."""

    name = "annotate"
    ensures = (Annotation,)

    def run(self, state: State) -> int:
        """See `Pass`; counts streams."""
        annotation = annotate(state.captured, state.streams)
        state.add(annotation)
        return len(annotation.streams)
