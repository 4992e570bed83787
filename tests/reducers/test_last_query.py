"""The tokens that the last query looks at: which stay, in what order, and when another choice is a near-tie."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from torch import Tensor

from pumer_compile.reducers.base import Decisions, forced_decisions
from pumer_compile.reducers.last_query import LastQueryPruner, LastQueryReducer

pytestmark = pytest.mark.fast


def attention(*scores: float, heads: int = 2) -> Tensor:
    """Of every head the same, `[1, heads, 1, tokens]`."""
    return torch.tensor(scores).expand(1, heads, 1, -1)


def reducer(tokens: int, budget: int) -> torch.nn.Module:
    holder = torch.nn.Module()
    holder.last = LastQueryReducer(tokens, budget)
    return holder


@settings(max_examples=100, deadline=None)
@given(data=st.data(), batch=st.integers(1, 3), heads=st.integers(1, 4), tokens=st.integers(1, 12))
def test_the_most_of_the_mean_over_heads(data: st.DataObject, batch: int, heads: int, tokens: int) -> None:
    keep = data.draw(st.integers(1, tokens))
    # Eighths: sums are exact, and there are ties.
    drawn = data.draw(arrays.arrays(np.int64, (batch, heads, 1, tokens), elements=st.integers(0, 8)))
    given_attention = torch.from_numpy(drawn).float() / 8
    kept, scores = LastQueryPruner(keep)(given_attention)
    for row in range(batch):
        mean = [sum(drawn[row, head, 0, i] for head in range(heads)) for i in range(tokens)]
        best = sorted(sorted(range(tokens), key=lambda i: (-mean[i], i))[:keep])
        assert kept[row].tolist() == best
        assert scores[row].tolist() == pytest.approx([m / 8 / heads for m in mean])


def test_heads_are_averaged_and_not_compared() -> None:
    one_head = torch.tensor([[[[0.9, 0.0, 0.5]], [[0.0, 0.0, 0.5]]]])
    assert LastQueryPruner(1)(one_head)[0].tolist() == [[2]]


def test_ties_go_to_the_lowest() -> None:
    assert LastQueryPruner(3)(attention(0.5, 0.5, 0.5, 0.5, 0.9))[0].tolist() == [[0, 1, 4]]


def test_votes_in_single_precision() -> None:
    # 1/3 and the next in float16 differ by 2^-12; over 2048 heads a float16 sum would not tell them apart.
    low, high = (torch.tensor(x, dtype=torch.float16) for x in (0.33325, 0.3335))
    assert high > low
    votes = torch.stack([low, high]).expand(1, 2048, 1, 2)
    kept, scores = LastQueryPruner(1)(votes)
    assert kept.tolist() == [[1]] and scores.dtype == torch.float32


def test_tokens_stay_as_they_are_and_in_order() -> None:
    tokens = torch.randn(2, 4, 3, dtype=torch.float16)
    votes = torch.tensor([[0.1, 0.4, 0.2, 0.3], [0.4, 0.1, 0.3, 0.2]]).view(2, 1, 1, 4)
    found = LastQueryReducer(4, 2)(tokens, votes)
    assert found.kept.tolist() == [[1, 3], [0, 2]]
    assert found.tokens.dtype == torch.float16
    assert torch.equal(found.tokens, torch.stack([tokens[0, [1, 3]], tokens[1, [0, 2]]]))
    assert torch.equal(found.map, found.assigned) and found.map.sum(-1).eq(1).all()
    assert found.source.shape == found.target.shape == (2, 0)
    assert torch.equal(found.weights, torch.ones(2, 2, dtype=torch.float16))


@given(data=st.data(), batch=st.integers(1, 2), tokens=st.integers(2, 8))
def test_pinned_tokens_stay_and_count_in_no_budget(data: st.DataObject, batch: int, tokens: int) -> None:
    pinned = data.draw(st.lists(st.integers(0, tokens - 1), unique=True, max_size=tokens - 1))
    keep = data.draw(st.integers(1, tokens - len(pinned)))
    # Attention is at most 1, and a pinned token may get nothing.
    votes = torch.tensor([[data.draw(st.sampled_from([0.0, 0.5, 1.0])) for _ in range(tokens)] for _ in range(batch)])
    kept, _ = LastQueryPruner(keep, pinned)(votes.view(batch, 1, 1, tokens))
    for row in range(batch):
        others = [i for i in range(tokens) if i not in pinned]
        best = sorted(others, key=lambda i: (-float(votes[row, i]), i))[:keep]
        assert kept[row].tolist() == sorted([*best, *pinned])
    found = LastQueryReducer(tokens, keep, pinned)(torch.randn(batch, tokens, 3), votes.view(batch, 1, 1, tokens))
    assert torch.equal(found.kept, kept)


def test_a_choice_has_no_gradient_and_tokens_have() -> None:
    tokens, votes = torch.randn(1, 3, 2, requires_grad=True), torch.rand(1, 2, 1, 3, requires_grad=True)
    LastQueryReducer(3, 1)(tokens, votes).tokens.sum().backward()
    assert votes.grad is None and tokens.grad is not None and tokens.grad.sum() == 2


# --- Forced decisions -------------------------------------------------------------------------------------------------


def forced(votes: Tensor, kept: list[int]) -> tuple[bool, float, Tensor]:
    """Whether a forced choice differs, by what margin, and the tokens that it leaves."""
    tokens = torch.arange(votes.shape[-1], dtype=torch.float32).view(1, -1, 1)
    module = reducer(votes.shape[-1], len(kept))
    none = torch.empty(1, 0, dtype=torch.int64)
    with forced_decisions(module, {"last": Decisions(torch.tensor([kept]), none, none)}) as forcings:
        found = module.last(tokens, votes)  # type: ignore[operator]  # a module
    comparison = forcings["last"].comparison
    assert comparison is not None
    return bool(comparison.differs), float(comparison.margin), found.tokens.flatten()


def test_the_same_choice() -> None:
    differs, margin, left = forced(attention(0.1, 0.4, 0.2, 0.3), [1, 3])
    assert not differs and margin == 0 and left.tolist() == [1, 3]


def test_a_near_tie_is_told_from_a_wrong_choice() -> None:
    votes = attention(0.1, 0.5, 0.3 - 1e-7, 0.3)
    differs, margin, left = forced(votes, [1, 2])
    assert differs and 0 <= margin < 1e-6 and left.tolist() == [1, 2]
    differs, margin, left = forced(votes, [0, 1])
    assert differs and margin == pytest.approx(0.2 / 0.3) and left.tolist() == [0, 1]


def test_a_swap_moves_the_others_and_that_does_not_count() -> None:
    """The first kept token goes: every other one has another place, and only the swap is judged."""
    votes = attention(0.2, 0.9, 0.5, 0.7, 0.2 - 1e-7)
    differs, margin, _ = forced(votes, [1, 2, 3, 4])
    assert differs and margin < 1e-6


@pytest.mark.parametrize("kept", [[3, 1], [1, 1], [3, 3]])
def test_what_is_no_choice_in_its_order_is_no_near_tie(kept: list[int]) -> None:
    differs, margin, left = forced(attention(0.3, 0.3, 0.3, 0.3), kept)
    assert differs and left.tolist() == kept and margin == 1
