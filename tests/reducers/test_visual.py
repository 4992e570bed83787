"""Votes of members, and pinned tokens of an image that is reduced by visual cues."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pumer_compile.reducers.visual import MemberVotes, VisualReducer

pytestmark = pytest.mark.fast


@given(data=st.data(), batch=st.integers(1, 2), rows=st.integers(1, 4), tokens=st.integers(1, 6))
def test_the_mean_of_the_members(data: st.DataObject, batch: int, rows: int, tokens: int) -> None:
    """Rows of one member and of several, of the same ones, and of other ones in another prompt."""
    member = st.lists(st.integers(0, tokens - 1), min_size=1, max_size=tokens, unique=True)
    members = [[data.draw(member) for _ in range(rows)] for _ in range(batch)]
    votes = torch.rand(tokens, generator=torch.Generator().manual_seed(0))
    found = MemberVotes(members)(votes)
    wanted = [[sum(float(votes[i]) for i in row) / len(row) for row in prompt] for prompt in members]
    torch.testing.assert_close(found, torch.tensor(wanted))


def test_members_of_one_number_are_an_exact_mean() -> None:
    """Four times the same vote is that vote, whatever its last bit."""
    votes = torch.full((8,), 0.1)
    assert MemberVotes([[[0, 1, 2, 3], [4, 5, 6, 7]]])(votes).tolist() == [[float(votes[0])] * 2]


def inputs(batch: int, tokens: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(batch, tokens, 5, generator=generator), torch.rand(batch, tokens, generator=generator)


@given(data=st.data(), batch=st.integers(1, 2), lengths=st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_pinned_tokens_change_nothing_but_places(data: st.DataObject, batch: int, lengths: list[int]) -> None:
    """Marks at the ends of an image's lines stay; the others are those that an image without marks keeps."""
    pinned_count, total = data.draw(st.integers(0, 3)), sum(lengths)
    places = sorted(data.draw(st.permutations(range(total + pinned_count)))[:total])
    pinned = [place for place in range(total + pinned_count) if place not in places]
    budget = data.draw(st.integers(1, max(lengths)))
    starts = [sum(lengths[:i]) for i in range(len(lengths) + 1)]
    bare = [list(range(a, b)) for a, b in itertools.pairwise(starts)]
    marked = [[places[i] for i in crop] for crop in bare]
    tokens, votes = inputs(batch, total + pinned_count)
    alone = VisualReducer(bare, budget, 0.5).choose(tokens[:, places], votes[:, places])
    found = VisualReducer(marked, budget, 0.5, pinned=pinned).choose(tokens, votes)
    for row in range(batch):
        wanted = sorted([places[i] for i in alone.decisions.kept[row].tolist()] + pinned)
        assert found.decisions.kept[row].tolist() == wanted


def test_how_many_stay() -> None:
    reducer = VisualReducer([[0, 1, 3, 4], [6, 7]], 3, 0.5, pinned=[2, 5])
    assert (reducer.tokens, reducer.keep) == (8, 3 + 2 + 2)
    tokens, votes = inputs(2, 8)
    found = reducer(tokens, votes)
    assert found.tokens.shape == (2, 7, 5)
    assert all({2, 5, 6, 7} <= set(row) for row in found.kept.tolist())


def test_other_votes_keep_other_tokens() -> None:
    reducer = VisualReducer([[0, 1, 3, 4]], 2, 1.0, pinned=[2])
    tokens, _ = inputs(1, 5)
    for best in ([0, 1], [3, 4], [0, 4]):
        votes = torch.zeros(1, 5)
        votes[0, best] = 1.0
        votes[0, 2] = 9.0  # a pinned token's votes count nowhere
        assert reducer.choose(tokens, votes).decisions.kept.tolist() == [sorted([*best, 2])]
