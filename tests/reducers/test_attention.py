"""Text rows of a fused attention, and sizes of keys, against the whole attention written out."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pumer_compile.reducers import SizeBias, TextRowsAttention

pytestmark = pytest.mark.fast


def whole(query: Tensor, key: Tensor, mask: Tensor | None, scale: float | None = None) -> Tensor:
    """All rows in float64, element by element of the mask."""
    scores = torch.einsum("bhqd,bhkd->bhqk", query.double(), key.double())
    scores = scores * (scale if scale is not None else 1 / math.sqrt(query.shape[-1]))
    if mask is not None and mask.dtype == torch.bool:
        scores = torch.where(mask, scores, -math.inf)
    elif mask is not None:
        scores = scores + mask.double()
    scores = scores - scores.amax(-1, keepdim=True)
    return scores.exp() / scores.exp().sum(-1, keepdim=True)


MASKS = {
    "none": None,
    "bool, one row": torch.tensor([1, 1, 0, 1, 1, 0, 1]).bool().view(1, 1, 1, 7),
    "additive, one row": torch.tensor([0, 0, -1e9, 0, -2.5, 0, 0]).view(1, 1, 1, 7),
    "bool, every row": torch.ones(7, 7).tril().bool().view(1, 1, 7, 7),
    "additive, every row and head": torch.linspace(-3, 3, 2 * 3 * 49).view(2, 3, 7, 7),
}


@pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS.keys())
@pytest.mark.parametrize("rows", [(0, 3), (4, 7)])
@pytest.mark.parametrize("scale", [None, 0.7])
def test_rows(mask: Tensor | None, rows: tuple[int, int], scale: float | None) -> None:
    g = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 3, 7, 4, generator=g), torch.randn(2, 3, 7, 4, generator=g)
    found = TextRowsAttention(scale, rows)(query[:, :, rows[0] : rows[1]], key, mask)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), whole(query, key, mask, scale)[:, :, rows[0] : rows[1]])


def test_they_are_the_probabilities_of_the_fused_operator() -> None:
    g = torch.Generator().manual_seed(1)
    query, key = torch.randn(2, 2, 6, 4, generator=g), torch.randn(2, 2, 6, 4, generator=g)
    mask = torch.rand(2, 1, 1, 6, generator=g) < 0.7
    mask[..., 0] = True
    value = torch.eye(6).expand(2, 2, 6, 6)
    fused = torch.nn.functional.scaled_dot_product_attention(query, key, value, attn_mask=mask)
    torch.testing.assert_close(TextRowsAttention(None, (1, 4))(query[:, :, 1:4], key, mask), fused[:, :, 1:4])


def test_half_precision_is_computed_in_single() -> None:
    g = torch.Generator().manual_seed(2)
    query, key = torch.randn(1, 2, 3, 4, generator=g).half(), torch.randn(1, 2, 5, 4, generator=g).half()
    found = TextRowsAttention(None, (0, 3))(query, key)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), whole(query, key, None))


# --- sizes ----------------------------------------------------------------------------------------------------------


CLOSE = {"atol": 2e-6, "rtol": 0}


@st.composite
def sized(draw: st.DrawFn) -> dict:
    batch, heads, queries = draw(st.integers(1, 3)), draw(st.integers(1, 3)), draw(st.integers(1, 4))
    lengths = [draw(st.integers(1, 5)) for _ in range(draw(st.integers(1, 3)))]
    keys = sum(lengths)
    g = torch.Generator().manual_seed(draw(st.integers(0, 2**31 - 1)))
    return {
        "scores": torch.randn(batch, heads, queries, keys, generator=g) * 3,
        "sizes": torch.randint(1, 6, (batch, keys), generator=g).float(),
        "lengths": lengths,
        "opened": torch.rand(batch, 1, 1, keys, generator=g) < 0.7,
    }


def counted(scores: Tensor, sizes: Tensor) -> Tensor:
    """Probabilities where key k is there `sizes[k]` times, all copies together."""
    rows = torch.zeros_like(scores, dtype=torch.float64)
    for b in range(scores.shape[0]):
        copies = [k for k, size in enumerate(sizes[b].long().tolist()) for _ in range(size)]
        found = scores[b].double()[..., copies].softmax(-1)
        for place, k in enumerate(copies):
            rows[b, :, :, k] += found[..., place]
    return rows


@given(sized())
def test_a_key_of_size_s_counts_s_times(case: dict) -> None:
    parts = case["sizes"].split(case["lengths"], 1)
    found = SizeBias()(case["scores"], case["scores"], *parts)
    assert found.shape == case["scores"].shape
    torch.testing.assert_close(found.softmax(-1).double(), counted(case["scores"], case["sizes"]), **CLOSE)


@given(sized())
def test_the_bias_as_a_mask(case: dict) -> None:
    """Without a mask, and with a boolean one: what a fused attention takes."""
    bias = SizeBias()(None, case["scores"], case["sizes"])
    assert bias.shape == (len(case["sizes"]), 1, 1, case["scores"].shape[-1])
    torch.testing.assert_close(
        (case["scores"] + bias).softmax(-1).double(), counted(case["scores"], case["sizes"]), **CLOSE
    )
    opened = case["opened"].clone()
    opened[..., 0] = True
    masked = (case["scores"] + SizeBias()(opened, case["scores"], case["sizes"])).softmax(-1)
    closed = case["scores"].masked_fill(~opened, -math.inf)
    torch.testing.assert_close(masked.double(), counted(closed, case["sizes"]), **CLOSE)


def test_padding_of_size_0_is_left_to_the_mask() -> None:
    scores = torch.tensor([[[[1.0, 2.0, -1e9]]]])
    torch.testing.assert_close(SizeBias()(scores, scores, torch.tensor([[1.0, 1.0, 0.0]])), scores)


@given(sized())
def test_heads_folded_into_the_batch(case: dict) -> None:
    folded = case["scores"].flatten(0, 1)
    found = SizeBias()(folded, folded, case["sizes"])
    expected = SizeBias()(case["scores"], case["scores"], case["sizes"])
    torch.testing.assert_close(found, expected.flatten(0, 1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_the_result_has_the_precision_of_the_queries(dtype: torch.dtype) -> None:
    scores = torch.randn(1, 2, 3, 4, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    sizes = torch.tensor([[1.0, 2.0, 3.0, 100.0]])
    exact = scores + sizes.double().log()
    for given_scores in (scores.to(dtype), None, torch.ones(1, 1, 1, 4, dtype=torch.bool)):
        found = SizeBias()(given_scores, scores.to(dtype), sizes)
        assert found.dtype == dtype
        wanted = exact if given_scores is not None and given_scores.dtype == dtype else exact - scores
        torch.testing.assert_close(
            found.double().expand_as(wanted), wanted, atol=1e-2 if dtype == torch.half else 1e-6, rtol=0
        )


def test_a_key_of_less_than_one_token_counts_as_one() -> None:
    """Padding has size 0, and the mask hides it; a logarithm below 0 would hide it a second time."""
    like, sizes = torch.zeros(1, 2, 3, 4), torch.tensor([[0.0, 0.5, 1.0, 4.0]])
    bias = SizeBias()(None, like, sizes)
    torch.testing.assert_close(bias.flatten(), torch.tensor([0.0, 0.0, 0.0, math.log(4)]))
