"""One stream at one site: prune and merge together, against loops over tokens."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from pumer_compile.reducers import (
    ModalityAwareMerger,
    StreamReducer,
    TextInformedPruner,
    forced_decisions,
    noted_decisions,
)
from pumer_compile.reducers.base import Decisions, Reduction
from tests.support.helpers import combine, data_dependent, groups, match, order, reduce_image, reduce_text, saliency

pytestmark = pytest.mark.fast

SEMANTICS = ("reference", "paper", "safe")


def image_reducer(semantics: str, tokens: int, keep: int, merge: int, learned: int = 0) -> StreamReducer:
    safe = semantics == "safe"
    return StreamReducer(
        tokens,
        TextInformedPruner(keep, protected=learned if safe else 0, pads_vote=not safe, in_order=safe),
        ModalityAwareMerger(
            merge,
            similarity="dot" if semantics == "paper" else "cosine",
            protected=max(1, learned) if safe else 1,
            keep_padding_apart=safe,
            in_order=safe,
        ),
        averaging="sizes" if safe else "plain",
        carried={"reference": "ones", "paper": "mean", "safe": "sum"}[semantics],
    )


def text_reducer(semantics: str, tokens: int, merge: int) -> StreamReducer:
    safe = semantics == "safe"
    return StreamReducer(
        tokens,
        None,
        ModalityAwareMerger(
            merge,
            similarity="dot" if semantics == "paper" else "cosine",
            keep_padding_apart=safe,
            in_order=safe,
        ),
        averaging="sizes" if safe else "plain",
        carried="sum" if safe else "mean",
    )


def _most(keep: int, protected: int) -> int:
    targets = [i for i in range(1, keep, 2) if i >= protected]
    return len([i for i in range(0, keep, 2) if i >= protected]) if targets else 0


@st.composite
def sites(draw: st.DrawFn) -> dict[str, Any]:
    """A site whose scores are exact in float32, so that ties are frequent and decisions can be compared.

    Keys lie along one axis with a length of a power of two (cosines -1, 0, 1; exact products), attention is in
    eighths, and heads are 1, 2 or 4 (exact means; all heads have the same keys, so that means keep their axis).
    """
    batch, heads = draw(st.integers(1, 3)), draw(st.sampled_from([1, 2, 4]))
    text, image = draw(st.integers(2, 9)), draw(st.integers(3, 22))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    dtype = draw(st.sampled_from([torch.float16, torch.float32]))

    def keys(n: int) -> Tensor:
        one = np.zeros((batch, 1, n, 4))
        np.put_along_axis(one, rng.integers(0, 4, (batch, 1, n, 1)), rng.choice([-2, 0.5, 1, 4]), -1)
        one *= rng.choice([-1, 1, 2], (batch, 1, n, 1))
        return torch.from_numpy(np.repeat(one, heads, 1)).to(dtype)

    real = np.ones((batch, text), bool)
    for row in real[1:]:
        row[rng.integers(1, text + 1) :] = False
    learned = draw(st.integers(0, min(3, image - 1)))
    keep = draw(st.integers(max(1, learned), image))
    return {
        "text": torch.from_numpy(rng.integers(-8, 9, (batch, text, 6)).astype(np.float64)).to(dtype),
        "image": torch.from_numpy(rng.integers(-8, 9, (batch, image, 6)).astype(np.float64)).to(dtype),
        "text_keys": keys(text),
        "image_keys": keys(image),
        "text_to_image": torch.from_numpy(rng.integers(0, 4, (batch, heads, text, image)) / 8).to(dtype),
        "real": torch.from_numpy(real),
        "image_real": torch.from_numpy(rng.random((batch, image)) < draw(st.sampled_from([0.5, 1.0]))),
        "learned": learned,
        "keep": keep,
        "share": draw(st.sampled_from([0.0, 0.3, 0.7, 1.0])),
    }


def assert_reduced(result: Reduction, tokens: Tensor, members: list[list[list[int]]], sizes: Any) -> None:
    """Features, map and order of every sample are those of the given groups."""
    exact = 1e-5 if tokens.dtype == torch.float32 else 2e-2
    assert result.tokens.dtype == tokens.dtype
    assert result.map.dtype == torch.float32
    assert result.tokens.shape[1] == result.map.shape[1] == len(members[0])
    for b, expected in enumerate(members):
        mine = None if sizes is None else sizes[b].tolist()
        torch.testing.assert_close(result.tokens[b].double(), combine(tokens[b], expected, mine), atol=exact, rtol=0.0)
        # A token of size 0 in a group that is not all padding has no share, so it is not seen in the map.
        for row, group in zip(result.map[b].tolist(), expected, strict=True):
            seen = sorted(i for i, share in enumerate(row) if share > 0)
            counted = [i for i in group if mine is None or mine[i] > 0] or group
            assert seen == sorted(counted)
            assert abs(sum(row) - 1) < 1e-6


@pytest.mark.parametrize("semantics", SEMANTICS)
@given(site=sites())
def test_image(semantics: str, site: dict[str, Any]) -> None:
    safe = semantics == "safe"
    learned = site["learned"] if safe else 0
    merge = int(site["share"] * _most(site["keep"], max(1, learned)))
    reducer = image_reducer(semantics, site["image"].shape[1], site["keep"], merge, learned)
    text_weights, weights = site["real"].float(), site["image_real"].float()
    result = reducer(site["image"], site["image_keys"], weights, site["text_to_image"], text_weights)
    members = [
        reduce_image(
            attention,
            keys,
            site["keep"],
            merge,
            similarity="dot" if semantics == "paper" else "cosine",
            votes=real if safe else None,
            learned=learned,
            real=alive if safe else None,
            in_order=safe,
        )
        for attention, keys, real, alive in zip(
            site["text_to_image"].double().numpy(),
            site["image_keys"].double().numpy(),
            site["real"].tolist(),
            site["image_real"].tolist(),
            strict=True,
        )
    ]
    assert reducer.tokens_after == site["keep"] - merge
    assert_reduced(result, site["image"], members, weights if safe else None)
    for b, expected in enumerate(members):
        if semantics == "reference":
            assert result.weights[b].tolist() == [1.0] * len(expected)
        elif semantics == "safe":
            assert result.weights[b].tolist() == [sum(weights[b, i].item() for i in g) for g in expected]
        else:
            mean = [sum(weights[b, i].item() for i in g) / len(g) for g in expected]
            torch.testing.assert_close(result.weights[b], torch.tensor(mean))
        for token in range(learned):
            rows = [row for row in result.map[b].tolist() if row[token] > 0]
            assert rows == [[float(i == token) for i in range(len(rows[0]))]]


@pytest.mark.parametrize("semantics", SEMANTICS)
@given(site=sites())
def test_text(semantics: str, site: dict[str, Any]) -> None:
    safe = semantics == "safe"
    tokens = site["text"].shape[1]
    merge = int(site["share"] * _most(tokens, 1))
    weights = site["real"].float()
    reducer = text_reducer(semantics, tokens, merge)
    result = reducer(site["text"], site["text_keys"], weights)
    members = [
        reduce_text(
            keys,
            merge,
            similarity="dot" if semantics == "paper" else "cosine",
            real=real if safe else None,
            in_order=safe,
        )
        for keys, real in zip(site["text_keys"].double().numpy(), site["real"].tolist(), strict=True)
    ]
    assert reducer.tokens_after == tokens - merge
    assert_reduced(result, site["text"], members, weights if safe else None)
    assert torch.equal(result.kept, torch.arange(tokens).expand(len(members), -1))
    for b, expected in enumerate(members):
        if safe:
            assert result.weights[b].tolist() == [sum(weights[b, i].item() for i in g) for g in expected]
        else:
            mean = [sum(weights[b, i].item() for i in g) / len(g) for g in expected]
            torch.testing.assert_close(result.weights[b], torch.tensor(mean))


@pytest.mark.parametrize("semantics", ["reference", "safe"])
@given(site=sites())
def test_decisions_are_what_was_done(semantics: str, site: dict[str, Any]) -> None:
    """`kept`, `source` and `target` alone give the groups that the map shows."""
    safe = semantics == "safe"
    merge = int(site["share"] * _most(site["keep"], 1))
    reducer = image_reducer(semantics, site["image"].shape[1], site["keep"], merge)
    result = reducer(site["image"], site["image_keys"], None, site["text_to_image"])
    assert result.kept.shape == (len(result.map), site["keep"])
    assert result.source.shape == result.target.shape == (len(result.map), merge)
    for b in range(len(result.map)):
        kept = result.kept[b].tolist()
        pairs = list(zip(result.source[b].tolist(), result.target[b].tolist(), strict=True))
        members = [[kept[i] for i in g] for g in groups(len(kept), pairs, safe)]
        shown = [[i for i, share in enumerate(row) if share > 0] for row in result.map[b].tolist()]
        assert shown == [sorted(g) for g in members]


@given(site=sites())
def test_sizes_are_preserved_over_reducers(site: dict[str, Any]) -> None:
    """Merging moves sizes and loses none; two steps weigh as one mean over all original tokens."""
    tokens = site["text"].shape[1]
    first = text_reducer("safe", tokens, _most(tokens, 1))
    one = first(site["text"], site["text_keys"], site["real"].float())
    torch.testing.assert_close(one.weights.sum(1), site["real"].float().sum(1))
    left = one.tokens.shape[1]
    second = text_reducer("safe", left, _most(left, 1))
    keys = (one.map.unsqueeze(1) @ site["text_keys"].float()) + 1
    two = second(one.tokens.float(), keys, one.weights)
    torch.testing.assert_close(two.weights.sum(1), site["real"].float().sum(1))
    whole = two.map @ one.map
    for b in range(len(whole)):
        for new, size in zip(whole[b], two.weights[b].tolist(), strict=True):
            if size > 0:
                shares = {round(x, 5) for x in new.tolist() if x > 0}
                assert shares == {round(1 / size, 5)}


@given(site=sites())
def test_padding_is_left_out_of_the_mean_under_safe(site: dict[str, Any]) -> None:
    tokens = site["text"].shape[1]
    reducer = text_reducer("safe", tokens, _most(tokens, 1))
    result = reducer(site["text"], site["text_keys"], site["real"].float())
    pads = ~site["real"]
    for b in range(len(pads)):
        for row, size in zip(result.map[b], result.weights[b].tolist(), strict=True):
            if size > 0:
                assert row[pads[b]].abs().sum() == 0


def test_class_token_stays_alone_and_first_under_safe() -> None:
    torch.manual_seed(0)
    attention = torch.rand(3, 2, 5, 20)
    attention[..., 0] = 0.0  # nobody looks at the class token
    tokens = torch.randn(3, 20, 8)
    reducer = image_reducer("safe", 20, 11, 5, learned=1)
    keys = torch.ones(3, 2, 20, 4)  # and it is like every other
    result = reducer(tokens, keys, None, attention)
    assert torch.equal(result.tokens[:, 0], tokens[:, 0])
    reference = image_reducer("reference", 20, 11, 5)(tokens, keys, None, attention)
    assert (reference.map[:, :, 0] == 0).all()


def test_without_pruner_or_attention_the_order_stays() -> None:
    tokens, keys = torch.randn(2, 9, 4), torch.randn(2, 1, 9, 3)
    plain = StreamReducer(9, None, ModalityAwareMerger(0))(tokens, keys)
    assert torch.equal(plain.tokens, tokens)
    no_text = image_reducer("reference", 9, 9, 0)(tokens, keys)
    assert torch.equal(no_text.tokens, tokens)


def test_safe_keeps_the_old_order() -> None:
    """Tokens that are kept, and merged ones at the place of the odd one."""
    tokens = torch.arange(7.0).view(1, 7, 1)
    attention = torch.tensor([1.0, 4.0, 2.0, 8.0, 0.0, 3.0, 5.0]).view(1, 1, 1, 7)
    keys = torch.eye(7).view(1, 1, 7, 7).clone()
    keys[..., 3, :] = keys[..., 5, :]  # of those kept, 0 1 2 3 5 6, the even one that is like an odd one is 5
    result = image_reducer("safe", 7, 6, 1)(tokens, keys, None, attention)
    assert result.kept.tolist() == [[0, 1, 2, 3, 5, 6]]
    assert result.source.tolist() == [[4]] and result.target.tolist() == [[3]]
    assert result.tokens.flatten().tolist() == [0, 1, 2, 4, 6]


def test_published_order_is_by_saliency_even_when_nothing_is_pruned() -> None:
    tokens = torch.arange(6.0).view(1, 6, 1)
    attention = torch.tensor([1.0, 4.0, 2.0, 8.0, 0.0, 3.0]).view(1, 1, 1, 6)
    result = image_reducer("reference", 6, 6, 0)(tokens, torch.ones(1, 1, 6, 2), None, attention)
    assert result.tokens.flatten().tolist() == [3, 1, 5, 2, 0, 4]


# --- gradients and determinism ------------------------------------------------------------------------------


def example(dtype: torch.dtype = torch.float32, seed: int = 3) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(seed)
    return {
        "tokens": torch.randn(2, 13, 5, generator=g).to(dtype),
        "keys": torch.randn(2, 2, 13, 4, generator=g).to(dtype),
        "weights": torch.tensor([[1.0] * 13, [1.0] * 9 + [0.0] * 4]),
        "text_to_image": torch.rand(2, 2, 6, 13, generator=g).to(dtype),
        "text_weights": torch.tensor([[1.0] * 6, [1.0] * 3 + [0.0] * 3]),
    }


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_gradients_flow_through_tokens(semantics: str) -> None:
    case = example(torch.float64)
    reducer = image_reducer(semantics, 13, 10, 3, learned=1)

    def reduced(tokens: Tensor) -> Tensor:
        return reducer(**{**case, "tokens": tokens}).tokens

    tokens = case["tokens"].requires_grad_()
    assert torch.autograd.gradcheck(reduced, (tokens,), fast_mode=False)
    (gradient,) = torch.autograd.grad(reduced(tokens).sum(), tokens)
    result = reducer(**case)
    # Every new token is a mean: its gradient is shared out, and pruned tokens get none.
    torch.testing.assert_close(gradient, result.map.sum(1).double().unsqueeze(-1).expand_as(gradient))
    kept = torch.zeros(2, 13, dtype=torch.bool).scatter(1, result.kept, True)
    assert (gradient.abs().sum(-1)[~kept] == 0).all()


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_decisions_do_not_depend_on_the_batch_or_on_luck(semantics: str) -> None:
    case = {k: v.round(decimals=1) for k, v in example().items()}
    case["text_to_image"] = (case["text_to_image"] * 4).round() / 4
    reducer = image_reducer(semantics, 13, 10, 3, learned=1)
    whole = reducer(**case)
    again = reducer(**case)
    for name in ("kept", "source", "target"):
        assert torch.equal(getattr(whole, name), getattr(again, name))
        for b in range(2):
            alone = reducer(**{k: v[b : b + 1] for k, v in case.items()})
            assert torch.equal(getattr(whole, name)[b : b + 1], getattr(alone, name))


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_padding_never_changes_a_real_token_under_safe(semantics: str) -> None:
    """The features of padding reach no token that holds a real one, under `safe`; elsewhere they may."""
    case = example()
    case["weights"] = torch.tensor([[1.0] * 8 + [0.0] * 5] * 2)
    reducer = image_reducer(semantics, 13, 13, 6)
    result = reducer(**case)
    loud = case["tokens"].clone()
    loud[:, 8:] = 1e6
    changed = (reducer(**{**case, "tokens": loud}).tokens - result.tokens).abs().amax(-1) > 1e-3
    real = (result.map[:, :, :8] > 0).any(-1)
    assert changed.any()
    if semantics == "safe":
        assert not (changed & real).any()


class Site(nn.Module):
    """Names what a reducer takes by position, for dynamic shapes."""

    def __init__(self, reducer: StreamReducer) -> None:
        super().__init__()
        self.reducer = reducer

    def forward(
        self, tokens: Tensor, keys: Tensor, weights: Tensor, text_to_image: Tensor, text_weights: Tensor
    ) -> Reduction:
        return self.reducer(tokens, keys, weights, text_to_image, text_weights)


@pytest.mark.parametrize(("semantics", "dynamic"), [("reference", False), ("paper", False), ("safe", True)])
def test_exported_reducer_has_no_data_dependent_operators(semantics: str, dynamic: bool) -> None:
    case = example()
    reducer = image_reducer(semantics, 13, 10, 3, learned=1)
    batch = torch.export.Dim("batch")
    shapes = {name: {0: batch} for name in case} if dynamic else None
    exported = torch.export.export(Site(reducer), (), case, dynamic_shapes=shapes)
    assert not data_dependent(exported.graph_module)
    assert not data_dependent(exported.run_decompositions().graph_module)
    torch.testing.assert_close(exported.module()(**case).tokens, reducer(**case).tokens)
    if dynamic:
        more = {k: torch.cat([v, v.flip(0)[:1]]) for k, v in case.items()}
        torch.testing.assert_close(exported.module()(**more).tokens, reducer(**more).tokens)


# --- forced decisions ---------------------------------------------------------------------------------------


class Two(nn.Module):
    """Two reducers under their own names."""

    def __init__(self, semantics: str = "reference", learned: int = 0) -> None:
        super().__init__()
        self.image = image_reducer(semantics, 13, 10, 3, learned)
        self.text = text_reducer(semantics, 13, 4)

    def forward(self, **case: Tensor) -> tuple[Reduction, Reduction]:
        text = {k: case[k] for k in ("tokens", "keys", "weights")}
        return self.image(**case), self.text(**text)


def decisions_of(result: Reduction) -> Decisions:
    return Decisions(result.kept.clone(), result.source.clone(), result.target.clone())


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_forcing_own_decisions_changes_nothing(semantics: str) -> None:
    model, case = Two(semantics, learned=1), example()
    image, text = model(**case)
    with forced_decisions(model, {"image": decisions_of(image), "text": decisions_of(text)}) as forcings:
        forced_image, forced_text = model(**case)
    for free, forced in ((image, forced_image), (text, forced_text)):
        for a, b in zip(free, forced, strict=True):
            assert torch.equal(a, b)
    for name in ("image", "text"):
        comparison = forcings[name].comparison
        assert comparison is not None
        assert comparison.differs.tolist() == [False, False]
        assert comparison.margin.tolist() == [0.0, 0.0]


def test_decisions_are_noted_within_the_block() -> None:
    model, case = Two(), example()
    with noted_decisions(model) as noted:
        results = dict(zip(("image", "text"), model(**case), strict=True))
    assert noted.keys() == results.keys()
    for name, result in results.items():
        assert all(torch.equal(a, b) for a, b in zip(noted[name], decisions_of(result), strict=True))
    before = dict(noted)
    model(**case)
    assert all(noted[name] is before[name] for name in before)


def test_forcing_ends_with_the_block_and_on_errors() -> None:
    model, case = Two(), example()
    free = model(**case)[0]
    other = decisions_of(free)
    other.kept[:] = other.kept.flip(1)
    with pytest.raises(RuntimeError, match="stop"), forced_decisions(model, {"image": other}):
        assert torch.equal(model(**case)[0].kept, other.kept)
        raise RuntimeError("stop")
    assert torch.equal(model(**case)[0].kept, free.kept)


def test_forcing_an_unknown_reducer_names_those_there_are() -> None:
    with (
        pytest.raises(KeyError, match=r"imag.*image.*text"),
        forced_decisions(Two(), {"imag": Decisions(*[torch.zeros(1, 1)] * 3)}),
    ):
        pass


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_forced_pruning_is_followed_and_measured(semantics: str) -> None:
    """Sample 1 keeps a worse token than the last; the margin is the gap of the two saliencies, relative to them."""
    learned = 1 if semantics == "safe" else 0
    model, case = Two(semantics, learned=1), example()
    safe = semantics == "safe"
    free = model(**case)[0]
    wanted = decisions_of(free)
    votes = [w > 0 for w in case["text_weights"][1].tolist()] if safe else None
    scores = saliency(case["text_to_image"][1].double().numpy(), votes)
    ranked = list(range(learned)) + [i for i in order(scores, 13) if i >= learned]
    chosen = [*ranked[:9], ranked[11]]
    chosen = sorted(chosen) if safe else chosen
    wanted.kept[1] = torch.tensor(chosen)
    mean = case["keys"][1].double().numpy().mean(0)[chosen]
    real = [case["weights"][1, i].item() > 0 for i in chosen] if safe else None
    pairs = match(mean, 3, "dot" if semantics == "paper" else "cosine", protected=max(1, learned), real=real)
    pairs = sorted(pairs) if safe else pairs
    wanted.source[1] = torch.tensor([a for a, _ in pairs])
    wanted.target[1] = torch.tensor([b for _, b in pairs])
    with forced_decisions(model, {"image": wanted}) as forcings:
        forced = model(**case)[0]
    comparison = forcings["image"].comparison
    assert comparison is not None
    assert comparison.differs.tolist() == [False, True]
    assert torch.equal(forced.tokens[0], free.tokens[0])
    members = [[chosen[i] for i in g] for g in groups(10, pairs, safe)]
    sizes = case["weights"][1].tolist() if safe else None
    torch.testing.assert_close(
        forced.tokens[1].double(), combine(case["tokens"][1], members, sizes), atol=1e-5, rtol=0.0
    )
    gap = (scores[ranked[9]] - scores[ranked[11]]) / scores[ranked[9]]
    assert comparison.margin[0].item() == 0.0
    assert comparison.margin[1].item() == pytest.approx(gap, rel=1e-4)


@pytest.mark.parametrize("semantics", ["reference", "safe"])
@pytest.mark.parametrize("what", ["source", "target", "order"])
def test_forced_merging_is_followed_and_measured(what: str, semantics: str) -> None:
    """Sample 0 has no padding, sample 1 has: its pairs of real tokens and padding are no scale for sample 0."""
    safe, model, case = semantics == "safe", Two(semantics), example()
    free = model(**case)[1]
    wanted = decisions_of(free)
    unit = case["keys"][0].double().numpy().mean(0)
    unit = unit / np.linalg.norm(unit, axis=-1, keepdims=True)
    similarity = {(a, b): float(unit[a] @ unit[b]) for a in range(0, 13, 2) for b in range(1, 13, 2)}
    best = {a: max(similarity[a, b] for b in range(1, 13, 2)) for a in range(2, 13, 2)}
    ranked = sorted(best, key=lambda a: -best[a])
    if what == "source":  # the fifth best merges instead of the fourth, into its own best
        a = ranked[4]
        b = max(range(1, 13, 2), key=lambda b: similarity[a, b])
        place = free.source[0].tolist().index(ranked[3])
        wanted.source[0, place], wanted.target[0, place] = a, b
        gap = best[ranked[3]] - best[a]
        if safe:
            order_ = wanted.source[0].argsort()
            wanted.source[0], wanted.target[0] = wanted.source[0, order_], wanted.target[0, order_]
    elif what == "target":  # the best merges into its second choice
        a = ranked[0]
        b = sorted(range(1, 13, 2), key=lambda b: -similarity[a, b])[1]
        wanted.target[0, free.source[0].tolist().index(a)] = b
        gap = best[a] - similarity[a, b]
    else:  # the same pairs in another order
        for choice in (wanted.source, wanted.target):
            choice[0, :2] = choice[0, :2].flip(0)
        gap = float("inf") if safe else best[ranked[0]] - best[ranked[1]]  # nothing that `safe` could have chosen
    with forced_decisions(model, {"text": wanted}) as forcings:
        forced = model(**case)[1]
    comparison = forcings["text"].comparison
    assert comparison is not None
    assert comparison.differs.tolist() == [True, False]
    scale = max(abs(s) for s in similarity.values())
    assert comparison.margin.tolist()[1] == 0.0
    # Cosines are at most one; a margin relative to the largest of them differs from it by that factor.
    assert gap * 0.999 - 1e-6 <= comparison.margin[0].item() <= gap / scale * 1.001 + 1e-6
    pairs = list(zip(wanted.source[0].tolist(), wanted.target[0].tolist(), strict=True))
    expected = combine(case["tokens"][0], groups(13, pairs, safe))
    torch.testing.assert_close(forced.tokens[0].double(), expected, atol=1e-5, rtol=0.0)
    assert torch.equal(forced.tokens[1], free.tokens[1])


def test_a_swapped_token_is_one_difference_under_safe() -> None:
    """All that stands between the two has another place then; by saliency a swap at the cut changes the last alone."""
    reducer, case = image_reducer("safe", 13, 10, 0, learned=1), example()
    free = reducer(**case)
    votes = [True] * 3 + [False] * 3
    scores = saliency(case["text_to_image"][1].double().numpy(), votes)
    ranked = [0, *(i for i in order(scores, 13) if i > 0)]
    kept, other = sorted(ranked[:10]), sorted([*ranked[:9], ranked[10]])
    assert free.kept[1].tolist() == kept
    assert sum(a != b for a, b in zip(kept, other, strict=True)) > 1
    gap = (scores[ranked[9]] - scores[ranked[10]]) / scores[ranked[9]]
    for chosen, margin in ((other, gap), (other[::-1], 1.0), ([*range(1, 11)], 1.0)):  # the last: no class token
        wanted = decisions_of(free)
        wanted.kept[1] = torch.tensor(chosen)
        with forced_decisions(reducer, {"": wanted}) as forcings:
            reducer(**case)
        comparison = forcings[""].comparison
        assert comparison is not None
        assert comparison.differs.tolist() == [False, True]
        assert comparison.margin.tolist() == [0.0, pytest.approx(margin, rel=1e-4)]


def test_merges_compare_on_the_forced_pruning() -> None:
    """Where pruning differs, the merge is judged on the tokens that the forced pruning kept."""
    model, case = Two(), example()
    free = model(**case)[0]
    wanted = decisions_of(free)
    wanted.kept[:] = wanted.kept.roll(3, 1)
    with forced_decisions(model, {"image": wanted}) as forcings:
        model(**case)
    comparison = forcings["image"].comparison
    assert comparison is not None
    for b in range(2):
        keys = case["keys"][b].double().numpy().mean(0)[wanted.kept[b].tolist()]
        own = list(zip(comparison.own.source[b].tolist(), comparison.own.target[b].tolist(), strict=True))
        assert own == match(keys, 3)
    assert torch.equal(comparison.own.kept, free.kept)
    assert comparison.differs.all()


def near_ties() -> dict[str, Tensor]:
    """A site whose scores half precision cannot tell apart."""
    g = torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 12, 6, generator=g)
    keys = torch.ones(2, 2, 12, 4) + 1e-3 * torch.randn(2, 2, 12, 4, generator=g)
    attention = (torch.ones(2, 2, 5, 12) + 1e-4 * torch.randn(2, 2, 5, 12, generator=g)) / 12
    return {"tokens": tokens, "keys": keys, "weights": torch.ones(2, 12), "text_to_image": attention}


@pytest.mark.parametrize("semantics", SEMANTICS)
def test_autocast_reaches_neither_decisions_nor_features(semantics: str) -> None:
    reducer, site = image_reducer(semantics, 12, 9, 3), near_ties()
    wanted = reducer(**site, text_weights=torch.ones(2, 5))
    with torch.autocast("cpu", torch.bfloat16):
        found = reducer(**site, text_weights=torch.ones(2, 5))
    for name, a, b in zip(Reduction._fields, found, wanted, strict=True):
        assert a.dtype == b.dtype and torch.equal(a, b), name


def test_a_comparison_has_no_gradient() -> None:
    """Autograd would hold on to the attention that decisions are made from."""
    reducer, site = image_reducer("paper", 12, 9, 3), near_ties()
    site = {name: value.requires_grad_() for name, value in site.items()}
    own = Decisions(*reducer(**site, text_weights=torch.ones(2, 5))[3:6])
    other = Decisions(own.kept.flip(1), own.source, own.target)
    with forced_decisions(reducer, {"": other}) as forcings:
        reducer(**site, text_weights=torch.ones(2, 5))
    assert forcings[""].comparison.margin.max() > 0
    assert not forcings[""].comparison.margin.requires_grad
