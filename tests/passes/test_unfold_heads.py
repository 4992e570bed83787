"""Attention whose heads are folded into its batch: written with a dimension for them, and reduced like any other.

The oracle is the plain model of the same function, reduced by hand (`tests.support.models`).
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pumer_compile import capture
from pumer_compile.passes.unfold_heads import unfold_heads
from pumer_compile.reduce import reduce_graph
from tests.support.fx_text import fx_text
from tests.support.helpers import count_op
from tests.support.models import Config, Fusion, inputs_for, make, reduced, schedule

aten = torch.ops.aten
HEADS = 4


class Folded(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.view(8, 6, 3) for x in (q, k, v))
        return torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v).view(2, HEADS, 6, 3)


BEFORE = """\
%q -> [2, 4, 6, 3]
%k -> [2, 4, 6, 3]
%v -> [2, 4, 6, 3]
%view: view(%q, [8, 6, 3]) -> [8, 6, 3]
%view_1: view(%k, [8, 6, 3]) -> [8, 6, 3]
%view_2: view(%v, [8, 6, 3]) -> [8, 6, 3]
%transpose: transpose(%view_1, 1, 2) -> [8, 3, 6]
%bmm: bmm(%view, %transpose) -> [8, 6, 6]
%softmax: softmax(%bmm, -1) -> [8, 6, 6]
%bmm_1: bmm(%softmax, %view_2) -> [8, 6, 3]
%view_3: view(%bmm_1, [2, 4, 6, 3]) -> [2, 4, 6, 3]
return %view_3"""
AFTER = """\
%q -> [2, 4, 6, 3]
%k -> [2, 4, 6, 3]
%v -> [2, 4, 6, 3]
%transpose: transpose(%k, 2, 3) -> [2, 4, 3, 6]
%matmul: matmul(%q, %transpose) -> [2, 4, 6, 6]
%softmax: softmax(%matmul, 3) -> [2, 4, 6, 6]
%matmul_1: matmul(%softmax, %v) -> [2, 4, 6, 3]
return %matmul_1"""


def test_before_and_after() -> None:
    module = capture(Folded(), {name: torch.randn(2, HEADS, 6, 3) for name in "qkv"}).module
    assert fx_text(module) == BEFORE
    lifted, count = unfold_heads(module)
    assert count == 1 and fx_text(lifted) == AFTER


# --- forms of it ----------------------------------------------------------------------------------------------------


def folded(x: Tensor) -> Tensor:
    """`[batch, tokens, width]` as `[batch * heads, tokens, size]`."""
    return x.unflatten(-1, (HEADS, -1)).transpose(1, 2).flatten(0, 1)


def joined(x: Tensor) -> Tensor:
    return x.unflatten(0, (-1, HEADS)).transpose(1, 2).flatten(2)


def masked_in_between(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """BART's: heads are unfolded for the mask alone."""
    q, k, v = folded(q), folded(k), folded(v)
    scores = torch.bmm(q, k.transpose(1, 2))
    scores = scores.view(-1, HEADS, *scores.shape[1:]) + mask
    return joined(torch.bmm(scores.flatten(0, 1).softmax(-1), v))


