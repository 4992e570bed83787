"""`method: vidcom2`: tokens of a film that are unlike the film and unlike their frame (Liu et al., EMNLP 2025)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from .about import About
from .film import Film

if TYPE_CHECKING:
    from ..reducers import Reducer
    from ..rewrite.sites import Stream


class VidCom2(Film):
    """Keeps `keep` tokens of a film, those least like its mean and their frame's, more of frames unlike the others.

    Args:
        semantics: `stable`: as published, the number of tokens depends on the film; here `keep` are shared out.
        keep, outputs: see `Film`.
        positions: `original` by default, as published for Qwen-VL.
    """

    about = About(
        does="keeps the tokens of a film that are least like its mean and their frame's, more of unusual frames",
        reads="rows of the prompt",
        use="films with scenes",
        paper="Liu et al., VidCom2, EMNLP 2025",
        code="xuyang-liu16/VidCom2, Apache-2.0",
    )

    method: Literal["vidcom2"] = "vidcom2"
    semantics: Literal["stable"] = "stable"

    def chooser(self, stream: Stream) -> Reducer:
        """See `Film.chooser`."""
        from ..reducers import UniqueReducer

        return UniqueReducer(stream.crops, self.keep, pinned=stream.pinned)
