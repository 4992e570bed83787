"""Ordering by counting, against stable sorting."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pumer_compile.reducers.ranking import descending_rank, first_largest, indices, one_hot, ranked, top
from tests.support.helpers import data_dependent

pytestmark = pytest.mark.fast


@st.composite
def scores(draw: st.DrawFn, least: int = 1) -> Tensor:
    """`[batch, n]`: mostly ties (small integers), or all different; float16, float32 or float64."""
    batch, n = draw(st.integers(1, 4)), draw(st.integers(least, 24))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    tied = draw(st.booleans())
    values = rng.integers(-3, 4, (batch, n)) if tied else rng.normal(size=(batch, n))
    dtype = draw(st.sampled_from([torch.float16, torch.float32, torch.float64]))
    return torch.from_numpy(values.astype(np.float64)).to(dtype)


@given(scores())
def test_rank_is_the_place_in_a_stable_descending_sort(values: Tensor) -> None:
    order = torch.sort(values, dim=-1, descending=True, stable=True).indices
    rank = descending_rank(values)
    assert rank.dtype == torch.float32
    for b in range(values.shape[0]):
        for place in range(values.shape[1]):
            assert rank[b, order[b, place]] == place


@given(scores(), st.data())
def test_top_is_the_head_of_a_stable_descending_sort(values: Tensor, data: st.DataObject) -> None:
    count = data.draw(st.integers(0, values.shape[1]))
    found = top(values, count)
    expected = torch.sort(values, dim=-1, descending=True, stable=True).indices[:, :count]
    assert found.dtype == torch.int64
    assert torch.equal(found, expected)


def test_ties_go_to_the_lowest_index() -> None:
    values = torch.tensor([[1.0, 3.0, 3.0, 1.0, 3.0]])
    assert top(values, 5).tolist() == [[1, 2, 4, 0, 3]]
    assert top(torch.zeros(2, 4), 4).tolist() == [[0, 1, 2, 3]] * 2


def test_signed_zeros_are_a_tie() -> None:
    assert top(torch.tensor([[-0.0, 0.0, -0.0]]), 3).tolist() == [[0, 1, 2]]


def test_infinities_have_their_place() -> None:
    values = torch.tensor([[0.0, float("-inf"), float("inf"), float("-inf")]])
    assert top(values, 4).tolist() == [[2, 0, 1, 3]]


def test_samples_are_ranked_apart() -> None:
    values = torch.tensor([[1.0, 2.0, 3.0], [3.0, 2.0, 1.0]])
    assert descending_rank(values).tolist() == [[2, 1, 0], [0, 1, 2]]


@given(scores())
def test_first_largest(values: Tensor) -> None:
    best, there = first_largest(values)
    assert there.dtype == torch.bool and best.dtype == values.dtype
    for b, row in enumerate(values.tolist()):
        assert best[b].item() == max(row)
        assert [i for i, on in enumerate(there[b].tolist()) if on] == [row.index(max(row))]


def test_first_largest_takes_any_rank() -> None:
    values = torch.tensor([[[1.0, 5.0, 5.0], [7.0, 7.0, 0.0]]])
    best, there = first_largest(values)
    assert best.tolist() == [[[5.0], [7.0]]]
    assert there.tolist() == [[[False, True, False], [True, False, False]]]


def test_first_largest_of_nothing_but_minus_infinity() -> None:
    best, there = first_largest(torch.full((1, 3), float("-inf")))
    assert best.item() == float("-inf")
    assert there.tolist() == [[True, False, False]]


def test_first_largest_of_what_is_no_number() -> None:
    """Nothing equals it, and still each row must select one."""
    scores = torch.tensor([[1.0, float("nan"), 2.0], [3.0, 1.0, 2.0]])
    assert first_largest(scores)[1].tolist() == [[False, False, True], [True, False, False]]


@given(scores(), st.data())
def test_of_a_tie_the_one_named_comes_first(values: Tensor, data: st.DataObject) -> None:
    order = data.draw(st.permutations(range(values.shape[1])))
    place = torch.tensor([order.index(i) for i in range(values.shape[1])])
    rank = descending_rank(values, place < place.unsqueeze(-1))
    for b, row in enumerate(values.tolist()):
        wanted = sorted(range(len(row)), key=lambda i: (-row[i], order.index(i)))
        assert [wanted.index(i) for i in range(len(row))] == rank[b].tolist()


def test_rows_select_what_stands_at_a_place() -> None:
    rank = descending_rank(torch.tensor([[1.0, 5.0, 3.0]]))
    rows = ranked(rank, torch.tensor([2, 0]))
    assert rows.tolist() == [[[True, False, False], [False, True, False]]]
    assert indices(rows).tolist() == [[0, 1]]


@given(st.lists(st.integers(0, 6), max_size=6), st.integers(7, 9))
def test_one_hot(numbers: list[int], size: int) -> None:
    rows = one_hot(torch.tensor(numbers, dtype=torch.int64), size)
    assert rows.dtype == torch.bool
    assert rows.shape == (len(numbers), size)
    for row, index in zip(rows.tolist(), numbers, strict=True):
        assert [i for i, on in enumerate(row) if on] == [index]


@pytest.mark.parametrize("function", [lambda s: top(s, 3), descending_rank, lambda s: first_largest(s)[1]])
def test_nothing_data_dependent_is_traced(function) -> None:
    class Module(torch.nn.Module):
        def forward(self, scores: Tensor) -> Tensor:
            return function(scores)

    program = torch.export.export(Module(), (torch.randn(2, 8),)).run_decompositions()
    assert not data_dependent(program.graph_module)