def viewed_twice(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """The same, its probabilities unfolded for an output that nobody wants, and folded again."""
    q, k, v = folded(q), folded(k), folded(v)
    scores = torch.bmm(q, k.transpose(1, 2))
    scores = (scores.view(-1, HEADS, *scores.shape[1:]) + mask).flatten(0, 1)
    kept = scores.softmax(-1).view(-1, HEADS, *scores.shape[1:])
    return joined(torch.bmm(nn.functional.dropout(kept.flatten(0, 1), 0.1, False), v))


def masked_for_each_head(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    q, k, v = folded(q), folded(k), folded(v)
    mask = mask.expand(-1, HEADS, q.shape[1], -1).reshape(-1, q.shape[1], k.shape[1])
    return joined((q @ k.transpose(1, 2) + mask).softmax(-1) @ v)


def tokens_first(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """PyTorch's own `MultiheadAttention`."""
    batch, tokens, width = q.shape
    split = (x.transpose(0, 1).contiguous() for x in (q, k, v))
    q, k, v = (x.view(tokens, batch * HEADS, width // HEADS).transpose(0, 1) for x in split)
    mask = mask.expand(-1, HEADS, tokens, -1).reshape(-1, tokens, tokens)
    context = torch.bmm(torch.baddbmm(mask, q, k.transpose(-2, -1)).softmax(-1), v)
    return context.transpose(0, 1).contiguous().view(tokens, batch, width).transpose(0, 1)


def in_one(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Queries, keys and values folded together, as in ViTDet."""
    batch, tokens, width = q.shape
    all_three = torch.cat([q, k, v], -1).view(batch, tokens, 3, HEADS, -1).permute(2, 0, 3, 1, 4)
    q, k, v = all_three.reshape(3, batch * HEADS, tokens, width // HEADS).unbind(0)
    mask = mask.expand(-1, HEADS, tokens, -1).reshape(-1, tokens, tokens)
    return joined((q @ k.transpose(-2, -1) + mask).softmax(-1) @ v)


FORMS = {f.__name__: f for f in (masked_in_between, viewed_twice, masked_for_each_head, tokens_first, in_one)}


class Attention(nn.Module):
    def __init__(self, config: Config, how: Any) -> None:
        super().__init__()
        self.q, self.k, self.v, self.out = (nn.Linear(config.width, config.width) for _ in range(4))
        self.size, self.how = config.width // config.heads, how

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        return self.out(self.how(self.q(x) * self.size**-0.5, self.k(x), self.v(x), mask))


class Other(Fusion):
    how = staticmethod(masked_in_between)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        for layer in self.layers:
            layer.attention = Attention(config, self.how)


# In the second one everything collides: heads x batch = tokens = size of a head.
CONFIGS = {
    "apart": Config(text=5, grid=(3, 4), layers=2, heads=HEADS, width=16),
    "colliding": Config(text=4, grid=(2, 2), layers=2, heads=HEADS, width=32, batch=2),
}


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("form", FORMS)
def test_reduced_by_hand(form: str, name: str) -> None:
    config = CONFIGS[name]
    model, inputs = make(config, kind=type("Made", (Other,), {"how": staticmethod(FORMS[form])})), inputs_for(config)
    plain = make(config)
    plain.load_state_dict(model.state_dict())
    captured = capture(model, inputs)
    lifted, count = unfold_heads(captured.module)
    assert count == config.layers and count_op(lifted, aten.bmm.default) == 0
    sites = {0: (1, 1, 1)}
    wanted = schedule("safe", (0,), prune=1, merge={"image": 1, "text": 1})
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs), plain(**inputs), atol=1e-5, rtol=0)
        torch.testing.assert_close(lifted(**inputs), model(**inputs), atol=1e-6, rtol=0)
        module = reduce_graph(captured, wanted)
        for seed in (1, 2):
            given = inputs_for(config, seed)
            expected, _ = reduced(plain, given, sites, "safe")
            torch.testing.assert_close(module(**given), expected.float(), atol=2e-5, rtol=0)


# --- what is no attention with folded heads -------------------------------------------------------------------------


class NoHeads(nn.Module):
    """A batch of matrices, and a softmax between their products."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v)


class Pairs(nn.Module):
    """Products of folded values without a softmax between them."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.view(8, 6, 3) for x in (q, k, v))
        return torch.bmm(torch.bmm(q, k.transpose(1, 2)).tanh(), v).view(2, HEADS, 6, 3)


class OneHead(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        q, k, v = (x.view(8, 6, 3) for x in (q, k, v))
        return torch.bmm(torch.bmm(q, k.transpose(1, 2)).softmax(-1), v).view(8, 1, 6, 3)


@pytest.mark.parametrize(("kind", "shape"), [(NoHeads, (8, 6, 3)), (Pairs, (2, HEADS, 6, 3)), (OneHead, (8, 1, 6, 3))])
def test_other_products_are_left_alone(kind: type[nn.Module], shape: tuple[int, ...]) -> None:
    captured = capture(kind(), {name: torch.randn(shape) for name in "qkv"}).module
    assert unfold_heads(captured) == (captured, 0)


class ReadsProbabilities(Folded):
    """Someone else reads the folded probabilities."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        q, k, v = (x.view(8, 6, 3) for x in (q, k, v))
        probabilities = torch.bmm(q, k.transpose(1, 2)).softmax(-1)
        return torch.bmm(probabilities, v), probabilities.amax(0)


def test_who_reads_folded_values_still_does() -> None:
    inputs = {name: torch.randn(2, HEADS, 6, 3) for name in "qkv"}
    module = capture(ReadsProbabilities(), inputs).module
    lifted, count = unfold_heads(module)
    assert count == 1 and count_op(lifted, aten.bmm.default) == 0
    for found, expected in zip(lifted(**inputs), module(**inputs), strict=True):
        torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
