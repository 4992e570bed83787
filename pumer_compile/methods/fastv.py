"""`method: fastv`: the image tokens that the last token of a prompt attends to (Chen et al., ECCV 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal

from pydantic import Field, field_validator

from ..errors import LocateError, PlanError
from .about import About
from .base import Method, TokenOutputs

if TYPE_CHECKING:
    from ..analysis.attention import Attention
    from ..reducers import Reducer
    from ..rewrite.sites import LocatedGraph, Site, Stream


class FastV(Method):
    """Keeps `budget` tokens of each image after the first `layer` layers of the language model.

    The query that votes stands at the last position of the prompt, so prompts of several lengths are padded in front.

    Args:
        layer: the paper's K: so many language layers see every token; the attention of the last of them decides.
        budget: tokens to keep of each image.
        positions: `original`: of tokens that layers before it have counted already.
        outputs: `reduced` by default: logits have an entry for each token that is left.
    """

    about = About(
        does="keeps the image tokens that the last token of a prompt attends to, after a layer",
        reads="attention of the last token in the language model",
        use="every prompt family, with or without a tower; what is kept depends on the question",
        paper="Chen et al., FastV, ECCV 2024",
        code="pkunlp-icler/FastV, no licence file",
        held="published vectors",
    )

    needs_prompt = True
    cache_lengths: ClassVar[Literal["uniform", "by_layer"]] = "by_layer"

    method: Literal["fastv"] = "fastv"
    semantics: Literal["reference"] = "reference"
    outputs: TokenOutputs = "reduced"
    budget: Annotated[int, Field(ge=1, strict=True, description="the image tokens to keep, such as 64")]
    layer: Annotated[int, Field(strict=True, description="how many language layers see every token, such as 2")]
    positions: Literal["original"] = "original"

    @field_validator("layer")
    @classmethod
    def _at_least_one(cls, layer: int) -> int:
        if layer < 1:
            raise ValueError(
                f"`layer` counts the language layers that see every token, at least 1 (whose own attention then "
                f"decides), got {layer}"
            )
        return layer

    @field_validator("positions", mode="before")
    @classmethod
    def _original(cls, positions: object) -> object:
        if positions != "original":
            raise ValueError(
                "`method: fastv` leaves tokens at their original positions (layers before it have counted them "
                "already): leave out `positions`"
            )
        return positions

    def canonical(self) -> dict[str, object]:
        """See `Method.canonical`."""
        return {**super().canonical(), "budget": self.budget, "layer": self.layer}

    def find_sites(self, graph: LocatedGraph) -> list[Site]:
        """See `Method.find_sites`: the attention of the last language layer that sees every token, with all the images.

        Raises:
            LocateError: no attention over a prompt with its images, or one that cannot be reduced.
            PlanError: there is no such layer, or none after it.
        """
        from ..rewrite.sites import Site

        images, layers = graph.prompt_images(), graph.prompt_layers() or graph.reading_layers()
        if not layers:
            raise LocateError(
                "`method: fastv` reads the attention of a language model, and none was found whose queries and keys "
                f"are the text tokens of a prompt with {' and '.join(images) or 'its image'} among them."
            )
        if self.layer >= len(layers):
            few = f"choose 1 to {len(layers) - 1}" if len(layers) > 1 else "there is none to choose"
            raise PlanError(
                f"`layer: {self.layer}` lets the first {self.layer} language layers see every token and the others "
                f"fewer, and this model has {len(layers)}: {few}."
            )
        attention = layers[self.layer - 1]
        graph.check_reducible(attention)
        _check_prompt(graph, attention, images)
        graph.check_masks(attention)
        self._check_seen(graph, layers, images)
        return [Site(attention, after=attention.carrier, streams=images)]

    def _check_seen(self, graph: LocatedGraph, layers: list[Attention], images: tuple[str, ...]) -> None:
        """What the last token does not see gets no vote, and chance would decide over it."""
        attention = layers[self.layer - 1]
        if not set(images) <= set(attention.query_axis.streams):
            return  # images that are read hold tiles of padding, which nobody sees
        unseen = graph.hidden_from_last(attention, images)
        if not unseen:
            return
        others = [i + 1 for i, other in enumerate(layers[:-1]) if not graph.hidden_from_last(other, images)]
        remedy = (
            f"Choose `layer: {min(others, key=lambda i: abs(i - self.layer))}`, whose last token sees every image token"
            if others
            else "Use a method that reads the vision tower, or a prompt that the window reaches over"
        )
        raise PlanError(
            f"The last token of the prompt does not see all of {' and '.join(unseen)} in language layer {self.layer} "
            f"({attention.described}), whose mask lets it look at a window of tokens; the others would get no vote in "
            f"`method: fastv`. {remedy}."
        )

    def reducers(self, site: Site, streams: Sequence[Stream]) -> dict[str, Reducer]:
        """See `Method.reducers`."""
        if all(self.budget == stream.rows for stream in streams):
            raise PlanError(
                f"A budget of {self.budget} would reduce nothing: the image has "
                f"{' and '.join(str(s.rows) for s in streams)} tokens ({', '.join(s.name for s in streams)}). Choose a "
                "smaller one, or compile with `none`."
            )
        return super().reducers(site, streams)

    def reducer(self, site: Site, stream: Stream) -> Reducer | None:
        """See `Method.reducer`."""
        from ..reducers import LastQueryReducer

        if self.budget > stream.rows:
            raise PlanError(
                f"A budget of {self.budget} is more than the {stream.rows} tokens of {stream.name} in the prompt. "
                "Choose a smaller one, or `none`."
            )
        return LastQueryReducer(stream.tokens, self.budget, stream.pinned)


def _check_prompt(graph: LocatedGraph, attention: Attention, images: tuple[str, ...]) -> None:
    *_, last = attention.query_axis.segments
    if last.stream is None or graph.modality(last.stream) != "text":
        raise LocateError(
            f"The prompt {attention.query_axis} ends with an image, and `method: fastv` keeps the image tokens that "
            "its last token attends to. Compile it for a prompt that ends with text."
        )
    cut = [s for s in attention.query_axis.segments if s.stream in images and not s.whole]
    if cut:
        raise LocateError(
            f"The prompt {attention.query_axis} has {cut[0].length} tokens of {cut[0].stream} apart from the others; "
            "an image is reduced whole."
        )
