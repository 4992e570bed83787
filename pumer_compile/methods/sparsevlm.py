"""`method: sparsevlm`: the image tokens that a prompt's visual words look at (Zhang et al., ICML 2025)."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ..errors import PlanError
from .about import About
from .base import Method
from .language import InLanguageModel, in_order
from .proposing import Ask, Outline

if TYPE_CHECKING:
    from ..reducers import Reducer
    from ..rewrite.sites import LocatedGraph, Site, Stream

EXAMPLE = "{3: 303, 7: 110, 16: 36}"


def _counts(given: object) -> dict[int, int]:
    return in_order(given, int, EXAMPLE)


def _share(given: object) -> float:
    if isinstance(given, bool) or not isinstance(given, int | float) or not 0 < given <= 1:
        raise ValueError(f"a share of the text behind the image, above 0 and at most 1, such as 0.5; got {given!r}")
    return given


class SparseVLM(InLanguageModel):
    """Keeps fewer tokens of each image after some layers of the language model, by the attention of raters.

    Raters are the tokens of the text behind the image that have the most to do with it, by products of the embeddings
    of both as they enter the language model. The attention of the last layer before a stage decides.

    Args:
        semantics: `stable`: as published, how many rate depends on the text, and clusters begin with noise; here a
            share rates, and of equally dense tokens the lowest index comes first.
        stages: after so many language layers: the tokens of each image that stay.
        raters: the share of the text behind the image that rates, the same tokens at every stage.
        recycle: of the tokens that go, the share with the most attention that is merged into a tenth as many, which
            stay beside those that `stages` says. 0, the default, is the published version 2.0; 0.3 is version 1.
        positions: `original`: of tokens that layers before a stage have counted already.
        outputs: `reduced` by default: logits have an entry for each token that is left.
    """

    about = About(
        does="keeps the image tokens that the visual words of a prompt attend to, fewer after every stage",
        reads="attention of the text behind the image in the language model, and embeddings that enter it",
        use="long questions, few of whose words are about the image",
        paper="Zhang et al., SparseVLM, ICML 2025",
        code="Gumpest/SparseVLMs, Apache-2.0",
    )

    method: Literal["sparsevlm"] = "sparsevlm"
    semantics: Literal["stable"] = "stable"
    stages: Annotated[
        dict[int, int],
        BeforeValidator(_counts),
        Field(description=f"after so many layers: the tokens of each image that stay, such as {EXAMPLE}"),
    ]
    raters: Annotated[float, BeforeValidator(_share)] = 0.5
    recycle: Annotated[float, Field(ge=0, le=1, strict=True, allow_inf_nan=False)] = 0.0
    positions: Literal["original"] = "original"

    @classmethod
    def proposals(cls, outline: Outline, ask: Ask) -> Iterator[Method]:
        """See `Method.proposals`."""
        if outline.rows > 1 and outline.layers > 1:
            shares = cls.falling(outline, ask, 1 / outline.rows)
            counts = {layer: max(1, int(share * outline.rows)) for layer, share in shares.items()}
            stages = {n: c for n, c in counts.items() if all(c < other for m, other in counts.items() if m < n)}
            if stages:
                yield cls(stages=stages)

    def canonical(self) -> dict[str, Any]:
        """See `Method.canonical`."""
        recycle = {"recycle": self.recycle} if self.recycle else {}
        return {**super().canonical(), "stages": self.stages, "raters": self.raters, **recycle}

    def find_sites(self, graph: LocatedGraph) -> list[Site]:
        """See `Method.find_sites`: the attentions of the layers after which there are fewer tokens, with all images."""
        from ..rewrite.sites import Site

        layers, sites = self.layers_of(graph), list[Site]()
        self.entering(layers[0], "compares")
        for number, budget in self.stages.items():
            self.check_layer(layers, number, "stages")
            attention = layers[number - 1]
            self.check_prompt(graph, attention, "lets the text behind the image rate its tokens")
            # Whatever the last token sees of an image, the text between sees as well.
            self.check_seen(graph, layers, number, {i: f"stages: {i}" for i in range(1, len(layers))})
            images, site = graph.prompt_images(), Site(attention, attention.carrier, keep=budget)
            if self.recycle:  # tokens are merged as they leave the layer, and not before its feed-forward part
                site = Site(layers[number], self.entering(layers[number]), keep=budget, keys=attention)
            site.streams = images
            sites.append(site)
        return sites

    def reducer(self, site: Site, stream: Stream) -> Reducer | None:
        """See `Method.reducer`."""
        from ..reducers.sparsevlm import RatedReducer, recycled

        merged = recycled(stream.rows - int(site.keep), self.recycle)[1]
        if not site.keep + merged < stream.rows:
            more = f" and {merged} merged ones" if merged else ""
            raise PlanError(
                f"`stages` leaves {site.keep} tokens{more} of {stream.name} at {site.described}, where it has "
                f"{stream.rows}: a stage leaves fewer than there are. Choose a smaller number, or compile with `none`."
            )
        return RatedReducer(stream.tokens, int(site.keep), self.raters, stream.pinned, self.recycle)
