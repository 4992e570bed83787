"""`method: divprune`: image tokens that are unlike each other, where they enter the prompt (Alvar et al., CVPR 2025).

It reads neither attention nor text, so every model whose image stands in a prompt can be reduced by it. The published
repository is non-commercial (CC BY-NC 4.0): this is written from the paper.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

from .about import About
from .image_budget import ImageBudget

if TYPE_CHECKING:
    from ..reducers import Reducer
    from ..rewrite.sites import Stream


class DivPrune(ImageBudget):
    """Keeps `budget` tokens of each image such that the two most alike of them are as unlike as can be, found greedily.

    The published code looks for the image behind 35 tokens of text, and gives every row of a batch the choice of the
    first; here the image is found, and each row chooses for itself.

    Args:
        semantics: `reference`, the default, compares distances as they are; in `stable` rounding does not decide
            between tokens that are alike (see `FarthestPoints`).
    """

    about = About(
        does="keeps image tokens that are as unlike each other as can be",
        reads="rows of the prompt",
        use="every family, with or without a tower; what is kept does not depend on the question",
        paper="Alvar et al., DivPrune, CVPR 2025",
        code="vbdi/divprune, CC BY-NC 4.0 (not used)",
        held="published vectors",
    )

    method: Literal["divprune"] = "divprune"
    semantics: Literal["reference", "stable"] = "reference"

    def chooser(self, stream: Stream) -> Reducer:
        """See `ImageBudget.chooser`."""
        from ..reducers.divprune import DiverseReducer

        return DiverseReducer(stream.crops, self.budget, order=self.semantics, pinned=stream.pinned)
