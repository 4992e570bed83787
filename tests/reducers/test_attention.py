"""Text rows of a fused attention, against the whole attention written out."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pumer_compile.reducers import TextRowsAttention


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
