"""The softmax of the published PuMer code, which multiplies by the mask (semantics `reference`), alone and together
with the product that reads it."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .ranking import identity

EPS = 1e-6


class PublishedMaskedSoftmax(nn.Module):
    """Softmax over keys with multiplicative weights, as the published code has it.

    `x = exp(a - max(a)) * m` and `(x + eps / N) / (sum(x) + eps)` with `m = mask + (1 - mask) * eye`: masked
    keys still see themselves, the maximum is taken over all keys, and eps = 1e-6 spreads a little over the N
    keys. Fractions in the mask are the weights of merged tokens. In cross-attention the same `eye`, no longer
    square, lets query i see key i: that means nothing there, and it is what the published code computes.
    """

    def forward(self, scores: Tensor, *weights: Tensor, first: int = 0) -> Tensor:
        """Probabilities, float32.

        Args:
            scores: scaled, not masked, `[batch, heads, queries, keys]`.
            weights: of the keys, `[batch, n]` each, side by side along the keys; 0 is padding.
            first: number of the first query, where the others before it are left out.
        """
        x = scores.float()
        x = (x - x.amax(-1, keepdim=True)).exp()
        if weights:
            mask = torch.cat(weights, 1).float().unsqueeze(1).unsqueeze(1)
            queries, keys = scores.shape[-2:]
            eye = identity(first + queries, keys, scores.device)[first:]
            x = x * (mask + (1 - mask) * eye)
        spread = EPS / scores.shape[-1]
        return (x + spread) / (x.sum(-1, keepdim=True) + EPS)


class PublishedAttention(nn.Module):
    """`PublishedMaskedSoftmax(scores) @ values`, with the sums in another order.

    The mask is on the side of the keys, so it can multiply the values instead of the scores; what a masked query sees
    of itself is one number for each query; and the division comes after the product. That leaves one value of the
    size of the scores to be written, and kept for the backward pass, after their difference from the maximum; the
    formula as it stands has five. The maximum has no gradient here: it is of the order of eps.

    Sums of what is not divided yet would overflow in float16: for float32 alone.
    """

    def forward(self, scores: Tensor, values: Tensor, *weights: Tensor, first: int = 0) -> Tensor:
        """The attention's result, `[batch, heads, queries, head_size]`, float32.

        Args:
            scores: scaled, not masked, `[batch, heads, queries, keys]`, float32.
            values: `[batch, heads, keys, head_size]`, float32.
            weights, first: as for `PublishedMaskedSoftmax`.
        """
        x = (scores - scores.detach().amax(-1, keepdim=True)).exp()
        spread = EPS * values.mean(-2, keepdim=True)
        if not weights:
            return (x @ values + spread) / (x.sum(-1, keepdim=True) + EPS)
        mask = torch.cat(weights, 1).float().unsqueeze(1).unsqueeze(-1)
        own, last = self._own(x, first)
        seen = own * (1 - mask[:, :, first:last])
        result, total = x @ (values * mask), x @ mask
        rest = x.shape[-2] - (last - first)
        alone = seen * values[:, :, first:last]
        if rest:  # queries beyond the last key have no key of their own
            alone, seen = (torch.nn.functional.pad(part, (0, 0, 0, rest)) for part in (alone, seen))
        return (result + alone + spread) / (total + seen + EPS)

    def _own(self, x: Tensor, first: int) -> tuple[Tensor, int]:
        """What query i gives key i, `[batch, heads, n, 1]`, and the number of the last-but-one such query."""
        queries, keys = x.shape[-2:]
        last = max(first, min(first + queries, keys))
        # Entries of the diagonal are one row and one column apart.
        stop = first + (last - first) * (keys + 1)
        return x.flatten(-2)[..., first : min(stop, queries * keys) : keys + 1].unsqueeze(-1), last
