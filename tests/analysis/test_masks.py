"""Biases and masks of an attention, apart or in one value: each is aligned as what it is, and masks alone are padding.

The oracle aligns with lists of members, one sample at a time; it shares no code with the package.
"""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pumer_compile import capture
from pumer_compile.analysis.annotate import annotate
from pumer_compile.analysis.attention import locate
from pumer_compile.analysis.masks import MaskReader
from pumer_compile.errors import LocateError
from pumer_compile.reduce import reduce_graph
from pumer_compile.reducers import TokenWeights
from tests.support.models import WEIGHTED, Config, Fusion, State, _probabilities, _reduce, inputs_for, make, schedule

SMALL = Config(text=5, grid=(3, 4), layers=2, heads=2, width=16, patch_mask=True)
BUDGETS = (3, 2, 1)


class Biased(Fusion):
    """Scores get a bias for each pair of positions, and a mask; `how` says in which way."""

    how = "apart"

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        n = config.text + config.image
        self.bias = nn.Parameter(torch.randn(1, config.heads, n, n))

    def position_bias(self) -> Tensor:
        if self.how != "constant":
            return self.bias
        place = torch.arange(self.bias.shape[-1])
        slopes = torch.tensor([0.5, 0.125]).view(1, -1, 1, 1)
        return -slopes * (place[:, None] - place).abs()

    def context(self, q: Tensor, k: Tensor, v: Tensor, opened: Tensor) -> Tensor:
        bias, low = self.position_bias(), torch.finfo(q.dtype).min
        mask = (1.0 - opened.to(q.dtype)) * low
        if self.how == "infinite":
            mask = torch.where(opened > 0, 0.0, float("-inf"))
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        match self.how:
            case "apart":
                return (scores + bias + mask).softmax(-1) @ v
            case "the other way round":
                return (scores + mask + bias).softmax(-1) @ v
            case "sum":
                return (scores + (mask + bias)).softmax(-1) @ v
            case "fused bias":
                return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)
            case "filled":
                return F.scaled_dot_product_attention(q, k, v, attn_mask=bias.masked_fill(opened == 0, low))
            case "where":
                return F.scaled_dot_product_attention(q, k, v, attn_mask=torch.where(opened > 0, bias, low))
            case "expanded":
                wide = (bias + mask).expand(q.shape[0], -1, -1, -1).contiguous()
                return F.scaled_dot_product_attention(q, k, v, attn_mask=wide)
            case _:
                return F.scaled_dot_product_attention(q, k, v, attn_mask=bias + mask)

    def run(self, layer: nn.Module, x: Tensor, opened: Tensor) -> Tensor:
        attention, normed = layer.attention, layer.norm1(x)
        q, k, v = (attention.split(m(normed)) for m in (attention.q, attention.k, attention.v))
        x = x + attention.out(self.context(q, k, v, opened).transpose(1, 2).flatten(2))
        return x + layer.mlp(layer.norm2(x))

    def forward(self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor, patch_mask: Tensor) -> Tensor:
        x = self.embed(input_ids, pixel_values)
        opened = self.tokens_open(x, attention_mask, patch_mask)[:, None, None, :]
        for layer in self.layers:
            x = self.run(layer, x, opened)
        return self.classify(self.last(x).amax(1))


class Shared(Biased):
    """One sum of bias and mask for all layers."""

    def forward(self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor, patch_mask: Tensor) -> Tensor:
        x = self.embed(input_ids, pixel_values)
        opened = self.tokens_open(x, attention_mask, patch_mask)[:, None, None, :]
        both = self.bias + (1.0 - opened.to(x.dtype)) * torch.finfo(x.dtype).min
        for layer in self.layers:
            attention, normed = layer.attention, layer.norm1(x)
            q, k, v = (attention.split(m(normed)) for m in (attention.q, attention.k, attention.v))
            context = F.scaled_dot_product_attention(q, k, v, attn_mask=both)
            x = x + attention.out(context.transpose(1, 2).flatten(2))
            x = x + layer.mlp(layer.norm2(x))
        return self.classify(self.last(x).amax(1))


