"""Text-informed pruning, against loops over heads, text rows and image tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from pumer_compile.reducers import TextInformedPruner
from tests.support.helpers import order, saliency

pytestmark = pytest.mark.fast


@st.composite
def cases(draw: st.DrawFn) -> dict:
    """Attention of eighths, so that sums are exact and ties frequent; text weights with zeros and fractions."""
    batch, heads = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4]))
    text, image = draw(st.integers(1, 6)), draw(st.integers(1, 17))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    attention = rng.integers(0, 4, (batch, heads, text, image)) / 8
    return {
        "attention": torch.from_numpy(attention).to(draw(st.sampled_from([torch.float16, torch.float32]))),
        "weights": torch.from_numpy(rng.choice([0.0, 0.5, 1.0], (batch, text))).float(),
        "keep": draw(st.integers(1, image)),
        "seed": rng,
    }


@given(cases())
def test_keeps_the_most_attended_in_descending_order(case: dict) -> None:
    kept, scores = TextInformedPruner(case["keep"])(case["attention"], case["weights"])
    assert kept.dtype == torch.int64
    assert scores.dtype == torch.float32
    for b, attention in enumerate(case["attention"].double().numpy()):
        expected = saliency(attention)
        assert scores[b].tolist() == expected
        assert kept[b].tolist() == order(expected, case["keep"])


@given(cases())
def test_padding_does_not_vote(case: dict) -> None:
    pruner = TextInformedPruner(case["keep"], pads_vote=False)
    kept, _ = pruner(case["attention"], case["weights"])
    for b, attention in enumerate(case["attention"].double().numpy()):
        votes = [w > 0 for w in case["weights"][b].tolist()]
        assert kept[b].tolist() == order(saliency(attention, votes), case["keep"])


@given(cases())
def test_without_weights_all_text_votes(case: dict) -> None:
    strict, _ = TextInformedPruner(case["keep"], pads_vote=False)(case["attention"])
    kept, _ = TextInformedPruner(case["keep"])(case["attention"])
    assert torch.equal(strict, kept)


@given(cases(), st.integers(1, 4))
def test_protected_tokens_lead(case: dict, protected: int) -> None:
    image = case["attention"].shape[-1]
    protected = min(protected, image)
    keep = max(case["keep"], protected)
    kept, _ = TextInformedPruner(keep, protected=protected)(case["attention"])
    for b, attention in enumerate(case["attention"].double().numpy()):
        rest = [i for i in order(saliency(attention), image) if i >= protected]
        assert kept[b].tolist() == [*range(protected), *rest][:keep]


@given(cases(), st.integers(0, 4))
def test_in_order_the_same_tokens_stand_where_they_stood(case: dict, protected: int) -> None:
    image = case["attention"].shape[-1]
    protected = min(protected, image)
    keep = max(case["keep"], protected)
    pruner = TextInformedPruner(keep, protected=protected, pads_vote=False, in_order=True)
    kept, _ = pruner(case["attention"], case["weights"])
    for b, attention in enumerate(case["attention"].double().numpy()):
        votes = [w > 0 for w in case["weights"][b].tolist()]
        rest = [i for i in order(saliency(attention, votes), image) if i >= protected]
        assert kept[b].tolist() == sorted([*range(protected), *rest][:keep])


def test_a_near_tie_swaps_one_token_in_order() -> None:
    """Two tokens a rounding apart at the cut; and two that are both kept, which changes nothing."""
    attention = torch.tensor([0.5, 0.1, 0.3, 0.1, 0.4]).view(1, 1, 1, 5)
    pruner = TextInformedPruner(4, in_order=True)
    assert pruner(attention)[0].tolist() == [[0, 1, 2, 4]]
    attention[..., 3] += 1e-7
    assert pruner(attention)[0].tolist() == [[0, 2, 3, 4]]
    attention[..., 4] = 0.6
    assert pruner(attention)[0].tolist() == [[0, 2, 3, 4]]


def test_protected_tokens_lead_whatever_the_others_score() -> None:
    attention = torch.zeros(1, 2, 50, 6)
    attention[..., 5] = 1.0  # every row of every head looks at the last token
    kept, _ = TextInformedPruner(3, protected=2)(attention)
    assert kept.tolist() == [[0, 1, 5]]


def test_heads_are_averaged_and_rows_summed() -> None:
    attention = torch.zeros(1, 2, 3, 4)
    attention[0, 0, 0, 2] = 1.0
    attention[0, 1, 1, 2] = 0.5
    attention[0, :, 2, 1] = 0.25
    _, scores = TextInformedPruner(1)(attention)
    assert scores.tolist() == [[0.0, 0.25, 0.75, 0.0]]


def test_half_precision_is_summed_in_single() -> None:
    attention = torch.full((1, 1, 3000, 2), 1.0, dtype=torch.float16)
    attention[..., 1] = 1 + 2**-10
    kept, scores = TextInformedPruner(1)(attention)
    assert scores.tolist() == [[3000.0, 3000 * (1 + 2**-10)]]  # 3000 is the 2048 that float16 counts to, and more
    assert kept.tolist() == [[1]]


def test_decisions_repeat_and_do_not_depend_on_the_batch() -> None:
    torch.manual_seed(1)
    attention = torch.randint(0, 3, (4, 2, 5, 30)).float()
    pruner = TextInformedPruner(12)
    kept, _ = pruner(attention)
    assert torch.equal(kept, pruner(attention)[0])
    for b in range(4):
        assert torch.equal(kept[b : b + 1], pruner(attention[b : b + 1])[0])


def test_has_no_parameters_and_no_state() -> None:
    assert not TextInformedPruner(3).state_dict()
