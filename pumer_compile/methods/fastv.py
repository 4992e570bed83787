"""`method: fastv`: the image tokens that the last token of a prompt attends to (Chen et al., ECCV 2024)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import Field, field_validator, model_validator

from ..errors import PlanError
from .about import About
from .language import InLanguageModel, in_order

if TYPE_CHECKING:
    from ..reducers import Reducer
    from ..rewrite.sites import LocatedGraph, Site, Stream

EXAMPLE = "{2: 72, 3: 36}"


class FastV(InLanguageModel):
    """Keeps `budget` tokens of each image after the first `layer` layers of the language model, or several times fewer.

    Args:
        layer: the paper's K: so many language layers see every token; the attention of the last of them decides.
        budget: tokens to keep of each image.
        stages: in place of both, after so many layers: so many tokens of each image.
        positions: `original`: of tokens that layers before it have counted already.
        outputs: `reduced` by default: logits have an entry for each token that is left.
    """

    about = About(
        does="keeps the image tokens that the last token of a prompt attends to, after a layer, or fewer in stages",
        reads="attention of the last token in the language model",
        use="every prompt family, with or without a tower; what is kept depends on the question",
        paper="Chen et al., FastV, ECCV 2024",
        code="pkunlp-icler/FastV, no licence file",
        held="published vectors",
    )

    suggested = 2
    method: Literal["fastv"] = "fastv"
    semantics: Literal["reference"] = "reference"
    budget: Annotated[int | None, Field(ge=1, strict=True)] = None
    layer: Annotated[int | None, Field(strict=True)] = None
    stages: dict[int, int] | None = None
    positions: Literal["original"] = "original"

    @field_validator("layer")
    @classmethod
    def _at_least_one(cls, layer: int | None) -> int | None:
        if layer is not None and layer < 1:
            wanted = "the language layers that see every token, at least 1 (whose own attention then decides)"
            raise ValueError(f"`layer` counts {wanted}, got {layer}")
        return layer

    @field_validator("stages", mode="before")
    @classmethod
    def _in_order(cls, stages: object) -> object:
        return None if stages is None else in_order(stages, int, EXAMPLE)

    @field_validator("positions", mode="before")
    @classmethod
    def _original(cls, positions: object) -> object:
        if positions != "original":
            raise ValueError(
                "`method: fastv` leaves tokens at their original positions (layers before it have counted them "
                "already): leave out `positions`"
            )
        return positions

    @model_validator(mode="after")
    def _one_or_several(self) -> FastV:
        one = {"layer": self.layer, "budget": self.budget}
        if self.stages is not None and (given := [f"`{key}`" for key, value in one.items() if value is not None]):
            raise ValueError(f"`stages` says after which layers how many tokens are left: leave out {', '.join(given)}")
        words_of = ("how many language layers see every token, such as 2", "the image tokens to keep, such as 64")
        for key, words in zip(one, words_of, strict=True):
            if self.stages is None and one[key] is None:
                raise ValueError(f"`method: fastv` needs a `{key}`, {words} (or `stages`, such as {EXAMPLE})")
        return self

    def canonical(self) -> dict[str, Any]:
        """See `Method.canonical`."""
        keys = ("budget", "layer") if self.stages is None else ("stages",)
        return {**super().canonical(), **{key: getattr(self, key) for key in keys}}

    def find_sites(self, graph: LocatedGraph) -> list[Site]:
        """See `Method.find_sites`: the attentions of the layers after which there are fewer tokens, with all images."""
        from ..rewrite.sites import Site

        layers, sites, key = self.layers_of(graph, reading=True), [], "layer" if self.stages is None else "stages"
        for layer, budget in (self.stages or {self.layer or 0: self.budget or 0}).items():
            self.check_layer(layers, layer, key)
            one, images = layers[layer - 1], graph.prompt_images()
            self.check_prompt(graph, one, "keeps the image tokens that its last token attends to")
            self.check_seen(graph, layers, layer, {i: f"{key}: {i}" for i in range(1, len(layers))})
            sites.append(Site(one, after=one.carrier, streams=images, keep=budget))
        return sites

    def reducers(self, site: Site, streams: Sequence[Stream]) -> dict[str, Reducer]:
        """See `Method.reducers`."""
        if all(site.keep == stream.rows for stream in streams):
            raise PlanError(
                f"A budget of {site.keep} would reduce nothing: the image has "
                f"{' and '.join(str(s.rows) for s in streams)} tokens ({', '.join(s.name for s in streams)}). Choose a "
                "smaller one, or compile with `none`."
            )
        return super().reducers(site, streams)

    def reducer(self, site: Site, stream: Stream) -> Reducer | None:
        """See `Method.reducer`."""
        from ..reducers import LastQueryReducer

        if site.keep > stream.rows:
            raise PlanError(
                f"A budget of {site.keep} is more than the {stream.rows} tokens of {stream.name} in the prompt. "
                "Choose a smaller one, or `none`."
            )
        return LastQueryReducer(stream.tokens, int(site.keep), stream.pinned)
