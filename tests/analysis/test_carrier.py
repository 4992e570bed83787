"""The carrier of an attention behind norms of every spelling."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pumer_compile import capture
from pumer_compile.analysis.annotate import annotate
from pumer_compile.analysis.attention import locate
from pumer_compile.reduce import reduce_graph
from tests.support.models import Config, Fusion, inputs_for, make, schedule

POST = Config(norm="post", text=5, grid=(3, 4), layers=2, heads=2, width=16)


class Norm(nn.Module):
    """A norm over features, of some spelling."""

    def __init__(self, width: int, spelling: str) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.rand(width) + 0.5), nn.Parameter(torch.randn(width))
        self.spelling = spelling

    def forward(self, x: Tensor) -> Tensor:
        return SPELLINGS[self.spelling](x, self.weight, self.bias)


def centred_once(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    return weight * centred / torch.sqrt(centred.pow(2).mean(-1, keepdim=True) + 1e-5) + bias


def centred_twice(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    variance = (x - x.mean(2, keepdim=True)).square().mean((2,), keepdim=True)
    return (x - x.mean(-1, keepdim=True)) * torch.rsqrt(variance + 1e-5) * weight + bias


def unsqueezed(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    centred = F.dropout(x - x.mean(-1).unsqueeze(-1), 0.1, training=False)
    return centred / (centred.pow(2).mean(-1).unsqueeze(-1) + 1e-5).sqrt() * weight + bias


def by_moments(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    variance, mean = torch.var_mean(x, -1, correction=0, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * weight + bias


def llama(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    h = x.to(torch.float64)
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + 1e-5)
    return weight * h.to(x.dtype)


def in_place(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    h = x - x.mean(-1, keepdim=True)
    h /= (h.pow(2).mean(-1, keepdim=True) + 1e-5).sqrt()
    h *= weight
    h += bias
    return h


def centred_in_place(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    h = x.clone()
    h -= h.mean(-1, keepdim=True)
    h.div_(h.var(-1, correction=0, keepdim=True).add_(1e-5).sqrt_())
    return h.mul_(weight).add_(bias)


def by_einsum(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    h = x - x.mean(-1, keepdim=True)
    variance = torch.einsum("btd,btd->bt", h, h) / h.shape[-1]
    return torch.einsum("btd,d->btd", h * (variance + 1e-5).rsqrt()[..., None], weight) + bias


def by_deviation(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    deviation, mean = torch.std_mean(x, dim=-1, correction=0, keepdim=True)
    return (x - mean) / (deviation.square() + 1e-5).sqrt() * weight + bias


def by_length(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    h = x - x.mean(-1, keepdim=True)
    length = torch.linalg.vector_norm(h, dim=-1, keepdim=True)
    return h / (length**2 / h.shape[-1] + 1e-5) ** 0.5 * weight + bias


def by_groups(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return F.group_norm(x.flatten(0, 1), 1, weight, bias).view(x.shape)


def group_by_hand(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    h = x.view(*x.shape[:2], 1, -1)
    h = (h - h.mean(-1, keepdim=True)) * (h.var(-1, correction=0, keepdim=True) + 1e-5).rsqrt()
    return h.view(x.shape) * weight + bias


def length_by_hand(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return x / x.pow(2).sum(-1, keepdim=True).sqrt().clamp_min(1e-12) * weight


def root_mean_square(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.einsum("btd,btd->bt", x, x).div(x.shape[-1]).add(1e-5).rsqrt().unsqueeze(-1).mul(x) * weight


SPELLINGS = {
    "layer norm": lambda x, weight, bias: F.layer_norm(x, x.shape[-1:], weight, bias),
    "centred once": centred_once,
    "centred twice": centred_twice,
    "unsqueezed": unsqueezed,
    "by moments": by_moments,
    "rms norm": lambda x, weight, bias: F.rms_norm(x, x.shape[-1:], weight, 1e-5),
    "llama": llama,
    "in place": in_place,
    "centred in place": centred_in_place,
    "native": lambda x, weight, bias: torch.native_layer_norm(x, x.shape[-1:], weight, bias, 1e-5)[0],
    "by einsum": by_einsum,
    "by deviation": by_deviation,
    "by length": by_length,
    "of groups": by_groups,
    "of groups by hand": group_by_hand,
    "root mean square": root_mean_square,
    "length by hand": length_by_hand,
    "unit length": lambda x, weight, bias: F.normalize(x, dim=-1) * weight,
}
LAYER_NORMS = (
    "layer norm",
    "centred once",
    "centred twice",
    "unsqueezed",
    "by moments",
    "in place",
    "centred in place",
)
LAYER_NORMS += ("native", "by einsum", "by deviation", "by length", "of groups", "of groups by hand")
ALIKE = [LAYER_NORMS, ("rms norm", "llama", "root mean square"), ("unit length", "length by hand")]
"""Spellings of one norm."""


class Normed(Fusion):
    """A fusion encoder whose norms are spelt in some way."""

    spelling = "layer norm"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        for layer in self.layers:
            layer.norm1, layer.norm2 = Norm(config.width, self.spelling), Norm(config.width, self.spelling)


def normed(config: Config, spelling: str, monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, fx.GraphModule]:
    monkeypatch.setattr(Normed, "spelling", spelling)
    model = make(config, kind=Normed)
    return model, capture(model, inputs_for(config))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_norm_that_alone_reads_the_sum_is_the_carrier(spelling: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its last operator: what the MLP and its residual read."""
    _, program = normed(POST, spelling, monkeypatch)
    for attention in locate(program.module, annotate(program.module)):
        carrier = attention.carrier
        assert carrier is not None
        users = {u.target for u in carrier.users}
        assert users == {torch.ops.aten.linear.default, torch.ops.aten.add.Tensor}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_before_a_norm_that_others_pass_by_the_sum_is_the_carrier(
    spelling: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Pre-norm, as in language models: the residual goes past the norm."""
    _, program = normed(dataclasses.replace(POST, norm="pre"), spelling, monkeypatch)
    for attention in locate(program.module, annotate(program.module)):
        carrier = attention.carrier
        assert carrier is not None and carrier.target is torch.ops.aten.add.Tensor
        assert any(u.target is torch.ops.aten.add.Tensor and carrier in u.args for u in carrier.users)


ONE_NORM = [(norms[0], other) for norms in ALIKE for other in norms[1:]]
REDUCED: dict[str, tuple[nn.Module, nn.Module]] = {}


def reduced_norm(spelling: str, monkeypatch: pytest.MonkeyPatch) -> tuple[nn.Module, nn.Module]:
    """A model and its reduced module."""
    if spelling not in REDUCED:
        model, program = normed(POST, spelling, monkeypatch)
        wanted = schedule("safe", (0,), prune=3, merge={"image": 3, "text": 1})
        REDUCED[spelling] = model, reduce_graph(program, wanted)
    return REDUCED[spelling]


@pytest.mark.parametrize(("first", "other"), ONE_NORM)
def test_one_model_is_reduced_alike_however_its_norm_is_spelt(
    first: str, other: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    (model, reduced), (spelt, found) = (reduced_norm(name, monkeypatch) for name in (first, other))
    for seed in (1, 2):
        inputs = inputs_for(POST, seed)
        with torch.no_grad():
            wanted, plain = reduced(**inputs), model(**inputs)
            torch.testing.assert_close(spelt(**inputs), plain, atol=1e-5, rtol=0)
            assert (wanted - plain).abs().max() > 1e-4
            torch.testing.assert_close(found(**inputs), wanted, atol=1e-5, rtol=0)


class Behind(nn.Module):
    """An attention whose sum is read by something."""

    def __init__(self, behind) -> None:
        super().__init__()
        self.words, self.patches = nn.Embedding(20, 8), nn.Conv2d(3, 8, 2, 2)
        self.out, self.norm, self.last = nn.Linear(8, 8), nn.LayerNorm(8), nn.LayerNorm(8)
        self.places = nn.Parameter(torch.randn(1, 13, 8))
        self.scale = nn.Parameter(torch.rand(8))
        self.behind = behind

    def forward(self, ids: Tensor, pixels: Tensor) -> Tensor:
        x = torch.cat([self.words(ids), self.patches(pixels).flatten(2).transpose(1, 2)], 1)
        return self.behind(self, x + self.out(F.scaled_dot_product_attention(x, x, x))).amax(1)


def mixed(m: Behind, x: Tensor) -> Tensor:
    """Centred over tokens: no norm of a token."""
    return (x - x.mean(1, keepdim=True)) / (x.pow(2).mean(1, keepdim=True) + 1e-5).sqrt()


def changed_in_place(m: Behind, x: Tensor) -> Tensor:
    """Grows with the token: no norm."""
    h = x.clone()
    h *= x.mean(-1, keepdim=True)
    return h.sigmoid()


def over_tokens_in_groups(m: Behind, x: Tensor) -> Tensor:
    return F.group_norm(x, x.shape[1]) + F.group_norm(x.transpose(1, 2), 2).transpose(1, 2)


BEHIND = {
    "a multiple by its mean": (changed_in_place, "add"),
    "a norm over tokens and features": (lambda m, x: F.group_norm(x, 1), "add"),
    "channels over tokens": (over_tokens_in_groups, "add"),
    "a variance over tokens": (lambda m, x: x / torch.einsum("btd,btd->bd", x, x).sqrt()[:, None], "add"),
    "a norm of all": (lambda m, x: x / x.norm(dim=(1, 2), keepdim=True), "add"),
    "a norm of all as one row": (lambda m, x: F.layer_norm(x.flatten(1), (13 * 8,)).view(x.shape), "add"),
    "a norm beside the sum": (lambda m, x: (x + m.norm(x)).sigmoid(), "add"),
    "a norm in place": (lambda m, x: x.div_(x.norm(dim=-1, keepdim=True)).sigmoid(), "div_"),
    "nothing": (lambda m, x: x.sigmoid(), "add"),
    "a norm": (lambda m, x: m.norm(x).sigmoid(), "layer_norm"),
    "a scaled norm": (lambda m, x: (m.norm(x.double().float()) * m.scale).sigmoid(), "mul"),
    "a norm and a table of places": (lambda m, x: m.norm(x) + m.places, "layer_norm"),
    "two norms": (lambda m, x: m.last(m.norm(x)), "layer_norm"),
    "a square": (lambda m, x: m.norm(x).square(), "layer_norm"),
    "a square of the sum": (lambda m, x: m.norm(x.pow(2)), "add"),
    "a scale alone": (lambda m, x: (x * m.scale).sigmoid(), "add"),
    "a mean taken away": (lambda m, x: (x - x.mean(-1, keepdim=True)).sigmoid(), "add"),
    "a norm over tokens": (mixed, "add"),
    "a softmax": (lambda m, x: x.softmax(-1), "add"),
}


@pytest.mark.parametrize("name", BEHIND)
def test_what_is_a_norm_and_what_is_not(name: str) -> None:
    behind, expected = BEHIND[name]
    inputs = {"ids": torch.randint(0, 20, (2, 7)), "pixels": torch.randn(2, 3, 4, 6)}
    module = capture(Behind(behind).eval(), inputs).module
    (attention,) = locate(module, annotate(module))
    assert attention.carrier is not None
    assert attention.carrier.target.overloadpacket.__name__ == expected
    if name == "two norms":
        assert attention.carrier.args[0].target is torch.ops.aten.add.Tensor
