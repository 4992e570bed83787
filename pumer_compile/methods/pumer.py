"""`method: pumer`: text-informed pruning, then modality-aware merging (Cao et al., ACL 2023, section 4)."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal, NamedTuple

from ..errors import PlanError
from .about import About
from .base import Method
from .budgets import Budgeted, Merge, SiteBudget, in_short, merge_count
from .proposing import Ask, Outline, at_depths

if TYPE_CHECKING:
    from ..reducers import Reducer
    from ..reducers.base import Averaging, Carried
    from ..reducers.merger import Similarity
    from ..rewrite.sites import LocatedGraph, Replacements, Site, Stream

log = logging.getLogger("pumer_compile")

Name = Literal["reference", "paper", "safe"]


class Semantics(NamedTuple):
    """One meaning of the method.

    Attributes:
        similarity: of keys.
        pads_vote: padding in the text takes part in the saliency.
        learned_stay: class tokens are neither pruned nor merged; else only token 0 never merges away.
        padding_apart: real tokens merge with padding only where nothing else is left.
        averaging: of merged tokens.
        carried: what becomes of the carried weights of image and text; None where none are carried.
        masked_softmax: attention in the cross-modal layers gets the published softmax.
        of_kept: shares as in Algorithm 1, `round((1 - p) n)` and of those kept `round(r n)`; else as the published
            code counts, `n - round(p n)` and `round(r n)` of the tokens before pruning.
        may_skip: a site whose share prunes no token is left out, as by the published code.
        first_stays: whatever comes first is taken for token 0; else the first token of a pruned stream moves unless it
            is learned.
        in_order: tokens stay in their old order; else kept ones stand by saliency, and merged ones last. In order, a
            near-tie among what is kept changes nothing, and one at the cut swaps a token; but the merger splits by
            place, and what stands between the two changes halves.
    """

    similarity: Similarity
    pads_vote: bool
    learned_stay: bool
    padding_apart: bool
    averaging: Averaging
    carried: tuple[Carried, Carried] | None
    masked_softmax: bool
    of_kept: bool
    may_skip: bool
    first_stays: bool
    in_order: bool


SEMANTICS: dict[Name, Semantics] = {
    #                      similarity pads  learned apart  averaging carried          softmax kept   skip   first  order
    "reference": Semantics("cosine", True, False, False, "plain", ("ones", "mean"), True, False, True, True, False),
    "paper": Semantics("dot", True, False, False, "plain", None, False, True, False, False, False),
    "safe": Semantics("cosine", False, True, True, "sizes", ("sum", "sum"), False, False, False, False, True),
}

_BUDGETS: dict[str, Any] = {"prune": 0.1, "merge": {"image": 0.3, "text": 0.2}}
_METER: dict[str, Any] = {"prune": 0.3, "merge": {"image": 0.5, "text": 0.2}}
_METER_VQA: dict[str, Any] = {"prune": 0.2, "merge": {"image": 0.2, "text": 0.2}}


def _with_tower(tower: float, **budgets: Any) -> dict[str, Any]:
    """METER's schedule with merging inside its image tower as well, since most of its arithmetic is before the first
    cross-modal layer; the share is merged at three of the tower's eleven layers."""
    inside = [{"at": f"vision.{layer}", "merge": {"image": tower}} for layer in (2, 5, 8)]
    return {"sites": [*inside, *({"at": f"cross_modal.{layer}", **budgets} for layer in (0, 2, 4, 6))]}


