"""Farthest points, against lists in double precision, and against what the published code keeps."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pumer_compile.reducers.divprune import FarthestPoints
from tests.support.greedy import cases, expected, farthest, features, kept

pytestmark = pytest.mark.fast

ORDERS: tuple[Any, ...] = ("reference", "stable")
CASES = cases("prompt-tiny", "divprune")


def by_hand(images: Tensor, budget: int) -> list[list[int]]:
    return [sorted(farthest(image, budget)) for image in images.double().tolist()]


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize("case", CASES)
def test_the_published_selection(case: str, order: Any) -> None:
    found = FarthestPoints(round(CASES[case]["ratio"] * 144), order)(features("prompt-tiny")[CASES[case]["images"]])
    assert kept(found) == expected("prompt-tiny", "divprune")[f"{case}.kept"].tolist()


@given(count=st.integers(1, 3), tokens=st.integers(2, 9), data=st.data(), seed=st.integers(0, 999))
def test_against_lists(count: int, tokens: int, data: st.DataObject, seed: int) -> None:
    budget = data.draw(st.integers(1, tokens))
    images = torch.randn(count, tokens, 5, generator=torch.Generator().manual_seed(seed))
    assert kept(FarthestPoints(budget)(images)) == by_hand(images, budget)


def test_the_first_is_the_loneliest() -> None:
    """Not the first token, nor the one that is farthest from the middle: those have one that is like them."""
    angles = torch.tensor([0.0, 0.1, 0.2, 1.3, 3.0, 3.05])
    image = torch.stack([angles.cos(), angles.sin()], -1).unsqueeze(0)
    assert kept(FarthestPoints(1)(image)) == [[3]]


@pytest.mark.parametrize("order", ORDERS)
def test_copies_are_kept_once(order: Any) -> None:
    """Also where nothing but copies is left."""
    image = torch.tensor([[1.0, 0.0], [0.0, 1.0]]).repeat(4, 1).unsqueeze(0)
    for budget in (2, 3, 7, 8, 9):
        assert FarthestPoints(budget, order)(image).sum() == min(budget, 8)
    assert kept(FarthestPoints(5, "stable")(image)) == [[0, 1, 2, 3, 4]]


def test_rounding_decides_nothing_between_copies() -> None:
    """Copies but for the last bit: `stable` keeps the same ones, whichever of them rounding favours."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 6, 32, generator=generator).repeat(1, 3, 1)
    noisy = [image + torch.randn(image.shape, generator=generator) * 1e-7 for _ in range(8)]
    assert len({str(kept(FarthestPoints(9, "stable")(x))) for x in noisy}) == 1
    assert len({str(kept(FarthestPoints(9)(x))) for x in noisy}) > 1


def test_tokens_of_zeros_spoil_nothing() -> None:
    images = torch.randn(2, 8, 4, generator=torch.Generator().manual_seed(1))
    images[0, 3:] = 0
    found = FarthestPoints(6)(images)
    assert found.sum(-1).tolist() == [6, 6]
    assert kept(found)[1] == by_hand(images[1:], 6)[0]
