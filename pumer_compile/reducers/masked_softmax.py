"""The softmax of the published PuMer code, which multiplies by the mask (semantics `reference`)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .ranking import identity


class PublishedMaskedSoftmax(nn.Module):
    """Softmax over keys with multiplicative weights, as the published code has it.

    `x = exp(a - max(a)) * m` and `(x + eps / N) / (sum(x) + eps)` with `m = mask + (1 - mask) * eye`: masked
    keys still see themselves, the maximum is taken over all keys, and eps = 1e-6 spreads a little over the N
    keys. Fractions in the mask are the weights of merged tokens. In cross-attention the same `eye`, no longer
    square, lets query i see key i: that means nothing there, and it is what the published code computes.
    """

    eps = 1e-6

    def forward(self, scores: Tensor, *weights: Tensor) -> Tensor:
        """Probabilities, float32.

        Args:
            scores: scaled, not masked, `[batch, heads, queries, keys]`.
            weights: of the keys, `[batch, n]` each, side by side along the keys; 0 is padding.
        """
        x = scores.float()
        x = (x - x.amax(-1, keepdim=True)).exp()
        if weights:
            mask = torch.cat(weights, 1).float().unsqueeze(1).unsqueeze(1)
            eye = identity(scores.shape[-2], scores.shape[-1], scores.device)
            x = x * (mask + (1 - mask) * eye)
        spread = self.eps / scores.shape[-1]
        return (x + spread) / (x.sum(-1, keepdim=True) + self.eps)
