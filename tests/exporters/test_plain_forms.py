"""Operators in forms that every converter gets right: the same numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, fx, nn

import pumer_compile as pumer
from pumer_compile.analysis.operators import aten
from pumer_compile.capture.plain_graph import plain_graph_module
from pumer_compile.exporters.plain_forms import use_plain_forms
from tests.support.commands import onnx_outputs

Body = Callable[[Tensor], Tensor]


class Forms(nn.Module):
    def __init__(self, body: Body) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"out": self.body(x)}


def sample(seed: int) -> Tensor:
    return torch.randn(2, 3, 1, generator=torch.Generator().manual_seed(seed))


def plain(body: Body) -> fx.GraphModule:
    module = plain_graph_module(torch.export.export(Forms(body), (sample(0),), strict=False))
    use_plain_forms(module)
    for seed in (0, 1):
        assert torch.equal(module(sample(seed))["out"], body(sample(seed)))
    return module


def count(module: fx.GraphModule, target: object) -> int:
    return len(module.graph.find_nodes(op="call_function", target=target))


@pytest.mark.parametrize(("dim", "left"), [(0, 0), (1, 0), (2, 1), (-1, 1), (-3, 0)])
def test_squeezes(dim: int, left: int) -> None:
    """Of a dimension that is not 1 it gives its input; of one that is it stays."""
    assert count(plain(lambda x: (x + 1).squeeze(dim) * 2), aten.squeeze.dim) == left


def test_ranges_of_fractions() -> None:
    """Counted in single precision, 0.1 steps may be one more or less."""
    module = plain(lambda x: x.sum() * torch.arange(0.0, 1.0, 0.1))
    assert count(module, aten.arange.start_step) == 0
    (found,) = [b for b in module.buffers() if b.dim() == 1]
    assert torch.equal(found, torch.arange(0.0, 1.0, 0.1))
    module = plain(lambda x: x.sum() * torch.linspace(1 / 7, 1 - 1 / 7, 6))
    assert count(module, aten.linspace.default) == 0


def test_ranges_of_integers_are_counted() -> None:
    """A reducer changes how many there are."""
    module = plain(lambda x: x * torch.arange(3).view(1, 3, 1))
    assert count(module, aten.arange.default) == 1 and not list(module.buffers())


def one_hot(x: Tensor, dim: int = 1, number: float = 1.0) -> Tensor:
    return torch.zeros_like(x).scatter_(dim, x.max(dim, keepdim=True)[1], number)


@pytest.mark.parametrize(("dim", "number"), [(1, 1.0), (-2, 2.5), (0, 1.0)])
def test_one_hot_rows_are_compared(dim: int, number: float) -> None:
    """GroupViT's groups: one at the largest place, zeros elsewhere."""
    module = plain(lambda x: one_hot(x, dim, number) + 1)
    assert count(module, aten.scatter_.value) == 0 and count(module, aten.eq.Tensor) == 1


@pytest.mark.parametrize(
    "body",
    [
        lambda x: x.clone().scatter_(1, x.max(1, keepdim=True)[1], 1.0),  # into something else than zeros
        lambda x: torch.zeros_like(x).scatter_(1, x.topk(2, 1)[1], 1.0),  # at two places
    ],
    ids=["values", "two places"],
)
def test_other_scatters_stay(body: Body) -> None:
    assert count(plain(body), aten.scatter_.value) == 1


@pytest.mark.parametrize("first", [True, False])
@pytest.mark.parametrize("side", ["right", "left"])
def test_sequences_of_several_lengths(first: bool, side: str) -> None:
    def body(x: Tensor) -> Tensor:
        return nn.utils.rnn.pad_sequence([x[0], x[1, :2], x[0, 1:2] + 1], first, 0.5, side)

    assert count(plain(body), aten.pad_sequence.default) == 0


def test_in_onnx(tmp_path: Path) -> None:
    model = Forms(lambda x: (x.squeeze(1) + 1).sum() * torch.arange(1 / 6, 1.0, 1 / 6))
    pumer.export(pumer.capture(model, {"x": sample(0)}), tmp_path / "model.onnx", verify=False)
    found = onnx_outputs(tmp_path / "model.onnx", {"x": sample(1).numpy()})["out"]
    np.testing.assert_allclose(found, model(sample(1))["out"].numpy(), atol=1e-6, rtol=1e-5)
