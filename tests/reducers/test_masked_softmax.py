"""The published softmax, against loops over queries and keys."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pumer_compile.reducers import PublishedMaskedSoftmax
from tests.support.helpers import data_dependent, published_softmax

pytestmark = pytest.mark.fast


def oracle(scores: Tensor, weights: Tensor | None) -> np.ndarray:
    """Head by head, sample by sample."""
    out = np.zeros(tuple(scores.shape))
    for b in range(scores.shape[0]):
        for h in range(scores.shape[1]):
            w = None if weights is None else weights[b].double().numpy()
            out[b, h] = published_softmax(scores[b, h].double().numpy(), w)
    return out


@st.composite
def cases(draw: st.DrawFn) -> dict:
    batch, heads = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    lengths = [draw(st.integers(1, 6)) for _ in range(draw(st.integers(1, 3)))]
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    keys = sum(lengths)
    return {
        "scores": torch.from_numpy(rng.normal(size=(batch, heads, keys, keys)) * 5).float(),
        "weights": torch.from_numpy(rng.choice([0.0, 0.25, 0.5, 1.0], (batch, keys))).float(),
        "lengths": lengths,
    }


@given(cases())
def test_self_attention(case: dict) -> None:
    parts = case["weights"].split(case["lengths"], 1)
    found = PublishedMaskedSoftmax()(case["scores"], *parts)
    wanted = torch.from_numpy(oracle(case["scores"], case["weights"]))
    torch.testing.assert_close(found.double(), wanted, atol=1e-6, rtol=0)


@given(cases(), st.integers(1, 4), st.integers(0, 4))
def test_cross_attention(case: dict, fewer: int, more: int) -> None:
    """Fewer queries than keys, or more: query i sees key i, where there is one."""
    square = case["scores"]
    scores = torch.cat([square[:, :, :fewer], square.flip(2)[:, :, :more]], 2)
    found = PublishedMaskedSoftmax()(scores, case["weights"])
    wanted = torch.from_numpy(oracle(scores, case["weights"]))
    torch.testing.assert_close(found.double(), wanted, atol=1e-6, rtol=0)


def test_the_eye_is_not_square_in_cross_attention() -> None:
    scores = torch.zeros(1, 1, 3, 2)
    found = PublishedMaskedSoftmax()(scores, torch.tensor([[1.0, 0.0]]))
    torch.testing.assert_close(found[0, 0], torch.tensor([[1.0, 0.0], [0.5, 0.5], [1.0, 0.0]]), atol=1e-6, rtol=0)
    found = PublishedMaskedSoftmax()(torch.zeros(1, 1, 1, 3), torch.tensor([[0.0, 0.0, 1.0]]))
    torch.testing.assert_close(found.flatten(), torch.tensor([0.5, 0.0, 0.5]), atol=1e-6, rtol=0)


@given(cases())
def test_without_a_mask_it_is_nearly_softmax(case: dict) -> None:
    found = PublishedMaskedSoftmax()(case["scores"])
    torch.testing.assert_close(found, case["scores"].softmax(-1), atol=2e-6, rtol=0)
    wanted = torch.from_numpy(oracle(case["scores"], None))
    torch.testing.assert_close(found.double(), wanted, atol=1e-6, rtol=0)
    assert not torch.equal(found, case["scores"].softmax(-1)) or case["scores"].shape[-1] == 1


@given(cases())
def test_rows_sum_to_one(case: dict) -> None:
    found = PublishedMaskedSoftmax()(case["scores"], case["weights"])
    torch.testing.assert_close(found.sum(-1), torch.ones_like(found[..., 0]), atol=1e-5, rtol=0)


def test_a_masked_query_sees_itself() -> None:
    scores = torch.zeros(1, 1, 3, 3)
    found = PublishedMaskedSoftmax()(scores, torch.tensor([[1.0, 0.0, 0.0]]))
    expected = torch.tensor([[1.0, 0.0, 0.0], [0.5, 0.5, 0.0], [0.5, 0.0, 0.5]])
    torch.testing.assert_close(found[0, 0], expected, atol=1e-6, rtol=0)


def test_epsilon_is_spread_over_the_keys() -> None:
    """Nothing but masked keys, and no key of the query's own: epsilon makes the row uniform instead of zero."""
    found = PublishedMaskedSoftmax()(torch.zeros(1, 1, 5, 4), torch.zeros(1, 4))
    torch.testing.assert_close(found[0, 0, 4], torch.full((4,), 0.25))
    torch.testing.assert_close(found[0, 0, :4], torch.eye(4), atol=1e-6, rtol=0)


def test_the_maximum_is_taken_over_masked_keys_too() -> None:
    """A masked key far above the others takes them below epsilon: the published code does this."""
    scores = torch.tensor([0.0, 0.0, 40.0]).expand(1, 1, 2, 3)
    found = PublishedMaskedSoftmax()(scores, torch.tensor([[1.0, 1.0, 0.0]]))
    torch.testing.assert_close(found[0, 0], torch.full((2, 3), 1 / 3), atol=1e-5, rtol=0)


