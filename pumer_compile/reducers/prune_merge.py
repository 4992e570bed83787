"""One stream at one site: prune, then merge (PuMer, section 4; without the pruner ToMe)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Averaging, Carried, Choice, Decisions, Reducer, Signal, kept_alone, relative_gap, set_margin
from .merger import LAST_RESORT, Matching, ModalityAwareMerger
from .pruner import TextInformedPruner
from .ranking import indices, leading, one_hot, ranked

_WEIGHTS = (Signal.WEIGHTS, Signal.TEXT_WEIGHTS)


@dataclass
class _Evidence:
    """What tokens were chosen by."""

    saliency: Tensor | None
    matching: Matching | None


class StreamReducer(Reducer):
    """Prunes (image only) and merges one stream.

    Args:
        tokens: tokens before.
        pruner: keeps `pruner.keep` of them; None prunes nothing and keeps the order.
        merger: merges `merger.merge` of the kept ones away.
        averaging, carried: see `Reducer`. The published code carries the `mean` (text) or `ones` (image); None reads
            no weights, and carries none.
        first_stays: see `Reducer`.
    """

    def __init__(
        self,
        tokens: int,
        pruner: TextInformedPruner | None,
        merger: ModalityAwareMerger,
        *,
        averaging: Averaging = "plain",
        carried: Carried | None = "mean",
        first_stays: bool = False,
    ) -> None:
        keep = pruner.keep if pruner else tokens
        super().__init__(tokens, keep, merger.merge, averaging=averaging, carried=carried or "ones")
        self.pruner, self.merger, self.first_stays = pruner, merger, first_stays
        self.keeps_order = (pruner is None or pruner.in_order) and (not merger.merge or merger.in_order)
        votes = (Signal.TEXT_TO_IMAGE, Signal.TEXT_WEIGHTS) if pruner else ()
        reads = (Signal.KEYS, Signal.WEIGHTS, *votes)
        self.reads = reads if carried else tuple(signal for signal in reads if signal not in _WEIGHTS)

    @property
    def prunes(self) -> bool:
        """See `Reducer`."""
        return self.pruner is not None

    def choose(
        self,
        tokens: Tensor | None,
        keys: Tensor,
        weights: Tensor | None = None,
        text_to_image: Tensor | None = None,
        text_weights: Tensor | None = None,
        *,
        kept: Tensor | None = None,
    ) -> Choice:
        """See `Reducer` and `Signal`."""
        if weights is None:
            weights = torch.ones_like(keys[:, 0, :, 0], dtype=torch.float32)
        # Decisions have no gradient, and autograd would hold on to what they are made from.
        units = self.merger.units(keys.detach().float().mean(1)) if self.merger.merge else None
        chosen, rows, saliency = self._prune(weights, text_to_image, text_weights, kept)
        matching = self._match(rows, units, weights)
        decisions = kept_alone(chosen) if matching is None else Decisions(chosen, matching.source, matching.target)
        return Choice(decisions, self._assigned(rows, matching), weights, _Evidence(saliency, matching))

    def _prune(
        self, weights: Tensor, text_to_image: Tensor | None, text_weights: Tensor | None, given: Tensor | None
    ) -> tuple[Tensor, tuple[Tensor, ...], Tensor | None]:
        """The kept tokens, the rows that select them (the even and the odd ones, where some merge), the saliency."""
        if self.pruner is None or text_to_image is None:
            place = torch.arange(self.tokens, device=weights.device)
            kept = place.expand(weights.shape[0], -1)
            # One row of places for all samples: a constant in the exported graph.
            rank = place.unsqueeze(0) if self.merger.merge else kept
            return kept, self._rows(rank.float()), None
        rank, saliency = self.pruner.rank(text_to_image.detach(), text_weights)
        if given is not None:
            return given, self._given_rows(given), saliency
        return indices(leading(rank, self.pruner.keep)), self._rows(rank), saliency

    def _rows(self, rank: Tensor) -> tuple[Tensor, ...]:
        """What selects the kept tokens, in order; or the even and the odd ones of them, where some merge."""
        return tuple(ranked(rank, part).float() for part in self._split(torch.arange(self.keep, device=rank.device)))

    def _given_rows(self, kept: Tensor) -> tuple[Tensor, ...]:
        return tuple(one_hot(part, self.tokens).float() for part in self._split(kept))

    def _split(self, kept: Tensor) -> tuple[Tensor, ...]:
        return (kept[..., 0::2], kept[..., 1::2]) if self.merger.merge else (kept,)

    def _match(self, rows: tuple[Tensor, ...], units: Tensor | None, weights: Tensor) -> Matching | None:
        if units is None:
            return None
        if self.pruner is None:
            return self.merger.match(units, weights)
        even, odd = rows
        weighed = []
        if self.merger.keep_padding_apart:
            weighed = [(half @ weights.float().unsqueeze(-1)).squeeze(-1) for half in rows]
        return self.merger.pair(even @ units, odd @ units, *weighed)

    def _assigned(self, rows: tuple[Tensor, ...], matching: Matching | None) -> Tensor:
        """Zeros and ones, `[batch, after, before]`: the old tokens that make each new one."""
        if matching is None:
            return rows[0]
        even, odd = rows
        if self.merger.in_order:
            of_even, of_odd = self.merger.assignment_in_order(matching.merged, matching.pairs)
            return of_even @ even + of_odd @ odd
        stay, join = self.merger.assignment(matching.merged, matching.pairs)
        return torch.cat((stay @ even, join @ even + odd), 1)

    # --- forced decisions ---------------------------------------------------------------------------------------------

    def assignment(self, forced: Decisions, among: Choice) -> Tensor:
        """See `Reducer`."""
        matching = among.evidence.matching
        if matching is not None:
            matching = self.merger.forced(matching, forced.source, forced.target)
        return self._assigned(self._given_rows(forced.kept), matching)

    def margin(self, own: Choice, among: Choice, forced: Decisions) -> Tensor:
        """See `Reducer`."""
        kept, saliency, matching = own.decisions.kept, own.evidence.saliency, among.evidence.matching
        margin = torch.zeros(kept.shape[0], device=kept.device)
        if saliency is not None:
            margin = self._kept_margin(saliency, kept, forced.kept)
        if matching is not None:
            scale = self._similarity_scale(matching)
            source, target = forced.source // 2, forced.target // 2  # among the even tokens, among the odd ones
            gap = _set_gap if self.merger.in_order else _gap
            margin = torch.maximum(margin, gap(matching.best, matching.source // 2, source) / scale)
            margin = torch.maximum(margin, _target_gap(matching, source, target) / scale)
        return margin

    def _kept_margin(self, saliency: Tensor, own: Tensor, forced: Tensor) -> Tensor:
        assert self.pruner is not None
        if not self.pruner.in_order:
            return relative_gap(saliency.gather(1, own), saliency.gather(1, forced), saliency).amax(1)
        # What is kept whatever it gets is not kept for its score.
        has = one_hot(forced, saliency.shape[1]).any(1)[:, : self.pruner.protected].all(1)
        return torch.where(has, set_margin(saliency, own, forced), 1.0)

    def _similarity_scale(self, matching: Matching) -> Tensor | float:
        """What similarities are rounded in proportion to, `[batch]`: cosines to 1, products to the largest."""
        if self.merger.similarity == "cosine":
            return 1.0
        allowed = torch.where(matching.scores > LAST_RESORT, matching.scores, 0.0)
        return allowed.abs().amax((1, 2)).clamp(min=1e-30)


def _gap(scores: Tensor, own: Tensor, forced: Tensor) -> Tensor:
    """Largest score difference between two choices, position by position, `[batch]`."""
    difference = scores.gather(1, own) - scores.gather(1, forced)
    return torch.where(own == forced, 0.0, difference.abs()).amax(1)


def _set_gap(scores: Tensor, own: Tensor, forced: Tensor) -> Tensor:
    """Score difference of two choices as sets, `[batch]`: of the best that only the first has and the worst that only
    the second has; infinite where that is no set in its order."""
    mine, theirs = (one_hot(chosen, scores.shape[1]).any(1) for chosen in (own, forced))
    best = torch.where(mine & ~theirs, scores, -torch.inf).amax(1)
    worst = torch.where(theirs & ~mine, scores, torch.inf).amin(1)
    gap = torch.where((mine == theirs).all(1), 0.0, (best - worst).abs())
    return torch.where((forced[:, 1:] > forced[:, :-1]).all(1), gap, torch.inf)


def _target_gap(matching: Matching, source: Tensor, target: Tensor) -> Tensor:
    """Largest similarity lost by given targets (among the odd tokens) of given sources (even), `[batch]`."""
    rows = matching.scores.gather(1, source.unsqueeze(-1).expand(-1, -1, matching.scores.shape[-1]))
    lost = rows.amax(-1) - rows.gather(2, target.unsqueeze(-1)).squeeze(-1)
    return lost.abs().amax(1)
