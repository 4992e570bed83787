"""Numbers near 0 and 1 in the ONNX graph: an optimizer takes them for nothing, and they may decide."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pumer_compile as pumer
from pumer_compile.errors import ExportError
from pumer_compile.exporters.onnx import OnnxOptions, build_onnx
from pumer_compile.exporters.small_numbers import small_numbers_kept
from pumer_compile.reducers import PublishedMaskedSoftmax
from tests.support.commands import onnx_outputs


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
            "in place": low.clone().add_(1e-9),
            "tensor": low + torch.tensor(1e-9),
            "product": low + self.eps * 0.5,
            "alpha": torch.add(low, 1e-3, alpha=1e-6),
            "whole": low.sum() + 1e-9,
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


NAMES = [*"unit buffer less reversed factor tensor product alpha whole softmax".split(), "in place"]


@pytest.mark.parametrize("name", NAMES)
def test_small_numbers_stay(name: str, outputs: dict[str, np.ndarray]) -> None:
    model = Small().double()
    wanted = model(**{n: t.double() for n, t in sample().items()})[name].detach().numpy()
    size = np.abs(wanted).max()
    tolerance = 0.3 if name == "factor" else 1e-4  # rounding of x itself, of which a millionth is asked
    assert np.abs(outputs[name] - wanted).max() <= tolerance * size


def test_a_version_of_onnxscript_with_another_matcher_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr("onnxscript.rewriter._matcher.SimplePatternMatcher._match_constant")
    with pytest.raises(ExportError, match="onnxscript"), small_numbers_kept():
        pass


def test_what_is_neutral_is_still_left_out() -> None:
    class Neutral(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return (x + 0.0) * 1.0 + 2.0

    build = build_onnx(pumer.capture(Neutral(), {"x": torch.randn(2, 3)}), OnnxOptions())
    assert [node.op_type for node in build.model.graph] == ["Add"]
