"""Attention written with einsum, or whose keys and values have fewer heads than its queries: reduced like any other.

The oracle is the plain model of the same function, reduced by hand (`tests.support.models`).
"""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pumer_compile import capture
from pumer_compile.errors import LocateError
from pumer_compile.passes.lower_einsum import lower_einsum
from pumer_compile.reduce import reduce_graph
from tests.support.fx_text import fx_text
from tests.support.helpers import count_op
from tests.support.models import Config, Fusion, inputs_for, make, reduced, schedule

aten = torch.ops.aten
SMALL = Config(text=5, grid=(3, 4), layers=2, heads=4, width=16)
GROUPS = 2


class Einsums(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        weights = torch.einsum("bqhd,bkhd->bhqk", q, k).softmax(-1)
        return torch.einsum("bhqk,bkhd->bqhd", weights, v)


BEFORE = """\
%q -> [2, 6, 4, 8]
%k -> [2, 6, 4, 8]
%v -> [2, 6, 4, 8]
%einsum: einsum(bqhd,bkhd->bhqk, [%q, %k]) -> [2, 4, 6, 6]
%softmax: softmax(%einsum, -1) -> [2, 4, 6, 6]
%einsum_1: einsum(bhqk,bkhd->bqhd, [%softmax, %v]) -> [2, 6, 4, 8]
return %einsum_1"""
AFTER = """\
%q -> [2, 6, 4, 8]
%k -> [2, 6, 4, 8]
%v -> [2, 6, 4, 8]
%permute: permute(%q, [0, 2, 1, 3]) -> [2, 4, 6, 8]
%permute_1: permute(%k, [0, 2, 3, 1]) -> [2, 4, 8, 6]
%matmul: matmul(%permute, %permute_1) -> [2, 4, 6, 6]
%softmax: softmax(%matmul, -1) -> [2, 4, 6, 6]
%permute_2: permute(%v, [0, 2, 1, 3]) -> [2, 4, 6, 8]
%matmul_1: matmul(%softmax, %permute_2) -> [2, 4, 6, 8]
%permute_3: permute(%matmul_1, [0, 2, 1, 3]) -> [2, 6, 4, 8]
return %permute_3"""


def test_before_and_after() -> None:
    module = capture(Einsums(), {name: torch.randn(2, 6, 4, 8) for name in "qkv"}).module
    assert fx_text(module) == BEFORE
    lowered, count = lower_einsum(module)
    assert count == 2 and fx_text(lowered) == AFTER


def repeated(x: Tensor) -> Tensor:
    batch, heads, tokens, size = x.shape
    return x[:, :, None].expand(batch, heads, GROUPS, tokens, size).reshape(batch, heads * GROUPS, tokens, size)


def softmax(scores: Tensor, mask: Tensor) -> Tensor:
    return (scores / math.sqrt(4) + mask).softmax(-1)


def matmuls(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return softmax(q @ k.transpose(-1, -2), mask) @ v


# From `[batch, heads, tokens, size]` to the same; keys and values have half the heads.
GROUPED = {
    "expanded": lambda q, k, v, mask: matmuls(q, repeated(k), repeated(v), mask),
    "interleaved": lambda q, k, v, mask: matmuls(
        q, k.repeat_interleave(GROUPS, dim=1), v.repeat_interleave(GROUPS, 1), mask
    ),
    "interleaved and fused": lambda q, k, v, mask: F.scaled_dot_product_attention(
        q, torch.repeat_interleave(k, GROUPS, dim=-3), torch.repeat_interleave(v, GROUPS, dim=-3), mask
    ),
    "enable_gqa": lambda q, k, v, mask: F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True),
}


def tokens_first(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """XLNet's order of dimensions."""
    q, k, v = (x.permute(2, 0, 1, 3) for x in (q, k, v))
    weights = softmax(torch.einsum("ibnd,jbnd->bnij", q, k), mask)
    return torch.einsum("bnij,jbnd->ibnd", weights, v).permute(1, 2, 0, 3)


def behind_heads(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    weights = softmax(torch.einsum("bqhd,bkhd->bhqk", q, k), mask)
    return torch.einsum("bhqk,bkhd->bqhd", weights, v).transpose(1, 2)


def exchanged(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    weights = softmax(torch.einsum("xhyd, xhzd -> xhzy", k, q), mask)
    return torch.einsum("xhyd,xhzy->xhzd", v, weights)


def implied(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Dimensions of an ellipsis, and a result whose letters are not said (in alphabetical order)."""
    weights = softmax(torch.einsum("...id,...jd", q, k), mask)
    return torch.einsum("...ij,...jd->...id", weights, v)


EINSUMS = {f.__name__: f for f in (tokens_first, behind_heads, exchanged, implied)}


class Attention(nn.Module):
    def __init__(self, config: Config, heads: int, how) -> None:
        super().__init__()
        width, size = config.width, config.width // config.heads
        self.q, self.k, self.v = nn.Linear(width, width), nn.Linear(width, heads * size), nn.Linear(width, heads * size)
        self.out, self.size, self.how = nn.Linear(width, width), size, how

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        q, k, v = (m(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for m in (self.q, self.k, self.v))
        return self.out(self.how(q, k, v, mask).transpose(1, 2).flatten(2))


class Other(Fusion):
    """A fusion encoder with an attention of some kind."""

    heads, how = 4, staticmethod(matmuls)

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        for layer in self.layers:
            layer.attention = Attention(config, self.heads, self.how)


def other(how, heads: int) -> Other:
    return make(SMALL, kind=type("Made", (Other,), {"heads": heads, "how": staticmethod(how)}))


def plain(model: Other) -> Fusion:
    """The model of the same function whose keys and values have all the heads."""
    same, state = make(SMALL), dict(model.state_dict())
    for name, value in same.state_dict().items():
        if value.shape != state[name].shape:
            apart = state[name].unflatten(0, (-1, SMALL.width // SMALL.heads))
            state[name] = torch.stack([head for head in apart for _ in range(GROUPS)]).flatten(0, 1)
    same.load_state_dict(state)
    return same


CASES = [(how, 2, s) for how, s in [*((h, "safe") for h in GROUPED), ("enable_gqa", "reference")]]
CASES += [(how, 4, "safe") for how in EINSUMS] + [("behind_heads", 4, "reference")]


@pytest.mark.parametrize(("how", "heads", "semantics"), CASES)
def test_reduced_by_hand(how: str, heads: int, semantics: str) -> None:
    model, inputs = other({**GROUPED, **EINSUMS}[how], heads), inputs_for(SMALL)
    sites = {0: (3, 2, 1)}
    wanted = schedule(semantics, (0,), prune=3, merge={"image": 2, "text": 1})
    with torch.no_grad():
        torch.testing.assert_close(model(**inputs), plain(model)(**inputs), atol=1e-5, rtol=0)
        module = reduce_graph(capture(model, inputs), wanted)
        for seed in (1, 2):
            given = inputs_for(SMALL, seed)
            expected, _ = reduced(plain(model), given, sites, semantics)
            torch.testing.assert_close(module(**given), expected.float(), atol=2e-5, rtol=0)
    assert count_op(module, aten.einsum.default) == 0


# --- the einsum pass by itself --------------------------------------------------------------------------------------

PRODUCTS = [
    "bhqd,bhkd->bhqk",
    "bhqd,bhkd->bhkq",
    "bqhd,bkhd->hbqk",
    "bhqk,bkhd->bqhd",
    "b h q k, b h k d -> b q h d",
    "abc,acd->abd",
    "...qd,...kd->...qk",
    "bghqd,bgkd->bghqk",
    "b...d,bnd->b...n",
]
NO_PRODUCTS = {
    "three operands": "ab,bc,cd->ad",
    "one operand": "abc->acb",
    "a diagonal": "aab,acb->ac",
    "a sum over one alone": "abcd,acd->ac",
    "nothing summed": "ab,cb->abc",
    "no batch": "ab,cb->ac",
    "two letters summed": "abcd,aecd->abe",
    "element by element": "abc,abc->abc",
}


class Einsum(nn.Module):
    def __init__(self, equation: str) -> None:
        super().__init__()
        self.equation = equation

    def forward(self, **inputs: Tensor) -> Tensor:
        return torch.einsum(self.equation, *(x.sin() for x in inputs.values()))


def operands(equation: str) -> dict[str, Tensor]:
    sizes = {letter: 2 + i for i, letter in enumerate("abcdeghknq")}
    given = (
        equation.replace(" ", "").partition("->")[0].replace("...", "eg" if "b..." not in equation else "q").split(",")
    )
    return {f"x{i}": torch.randn([sizes[letter] for letter in g]) for i, g in enumerate(given)}


@pytest.mark.parametrize("equation", PRODUCTS)
def test_a_product_is_written_as_one(equation: str) -> None:
    inputs = operands(equation)
    captured = torch.export.export(Einsum(equation), (), inputs, strict=False).module()
    module, count = lower_einsum(captured)
    assert count == 1
    assert count_op(module, aten.einsum.default) == 0 and count_op(captured, aten.einsum.default) == 1
    torch.testing.assert_close(module(**inputs), captured(**inputs), atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", NO_PRODUCTS)
def test_anything_else_is_left_alone(name: str) -> None:
    captured = torch.export.export(Einsum(NO_PRODUCTS[name]), (), operands(NO_PRODUCTS[name]), strict=False).module()
    assert lower_einsum(captured) == (captured, 0)


# --- what stands in the way -----------------------------------------------------------------------------------------


def heads_before_the_batch(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    q, k, v = (x.transpose(0, 1) for x in (q, k, v))
    return ((q @ k.transpose(-1, -2) / 2).softmax(-1) @ v).transpose(0, 1)


def in_groups(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Groups of heads in a dimension of their own."""
    q = q.unflatten(1, (-1, 2))
    weights = (torch.einsum("bghqd,bgkd->bghqk", q, k[:, :2]) / 2).softmax(-1)
    return torch.einsum("bghqk,bgkd->bghqd", weights, v[:, :2]).flatten(1, 2)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (heads_before_the_batch, r"queries of shape \[4, 2, 18, 4\] with the heads before the batch"),
        (in_groups, r"queries of shape \[2, 2, 2, 18, 4\]; a reducer reads"),
    ],
)
def test_other_orders_of_batch_and_heads_are_refused(how, says: str) -> None:
    captured = capture(other(how, 4), inputs_for(SMALL))
    with pytest.raises(LocateError, match=says):
        reduce_graph(captured, schedule("safe", (0,), merge={"image": 2}))


def softmax_first(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    """Keys in front: no softmax over the last dimension."""
    scores = torch.einsum("bhqd,bhkd->bhkq", q, k) / 2
    return torch.einsum("bhkq,bhkd->bhqd", scores.softmax(2), v)


def sorted_keys(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k.sort(2).values, v.sort(2).values)


def distances(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (-torch.cdist(q, k)).softmax(-1) @ v


def cumulated(q: Tensor, k: Tensor, v: Tensor, mask: Tensor) -> Tensor:
    return (q @ k.transpose(-1, -2)).softmax(-1).cumsum(-1) @ v


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (softmax_first, r"softmax.* is over dimension 2 of \[2, 4, 18, 18\]"),
        (sorted_keys, "sort.* stands before an attention and mixes its tokens up"),
        (distances, "cdist.* stands before .*softmax.*, where a product of queries and keys was expected"),
        (cumulated, "cumsum.* stands behind .*softmax.*, where a product with values was expected"),
    ],
)
def test_what_stands_in_the_way_is_named(how, says: str) -> None:
    captured = capture(other(how, 4), inputs_for(SMALL))
    with pytest.raises(LocateError, match=says) as caught:
        reduce_graph(captured, schedule("safe", (0,), merge={"image": 2}))
    message = str(caught.value)
    assert "No attention over tokens was found" in message
    assert "layers.0.attention" in message and "test_lower_einsum.py:" in message