def averaged(bias: Tensor, members: list[list[int]], sizes: list[float]) -> Tensor:
    """`[heads, queries, keys]` of new tokens: the mean over the members of each."""
    rows = torch.zeros(len(members), bias.shape[-1])
    for new, group in enumerate(members):
        total = sum(sizes[i] for i in group)
        for old in group:
            rows[new, old] = sizes[old] / total if total else 1 / len(group)
    return rows @ bias @ rows.T


def by_hand(model: Biased, inputs: dict[str, Tensor], semantics: str) -> Tensor:
    """The model with a reducer after its first layer's attention."""
    config, results = model.config, []
    x = model.embed(inputs["input_ids"], inputs["pixel_values"])
    masked = model.how != "fused bias"
    opened = model.tokens_open(x, inputs["attention_mask"], inputs["patch_mask"]).float()
    opened = opened if masked else torch.ones_like(opened)
    kind = "bool" if model.how in ("filled", "where") else "additive"
    for b in range(len(x)):
        state, bias = State(x[b], config.text, opened[b].tolist(), opened[b].tolist()), model.position_bias()[0]
        for index, layer in enumerate(model.layers):
            attention, normed = layer.attention, layer.norm1(state.x)
            q, k, v = (
                m(normed).unflatten(-1, (config.heads, -1)).movedim(-2, 0)
                for m in (attention.q, attention.k, attention.v)
            )
            scores = torch.einsum("hqd,hkd->hqk", q, k) / math.sqrt(q.shape[-1]) + bias
            weights = _probabilities(scores, state.sizes, state.shares, semantics, kind)
            state.x = state.x + attention.out(torch.einsum("hqk,hkd->hqd", weights, v).movedim(0, -2).flatten(-2))
            if index == 0:
                sizes = list(state.sizes) if semantics in WEIGHTED else [1.0] * len(state.sizes)
                _reduce(state, weights.double().numpy(), k.double().numpy(), BUDGETS, semantics, config)
                bias = averaged(bias, state.members, sizes)
            state.x = state.x + layer.mlp(layer.norm2(state.x))
        results.append(model.classify(model.last(state.x).amax(0)))
    return torch.stack(results).float()


EVERY = (
    "apart",
    "the other way round",
    "sum",
    "fused bias",
    "fused sum",
    "infinite",
    "constant",
    "filled",
    "where",
    "expanded",
)
CASES = [(how, "safe") for how in EVERY] + [
    (how, semantics) for how in ("fused sum", "infinite", "fused bias") for semantics in ("paper", "reference")
]


@pytest.mark.parametrize(("how", "semantics"), CASES)
def test_biases_and_masks_follow_a_reducer_as_what_they_are(
    how: str, semantics: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Biased, "how", how)
    model, inputs = make(SMALL, kind=Biased), inputs_for(SMALL)
    prune, image, text = BUDGETS
    wanted = schedule(semantics, (0,), prune=prune, merge={"image": image, "text": text})
    module = reduce_graph(capture(model, inputs), wanted)
    with torch.no_grad():
        for seed in (1, 2):
            given = inputs_for(SMALL, seed)
            torch.testing.assert_close(module(**given), by_hand(model, given, semantics), atol=2e-5, rtol=0)
    reads = [m for m in module.modules() if isinstance(m, TokenWeights)]
    assert bool(reads) == (how != "fused bias" and semantics != "paper")


def test_one_sum_for_all_layers_follows_into_each() -> None:
    config = dataclasses.replace(SMALL, layers=3)
    model, inputs = make(config, kind=Shared), inputs_for(config)
    prune, image, text = BUDGETS
    wanted = schedule("safe", (0,), prune=prune, merge={"image": image, "text": text})
    module = reduce_graph(capture(model, inputs), wanted)
    with torch.no_grad():
        torch.testing.assert_close(module(**inputs), by_hand(model, inputs, "safe"), atol=2e-5, rtol=0)


