"""`method: dart`: the image tokens that are least like a few pivots (Wen et al., EMNLP 2025)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from ..errors import PlanError
from .about import About
from .base import Method
from .language import InLanguageModel
from .proposing import Ask, Outline

if TYPE_CHECKING:
    from ..reducers import Reducer
    from ..rewrite.sites import LocatedGraph, Site, Stream


class Pivots(BaseModel):
    """How many tokens the others are compared with: of the image, and of the text behind it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    image: Annotated[int, Field(ge=0, strict=True)] = 4
    text: Annotated[int, Field(ge=0, strict=True)] = 4


class Dart(InLanguageModel):
    """Keeps tokens of each image that are unlike each other, after the first `layer` layers of the language model.

    Pivots are the tokens whose keys (of the last of these layers, after rotary embedding) have the largest L1 norms;
    each takes the image tokens that are least like it. Nothing is read of any attention, so it stays fused.

    Args:
        layer: so many language layers see every token; 0: none, and the keys are those of the first layer.
        budget: tokens to keep of each image, its pivots among them. What is left over when the others are shared among
            all pivots goes to the last of them, one each.
        pivots: of each image, and of the text behind it (which stays anyway).
        positions: `original`.
        outputs: `reduced` by default: logits have an entry for each token that is left.
    """

    about = About(
        does="keeps the image tokens that are least like a few pivots, after a layer",
        reads="keys and states inside the language model, no attention",
        use="where attention must stay fused; asks nothing about the question but for pivots in its text",
        paper="Wen et al., DART, EMNLP 2025",
        code="ZichenWen1/DART, Apache-2.0",
        held="published vectors (rows whose pivots are taken in ascending order)",
    )

    method: Literal["dart"] = "dart"
    semantics: Literal["reference"] = "reference"
    layer: Annotated[int, Field(ge=0, strict=True, description="how many language layers see every token, such as 2")]
    budget: Annotated[int, Field(ge=1, strict=True, description="the image tokens to keep, such as 64")]
    pivots: Pivots = Pivots()
    positions: Literal["original"] = "original"

    @classmethod
    def proposals(cls, outline: Outline, ask: Ask) -> Iterator[Method]:
        """See `Method.proposals`: with fewer pivots where tokens, or the text behind the image, are few."""
        for schedule in super().proposals(outline, ask):
            for pivots in (4, 1):
                if pivots <= getattr(schedule, "budget", 0):
                    yield cls(**{**schedule.model_dump(), "pivots": {"image": pivots, "text": pivots}})

    def canonical(self) -> dict[str, Any]:
        """See `Method.canonical`."""
        keys = {"budget": self.budget, "layer": self.layer, "pivots": self.pivots.model_dump()}
        return {**super().canonical(), **keys}

    def find_sites(self, graph: LocatedGraph) -> list[Site]:
        """See `Method.find_sites`: the residual value that enters the first layer with fewer tokens."""
        from ..rewrite.sites import Site

        layers = self.layers_of(graph)
        self.check_layer(layers, self.layer, "layer", least=0)
        following = layers[self.layer]
        self.check_prompt(graph, following, "compares it with the text behind it" if self.pivots.text else "")
        after = self.entering(following)
        graph.last_norm(after)
        images = graph.prompt_images()
        for stream in images:
            text = sum(s.length for s in graph.behind(following.key_axis, stream))
            if text < self.pivots.text:
                raise PlanError(
                    f"`pivots: {{text: {self.pivots.text}}}` are more than the {text} tokens of text behind {stream} "
                    "in the prompt. Choose fewer."
                )
        return [Site(following, after=after, streams=images, keys=layers[max(self.layer - 1, 0)])]

    def reducer(self, site: Site, stream: Stream) -> Reducer | None:
        """See `Method.reducer`."""
        from ..reducers import DartReducer

        image, text = self.pivots.image, self.pivots.text
        if image + text == 0:
            raise PlanError("`pivots: {image: 0, text: 0}` leaves nothing to compare tokens with; choose some.")
        if not image <= self.budget < stream.rows:
            raise PlanError(
                f"A budget of {self.budget} is not from {max(image, 1)} (its pivots) to {stream.rows - 1}: the image "
                f"{stream.name} has {stream.rows} tokens in the prompt. Choose another one, or compile with `none`."
            )
        return DartReducer(stream.tokens, self.budget, (image, text), stream.pinned)
