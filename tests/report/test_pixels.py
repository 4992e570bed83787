"""Tokens stand where their pixels are: against the patch grid, counted by hand."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

import pumer_compile as pumer
from pumer_compile.report.pixels import _owners, owners_of
from pumer_compile.report.steps import execution_order
from tests.support.meter import meter_inputs, tiny_meter
from tests.support.prompt_families import FAMILIES
from tests.support.tiny import image_inputs, text_inputs, tiny_vilt


def found(reduced: pumer.Reduced, inputs: Mapping[str, Tensor], number: int = 0) -> dict[str, np.ndarray]:
    """The owners of one reducer's tokens."""
    image = [name for name in execution_order(reduced.module) if not name.endswith(".text")][number]
    return owners_of(reduced.module, inputs, [image])[image]


def grid(rows: int, columns: int, side: int, first: int = 0) -> np.ndarray:
    """Of each pixel of a picture of square patches, the number of its patch in raster order."""
    numbers = np.arange(rows * columns).reshape(rows, columns) + first
    return np.kron(numbers, np.ones((side, side), dtype=np.int64))


@pytest.mark.parametrize("semantics", ["reference", "safe"])
def test_patches_of_vilt_in_raster_order_behind_its_class_token(semantics: str) -> None:
    """Wider than high, so that rows are not columns; both samples, so that none has the other's pixels."""
    model = tiny_vilt()
    inputs = {**text_inputs(2), **image_inputs([(64, 96)] * 2, (64, 96))}
    schedule = pumer.Schedule(semantics=semantics, layers=[0], prune=0.1, merge={"image": 0.3, "text": 0.2})
    owners = found(pumer.reduce(pumer.capture(model, inputs), schedule), inputs)
    assert list(owners) == ["pixel_values"]
    side = model.config.patch_size
    rows, columns = 64 // side, 96 // side
    for sample in range(2):
        expected = grid(rows, columns, side, 1 + sample * (1 + rows * columns))
        for channel in range(3):
            assert np.array_equal(owners["pixel_values"][sample, channel], expected)


def test_the_image_of_a_co_attention_is_followed_through_its_keys() -> None:
    inputs = meter_inputs(2)
    schedule = pumer.Schedule(layers=[0], prune=0.2, merge={"image": 0.3, "text": 0.2})
    owners = found(pumer.reduce(pumer.capture(tiny_meter(), inputs), schedule), inputs)
    for sample in range(2):
        assert np.array_equal(owners["pixel_values"][sample, 0], grid(3, 3, 16, 1 + 10 * sample))


def test_rows_of_a_prompt_are_two_by_two_patches_whatever_the_windows() -> None:
    """Qwen2.5-VL's tower orders patches by windows and its projector folds four into one row; a grid of 6 x 10."""
    model, make = FAMILIES["qwen2_5_vl_uneven"]()
    inputs = make(0)
    first = {"method": "fastervlm", "budget": 9, "positions": "original"}
    schedule = pumer.Schedule.load(
        {"method": "stages", "stages": [first, {"method": "fastv", "layer": 1, "budget": 4}]}
    )
    reduced = pumer.reduce(pumer.capture(model.eval(), inputs), schedule)
    rows, left = (found(reduced, inputs, number)["pixel_values"] for number in (0, 1))
    assert rows.shape == left.shape == tuple(inputs["pixel_values"].shape) == (60, 96)
    # A patch is of one row, whole: four that follow one another, 3 x 5 rows in raster order.
    assert (rows == rows[:, :1]).all() and (left == left[:, :1]).all()
    assert rows[:, 0].tolist() == [row for row in range(15) for _ in range(4)]
    # And behind the first stage nine of these, each where it stood.
    there = left[:, 0].reshape(15, 4)
    assert (there == there[:, :1]).all() and [n for n in there[:, 0].tolist() if n >= 0] == list(range(9))


@pytest.mark.fast
def test_patches_that_overlap_or_learned_queries_have_no_pixels() -> None:
    torch.manual_seed(0)
    pixels = torch.randn(2, 3, 16, 16, requires_grad=True)
    for stride, apart in ((4, True), (2, False)):
        tokens = torch.nn.Conv2d(3, 8, 4, stride)(pixels).flatten(2).transpose(1, 2)
        owners = _owners([tokens], {"pixel_values": pixels})
        assert bool(owners) is apart
    learned = torch.randn(2, 5, 8, requires_grad=True)
    assert _owners([learned], {"pixel_values": pixels}) == {}
