"""Attention whose heads are folded into the batch: its masks follow the reducers like those of any other."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pumer_compile as pumer
from pumer_compile.reducers import AlignAxis
from tests.support.models import Config, Fusion, inputs_for, make


class Pooled(Fusion):
    """Reads the last hidden state with a learned query; `folded` says how its heads are kept."""

    folded = True

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.probe = nn.Parameter(torch.randn(1, 1, config.width))
        self.q, self.k, self.v = (nn.Linear(config.width, config.width) for _ in range(3))

    def heads(self, x: Tensor) -> Tensor:
        batch, n, width = x.shape
        heads = self.config.heads
        split = x.view(batch, n, heads, width // heads).transpose(1, 2)
        return split.reshape(batch * heads, n, width // heads) if self.folded else split

    def forward(self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embed(input_ids, pixel_values)
        mask = self.mask(x, attention_mask, None)
        for layer in self.layers:
            x = layer(x, mask)
        batch, heads, tokens = x.shape[0], self.config.heads, x.shape[1]
        q = self.heads(self.q(self.probe.expand(batch, -1, -1)))
        k, v = self.heads(self.k(x)), self.heads(self.v(x))
        bias = mask
        if self.folded:
            bias = mask.expand(batch, heads, 1, tokens).reshape(batch * heads, 1, tokens)
        pooled = torch.matmul((torch.matmul(q, k.transpose(-1, -2)) + bias).softmax(-1), v)
        return self.classify(pooled.reshape(batch, -1))


class Apart(Pooled):
    """The same model with its heads in a dimension of their own."""

    folded = False


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("method", ["pumer", "tome"])
def test_folded_heads_give_what_heads_apart_give(method: str, batch: int) -> None:
    config = Config(batch=batch)
    inputs = inputs_for(config)
    inputs["attention_mask"][-1, -2:] = 0
    sites = [{"at": f"cross_modal.{i}", "merge": {"image": 4, "text": 1}} for i in (0, 1)]
    schedule = (
        pumer.Schedule(method="tome", sites=sites)
        if method == "tome"
        else pumer.Schedule(semantics="safe", sites=sites)
    )
    logits = []
    for kind in (Pooled, Apart):
        reduced = pumer.reduce(pumer.capture(make(config, kind=kind), inputs), schedule)
        logits.append(reduced.module(**inputs))
        assert [site.after["image"] for site in reduced.plan.sites] == [config.image - 4, config.image - 8]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)
    unreduced = make(config, kind=Pooled)(**inputs)
    assert (logits[0] - unreduced).abs().max() > 1e-3


def test_each_row_of_a_sample_gets_its_map() -> None:
    maps = torch.softmax(torch.randn(2, 3, 5), -1)
    value = torch.randn(2 * 4, 6, 5)
    found = AlignAxis(2, ((5, True),), "mean", fold=4)(value, maps)
    for row in range(8):
        torch.testing.assert_close(found[row], value[row] @ maps[row // 4].T)