def test_the_ways_to_write_it_are_one_model(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the oracle is held against is not the same where nothing is masked or biased."""
    model, inputs = make(SMALL, kind=Biased), inputs_for(SMALL)
    results = {}
    with torch.no_grad():
        for how in EVERY:
            monkeypatch.setattr(Biased, "how", how)
            results[how] = model(**inputs)
    for how in set(EVERY) - {"fused bias", "constant"}:
        torch.testing.assert_close(results[how], results["apart"], atol=1e-5, rtol=0)
    assert float((results["fused bias"] - results["apart"]).abs().max()) > 1e-2
    assert float((results["constant"] - results["apart"]).abs().max()) > 1e-2


# --- what is proved a mask, and what is refused ---------------------------------------------------------------------


class Adds(nn.Module):
    """Adds something to the scores of one attention over words and patches."""

    def __init__(self, added, fused: bool = True) -> None:
        super().__init__()
        self.words, self.patches = nn.Embedding(20, 8), nn.Conv2d(3, 8, 2, 2)
        self.out = nn.Linear(8, 8)
        self.table = nn.Parameter(torch.randn(1, 1, 13, 13))
        self.register_buffer("baked", torch.randn(1, 1, 13, 13).masked_fill(torch.ones(13, 13).triu(1) > 0, -torch.inf))
        self.added, self.fused = added, fused

    def forward(self, ids: Tensor, pixels: Tensor, mask: Tensor, given: Tensor) -> Tensor:
        x = torch.cat([self.words(ids), self.patches(pixels).flatten(2).transpose(1, 2)], 1)
        h = x.unsqueeze(1)
        added = self.added(self, mask, given)
        if self.fused:
            context = F.scaled_dot_product_attention(h, h, h, attn_mask=added)
        else:
            context = ((h @ h.transpose(-1, -2)) / 8**0.5 + added).softmax(-1) @ h
        return (x + self.out(context.squeeze(1))).amax(1)


def numbers(seed: int = 0) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "ids": torch.randint(0, 20, (2, 7), generator=g),
        "pixels": torch.randn(2, 3, 4, 6, generator=g),
        "mask": (torch.rand(2, 13, generator=g) > 0.3).long(),
        "given": torch.randn(2, 1, 13, 13, generator=g),
    }


def addends(added, fused: bool = True, sample: bool = True, **given: Tensor):
    inputs = {**numbers(), **given}
    module = capture(Adds(added, fused), inputs).module
    (attention,) = locate(module, annotate(module), inputs if sample else None)
    return attention


def wide(mask: Tensor) -> Tensor:
    return mask[:, None, None, :].float()


def as_transformers(m: Adds, mask: Tensor, given: Tensor) -> Tensor:
    inverted = 1.0 - mask[:, None, None, :].expand(-1, 1, 13, -1).to(torch.float32)
    return inverted.masked_fill(inverted.to(torch.bool), torch.finfo(torch.float32).min)


PADDING = {
    "(1 - mask) * lowest": lambda m, mask, given: (1 - wide(mask)) * torch.finfo(torch.float32).min,
    "(1 - mask) * -10000": lambda m, mask, given: (1 - wide(mask)) * -10000.0,
    "(mask - 1) * 1e9": lambda m, mask, given: (wide(mask) - 1) * 1e9,
    "the logarithm of a mask": lambda m, mask, given: wide(mask).log(),
    "where": lambda m, mask, given: torch.where(wide(mask) > 0, 0.0, -torch.inf),
    "filled": lambda m, mask, given: torch.zeros_like(wide(mask)).masked_fill(wide(mask) == 0, -torch.inf),
    "filled where it is 1": as_transformers,
    "by pairs": lambda m, mask, given: (1 - wide(mask) * wide(mask).transpose(-1, -2)) * -1e4,
    "padded": lambda m, mask, given: (1 - F.pad(mask[:, :7].float(), (0, 6), value=1.0)[:, None, None]) * -1e4,
    "joined": lambda m, mask, given: (1 - torch.cat([mask[:, :7], torch.ones(2, 6).long()], 1)[:, None, None]) * -1e4,
    "causal beside": lambda m, mask, given: (1 - wide(mask)) * -1e4 + torch.full((13, 13), -torch.inf).triu(1),
}


@pytest.mark.parametrize("sample", [True, False], ids=["sample", "no sample"])
@pytest.mark.parametrize("name", PADDING)
def test_padding_as_models_write_it(name: str, sample: bool) -> None:
    attention = addends(PADDING[name], sample=sample)
    (mask,) = attention.masks
    assert mask.kind == "additive" and mask.of_input
    assert not attention.biases and not attention.sums and not attention.unusual


def test_a_floating_point_mask_is_told_by_its_numbers_or_its_name() -> None:
    direct = torch.zeros(2, 1, 1, 13).masked_fill(torch.rand(2, 1, 1, 13) > 0.7, -torch.inf)
    assert addends(lambda m, mask, given: given, given=direct).masks
    assert addends(lambda m, mask, given: mask, mask=direct).masks
    assert addends(lambda m, mask, given: mask, mask=direct, sample=False).masks
    assert not addends(lambda m, mask, given: given, given=direct, sample=False).masks


def test_zeros_of_a_sample_prove_no_mask() -> None:
    """A bias may well be zeros where it is captured."""

    class Given(nn.Module):
        def forward(self, bias: Tensor, attention_mask: Tensor) -> Tensor:
            return bias + attention_mask

    given = {"bias": torch.zeros(2, 1, 4, 4), "attention_mask": torch.zeros(2, 1, 4, 4)}
    graph = capture(Given(), given).module.graph
    bias, mask = graph.find_nodes(op="placeholder")
    reader = MaskReader(given)
    assert reader.addends(bias).unknown == "bias" and [m.node for m in reader.addends(mask).masks] == [mask]


@pytest.mark.parametrize(("columns", "known"), [(1, True), (2, False)])
def test_a_mask_of_pairs(columns: int, known: bool) -> None:
    """A product of one column with one row multiplies number by number; with more of them it adds up."""

    class Pairs(nn.Module):
        def forward(self, mask: Tensor) -> Tensor:
            padding = (1 - mask.float()).unflatten(1, (-1, columns))
            return padding @ padding.transpose(1, 2) * torch.finfo(torch.float32).min

    given = {"mask": torch.tensor([[1, 1, 0, 0], [1, 1, 1, 1]])}
    graph = capture(Pairs(), given).module.graph
    (result,) = graph.output_node().all_input_nodes
    found = MaskReader(given).addends(result)
    assert [mask.node for mask in found.masks] == ([result] if known else []) and bool(found.unknown) != known


def test_an_integer_input_may_be_1_where_the_sample_is_0() -> None:
    attention = addends(lambda m, mask, given: wide(mask) * 3.0, mask=torch.zeros(2, 13, dtype=torch.int64))
    assert not attention.masks and "no known mask" in attention.unusual


def test_a_constant_that_hides_is_a_mask_and_no_padding() -> None:
    """As models with windows write it."""
    attention = addends(lambda m, mask, given: torch.eye(13)[None, None] * -100.0)
    (mask,) = attention.masks
    assert mask.kind == "additive" and mask.by_query and not mask.of_input


BIASES = {
    "learned": lambda m, mask, given: m.table,
    "learned, of a part": lambda m, mask, given: m.table.expand(2, 2, -1, -1)[:, :1],
    "learned, by input": lambda m, mask, given: m.table * given,
    "constant": lambda m, mask, given: -0.3 * (torch.arange(13)[:, None] - torch.arange(13)).abs().float(),
    "constant of two small numbers": lambda m, mask, given: torch.eye(13)[None, None] * -3.0,
}


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "written out"])
@pytest.mark.parametrize("name", BIASES)
def test_a_bias_is_no_mask(name: str, fused: bool) -> None:
    attention = addends(BIASES[name], fused)
    assert not attention.masks and not attention.sums and not attention.unusual
    assert len(attention.biases) == fused  # where it is written out it is among the scores


UNKNOWN = {
    "numbers of an input": lambda m, mask, given: given,
    "a soft mask": lambda m, mask, given: (1 - given.sigmoid()) * -1e4,
    "low, but not to nothing": lambda m, mask, given: (1 - wide(mask)) * -60.0,
    "not low enough": lambda m, mask, given: (1 - wide(mask)) * -9.0,
    "a bias with a mask baked in": lambda m, mask, given: m.baked,
    "a learned bias beside them": lambda m, mask, given: m.table + given,
    "a learned bias and a mask, scaled": lambda m, mask, given: (m.table + (1 - wide(mask)) * -1e4) * 0.5,
    "a mask taken away": lambda m, mask, given: m.table - (1 - wide(mask)) * 1e4,
    "a mask added twice over": lambda m, mask, given: torch.add(m.table, (1 - wide(mask)) * -1e4, alpha=2),
    "a bias filled in place": lambda m, mask, given: m.table.repeat(2, 1, 1, 1).masked_fill_(wide(mask) == 0, -1e4),
    "a filled bias, scaled": lambda m, mask, given: m.table.masked_fill(wide(mask) == 0, -1e4) * 0.5,
    "a mask beside them": lambda m, mask, given: given + (1 - wide(mask)) * -1e4,
}


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "written out"])
@pytest.mark.parametrize("name", UNKNOWN)
def test_what_is_neither_is_refused_by_name(name: str, fused: bool) -> None:
    program = capture(Adds(UNKNOWN[name], fused), numbers())
    with pytest.raises(LocateError) as caught:
        reduce_graph(program, schedule("safe", (0,), merge={"image": 2}))
    message = str(caught.value)
    assert "cross_modal.0" in message and "test_masks.py:" in message
    assert "no known mask" in message and "masked_fill, where" in message


class Tower(Adds):
    """A text tower whose scores get something unknown, before attention that has no mask."""

    def forward(self, ids: Tensor, pixels: Tensor, mask: Tensor, given: Tensor) -> Tensor:
        words, image = self.words(ids), self.patches(pixels).flatten(2).transpose(1, 2)
        h = words.unsqueeze(1)
        words = words + F.scaled_dot_product_attention(h, h, h, attn_mask=given[..., :7, :7]).squeeze(1)
        x = torch.cat([words, image], 1)
        h = x.unsqueeze(1)
        return (x + self.out(F.scaled_dot_product_attention(h, h, h).squeeze(1))).amax(1)


def test_whether_tokens_are_padding_is_not_guessed_from_an_earlier_attention() -> None:
    """Of words, which it is over; the image's tokens are all real."""
    program = capture(Tower(None), numbers())
    with pytest.raises(LocateError, match=r"Whether the attention text\.0 .* hides padding cannot be told"):
        reduce_graph(program, schedule("safe", (0,), merge={"image": 2, "text": 1}))
    reduce_graph(program, schedule("paper", (0,), merge={"image": 2, "text": 1}))
    reduce_graph(program, schedule("safe", (0,), merge={"image": 2}))


class Changes(Adds):
    """Does something else to its scores than adding to them."""

    def forward(self, ids: Tensor, pixels: Tensor, mask: Tensor, given: Tensor) -> Tensor:
        x = torch.cat([self.words(ids), self.patches(pixels).flatten(2).transpose(1, 2)], 1)
        scores = self.added(self, x @ x.transpose(-1, -2), mask[:, None])
        return (x + self.out(scores.softmax(-1) @ x)).amax(1)


@pytest.mark.parametrize(
    ("change", "known"),
    [
        (lambda m, scores, mask: scores.masked_fill(mask == 0, 0.0), False),
        (lambda m, scores, mask: torch.where(mask == 0, 1.0, scores), False),
        (lambda m, scores, mask: torch.add(scores, (1 - mask) * 1e4, alpha=-1), False),
        (lambda m, scores, mask: scores * mask, False),
        (lambda m, scores, mask: scores.masked_fill(m.table[0] > 1, -1e4), True),  # learned: among the scores
    ],
)
def test_what_else_is_done_to_scores_is_no_mask(change, known: bool) -> None:
    module = capture(Changes(change), numbers()).module
    (attention,) = locate(module, annotate(module), numbers())
    assert not attention.masks
    assert ("no known mask" in attention.unusual) == (not known)
