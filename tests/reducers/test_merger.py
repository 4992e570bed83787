"""Bipartite matching and merging, against loops over pairs."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor

from pumer_compile.reducers import ModalityAwareMerger
from tests.support.helpers import groups, margin, match

pytestmark = pytest.mark.fast


def pairs_of(merger: ModalityAwareMerger, keys: Tensor, weights: Tensor | None = None) -> list[list[tuple]]:
    """The merger's pairs of token positions, by sample."""
    matching = merger.match(merger.units(keys), weights)
    return [
        list(zip(source, target, strict=True))
        for source, target in zip(matching.source.tolist(), matching.target.tolist(), strict=True)
    ]


def most(n: int, protected: int = 1) -> int:
    """How many can merge."""
    if not any(i >= protected for i in range(1, n, 2)):
        return 0
    return sum(i >= protected for i in range(0, n, 2))


@st.composite
def exact_keys(draw: st.DrawFn, kind: str) -> dict:
    """Keys whose similarities are exact in float32 and often equal.

    `dot`: small integers. `cosine`: a power of two along one axis, so that every cosine is -1, 0 or 1.
    """
    batch, n, size = draw(st.integers(1, 3)), draw(st.integers(2, 25)), draw(st.integers(1, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    if kind == "dot":
        keys = rng.integers(-3, 4, (batch, n, size)).astype(np.float64)
    else:
        keys = np.zeros((batch, n, size))
        axis = rng.integers(0, size, (batch, n, 1))
        np.put_along_axis(keys, axis, rng.choice([-4, -1, 0.5, 1, 2], (batch, n, 1)), -1)
    return {
        "keys": torch.from_numpy(keys).to(draw(st.sampled_from([torch.float16, torch.float32]))),
        "real": torch.from_numpy(rng.random((batch, n)) < draw(st.sampled_from([0.0, 0.3, 0.7, 1.0]))),
    }


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@given(data=st.data())
def test_pairs_under_exact_ties(similarity: str, data: st.DataObject) -> None:
    case = data.draw(exact_keys(similarity))
    n = case["keys"].shape[1]
    protected = data.draw(st.integers(1, 4))
    merge = data.draw(st.integers(0, most(n, protected)))
    merger = ModalityAwareMerger(merge, similarity=similarity, protected=protected)
    for b, found in enumerate(pairs_of(merger, case["keys"])):
        keys = case["keys"][b].double().numpy()
        assert found == match(keys, merge, similarity, protected=protected)
        assert all(a >= protected and target >= protected for a, target in found)


@given(data=st.data())
def test_padding_stays_apart_as_long_as_it_can(data: st.DataObject) -> None:
    case = data.draw(exact_keys("cosine"))
    n = case["keys"].shape[1]
    merge = data.draw(st.integers(0, most(n)))
    merger = ModalityAwareMerger(merge, keep_padding_apart=True)
    weights = case["real"].float()
    for b, found in enumerate(pairs_of(merger, case["keys"], weights)):
        real = case["real"][b].tolist()
        assert found == match(case["keys"][b].double().numpy(), merge, real=real)
        mixed = sum(real[a] != real[t] for a, t in found)
        avoidable = sum(any(real[a] == real[t] for t in range(1, n, 2)) for a in range(2, n, 2))
        assert mixed == max(0, merge - avoidable)


@given(st.integers(1, 3), st.integers(3, 40), st.integers(2, 16), st.integers(0, 2**32 - 1), st.floats(0.05, 1))
def test_cosine_pairs_of_ordinary_keys(batch: int, n: int, size: int, seed: int, share: float) -> None:
    keys = np.random.default_rng(seed).normal(size=(batch, n, size)).astype(np.float32)
    merge = max(1, int(share * most(n)))
    assume(all(margin(k.astype(np.float64), merge) > 1e-5 for k in keys))
    merger = ModalityAwareMerger(merge)
    assert pairs_of(merger, torch.from_numpy(keys)) == [match(k.astype(np.float64), merge) for k in keys]


def test_figure_4_of_the_paper() -> None:
    """t1 and t3 are closest to t4, t5 and t7 to t6; the edges t3-t4, t7-t6, t5-t6 are taken.

    Leaves t1, t34, t567, t2, t8.
    """
    degrees = {1: 30.0, 2: 200.0, 3: 2.0, 4: 0.0, 5: 95.0, 6: 90.0, 7: 88.0, 8: 270.0}
    keys = torch.tensor([[[np.cos(np.radians(d)), np.sin(np.radians(d))] for d in degrees.values()]])
    # Position 0 is t1: the paper's t1, t3, t5, t7 are the even positions.
    (found,) = pairs_of(ModalityAwareMerger(3), keys)
    assert found == [(2, 3), (6, 5), (4, 5)]
    names = [[f"t{i + 1}" for i in group] for group in groups(8, found)]
    assert names == [["t1"], ["t2"], ["t4", "t3"], ["t6", "t7", "t5"], ["t8"]]


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
@given(data=st.data())
def test_pairs_in_order(similarity: str, data: st.DataObject) -> None:
    """The same pairs, by the place of what merges away."""
    case = data.draw(exact_keys(similarity))
    n = case["keys"].shape[1]
    protected = data.draw(st.integers(1, 4))
    merge = data.draw(st.integers(0, most(n, protected)))
    merger = ModalityAwareMerger(merge, similarity=similarity, protected=protected, in_order=True)
    for keys, found in zip(case["keys"].double().numpy(), pairs_of(merger, case["keys"]), strict=True):
        assert found == sorted(match(keys, merge, similarity, protected=protected))


@pytest.mark.parametrize("similarity", ["cosine", "dot"])
def test_padding_stays_apart_however_unlike_the_real_tokens_are(similarity: str) -> None:
    keys = torch.tensor([[[3.0], [-3.0], [3.0], [3.0]]])
    real = torch.tensor([[1.0, 1.0, 1.0, 0.0]])
    merger = ModalityAwareMerger(1, similarity=similarity, keep_padding_apart=True)
    assert pairs_of(merger, keys, real) == [[(2, 1)]]


def test_token_0_never_merges_away() -> None:
    keys = torch.ones(1, 7, 3)
    assert pairs_of(ModalityAwareMerger(3), keys) == [[(2, 1), (4, 1), (6, 1)]]


def test_equal_scores_go_to_the_lowest_index() -> None:
    keys = torch.ones(2, 9, 4)
    assert pairs_of(ModalityAwareMerger(2), keys) == [[(2, 1), (4, 1)]] * 2


def test_protected_tokens_are_not_merged_into() -> None:
    keys = torch.ones(1, 9, 4)
    assert pairs_of(ModalityAwareMerger(3, protected=3), keys) == [[(4, 3), (6, 3), (8, 3)]]
    assert pairs_of(ModalityAwareMerger(2, protected=4), keys) == [[(4, 5), (6, 5)]]


def test_cosine_ignores_length_and_dot_does_not() -> None:
    keys = torch.tensor([[[1.0, 0.0], [9.0, 9.0], [1.0, 0.0], [1.0, 0.1]]])
    assert pairs_of(ModalityAwareMerger(1, similarity="cosine"), keys) == [[(2, 3)]]
    assert pairs_of(ModalityAwareMerger(1, similarity="dot"), keys) == [[(2, 1)]]


def test_a_zero_key_gives_valid_pairs() -> None:
    """Keys of all zeros have no direction: a norm without bias before a projection without bias makes them."""
    keys = torch.randn(2, 9, 4, generator=torch.Generator().manual_seed(0))
    keys[:, [2, 5, 6]] = 0.0
    for found in pairs_of(ModalityAwareMerger(3), keys):
        sources = [a for a, _ in found]
        assert len(set(sources)) == 3
        assert all(2 <= a <= 8 and 1 <= b <= 7 for a, b in found)


def test_best_and_scores_are_the_similarities() -> None:
    keys = torch.tensor([[[1.0, 0.0], [0.0, 2.0], [3.0, 0.0], [4.0, 0.0]]])
    merger = ModalityAwareMerger(1)
    matching = merger.match(merger.units(keys))
    assert matching.scores.tolist() == [[[0.0, 1.0], [0.0, 1.0]]]
    assert matching.best[0, 1].item() == 1.0
    assert matching.best[0, 0].item() == float("-inf")


def test_half_precision_keys_are_compared_in_single() -> None:
    keys = torch.tensor([[[1.0, 0.0], [64.0, 0.0], [64.0, 1.0], [64.0, 1.0]]], dtype=torch.float16)
    # In float16 both products would be 4096; in float32 the second is one more.
    assert pairs_of(ModalityAwareMerger(1, similarity="dot"), keys) == [[(2, 3)]]


@given(st.integers(2, 24), st.integers(0, 2**32 - 1), st.data())
def test_assignment(n: int, seed: int, data: st.DataObject) -> None:
    merge = data.draw(st.integers(0, most(n)))
    rng = np.random.default_rng(seed)
    samples = []
    for _ in range(2):
        sources = rng.permutation(np.arange(2, n, 2))[:merge]
        samples.append([(int(a), int(rng.choice(np.arange(1, n, 2)))) for a in sources])
    source = torch.tensor([[a for a, _ in pairs] for pairs in samples], dtype=torch.int64)
    target = torch.tensor([[b for _, b in pairs] for pairs in samples], dtype=torch.int64)
    shape = (2, merge)
    merger = ModalityAwareMerger(merge)
    unforced = merger.match(merger.units(torch.zeros(2, n, 1)))
    matching = merger.forced(unforced, source.view(shape), target.view(shape))
    stay, join = merger.assignment(matching.merged, matching.pairs)
    assert stay.dtype == join.dtype == torch.float32
    for b, pairs in enumerate(samples):
        expected = groups(n, pairs)
        evens = [g for g in expected if g[0] % 2 == 0]
        odds = [g for g in expected if g[0] % 2 == 1]
        assert [[2 * i for i, x in enumerate(row) if x] for row in stay[b].tolist()] == evens
        joined = [sorted(2 * i for i, x in enumerate(row) if x) for row in join[b].tolist()]
        assert joined == [sorted(g[1:]) for g in odds]
    assert set(stay.unique().tolist()) | set(join.unique().tolist()) <= {0.0, 1.0}
    even, odd = merger.assignment_in_order(matching.merged, matching.pairs)
    assert even.dtype == odd.dtype == torch.float32
    assert set(even.unique().tolist()) | set(odd.unique().tolist()) <= {0.0, 1.0}
    for b, pairs in enumerate(samples):
        members = [
            sorted([2 * i for i, x in enumerate(one) if x] + [2 * i + 1 for i, x in enumerate(two) if x])
            for one, two in zip(even[b].tolist(), odd[b].tolist(), strict=True)
        ]
        assert members == [sorted(g) for g in groups(n, pairs, in_order=True)]


def test_decisions_repeat_and_do_not_depend_on_the_batch() -> None:
    keys = torch.randint(-2, 3, (4, 31, 3), generator=torch.Generator().manual_seed(2)).float()
    merger = ModalityAwareMerger(11, similarity="dot")
    found = pairs_of(merger, keys)
    assert found == pairs_of(merger, keys)
    assert found == [pairs_of(merger, keys[b : b + 1])[0] for b in range(4)]


def test_has_no_parameters_and_no_state() -> None:
    assert not ModalityAwareMerger(3).state_dict()


@pytest.mark.parametrize("padding", [False, True])
def test_the_pairs_are_said_twice_alike(padding: bool) -> None:
    """As indices, which parity compares, and as what the assignment reads."""
    generator = torch.Generator().manual_seed(3)
    keys, weights = torch.randn(3, 15, 4, generator=generator), torch.rand(3, 15, generator=generator).round()
    merger = ModalityAwareMerger(5, keep_padding_apart=padding)
    found = merger.match(merger.units(keys), weights)
    again = merger.forced(found, found.source, found.target)
    assert torch.equal(found.merged, again.merged) and torch.equal(found.pairs, again.pairs)
    assert found.merged.sum(1).tolist() == found.pairs.sum((1, 2)).tolist() == [5, 5, 5]
