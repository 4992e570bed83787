"""Clusters around peaks of density, against loops."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from pumer_compile.reducers.clusters import DensityPeaks
from tests.support.clusters import clusters_of


def found_by(tokens: Tensor, count: int) -> list[dict[int, list[int]]]:
    """The members of each center, of each sample."""
    center, nearest = DensityPeaks(count)(tokens)
    found: list[dict[int, list[int]]] = []
    for row, own in zip(center.tolist(), nearest, strict=True):
        assert bool((own.sum(-1) == 1).all())
        to = own.float().argmax(-1).tolist()
        found.append({i: [j for j, c in enumerate(to) if c == i] for i, is_center in enumerate(row) if is_center})
    return found


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 999), count=st.integers(2, 13), width=st.integers(1, 6), data=st.data())
def test_against_loops(seed: int, count: int, width: int, data: st.DataObject) -> None:
    clusters = data.draw(st.integers(1, count))
    tokens = torch.randn(2, count, width, generator=torch.Generator().manual_seed(seed))
    wanted = [clusters_of([*row.double()], clusters) for row in tokens]
    assert found_by(tokens, clusters) == wanted


@pytest.mark.parametrize("clusters", [1, 2, 3])
def test_copies_are_told_apart_by_their_index(clusters: int) -> None:
    """Where every token is the same each is as dense, the first is the densest, and each center is its own."""
    (found,) = found_by(torch.ones(1, 5, 4), clusters)
    assert list(found) == list(range(clusters))
    assert found[0] == [0, *range(clusters, 5)] and all(found[i] == [i] for i in range(1, clusters))


def test_a_near_tie_moves_what_is_nearly_tied() -> None:
    """Between two centers rounding decides over the token in the middle alone."""
    spread = [[-4.0], [-3.9], [-4.1], [4.0], [3.9], [4.1], [0.0]]
    first, second = (found_by(torch.tensor([[*spread[:-1], [x]]]), 2)[0] for x in (-1e-4, 1e-4))
    assert list(first) == list(second)
    one, other = first
    assert 6 in first[one] and 6 in second[other]
    assert [i for i in first[one] if i != 6] == second[one]