class Pumer(Budgeted):
    """Prunes the image tokens that the text attends to least, and merges similar tokens within each modality.

    Args:
        semantics: `safe`, the default, is for models that were not fine-tuned with reduction (padding neither votes nor
            merges, class tokens stay, tokens stay in their old order, token sizes are carried from reducer to reducer);
            `reference` computes what the published code computes, its masked softmax included, for models fine-tuned
            with it; `paper` is Algorithm 1 and equation 1 as written, with the model's own softmax. One that names none
            takes those that the model was trained with, where its configuration says so.
    """

    about = About(
        does="prunes image tokens that the text attends to least, merges similar tokens within each modality",
        reads="attention of the text to the image, keys",
        use="fusion models (ViLT, METER), best fine-tuned with it",
        paper="Cao et al., PuMer, ACL 2023",
        code="csarron/PuMer, MIT",
        held="published vectors",
    )

    trained_semantics = True
    suggested = 4
    wants = "attention from text to an image that stands in no language model's prompt"
    # Table 6 of the paper; and for METER, where that leaves most of the arithmetic alone, with the tower (`-tower`),
    # whose accuracy nobody has measured.
    presets: ClassVar[Mapping[str, Mapping[str, Any]]] = {
        "vilt-vqa": {"layers": (2, 5, 8), **_BUDGETS},
        "vilt-nlvr2": {"layers": (2, 5, 8), **_BUDGETS},
        "vilt-ve": {"layers": (2, 4, 6, 8), **_BUDGETS},
        "vilt-irtr": {"layers": (2, 4, 6, 8), **_BUDGETS},
        "meter-vqa": {"layers": (0, 2, 4, 6), **_METER_VQA},
        "meter-ve": {"layers": (0, 2, 4, 6), **_METER},
        "meter-nlvr2": {"layers": (2, 4, 6), **_METER},
        "meter-irtr": {"layers": (2, 4, 6), "prune": 0.2, "merge": {"image": 0.5, "text": 0.2}},
        "meter-vqa-tower": _with_tower(0.2, **_METER_VQA),
        "meter-ve-tower": _with_tower(0.25, **_METER),
    }

    method: Literal["pumer"] = "pumer"
    semantics: Name = "safe"

    @classmethod
    def proposals(cls, outline: Outline, ask: Ask) -> Iterator[Method]:
        """See `Method.proposals`: at the depths of the paper; a text that is causal does not merge."""
        if not outline.fuses:
            return
        found = cls.chosen(outline.informed, at_depths(outline.informed), ask, text=True, prunes=True)
        tower = cls.chosen(outline.tower, (), ask)
        alone = (SiteBudget(at=site.at, prune=site.prune, merge=Merge(image=site.merge.image)) for site in found)
        image = tuple(site for site in alone if site.reduces)
        for sites in dict.fromkeys((tower + found, tower + image)):
            if sites:
                yield cls(**in_short(sites))

    @property
    def revision(self) -> int:
        """See `Method.revision`: `safe` ordered tokens as `reference` does, once."""
        return 2 if SEMANTICS[self.semantics].in_order else 1

    def reducers(self, site: Site, streams: Sequence[Stream]) -> dict[str, Reducer]:
        """See `Method.reducers`."""
        assert site.budget is not None
        skipped = [s.tokens for s in streams if s.modality == "image" and published_code_skips(site.budget, s.tokens)]
        if SEMANTICS[self.semantics].may_skip and skipped:
            log.warning(
                "Site %s is left out: its share prunes none of %d image tokens, and there the published code "
                "merges nothing either.",
                site.address,
                skipped[0],
            )
            return {}
        return super().reducers(site, streams)

    def reducer(self, site: Site, stream: Stream) -> Reducer | None:
        """See `Method.reducer`."""
        assert site.budget is not None
        if stream.modality not in ("image", "text"):
            return None
        keep, merge = self.counts(site.budget, stream)
        return stream_reducer(self.semantics, stream, keep, merge) if keep - merge < stream.tokens else None

    def counts(self, budget: SiteBudget, stream: Stream) -> tuple[int, int]:
        """Tokens of a stream to keep and, of these, to merge away.

        Raises:
            PlanError: a budget that cannot be met.
        """
        stays = stream.learned if SEMANTICS[self.semantics].learned_stay else 0
        if stream.modality == "image":
            return image_counts(stream.tokens, budget, self.semantics, stays)
        tokens = stream.tokens
        return tokens, merge_count(budget.at, "text", budget.merge.text, tokens, tokens, max(1, stays))

    def replacements(self, graph: LocatedGraph, sites: Sequence[Site]) -> Replacements:
        """See `Method.replacements`: the published softmax in every cross-modal layer."""
        from ..rewrite.published_softmax import published_softmaxes

        return published_softmaxes(graph) if SEMANTICS[self.semantics].masked_softmax else {}


def stream_reducer(semantics: Name, stream: Stream, keep: int, merge: int) -> Reducer:
    """The reducer of one stream.

    Args:
        semantics: see `SEMANTICS`.
        stream: before it.
        keep, merge: kept by the pruner, merged away by the merger.
    """
    from ..reducers import ModalityAwareMerger, StreamReducer, TextInformedPruner

    row = SEMANTICS[semantics]
    stays = stream.learned if row.learned_stay else 0
    how: dict[str, Any] = {"in_order": row.in_order}
    pruner = None
    if keep < stream.tokens:
        pruner = TextInformedPruner(keep, protected=stays, pads_vote=row.pads_vote, **how)
    how |= {"similarity": row.similarity, "keep_padding_apart": row.padding_apart}
    merger = ModalityAwareMerger(merge, protected=max(1, stays), **how)
    carried = row.carried[stream.modality == "text"] if row.carried else None
    first_stays = row.first_stays or pruner is None or stays > 0
    return StreamReducer(
        stream.tokens, pruner, merger, averaging=row.averaging, carried=carried, first_stays=first_stays
    )


def image_counts(tokens: int, site: SiteBudget, semantics: Name, protected: int) -> tuple[int, int]:
    """Image tokens to keep and to merge.

    Args:
        tokens: the stream's tokens, class token included.
        site: its budgets.
        semantics: see `Semantics.of_kept`.
        protected: leading tokens that stay (class token).

    Raises:
        PlanError: an absolute budget larger than the stream allows.
    """
    of_kept = SEMANTICS[semantics].of_kept
    if isinstance(site.prune, int):
        keep = tokens - site.prune
    else:
        keep = round((1 - site.prune) * tokens) if of_kept else tokens - round(site.prune * tokens)
    if keep < max(1, protected):
        raise PlanError(
            f"Site {site.at} would prune {tokens - keep} of {tokens} image tokens; at most "
            f"{tokens - max(1, protected)} can go. Lower `prune`."
        )
    return keep, merge_count(site.at, "image", site.merge.image, keep, keep if of_kept else tokens, max(1, protected))


def published_code_skips(site: SiteBudget, image: int) -> bool:
    """The published code reduces a layer only where its share of image tokens to prune rounds to at least
    one. A site that asks for merging alone (`prune: 0`) is our extension, and merges."""
    share = site.prune
    return isinstance(share, float) and share > 0 and round(share * image) == 0
