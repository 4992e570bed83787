"""The image tokens that words of the prompt look at which have to do with the image (SparseVLM, ICML 2025)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .base import Choice, Decisions, Reducer, Signal, kept_alone, set_margin
from .clusters import DensityPeaks
from .dart import Step
from .ranking import descending_rank, identity, one_hot, top
from .vispruner import selection


class TextRating(nn.Module):
    """How much each token of a text has to do with an image: what it gets of the image's tokens, each of which is
    shared out over the text by the softmax of its products with it; the mean over the image."""

    def forward(self, image: Tensor, text: Tensor) -> Tensor:
        """`[batch, text]`, float32; sums to 1.

        Args:
            image, text: `[batch, tokens, width]` each, any float.
        """
        if torch.amp.is_autocast_available(image.device.type) and torch.is_autocast_enabled(image.device.type):
            # Autocast would compute the products in half precision, and ties with them.
            with torch.autocast(image.device.type, enabled=False):
                return self.forward(image, text)
        products = image.detach().float() @ text.detach().float().transpose(1, 2)
        return products.softmax(-1).mean(1)


class RatedReducer(Reducer):
    """Keeps the tokens of an image with the most attention from raters, mean over these and over heads.

    Raters are the tokens of the text behind the image with the highest rating (`TextRating`). What stays is in its
    order; ties go to the lowest index. Of the tokens that go, some may be recycled: those with the most attention are
    merged by the mean into a tenth as many, each where the center of its cluster stood (`DensityPeaks`).

    Args:
        tokens: of the image, before.
        budget: of them to keep, 1..`tokens`; pinned ones not counted, nor merged ones.
        raters: the share of the text that rates, above 0 and at most 1; to the nearest number, at least one token.
        pinned: places of tokens that stay whatever they get.
        recycle: the share of the tokens that go which is merged, 0..1; as published, rounded down and one more.
    """

    reads = (Signal.BEHIND_TO_IMAGE, Signal.TEXT_RATING)
    keeps_order = True

    def __init__(
        self, tokens: int, budget: int, raters: float = 0.5, pinned: Sequence[int] = (), recycle: float = 0
    ) -> None:
        stay = budget + len(pinned)
        self.recycled, clusters = recycled(tokens - stay, recycle)
        super().__init__(tokens, stay + self.recycled, self.recycled - clusters)
        self.raters, self.pinned, self.stay = raters, list(pinned), stay
        self.peaks = DensityPeaks(clusters) if clusters else None
        # What merges with what is said by distances to several others: no score tells how near two ways are.
        self.judged, self.tells_place = not clusters, bool(clusters)

    def choose(
        self, tokens: Tensor, behind_to_image: Tensor, text_rating: Tensor, *, kept: Tensor | None = None
    ) -> Choice:
        """See `Reducer` and `Signal`; the tokens are the image's part of the carrier."""
        rating = text_rating.detach().float()
        count = max(1, round(rating.shape[1] * self.raters))
        rate = Step(rating, rating > -torch.inf, descending_rank(rating) < count)
        rows = behind_to_image.detach().float().mean(1)
        scores = (rate.taken.float().unsqueeze(1) @ rows).squeeze(1) / count
        if self.pinned:
            pinned = [2.0 if place in self.pinned else 0.0 for place in range(self.tokens)]
            scores = scores + torch.tensor(pinned).to(scores.device)  # attention is at most 1
        kept = top((descending_rank(scores) < self.keep).float(), self.keep) if kept is None else kept
        if self.peaks is not None:
            return self._merged(self._clustered(tokens.detach().float(), kept, scores), (scores, rate))
        weights = torch.ones_like(scores)
        return Choice(kept_alone(kept), one_hot(kept, self.tokens).float(), weights, (scores, rate))

    def _clustered(self, tokens: Tensor, kept: Tensor, scores: Tensor) -> Decisions:
        """With what merges into what, numbered among the kept ones."""
        assert self.peaks is not None
        chosen = one_hot(kept, self.tokens).float()
        again = descending_rank((chosen @ scores.unsqueeze(-1)).squeeze(-1)) >= self.stay
        rows = selection(again, self.recycled).map
        center, nearest = self.peaks(rows @ (chosen @ tokens))
        source = selection(~center, self.merge).map @ rows
        into = selection(~center, self.merge).map @ nearest.float() @ rows
        place = torch.arange(self.keep, device=kept.device).float().unsqueeze(-1)
        return Decisions(kept, *((x @ place).squeeze(-1).long() for x in (source, into)))

    def _merged(self, decisions: Decisions, evidence: object = None) -> Choice:
        """The choice that decisions are, some of which merge."""
        kept, source, target = (
            one_hot(index, count).float()
            for index, count in zip(decisions, (self.tokens, self.keep, self.keep), strict=True)
        )
        left = selection(source.sum(1) < 1, self.tokens_after).map
        place = left @ kept
        joined = target.transpose(1, 2) @ source + identity(self.keep, self.keep, kept.device)
        return Choice(decisions, left @ joined @ kept, torch.ones_like(kept[:, 0]), evidence, place=place)

    def follow(self, forced: Decisions, own: Choice, among: Choice) -> Choice:
        """See `Reducer`."""
        return super().follow(forced, own, among) if self.peaks is None else self._merged(forced)

    def margin(self, own: Choice, among: Choice, forced: Decisions) -> Tensor:
        """See `Reducer`: of the tokens, or of the raters where these are closer, of whom others may have decided."""
        scores, rate = own.evidence
        if self.peaks is not None:
            return torch.full_like(scores[:, 0], torch.nan)
        gap = torch.minimum(set_margin(scores, own.decisions.kept, forced.kept), rate.cut())
        return torch.where((forced.kept[:, 1:] > forced.kept[:, :-1]).all(1), gap, 1.0)


def recycled(gone: int, share: float) -> tuple[int, int]:
    """Of so many tokens that go: how many are merged, and into how many; as published."""
    count = min(gone, int(gone * share) + 1) if share and gone else 0
    return count, min(count, count // 10 + 1)
