"""Determinantal selection, against determinants, and against what the published codes keep."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pumer_compile.reducers.cdpruner import Determinantal, halved
from pumer_compile.reducers.relevance import spread
from tests.support.greedy import cases, cosine, determinantal, expected, features, kept

pytestmark = pytest.mark.fast


def by_hand(images: Tensor, relevance: Tensor, budget: int, weight: float) -> list[list[int]]:
    found = []
    for image, worth in zip(images.double().tolist(), relevance.double().tolist(), strict=True):
        like = [[cosine(a, b) for b in image] for a in image]
        kernel = [
            [(1 - weight) * s + weight * worth[i] * s * worth[j] for j, s in enumerate(row)]
            for i, row in enumerate(like)
        ]
        found.append(sorted(determinantal(kernel, budget)))
    return found


@pytest.mark.parametrize("order", ["reference", "stable"])
@pytest.mark.parametrize("case", cases("prompt-tiny", "cdpruner"))
def test_the_published_selection(case: str, order: str) -> None:
    spec, wanted = cases("prompt-tiny", "cdpruner")[case], expected("prompt-tiny", "cdpruner")
    relevance = torch.from_numpy(wanted[f"{case}.relevance"])
    reducer = Determinantal(spec["budget"], order=order)  # type: ignore[arg-type]
    found = reducer(features("prompt-tiny")[spec["images"]], relevance)
    assert kept(found) == wanted[f"{case}.kept"].tolist()


@given(count=st.integers(1, 3), tokens=st.integers(1, 8), data=st.data(), seed=st.integers(0, 999))
@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_against_determinants(weight: float, count: int, tokens: int, data: st.DataObject, seed: int) -> None:
    budget = data.draw(st.integers(1, min(tokens, 5)))
    generator = torch.Generator().manual_seed(seed)
    images = torch.randn(count, tokens, 16, generator=generator)
    relevance = torch.rand(count, tokens, generator=generator) * 0.9 + 0.1
    found = Determinantal(budget, weight)(images, relevance)
    assert kept(found) == by_hand(images, relevance, budget, weight)


def test_relevance_matters() -> None:
    images = torch.randn(1, 12, 32, generator=torch.Generator().manual_seed(0))
    worth = torch.linspace(0.1, 1, 12).unsqueeze(0)
    assert kept(Determinantal(3)(images, worth)) != kept(Determinantal(3)(images, worth.flip(1)))


@pytest.mark.parametrize("epsilon", [0.0, 1e-6])
def test_a_budget_above_the_rank(epsilon: float) -> None:
    """No gain is left; as many tokens as asked for are kept all the same, and in `stable` the lowest indices follow."""
    generator = torch.Generator().manual_seed(0)
    images, worth = torch.randn(2, 10, 3, generator=generator), torch.rand(2, 10, generator=generator) + 0.1
    for budget in (3, 4, 7, 9, 10, 11):
        for order in ("reference", "stable"):
            found = Determinantal(budget, 1.0, epsilon, order)(images, worth)  # type: ignore[arg-type]
            assert found.sum(-1).tolist() == [min(budget, 10)] * 2
    spanning = by_hand(images, worth, 3, 1.0)
    for row, first in zip(kept(Determinantal(6, order="stable")(images, worth)), spanning, strict=True):
        assert row == sorted([*first, *[i for i in range(10) if i not in first][:3]])


def test_copies() -> None:
    """All alike and of equal relevance: the lowest indices."""
    images = torch.ones(1, 6, 4)
    assert kept(Determinantal(3, order="stable")(images, torch.ones(1, 6))) == [[0, 1, 2]]


def test_relevance_from_nothing_to_one() -> None:
    values = torch.tensor([[1.0, 3.0, 2.0], [5.0, 5.0, 5.0]])
    torch.testing.assert_close(spread(values), torch.tensor([[0.0, 1.0, 0.5], [1.0, 1.0, 1.0]]))
    torch.testing.assert_close(spread(values, above=0.5)[0], torch.tensor([0.25, 1.25, 0.75]))
    torch.testing.assert_close(spread(values, below=2.0), torch.tensor([[0.0, 0.5, 0.25], [0.0, 0.0, 0.0]]))


def test_rounding_decides_nothing_between_copies() -> None:
    """Copies but for the last bit: `stable` keeps the same ones, whichever of them rounding favours."""
    generator = torch.Generator().manual_seed(0)
    image = torch.randn(1, 6, 32, generator=generator).repeat(1, 3, 1)
    worth = (torch.rand(1, 6, generator=generator) + 0.5).repeat(1, 3)
    noisy = [image + torch.randn(image.shape, generator=generator) * 1e-7 for _ in range(8)]
    assert len({str(kept(Determinantal(5, order="stable")(x, worth))) for x in noisy}) == 1
    assert len({str(kept(Determinantal(5)(x, worth))) for x in noisy}) > 1


@pytest.mark.parametrize(
    ("tokens", "budget", "wanted"),
    [
        (10, 5, [(0, 5, 2), (5, 10, 3)]),
        (9, 4, [(0, 4, 2), (4, 9, 2)]),
        (9, 9, [(0, 4, 4), (4, 9, 5)]),
        (10, 1, [(0, 5, 0), (5, 10, 1)]),
        (4, 4, [(0, 2, 2), (2, 4, 2)]),
    ],
)
def test_halves(tokens: int, budget: int, wanted: list[tuple[int, int, int]]) -> None:
    assert halved(tokens, budget) == wanted
