"""Text-informed image pruning (PuMer, section 4.1)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .ranking import by_place, descending_rank, indices, leading


class TextInformedPruner(nn.Module):
    """Keeps the image tokens that the text attends to most.

    The saliency of an image token is the attention it receives from the text, mean over heads and summed over
    text tokens (equation 1 up to a constant factor, which does not change the order). Kept tokens come in
    descending saliency, as published: the merger's even/odd split follows that order, and any two nearly equal
    saliencies that change places change halves. `in_order` leaves the tokens in their old order: then only a near-tie
    at the cut changes anything, a token, and with it the halves of what stands between the two.

    Args:
        keep: image tokens to keep.
        protected: leading tokens that are kept, first, whatever their saliency (`safe`: the class token).
        pads_vote: whether padding in the text takes part in the sum, as in the published code.
        in_order: whether kept tokens stay in their old order.
    """

    def __init__(self, keep: int, *, protected: int = 0, pads_vote: bool = True, in_order: bool = False) -> None:
        super().__init__()
        self.keep, self.protected, self.pads_vote, self.in_order = keep, protected, pads_vote, in_order

    def saliency(self, attention: Tensor, text_weights: Tensor | None = None) -> Tensor:
        """Scores of the image tokens.

        Args:
            attention: text-to-image attention after softmax, `[batch, heads, text, image]`.
            text_weights: weights of the text tokens, `[batch, text]`; 0 is padding.

        Returns:
            `[batch, image]`, float32.
        """
        per_text = attention.float().mean(1)
        if not self.pads_vote and text_weights is not None:
            per_text = per_text * (text_weights > 0).unsqueeze(-1)
        return per_text.sum(1)

    def rank(self, attention: Tensor, text_weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Place of every image token among the kept ones, from 0, or `keep` and more of another, `[batch, image]`
        float32; and the saliency."""
        scores = self.saliency(attention, text_weights)
        if self.protected:
            # Attention lies in 0..1 and is summed over the text: this bonus puts protected tokens before others.
            index = torch.arange(scores.shape[-1], device=scores.device)
            bonus = (self.protected - index).clamp(min=0) * (attention.shape[2] + 1)
            rank = descending_rank(scores + bonus)
        else:
            rank = descending_rank(scores)
        return (by_place(rank, self.keep) if self.in_order else rank), scores

    def forward(self, attention: Tensor, text_weights: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Indices of the kept tokens, `[batch, keep]` int64, and the saliency."""
        rank, scores = self.rank(attention, text_weights)
        return indices(leading(rank, self.keep)), scores
