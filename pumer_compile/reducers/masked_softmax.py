"""The softmax of the published PuMer code, which multiplies by the mask (semantics `reference`)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

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
        mask = None
        if weights:
            mask = torch.cat(weights, 1).float().unsqueeze(1).unsqueeze(1)
            queries, keys = scores.shape[-2:]
            eye = identity(first + queries, keys, scores.device)[first:]
            mask = mask + (1 - mask) * eye
        # torch 2.11 does not say that it compiles while a backend traces; the tensors are fake then.
        traced = torch.compiler.is_compiling() or isinstance(scores, FakeTensor)
        if traced or (mask is not None and mask.requires_grad):
            return _published(scores, mask)
        found: Tensor = _InPlace.apply(scores, mask)  # type: ignore[no-untyped-call]  # torch declares no types for it
        return found


def _published(scores: Tensor, mask: Tensor | None) -> Tensor:
    """The formula as it stands, for what traces it."""
    x = scores.float()
    x = (x - x.amax(-1, keepdim=True)).exp()
    if mask is not None:
        x = x * mask
    # onnxruntime adds a number to a column a number at a time, and to a row all at once.
    return (x + EPS / x.shape[-1]) / (x.sum(-1) + EPS).unsqueeze(-1)


class _InPlace(torch.autograd.Function):
    """The same in one new value, of which the backward pass keeps the result alone; as a softmax does. Autograd would
    keep four of its size. The maximum gets no gradient: it is of the order of eps."""

    @staticmethod
    def forward(ctx: Any, scores: Tensor, mask: Tensor | None) -> Tensor:
        x = scores.float()
        x = (x - x.amax(-1, keepdim=True)).exp_()
        if mask is not None:
            x *= mask
        total = x.sum(-1, keepdim=True) + EPS
        x += EPS / x.shape[-1]
        x /= total
        ctx.save_for_backward(x, total)
        ctx.dtype = scores.dtype
        return x

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        found, total = ctx.saved_tensors
        rest = gradient - (gradient * found).sum(-1, keepdim=True)
        # Before eps was added and the sum divided by.
        rest *= found - EPS / found.shape[-1] / total
        return rest.to(ctx.dtype), None
