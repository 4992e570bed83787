"""An artifact beside the unreduced model and controls: values counted by hand, controls that cost no more."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import pumer_compile as pumer
from pumer_compile.errors import UsageError
from pumer_compile.evaluation.evaluate import Evaluation, evaluate
from pumer_compile.evaluation.intervals import wilson
from pumer_compile.search.samples import Samples
from tests.support.tiny import image_inputs, text_inputs, tiny_vilt

COUNT, BATCH = 20, 8


def made(labels: np.ndarray | None) -> Samples:
    inputs = {**text_inputs(COUNT), **image_inputs([(96, 96)] * COUNT, (96, 96))}
    return Samples(inputs, tuple(inputs), COUNT, BATCH, labels, "")


@pytest.fixture(scope="module")
def program() -> pumer.Program:
    return pumer.capture(tiny_vilt(), made(None).first)


@pytest.fixture(scope="module")
def reduced(program: pumer.Program) -> pumer.Reduced:
    return pumer.reduce(program, pumer.Schedule(layers=(0,), prune=0.3, merge={"image": 0.3}, semantics="safe"))


@pytest.fixture(scope="module")
def labels(program: pumer.Program) -> np.ndarray:
    """Right for the unreduced model but for five."""
    with torch.no_grad():
        own = torch.cat([program.model(**batch).logits[:n] for batch, n in made(None).batches()])  # type: ignore[misc]
    found = own.argmax(-1).numpy()
    found[:5] = (found[:5] + 1) % 5
    return found


@pytest.fixture(scope="module")
def found(
    program: pumer.Program, reduced: pumer.Reduced, labels: np.ndarray, tmp_path_factory: pytest.TempPathFactory
) -> Evaluation:
    path = tmp_path_factory.mktemp("artifact") / "model.onnx"
    pumer.export(reduced, path, verify=False)
    return evaluate(path, program, made(labels))


def test_values_as_counted_by_hand(found: Evaluation, reduced: pumer.Reduced, labels: np.ndarray) -> None:
    assert (found.measure, found.samples, found.interval) == ("accuracy", COUNT, "Wilson")
    rows = {row.name: row for row in found.rows}
    assert (rows["unreduced"].value, rows["unreduced"].multiply_adds) == (0.75, 1.0)
    with torch.no_grad():
        given = [dict(reduced.module(**batch))["logits"][:n] for batch, n in made(None).batches()]
    right = int((torch.cat(given).argmax(-1).numpy() == labels).sum())
    one = rows["reduced"]
    assert one.value == right / COUNT and (one.low, one.high) == wilson(right, COUNT)
    assert one.difference == pytest.approx(right / COUNT - 0.75)
    assert one.difference_low is not None and one.difference_high is not None
    assert one.difference_low <= one.difference <= one.difference_high


def test_controls_cost_no_more_and_could_not_be_larger(
    found: Evaluation, program: pumer.Program, reduced: pumer.Reduced
) -> None:
    most = reduced.plan.multiply_adds_after
    rows = {row.name: row for row in found.rows}
    assert set(rows) == {"reduced", "unreduced", "random", "uniform", "downsample"}
    for name in ("random", "uniform"):
        keys = rows[name].schedule
        assert keys is not None and keys["at"] == "cross_modal.0"
        cost = pumer.reduce(program, pumer.Schedule(**keys)).plan.multiply_adds_after
        larger = pumer.reduce(program, pumer.Schedule(**{**keys, "budget": keys["budget"] + 1}))
        assert cost <= most < larger.plan.multiply_adds_after
        assert rows[name].value is not None


def test_an_artifact_that_reduces_nothing(program: pumer.Program, tmp_path: Path) -> None:
    pumer.export(program, tmp_path / "whole.onnx", verify=False)
    with pytest.raises(UsageError, match="not reduced"):
        evaluate(tmp_path / "whole.onnx", program, made(None))