def test_half_precision_is_computed_in_single() -> None:
    scores = torch.randn(1, 2, 5, 5, generator=torch.Generator().manual_seed(0)).half()
    weights = torch.tensor([[1.0, 1.0, 0.5, 0.0, 1.0]])
    found = PublishedMaskedSoftmax()(scores, weights)
    assert found.dtype == torch.float32
    wanted = torch.from_numpy(oracle(scores, weights))
    torch.testing.assert_close(found.double(), wanted, atol=1e-6, rtol=0)


def test_gradients_flow_through_scores_and_weights() -> None:
    scores = torch.randn(1, 1, 3, 3, generator=torch.Generator().manual_seed(0), requires_grad=True)
    weights = torch.tensor([[1.0, 0.5, 0.25]], requires_grad=True)
    out = PublishedMaskedSoftmax()(scores, weights)
    grads = torch.autograd.grad((out * torch.arange(9.0).view(1, 1, 3, 3)).sum(), (scores, weights))
    assert all(torch.isfinite(g).all() and g.abs().sum() > 0 for g in grads)


@pytest.mark.parametrize("queries", [4, 3])
def test_nothing_data_dependent_is_traced(queries: int) -> None:
    program = torch.export.export(
        PublishedMaskedSoftmax(),
        (torch.zeros(2, 2, queries, 4), torch.ones(2, 1), torch.ones(2, 3)),
    )
    assert not data_dependent(program.run_decompositions().graph_module)


@given(cases(), st.integers(0, 6), st.integers(1, 6), st.integers(0, 4))
def test_rows_of_it(case: dict, first: int, count: int, more: int) -> None:
    """Any rows of self-attention, or of cross-attention with fewer or more queries than keys: as they are in all."""
    scores = torch.cat([case["scores"], case["scores"].flip(2)[:, :, :more]], 2)
    parts = case["weights"].split(case["lengths"], 1)
    rows = range(scores.shape[2])[first : first + count]
    taken = scores[:, :, rows.start : rows.stop]
    found = PublishedMaskedSoftmax()(taken, *parts, first=rows.start)
    assert torch.equal(found, PublishedMaskedSoftmax()(scores, *parts)[:, :, rows.start : rows.stop])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_those_of_the_formula(masked: bool, dtype: torch.dtype) -> None:
    """As autograd has them of what is traced, but for the maximum's, which is of the order of eps."""
    generator = torch.Generator().manual_seed(0)
    scores = torch.randn(2, 2, 5, 5, generator=generator).to(dtype).requires_grad_()
    weights = (torch.tensor([[1.0, 0.5, 0.25, 0.0, 1.0]] * 2),) if masked else ()
    factors = torch.randn(2, 2, 5, 5, generator=generator)
    traced = torch.export.export(PublishedMaskedSoftmax(), (scores, *weights)).module()
    found, wanted = (f(scores, *weights) for f in (PublishedMaskedSoftmax(), traced))
    assert torch.equal(found, wanted)
    ours, theirs = (torch.autograd.grad((out * factors).sum(), scores)[0] for out in (found, wanted))
    assert ours.dtype == dtype
    torch.testing.assert_close(ours, theirs, atol=2e-6 if dtype == torch.float32 else 1e-3, rtol=0)


def test_autograd_keeps_the_result_alone() -> None:
    """And the row sums: what a softmax keeps, and not every step of the formula."""
    kept: list[Tensor] = []
    scores = torch.randn(2, 3, 7, 7, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        out = PublishedMaskedSoftmax()(scores, torch.ones(2, 7))
    assert [tuple(t.shape) for t in kept] == [(2, 3, 7, 7), (2, 3, 7, 1)]
    assert kept[0].data_ptr() == out.data_ptr()


def test_gradients_where_the_largest_score_is_masked() -> None:
    """What is left of a row is then of the order of epsilon, which the gradient must know of; by hand, the maximum a
    constant."""
    scores = torch.tensor([[0.0, 1.0, 9.0], [2.0, 0.5, 10.0]]).view(1, 1, 2, 3).requires_grad_()
    factors = torch.tensor([[1.0, -2.0, 3.0], [0.5, 1.5, -1.0]])
    found = PublishedMaskedSoftmax()(scores, torch.tensor([[1.0, 1.0, 0.0]]))
    x = (scores.double() - scores.double().amax(-1, keepdim=True).detach()).exp() * torch.tensor([1.0, 1.0, 0.0])
    wanted = (x + 1e-6 / 3) / (x.sum(-1, keepdim=True) + 1e-6)
    ours, theirs = (torch.autograd.grad((out * factors).sum(), scores)[0] for out in (found, wanted))
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
