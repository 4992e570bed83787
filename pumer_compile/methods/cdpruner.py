"""`method: cdpruner`: image tokens that are relevant to the text and unlike each other (Zhang et al., NeurIPS 2025)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field

from .about import About
from .image_budget import ImageBudget

if TYPE_CHECKING:
    from ..reducers import Reducer
    from ..rewrite.sites import Stream


class CDPruner(ImageBudget):
    """Keeps the `budget` tokens of each image whose determinant is largest, in a kernel of how alike they are to each
    other and how relevant to the text.

    Args:
        semantics: `reference`, the default, compares gains as they are; in `stable` rounding decides nothing between
            tokens that are alike, and a budget above the rank of the features is met (see `Determinantal`).
        variant: `openvino`, as OpenVINO GenAI has it: relevance to the mean of the prompt's words, as the model embeds
            them.
        relevance_weight: 0..1; how much of the kernel is relevance.
        split: whether each half of an image is chosen from by itself, with half of the budget.
    """

    about = About(
        does="keeps image tokens that are relevant to the question and unlike each other",
        reads="rows of the prompt, embeddings of its words",
        use="prompts that ask for one thing in the image; needs no attention",
        paper="Zhang et al., CDPruner, NeurIPS 2025",
        code="Theia-4869/CDPruner, Apache-2.0; openvinotoolkit/openvino.genai, Apache-2.0",
        held="published vectors",
    )

    method: Literal["cdpruner"] = "cdpruner"
    semantics: Literal["reference", "stable"] = "reference"
    variant: Literal["openvino"] = "openvino"
    relevance_weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    split: bool = True

    def chooser(self, stream: Stream) -> Reducer:
        """See `ImageBudget.chooser`."""
        from ..reducers.cdpruner import RelevantReducer

        keys: dict[str, Any] = {"split": self.split, "order": self.semantics, "pinned": stream.pinned}
        return RelevantReducer(stream.crops, self.budget, self.relevance_weight, **keys)
