"""`method: holov`: image tokens shared out over the whole picture (Zou et al., NeurIPS 2025)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field

from ..errors import PlanError
from .about import About
from .base import ActsOn, Marking, Method
from .image_budget import ImageBudget
from .proposing import Ask, Outline

if TYPE_CHECKING:
    from ..reducers import Reducer
    from ..rewrite.sites import Stream


class HoloV(ImageBudget):
    """Keeps `budget` tokens of each image, shared out over `crops` runs of it by votes and by how varied each is.

    The rows that enter the prompt are compared, and the votes are those of the vision tower.

    Args:
        semantics: `reference`, the default, is what the published code computes: what exceeds a run is lost, and the
            prompt is filled up with zeros at the end of the image; `stable` gives it to the others, in raster order.
            For a tower without a class token the published code is another (Qwen2.5-VL's): its window begins one token
            early, at the token of text in front of the image, which competes; the image's last token always stays,
            beside the budget; and votes are in the order of the tower's windows, so that a token has another one's.
            `reference` is that there, and `stable` the same as elsewhere.
        budget, positions, outputs: see `ImageBudget`; `compact` positions are the published ones.
        crops: runs of neighbours in raster order that an image is cut into (a tile or frame, where it has several).
    """

    about = About(
        does="shares a budget out over runs of the picture, by attention and by how varied each run is",
        reads="attention of the class token, rows of the prompt",
        use="where what matters may stand anywhere in the picture",
        paper="Zou et al., HoloV, NeurIPS 2025",
        code="obananas/HoloV, Apache-2.0",
        held="published vectors",
    )

    acts_on: ClassVar[ActsOn] = "rows"
    reads_tower = True

    method: Literal["holov"] = "holov"
    semantics: Literal["reference", "stable"] = "reference"
    crops: Annotated[int, Field(ge=1, strict=True)] = 16

    @classmethod
    def proposals(cls, outline: Outline, ask: Ask) -> Iterator[Method]:
        """See `Method.proposals`."""
        if outline.crops > 1:
            budget = ask.count("budget", 1, outline.crops - 1, outline.crops // 3)
            yield from cls.in_either_order(budget=budget, crops=min(16, outline.crops))

    @property
    def marks(self) -> Marking | None:
        """See `Method.marks`."""
        return Marking(self.acts_on, self.reads_tower, early=self.semantics == "reference")

    def chooser(self, stream: Stream) -> Reducer:
        """See `ImageBudget.chooser`."""
        from ..reducers import HoloVReducer

        least = min(map(len, stream.crops))
        if self.crops > least:
            raise PlanError(
                f"`crops: {self.crops}` would cut an image of {least} tokens into more runs than it has. Choose fewer."
            )
        if stream.pinned and not stream.early and self.semantics == "reference":
            raise PlanError(
                f"The image has text between its lines, and `semantics: {self.semantics}` of `method: holov` puts its "
                "tokens into an order in which these have no place. Choose `semantics: stable`."
            )
        if self.semantics == "reference" and not (stream.by_class or stream.early):
            raise PlanError(
                f"The vision tower has no class token, and `semantics: {self.semantics}` of `method: holov` is there "
                f"what was published for Qwen2.5-VL: an image in one piece behind a token of text. {stream.name} is "
                "none (tiles, frames or ends of lines, no text in front, or features added by later layers). Choose "
                "`semantics: stable`."
            )
        return HoloVReducer(stream.crops, self.budget, self.crops, order=self.semantics, pinned=stream.pinned)
