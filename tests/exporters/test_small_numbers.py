"""Numbers near 0 and 1 in the ONNX graph: an optimizer takes them for nothing, and they may decide."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._ops import OpOverload

import pumer_compile as pumer
from pumer_compile.exporters.small_numbers import keep_small_numbers
from pumer_compile.reducers import PublishedMaskedSoftmax
from tests.commands import onnx_outputs

aten = torch.ops.aten


class Small(nn.Module):
    """Numbers that matter beside small ones, by every way of writing them."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("eps", torch.tensor(3e-9))
        self.softmax = PublishedMaskedSoftmax()

    def forward(self, x: Tensor, mask: Tensor) -> dict[str, Tensor]:
        low = x * 1e-9
        return {
            "unit": x / (x.norm(dim=-1, keepdim=True) + 1e-9),
            "buffer": low / (low.abs() + self.eps),
            "less": (low - 1e-9) * 1e9,
            "reversed": 1e-9 + low,
            "factor": (x * 1.000005 - x) * 1e6,
            # 120 keys: eps / keys is below 1e-8, and all that a hidden maximum leaves is of that size.
            "softmax": self.softmax(20 * x[:, None, None, :].expand(-1, 1, 2, -1), mask),
        }


def sample() -> dict[str, Tensor]:
    x = torch.randn(3, 120, generator=torch.Generator().manual_seed(0))
    x[1] = 0
    x[2, 7] = 4  # the largest score belongs to a hidden key
    mask = torch.ones(3, 120)
    mask[2, 2:] = 0
    return {"x": x, "mask": mask}


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    path: Path = tmp_path_factory.mktemp("small") / "model.onnx"
    pumer.export(pumer.capture(Small(), sample()), path, verify=False)
    return onnx_outputs(path, {name: tensor.numpy() for name, tensor in sample().items()})


@pytest.mark.parametrize("name", ["unit", "buffer", "less", "reversed", "factor", "softmax"])
def test_small_numbers_stay(name: str, outputs: dict[str, np.ndarray]) -> None:
    model = Small().double()
    wanted = model(**{n: t.double() for n, t in sample().items()})[name].detach().numpy()
    size = np.abs(wanted).max()
    tolerance = 0.3 if name == "factor" else 1e-4  # rounding of x itself, of which a millionth is asked
    assert np.abs(outputs[name] - wanted).max() <= tolerance * size


def targets(module: nn.Module, *inputs: Tensor) -> list[str]:
    exported = torch.export.export(module, inputs, strict=False)
    before = exported.module()(*inputs)
    keep_small_numbers(exported)
    torch.testing.assert_close(exported.module()(*inputs), before, rtol=0, atol=0)
    return [n.target.__name__ for n in exported.graph.nodes if isinstance(n.target, OpOverload)]


def test_what_no_optimizer_takes_for_nothing_stays_as_it_is() -> None:
    class Ordinary(nn.Module):
        def forward(self, x: Tensor, n: Tensor, s: Tensor) -> Tensor:
            return (x + 1e-5) * 1.1 + 0.0 + (n + 1) * 1.0 + (s + 1e-9)

    found = targets(Ordinary(), torch.randn(2, 3), torch.arange(3), torch.tensor(2.0))
    assert "full.default" not in found and len(found) == 8


def test_dtypes_are_promoted_as_before() -> None:
    class Half(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("eps", torch.tensor(1e-9, dtype=torch.float64))

        def forward(self, x: Tensor) -> Tensor:
            return torch.add(x, 1e-9).add(self.eps)

    assert targets(Half(), torch.randn(2, 3).half()).count("full.default") == 2
