"""`method: uniform`: image tokens at equal distances in raster order, a control."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from .about import About
from .control import Control

if TYPE_CHECKING:
    from ..rewrite.sites import Stream


class Uniform(Control):
    """Keeps `budget` tokens of each image: the middles of as many equal parts of it, in raster order."""

    about = About(
        does="keeps image tokens at equal distances in raster order",
        reads="nothing",
        use="as a control",
    )

    method: Literal["uniform"] = "uniform"

    def groups(self, stream: Stream) -> list[list[int]]:
        """See `Control.groups`."""
        from ..reducers.fixed import even_places

        return [[crop[i]] for crop in stream.crops for i in even_places(len(crop), min(self.budget, len(crop)))]
