"""`method: tome`: merging alone, token sizes counted in every later attention (Bolya et al., ICLR 2023)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Literal

from pydantic import model_validator

from .about import About
from .base import Method
from .budgets import Budgeted, merge_count
from .proposing import Ask, Outline, at_depths

if TYPE_CHECKING:
    from ..reducers import Reducer
    from ..rewrite.sites import LocatedGraph, Replacements, Site, Stream


class ToMe(Budgeted):
    """Merges the most similar tokens, which are carried with their sizes; attention counts a token of size s s times
    (section 3.3). Where a stream has no learned tokens, token 0 may merge away like any other.

    Args:
        semantics: `reference`, the default: unmerged tokens of the one half stand first, then the other half, as
            published; in `safe` tokens stay in their old order, a merged one at its odd token's place. Rounding changes
            as much in either (docs/proof.md).
    """

    about = About(
        does="merges the most similar tokens, a few in each layer",
        reads="keys",
        use="encoders and fusion models without fine-tuning",
        paper="Bolya et al., ToMe, ICLR 2023",
        code="facebookresearch/ToMe, CC BY-NC 4.0",
        held="published vectors",
    )

    suggested = 1
    wants = "attention among image tokens, outside a language model"

    method: Literal["tome"] = "tome"
    semantics: Literal["reference", "safe"] = "reference"

    @classmethod
    def proposals(cls, outline: Outline, ask: Ask) -> Iterator[Method]:
        """See `Method.proposals`: in the vision tower, or where text and image meet."""
        for places in (outline.tower, outline.informed if outline.fuses else ()):
            found = cls.chosen(places, at_depths(places), ask)
            if found:
                yield cls(sites=found, semantics="safe")

    @model_validator(mode="after")
    def _prunes_nothing(self) -> ToMe:
        if any(site.prune for site in self.resolve()):
            raise ValueError("`method: tome` merges and prunes nothing: leave out `prune`")
        return self

    def reducer(self, site: Site, stream: Stream) -> Reducer | None:
        """See `Method.reducer`."""
        from ..reducers import ModalityAwareMerger, StreamReducer

        assert site.budget is not None
        if stream.modality not in ("image", "text"):
            return None
        budget = site.budget.merge.image if stream.modality == "image" else site.budget.merge.text
        tokens = stream.tokens
        merge = merge_count(site.budget.at, stream.modality, budget, tokens, tokens, stream.learned)
        if merge == 0:
            return None
        merger = ModalityAwareMerger(
            merge, protected=stream.learned, keep_padding_apart=True, in_order=self.semantics == "safe"
        )
        first_stays = stream.learned > 0
        return StreamReducer(tokens, None, merger, averaging="sizes", carried="sum", first_stays=first_stays)

    def replacements(self, graph: LocatedGraph, sites: Sequence[Site]) -> Replacements:
        """See `Method.replacements`: scores that know the sizes of merged tokens."""
        from ..rewrite.proportional_attention import proportional_attentions

        return proportional_attentions(graph)
