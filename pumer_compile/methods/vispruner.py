"""`method: vispruner`: image tokens by visual cues alone, before the projector (Zhang et al., ICCV 2025)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from .about import About
from .base import ActsOn
from .image_budget import ImageBudget

if TYPE_CHECKING:
    from ..reducers import Reducer
    from ..rewrite.sites import Stream


class VisPruner(ImageBudget):
    """Keeps `budget` tokens of each image: those that the class token attends to, and of the others a diverse few.

    Args:
        semantics: `reference`, the default, is what the published code computes; the result of `stable` does not depend
            on the order of nearly equal similarities.
        budget: tokens to keep of each image; all of them is the published selection too, with nothing pruned.
        important: share of them kept for the attention they get; the others are kept for being unlike each other.
        positions: of the tokens that are left: `compact` (renumbered, as published) or `original` (where they stood in
            the whole prompt).
        outputs: `reduced` by default: logits have an entry for each token that is left.
    """

    about = About(
        does="keeps the image tokens with the most attention, and diverse ones of the rest",
        reads="attention of the class token, features that leave the tower",
        use="any vision-language model with a tower; its prompts ask different questions of one image",
        paper="Zhang et al., VisPruner, ICCV 2025",
        code="Theia-4869/VisPruner, Apache-2.0",
        held="published vectors",
    )

    acts_on: ClassVar[ActsOn] = "tower"
    reads_tower = True
    suggested = 3

    method: Literal["vispruner"] = "vispruner"
    semantics: Literal["reference", "stable"] = "reference"
    important: Annotated[float, Field(ge=0, le=1)] = 0.5

    def chooser(self, stream: Stream) -> Reducer:
        """See `ImageBudget.chooser`."""
        from ..reducers import VisualReducer

        return VisualReducer(stream.crops, self.budget, self.important, order=self.semantics, pinned=stream.pinned)
