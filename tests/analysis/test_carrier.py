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
from tests.models import Config, Fusion, inputs_for, make, schedule

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


SPELLINGS = {
    "layer norm": lambda x, weight, bias: F.layer_norm(x, x.shape[-1:], weight, bias),
    "centred once": centred_once,
    "centred twice": centred_twice,
    "unsqueezed": unsqueezed,
    "by moments": by_moments,
    "rms norm": lambda x, weight, bias: F.rms_norm(x, x.shape[-1:], weight, 1e-5),
    "llama": llama,
    "unit length": lambda x, weight, bias: F.normalize(x, dim=-1) * weight,
}
LAYER_NORMS = ("layer norm", "centred once", "centred twice", "unsqueezed", "by moments")


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


def test_one_model_is_reduced_alike_however_its_norm_is_spelt(monkeypatch: pytest.MonkeyPatch) -> None:
    inputs, found = inputs_for(POST), []
    for spelling in LAYER_NORMS:
        _, program = normed(POST, spelling, monkeypatch)
        module = reduce_graph(program, schedule("safe", (0,), prune=3, merge={"image": 3, "text": 1}))
        with torch.no_grad():
            found.append(module(**inputs))
    for result in found[1:]:
        torch.testing.assert_close(result, found[0], atol=1e-5, rtol=0)


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


BEHIND = {
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
