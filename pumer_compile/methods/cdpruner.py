"""`method: cdpruner`: image tokens that are relevant to the text and unlike each other (Zhang et al., NeurIPS 2025)."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, model_validator

from ..added_inputs import AddedInput
from ..errors import PlanError
from .about import About
from .clip import clip_config, clip_relevance
from .image_budget import ImageBudget

if TYPE_CHECKING:
    from ..reducers import Reducer
    from ..rewrite.sites import Site, Stream


class CDPruner(ImageBudget):
    """Keeps the `budget` tokens of each image whose determinant is largest, in a kernel of how alike they are to each
    other and how relevant to the text.

    Args:
        semantics: `reference`, the default, compares gains as they are; `stable` does in steps above rounding, and
            takes a budget above the rank of the features (see `Determinantal`).
        variant: `paper`, the default where CLIP is given: relevance is CLIP's, of what leaves a CLIP vision tower, to
            the question. `openvino`, as OpenVINO GenAI has it: the cosine of the rows of the prompt to the mean of its
            words, as the model embeds them.
        relevance_weight: 0..1; how much of the kernel is relevance: all of it in the paper, half in OpenVINO.
        split: of `openvino`: whether each half of an image is chosen from by itself, with half of the budget.
        clip: of `paper`: folder of the CLIP checkpoint that the vision tower is from; the graph takes the question as
            `text_embeds`, `[batch, texts, width]`, as CLIP's text tower gives it.
        text_tower: the same, with the text tower inside the graph, which takes the question's ids, `question_ids`,
            `[batch, length]` (-1 behind the last).
        positions: `compact` in the paper, `original` in OpenVINO (whose text behind the image goes on after the largest
            position that is left: the same where one of the image's last row or column is).
    """

    about = About(
        does="keeps image tokens that are relevant to the question and unlike each other",
        reads="rows of the prompt, its words; or CLIP's text and features that leave the tower",
        use="prompts that ask for one thing in the image; needs no attention",
        paper="Zhang et al., CDPruner, NeurIPS 2025",
        code="Theia-4869/CDPruner, Apache-2.0; openvinotoolkit/openvino.genai, Apache-2.0",
        held="published vectors",
    )

    method: Literal["cdpruner"] = "cdpruner"
    semantics: Literal["reference", "stable"] = "reference"
    variant: Literal["paper", "openvino"] = "openvino"
    relevance_weight: Annotated[float, Field(ge=0, le=1)] = 0.5
    split: bool = True
    clip: str | None = None
    text_tower: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _defaults(cls, given: dict[str, Any]) -> dict[str, Any]:
        folders = sum(given.get(key) is not None for key in ("clip", "text_tower"))
        variant = given.get("variant", "paper" if folders else "openvino")
        if variant == "paper" and folders != 1:
            raise ValueError(
                "`variant: paper` compares the image with the question in CLIP's space: give the folder of the CLIP "
                "checkpoint, as `text_tower` (--text-tower; its text tower becomes part of the graph) or as `clip` "
                "(the graph takes `text_embeds`), one of the two"
            )
        if variant == "openvino" and folders:
            raise ValueError(
                "`clip` and `text_tower` are for `variant: paper`; `openvino` reads the prompt's own words"
            )
        if variant == "paper" and given.get("split"):
            raise ValueError("`split` is for `variant: openvino`; the paper chooses from an image as a whole")
        paper = variant == "paper"
        own = {"relevance_weight": 1.0, "split": False} if paper else {"positions": "original"}
        return {**own, **given, "variant": variant}

    @property
    def adds(self) -> dict[str, AddedInput]:
        """See `Method.adds`: the question."""
        if self.text_tower is not None:
            config = clip_config(Path(self.text_tower))
            return {"question_ids": AddedInput((config["max_position_embeddings"],), ids=config["vocab_size"])}
        if self.clip is not None:
            return {"text_embeds": AddedInput((1, clip_config(Path(self.clip))["projection_dim"]))}
        return {}

    def reducer(self, site: Site, stream: Stream) -> Reducer | None:
        """See `Method.reducer`."""
        from ..analysis.rules import shape
        from ..reducers.relevant import ClipReducer

        mark = site.instead[0]
        self._check_rank(int(shape(mark.node)[2]))
        found = super().reducer(site, stream)
        folder = self.text_tower or self.clip
        if folder is None:
            return found
        clip = clip_relevance(Path(folder), mark, with_text=self.text_tower is not None)
        return ClipReducer(stream.crops, self.budget, self.relevance_weight, clip, order=self.semantics)

    def _check_rank(self, width: int) -> None:
        """A kernel of tokens has the rank of their width at most; twice that, where it is a sum of two."""
        rank = width if self.relevance_weight in (0, 1) else 2 * width
        most = -(-self.budget // 2) if self.split else self.budget
        if self.semantics == "reference" and most > rank:
            raise PlanError(
                f"A budget of {self.budget} asks for {most} tokens none of which is a sum of others, and there are "
                f"{rank} at most, since tokens have a width of {width}: rounding decides what the published code keeps "
                "beyond. Choose a smaller budget, or `semantics: stable`."
            )

    def chooser(self, stream: Stream) -> Reducer:
        """See `ImageBudget.chooser`."""
        from ..reducers.relevant import RelevantReducer

        keys: dict[str, Any] = {"split": self.split, "order": self.semantics, "pinned": stream.pinned}
        return RelevantReducer(stream.crops, self.budget, self.relevance_weight, **keys)
