"""An artifact is not blamed for what its precision does to eager PyTorch too, and for more it is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, fx

import pumer_compile as pumer
from pumer_compile.analysis.nodes import copied
from pumer_compile.parity.check import check
from pumer_compile.parity.noise import _linear, coarse_of, with_int8_linears
from pumer_compile.parity.report import MOST_NOISE, NOISE, ParityReport, allowed
from pumer_compile.reduce import Reduced, with_decisions
from pumer_compile.reducers import reducers_of
from tests.support.models import Config, Fusion, inputs_for, program, schedule

CONFIG = Config(layers=2, batch=3)
NORM = 5e-3  # the constant of float16


class Named(Fusion):
    """Gives its answer by name."""

    def finish(self, x: Tensor, text: int) -> Any:
        return {"logits": super().finish(x, text)}


@pytest.fixture(scope="module")
def reduced() -> Reduced:
    return pumer.reduce(program(CONFIG, Named), schedule(layers=(0,)))


def scaled(module: fx.GraphModule, factor: float) -> Callable[[], fx.GraphModule]:
    """The module with its output times a number: a precision that makes just this error."""
    twin = fx.GraphModule(module, copied(module.graph))
    output = twin.graph.output_node()
    (given,) = output.all_input_nodes
    with twin.graph.inserting_before(output):
        times = twin.graph.call_function(torch.ops.aten.mul.Tensor, (given, factor))
    output.args = fx.map_arg(output.args, lambda node: times)
    twin.recompile()
    return lambda: twin


class Off:
    """An open artifact that gives what eager PyTorch does, times a number."""

    path, provider, outputs = "fake.onnx", "none", ["logits"]

    def __init__(self, reduced: Reduced, factor: float) -> None:
        (self.twin, self.decisions), self.factor = with_decisions(reduced.module), factor

    def run(self, batch: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
        given = {name: value.numpy().copy() for name, value in self.twin(**batch).items()}
        return {name: value * self.factor if name == "logits" else value for name, value in given.items()}

    def close(self) -> None:
        """Nothing is held."""


def judged(reduced: Reduced, factor: float, coarse: Any, **more: Any) -> ParityReport:
    opened: Any = Off(reduced, factor)
    whole = reduced.program.module
    return check(
        opened, reduced.module, whole, [inputs_for(CONFIG)], "float16", opened.decisions, coarse=coarse, **more
    )


def test_twice_the_noise_passes_and_the_report_says_both(reduced: Reduced) -> None:
    """Off by 0.8% of the norm, beside a constant of 0.5%."""
    assert not judged(reduced, 1.008, None).passed
    report = judged(reduced, 1.008, scaled(reduced.module, 1.0045))
    assert report.passed, report.failures()
    row = next(row for row in report.outputs if row.against == "forced")
    assert row.max_norm == pytest.approx(8e-3, rel=1e-3) and row.noise_norm == pytest.approx(4.5e-3, rel=1e-3)
    assert not row.within_constants and row.verdict == "pass"
    note = next(note for note in report.notes if "logits (forced)" in note)
    assert "8.00e-03 of its norm" in note and "constant of float16 is 0.005" in note and "makes 4.50e-03" in note


def test_more_than_twice_fails_and_says_both(reduced: Reduced) -> None:
    report = judged(reduced, 1.008, scaled(reduced.module, 1.0035))
    assert not report.passed and report.only_too_far
    assert "8.00e-03 of its norm, allowed 0.005 (float16 in eager PyTorch makes 3.50e-03" in report.failures()


def test_what_needs_no_noise_asks_for_none(reduced: Reduced) -> None:
    def coarse() -> fx.GraphModule:
        raise AssertionError("asked")

    assert judged(reduced, 1.004, coarse).passed
    # Tolerances of the user's own are the whole of the judgement.
    assert not judged(reduced, 1.008, coarse, atol=1e-6, rtol=1e-6).passed


@pytest.mark.parametrize("noise", [0.5, float("nan"), float("inf")])
def test_a_precision_that_ruins_a_model_proves_nothing(reduced: Reduced, noise: float) -> None:
    assert not judged(reduced, 1.0 + 1.1 * MOST_NOISE * NORM, scaled(reduced.module, 1 + noise)).passed


def test_an_operator_that_cpus_lack_leaves_the_constant(reduced: Reduced) -> None:
    def coarse() -> fx.GraphModule:
        raise RuntimeError("\"addmm_impl_cpu_\" not implemented for 'Half'")

    report = judged(reduced, 1.008, coarse)
    assert not report.passed and any('was not measured: "addmm_impl_cpu_" not implemented' in n for n in report.notes)


@pytest.mark.fast
def test_how_much_is_allowed() -> None:
    assert allowed(0.1, None) == 0.1 and allowed(0.1, 0.01) == 0.1
    assert allowed(0.1, 0.2) == pytest.approx(NOISE * 0.2) and allowed(0.1, 5.0) == pytest.approx(MOST_NOISE * 0.1)


def test_half_precision_is_the_models_own(reduced: Reduced) -> None:
    model, inputs = reduced.program.model, inputs_for(CONFIG)
    coarse = coarse_of(reduced.program, None, reduced.program.module, "float16")
    assert model is not None and coarse is not None
    half = {name: t.half() if t.is_floating_point() else t for name, t in inputs.items()}
    with torch.no_grad():
        expected = copy.deepcopy(model).half().eval()(**half)["logits"]
        found, exact = coarse()(**half)["logits"], model.eval()(**inputs)["logits"]
    assert found.dtype == torch.float16 and torch.equal(found, expected)
    assert 1e-6 < float((found.float() - exact).norm() / exact.norm()) < 2e-2
    assert coarse_of(reduced.program, None, reduced.program.module, "float32") is None
    again = coarse_of(reduced.program, reduced.schedule, reduced.module, "bfloat16")
    assert again is not None and set(reducers_of(again())) == set(reducers_of(reduced.module))


def test_int8_rounds_as_whole_numbers_do(reduced: Reduced) -> None:
    generator = torch.Generator().manual_seed(0)
    x, weight, bias = (torch.randn(*shape, generator=generator) for shape in ((5, 64), (7, 64), (7,)))
    # By whole numbers: uint8 with a zero point times int8 by row.
    low, high = min(0.0, float(x.min())), max(0.0, float(x.max()))
    step, steps = (high - low) / 255, weight.abs().amax(1).numpy() / 127
    zero = round(-low / step)
    ints = np.clip(np.rint(x.numpy() / step) + zero, 0, 255).astype(np.int64)
    rows = np.rint(weight.numpy() / steps[:, None]).astype(np.int64)
    expected = ((ints - zero) @ rows.T) * step * steps + bias.numpy()
    assert np.allclose(_linear(x, weight, bias, inputs=True).numpy(), expected, atol=1e-4)
    # Weights alone, in blocks of 32, the last of which may be short.
    for width in (64, 40):
        rounded = weight.numpy()[:, :width].copy()
        for start in (0, 32):
            block = rounded[:, start : start + 32]
            scale = np.abs(block).max(1, keepdims=True) / 127
            rounded[:, start : start + 32] = np.rint(block / scale) * scale
        expected = x.numpy()[:, :width] @ rounded.T
        assert np.allclose(_linear(x[:, :width], weight[:, :width], inputs=False).numpy(), expected, atol=1e-4)
    twin, inputs = with_int8_linears(reduced.module, inputs=True), inputs_for(CONFIG)
    with torch.no_grad():
        found, exact = twin(**inputs)["logits"], reduced.module(**inputs)["logits"]
    assert 1e-4 < float((found - exact).norm() / exact.norm()) < 1.0
