"""`method: evs`: tokens of a film that have changed since the frame before (Bagrov et al., 2025)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from .about import About
from .film import Film

if TYPE_CHECKING:
    from ..reducers import Reducer
    from ..rewrite.sites import Stream


class EVS(Film):
    """Keeps `keep` tokens of a film: all of its first frame, and those least like the one before at the same place.

    The rows of the prompt are compared, as serving engines do it; the paper also compares pixels.

    Args:
        semantics: `reference` and `stable` are the same: tokens stay in their order, ties go to the lowest number.
        keep, outputs: see `Film`; at least the tokens of a frame.
        positions: `original` by default, as published.
    """

    about = About(
        does="keeps the first frame of a film, and the tokens that changed most since the frame before",
        reads="rows of the prompt",
        use="films whose picture stands still for the most part",
        paper="Bagrov et al., EVS, 2025",
        code="vllm-project/vllm and sgl-project/sglang, Apache-2.0",
    )

    method: Literal["evs"] = "evs"
    semantics: Literal["reference", "stable"] = "reference"

    def least(self, stream: Stream) -> int:
        """See `Film.least`: the first frame."""
        return len(stream.crops[0])

    def chooser(self, stream: Stream) -> Reducer:
        """See `Film.chooser`."""
        from ..reducers import ChangeReducer

        return ChangeReducer(stream.crops, self.keep, pinned=stream.pinned)
