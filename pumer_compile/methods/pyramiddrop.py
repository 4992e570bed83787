"""`method: pyramiddrop`: fewer image tokens layer by layer, by the last word's attention (Xing et al., CVPR 2025)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import BeforeValidator, Field

from ..errors import LocateError, PlanError
from .about import About
from .base import Method
from .language import InLanguageModel, in_order
from .proposing import Ask, Outline

if TYPE_CHECKING:
    from ..analysis.attention import Attention
    from ..reducers import Reducer
    from ..rewrite.sites import LocatedGraph, Site, Stream

EXAMPLE = "{8: 0.5, 16: 0.25, 24: 0.125}"


def _shares(given: object) -> dict[int, float]:
    return in_order(given, float, EXAMPLE)


class PyramidDrop(InLanguageModel):
    """Keeps a share of each image's tokens after some layers of the language model, less at every stage.

    What stays is decided by the layer that comes next: the attention of the prompt's last token, computed ahead from
    the tokens that are still there.

    Args:
        stages: after so many language layers: the share of the image's tokens in the prompt that stays, rounded down.
        positions: of the tokens that are left: `compact` (counted anew after every stage, as published) or `original`.
        outputs: `reduced` by default: logits have an entry for each token that is left.
    """

    about = About(
        does="keeps the image tokens that the last token of a prompt attends to, fewer after every stage",
        reads="attention of the last token in the layer that comes next, computed ahead",
        use="where every layer of a language model counts; grouped queries too",
        paper="Xing et al., PyramidDrop, CVPR 2025",
        code="Cooperx521/PyramidDrop, MIT",
        held="published vectors",
    )

    method: Literal["pyramiddrop"] = "pyramiddrop"
    semantics: Literal["reference"] = "reference"
    stages: Annotated[
        dict[int, float],
        BeforeValidator(_shares),
        Field(description=f"after so many layers: the share of the image tokens that stays, such as {EXAMPLE}"),
    ]
    positions: Literal["compact", "original"] = "compact"

    @classmethod
    def proposals(cls, outline: Outline, ask: Ask) -> Iterator[Method]:
        """See `Method.proposals`."""
        if outline.rows > 1 and outline.layers > 1:
            stages = cls.falling(outline, ask, 1 / outline.rows)
            if stages:
                yield from cls.in_either_order(stages=stages)

    def canonical(self) -> dict[str, Any]:
        """See `Method.canonical`."""
        return {**super().canonical(), "stages": self.stages, "positions": self.positions}

    def find_sites(self, graph: LocatedGraph) -> list[Site]:
        """See `Method.find_sites`: the residual values between two layers, with all images."""
        from ..rewrite.renumber_positions import check_counted
        from ..rewrite.sites import Site

        layers, sites = self.layers_of(graph), list[Site]()
        for number, share in self.stages.items():
            self.check_layer(layers, number, "stages")
            attention = layers[number]
            self.check_prompt(graph, attention, "keeps the image tokens that its last token attends to")
            self.check_seen(graph, layers, number + 1, {i + 1: f"stages: {i}" for i in range(1, len(layers))})
            entering = self.entering(attention)
            first = sites[0] if sites else None
            anew, images = self.positions == "compact", graph.prompt_images()
            sites.append(Site(attention, entering, streams=images, recounts=anew, keep=share, first=first))
        if self.positions == "compact":
            check_counted(graph)
            _check_no_window(graph, layers[next(iter(self.stages)) :])
        return sites

    def reducer(self, site: Site, stream: Stream) -> Reducer | None:
        """See `Method.reducer`."""
        from ..reducers import NextQueryReducer

        pinned, first = len(stream.pinned), site.first
        whole = stream.rows if first is None or first.plan is None else first.plan.before[stream.name] - pinned
        budget = int(whole * site.keep)
        if not 1 <= budget < stream.rows:
            raise PlanError(
                f"A share of {site.keep} of the {whole} tokens of {stream.name} in the prompt is {budget}, and "
                f"{stream.rows} are left at {site.described}: a stage leaves at least 1 and fewer than "
                "before. Choose another share."
            )
        return NextQueryReducer(stream.tokens, budget, stream.pinned)


def _check_no_window(graph: LocatedGraph, layers: Sequence[Attention]) -> None:
    """A mask says what stands within a window by the places in the whole prompt, also where these are counted anew."""
    hides = [set(graph.hidden_from_last(layer, layer.key_axis.streams)) for layer in layers]
    narrow = next((i for i, found in enumerate(hides) if found & set(graph.prompt_images()) or found != hides[0]), None)
    if narrow is not None:
        raise LocateError(
            f"The mask of {layers[narrow].described} lets the last token of the prompt look at a window of tokens, "
            "counted along the whole prompt, and `positions: compact` counts anew behind every stage. Choose "
            "`positions: original`."
        )
