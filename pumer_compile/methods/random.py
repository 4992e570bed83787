"""`method: random`: image tokens by lot, a control: a method that does no better has found nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from .about import About
from .control import Control

if TYPE_CHECKING:
    from ..rewrite.sites import Stream


class Random(Control):
    """Keeps `budget` tokens of each image, drawn once when it is compiled: the same places for every sample, others for
    each crop of an image.

    Args:
        seed: of the draw; the same places on every machine.
    """

    about = About(
        does="keeps image tokens drawn by lot, once",
        reads="nothing",
        use="as a control: a method that does no better has found nothing",
    )

    method: Literal["random"] = "random"
    seed: Annotated[int, Field(strict=True)] = 0

    def groups(self, stream: Stream) -> list[list[int]]:
        """See `Control.groups`."""
        from ..reducers.fixed import random_places

        return [
            [crop[i]]
            for number, crop in enumerate(stream.crops)
            for i in random_places(len(crop), min(self.budget, len(crop)), self.seed, number)
        ]
