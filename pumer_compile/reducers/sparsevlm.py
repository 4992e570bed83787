"""The image tokens that words of the prompt look at which have to do with the image (SparseVLM, ICML 2025)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .base import Choice, Decisions, Reducer, Signal, kept_alone, set_margin
from .dart import Step
from .ranking import descending_rank, one_hot, top


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
    order; ties go to the lowest index.

    Args:
        tokens: of the image, before.
        budget: of them to keep, 1..`tokens`; pinned ones not counted.
        raters: the share of the text that rates, above 0 and at most 1; to the nearest number, at least one token.
        pinned: places of tokens that stay whatever they get.
    """

    reads = (Signal.BEHIND_TO_IMAGE, Signal.TEXT_RATING)
    keeps_order = True

    def __init__(self, tokens: int, budget: int, raters: float = 0.5, pinned: Sequence[int] = ()) -> None:
        super().__init__(tokens, budget + len(pinned))
        self.raters, self.pinned = raters, list(pinned)

    def choose(self, tokens: Tensor, behind_to_image: Tensor, text_rating: Tensor) -> Choice:
        """See `Reducer` and `Signal`; the tokens are the image's part of the carrier."""
        rating = text_rating.detach().float()
        count = max(1, round(rating.shape[1] * self.raters))
        rate = Step(rating, rating > -torch.inf, descending_rank(rating) < count)
        rows = behind_to_image.detach().float().mean(1)
        scores = (rate.taken.float().unsqueeze(1) @ rows).squeeze(1) / count
        if self.pinned:
            pinned = [2.0 if place in self.pinned else 0.0 for place in range(self.tokens)]
            scores = scores + torch.tensor(pinned).to(scores.device)  # attention is at most 1
        kept = top((descending_rank(scores) < self.keep).float(), self.keep)
        weights = torch.ones_like(scores)
        return Choice(kept_alone(kept), one_hot(kept, self.tokens).float(), weights, (scores, rate))

    def ranking(self, choice: Choice) -> Tensor | None:
        """See `Reducer`: attention from the raters."""
        scores: Tensor = choice.evidence[0]
        return scores

    def margin(self, own: Choice, among: Choice, forced: Decisions) -> Tensor:
        """See `Reducer`: of the tokens, or of the raters where these are closer, of whom others may have decided."""
        scores, rate = own.evidence
        gap = torch.minimum(set_margin(scores, own.decisions.kept, forced.kept), rate.cut())
        return torch.where((forced.kept[:, 1:] > forced.kept[:, :-1]).all(1), gap, 1.0)
