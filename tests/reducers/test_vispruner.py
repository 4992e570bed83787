"""VisPruner against the published implementation's vectors, and against loops over lists."""

from __future__ import annotations

import functools
import itertools
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import LlavaForConditionalGeneration

from pumer_compile.reducers.distinct import leap, removals
from pumer_compile.reducers.vispruner import VisPruner
from tests.support.commands import onnx_outputs, tensorrt_refuses
from tests.support.helpers import data_dependent

FOLDER = Path(__file__).parents[1] / "oracle" / "llava-tiny"
CASES: dict[str, dict[str, Any]] = json.loads((FOLDER / "cases.json").read_text(encoding="utf-8"))
EXPECTED = dict(np.load(FOLDER / "expected.npz"))
ORDERS = ("reference", "stable")
CLEAR = 1e-5
"""Decisions further apart than this are the same in float32 as in float64."""


# --- the algorithm a second time, with loops and lists, on one sample ---------------------------------------------


def slow(features: np.ndarray, attention: np.ndarray, budget: int, share: float, order: str) -> tuple[list[int], float]:
    """The kept tokens, and the smallest gap between values whose order decided anything."""
    tokens = len(attention)
    budget = min(budget, tokens)
    important = int(budget * share)
    by_attention = sorted(range(tokens), key=lambda t: (-attention[t], t))
    kept, others = by_attention[:important], by_attention[important:]
    gaps = [1.0]
    if order == "reference" or not important:
        gaps += [attention[a] - attention[b] for a, b in itertools.pairwise(others)]
    if important and others:
        gaps.append(attention[kept[-1]] - attention[others[0]])
    if important == budget:
        return sorted(kept), min(gaps[-1:])
    if order == "stable":
        others.sort(key=lambda t: t * golden(tokens) % tokens)
    while important + len(others) > budget:
        scores = pair_even_odd(features, others) if order == "reference" else pair_with_earlier(features, others)
        # The most similar first; of ties the lowest number (reference) or the last in the list (stable).
        ranked = sorted(scores, key=lambda t: (-scores[t], t if order == "reference" else -others.index(t)))
        count = min(8, important + len(others) - budget, (len(others) + 1) // 2)
        removed = ranked[:count]
        values = [scores[t] for t in ranked]
        if order == "reference":
            gaps += [a - b for a, b in itertools.pairwise(values)]
            others = ranked[count:] + others[1::2]
        else:
            gaps += [values[count - 1] - values[count]] if count < len(values) else []
            others = [t for t in others if t not in removed]
    return sorted(kept + others), min(gaps)


def pair_even_odd(features: np.ndarray, others: list[int]) -> dict[int, float]:
    """Similarity of each token at an even place to its most similar one at an odd place."""
    return {a: max(cosine(features[a], features[b]) for b in others[1::2]) for a in others[::2]}


def pair_with_earlier(features: np.ndarray, others: list[int]) -> dict[int, float]:
    """Similarity of each token but the first to its most similar one before it."""
    return {a: max(cosine(features[a], features[b]) for b in others[:i]) for i, a in enumerate(others) if i}


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    lengths = float(a @ a) ** 0.5 * float(b @ b) ** 0.5
    return float(a @ b) / lengths if lengths else 0.0


def golden(tokens: int) -> int:
    """The first number from 0.618 of the tokens on that shares no divisor with them."""
    step = round(tokens * 0.6180339887498949)
    while step < 1 or any(tokens % d == 0 and step % d == 0 for d in range(2, step + 1)):
        step += 1
    return step


def slow_batch(features: Tensor, attention: Tensor, budget: int, share: float, order: str) -> tuple[list, float]:
    found = [
        slow(f, a, budget, share, order)
        for f, a in zip(features.double().numpy(), attention.double().numpy(), strict=True)
    ]
    return [kept for kept, _ in found], min(gap for _, gap in found)


def ordinary(batch: int, tokens: int, width: int, seed: int = 0) -> tuple[Tensor, Tensor]:
    """Features around a few directions, so that there are duplicates, and a softmax of attention."""
    rng = np.random.default_rng(seed)
    centres = rng.normal(size=(batch, 5, width))
    features = centres[np.arange(batch)[:, None], rng.integers(0, 5, (batch, tokens))]
    features = features + rng.normal(size=features.shape)
    attention = torch.from_numpy(rng.normal(size=(batch, tokens))).softmax(-1)
    return torch.from_numpy(features).float(), attention.float()


# --- the published implementation ----------------------------------------------------------------------------------


@functools.cache
def tower(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor, nn.Module]:
    """Features and attention of the oracle's images as LLaVA's tower gives them, and its projector."""
    model = LlavaForConditionalGeneration.from_pretrained(FOLDER, attn_implementation="eager", dtype=dtype).eval()
    pixels = torch.from_numpy(np.load(FOLDER / "inputs.npz")["pixel_values"]).to(dtype)
    layer = model.config.vision_feature_layer
    with torch.no_grad():
        out = model.model.vision_tower(pixels, output_attentions=True, output_hidden_states=True)
    # `hidden_states` starts with the embeddings: counted from the end, the layer that made one has the same index.
    features, attention = out.hidden_states[layer][:, 1:], out.attentions[layer][:, :, 0, 1:].mean(1)
    return features, attention, model.model.multi_modal_projector


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("case", CASES)
def test_keeps_what_the_published_code_keeps(case: str, dtype: torch.dtype) -> None:
    features, attention, projector = tower(dtype)
    found = VisPruner(CASES[case]["budget"], CASES[case]["important_ratio"])(features, attention)
    assert np.array_equal(found.kept.numpy(), EXPECTED[f"{case}.kept"])
    with torch.no_grad():
        projected = projector(found.map.to(dtype) @ features)
    expected = EXPECTED[f"{case}.features"]
    assert np.abs(projected[:, : expected.shape[1]].numpy() - expected).max() < 5e-5


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("budget", [1, 7, 33, 100, 143, 144, 500])
@pytest.mark.parametrize("order", ORDERS)
def test_other_budgets_on_the_same_images(order: str, budget: int, share: float) -> None:
    features, attention, _ = tower()
    expected, _ = slow_batch(features, attention, budget, share, order)
    found = VisPruner(budget, share, order=order)(features, attention)
    assert found.kept.tolist() == expected


# --- loops over lists ----------------------------------------------------------------------------------------------


@st.composite
def sizes(draw: st.DrawFn) -> tuple[int, int, float]:
    """Tokens, budget and share, with their ends."""
    tokens = draw(st.integers(1, 45))
    share = draw(st.sampled_from([0.0, 0.25, 0.5, 0.75, 0.9, 1.0]))
    return tokens, draw(st.integers(1, tokens + 3)), share


@pytest.mark.parametrize("order", ORDERS)
@given(sizes(), st.integers(1, 3), st.integers(2, 20), st.integers(0, 2**32 - 1))
def test_ordinary_features(order: str, size: tuple[int, int, float], batch: int, width: int, seed: int) -> None:
    tokens, budget, share = size
    features, attention = ordinary(batch, tokens, width, seed)
    expected, gap = slow_batch(features, attention, budget, share, order)
    assume(gap > CLEAR)
    found = VisPruner(budget, share, order=order)(features, attention)
    assert found.kept.dtype == torch.int64
    assert found.kept.tolist() == expected
    assert found.map.dtype == torch.float32
    assert torch.equal(found.map, torch.eye(tokens)[found.kept])


@pytest.mark.parametrize("order", ORDERS)
@given(sizes(), st.integers(1, 3), st.sampled_from([4, 16, 64]), st.booleans(), st.integers(0, 2**32 - 1))
def test_exact_ties(order: str, size: tuple[int, int, float], batch: int, width: int, zeros: bool, seed: int) -> None:
    """Cosines of vectors of ones and minus ones are exact in float32, and so are sums of eighths: ties are frequent."""
    tokens, budget, share = size
    rng = np.random.default_rng(seed)
    features = rng.choice([-1.0, 1.0], (batch, tokens, width)) * rng.choice([0.5, 1.0, 4.0], (batch, tokens, 1))
    if zeros:
        features *= rng.integers(0, 2, (batch, tokens, 1))
    attention = torch.from_numpy(rng.integers(0, 4, (batch, tokens)) / 8)
    expected, _ = slow_batch(torch.from_numpy(features), attention, budget, share, order)
    found = VisPruner(budget, share, order=order)(torch.from_numpy(features), attention)
    assert found.kept.tolist() == expected


@pytest.mark.parametrize(("batch", "tokens", "width"), [(8, 8, 8), (16, 16, 16), (2, 32, 16), (16, 32, 32)])
@pytest.mark.parametrize("budget", [2, 8, 16])
@pytest.mark.parametrize("order", ORDERS)
def test_sizes_that_collide(order: str, budget: int, batch: int, tokens: int, width: int) -> None:
    features, attention = ordinary(batch, tokens, width)
    expected, gap = slow_batch(features, attention, budget, 0.5, order)
    assert gap > 1e-7
    assert VisPruner(budget, order=order)(features, attention).kept.tolist() == expected


@given(st.integers(1, 700), st.data())
def test_removals_end_at_what_is_wanted(length: int, data: st.DataObject) -> None:
    wanted = data.draw(st.integers(1, length))
    left = length
    for before, count in removals(length, wanted):
        assert before == left
        assert 1 <= count <= min(8, (before + 1) // 2)
        left -= count
    assert left == wanted


@given(st.integers(1, 1000))
def test_the_leap_visits_every_token(tokens: int) -> None:
    assert {i * leap(tokens) % tokens for i in range(tokens)} == set(range(tokens))
    assert leap(tokens) == golden(tokens)


# --- what the two orders promise -----------------------------------------------------------------------------------


def nearly_tied(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """An image, and the same image with every similarity and every attention off by a rounding error or so."""
    features, attention = ordinary(1, 64, 12, seed)
    noise = np.random.default_rng(seed).normal(size=(2, 1, 64, 12))
    rounding = 1 + 1e-6 * torch.from_numpy(noise).float()
    near = 1 / 64 + (attention - 1 / 64) * 1e-6  # attention so flat that rounding reorders it
    return (features, near), (features * rounding[0], near * rounding[1, :, :, 0])


def test_stable_does_not_read_the_order_of_near_ties() -> None:
    changed = dict.fromkeys(ORDERS, 0)
    for seed in range(20):
        here, there = nearly_tied(seed)
        for order in ORDERS:
            pruner = VisPruner(16, 0.0, order=order)
            changed[order] += not torch.equal(pruner(*here).kept, pruner(*there).kept)
    assert changed["stable"] == 0
    assert changed["reference"] > 10


@given(st.integers(10, 60), st.integers(2, 20), st.integers(0, 2**32 - 1))
def test_stable_survives_any_error_below_half_the_gap_at_its_boundaries(tokens: int, budget: int, seed: int) -> None:
    assume(budget < tokens)
    features, attention = ordinary(1, tokens, 16, seed)
    important = budget // 2
    top = attention.argsort(descending=True)[0]
    # Attention of the others in any order, and of the important ones in any order.
    shuffled = attention.clone()
    rng = np.random.default_rng(seed)
    for part in (top[:important], top[important:]):
        shuffled[0, part] = attention[0, part[torch.from_numpy(rng.permutation(len(part)))]]
    _, gap = slow_batch(features, attention, budget, 0.5, "stable")
    assume(gap > CLEAR)
    unit = features / features.norm(dim=-1, keepdim=True)
    error = torch.from_numpy(rng.normal(size=unit.shape)).float()
    # Two unit vectors that move by d each change their cosine by little more than 2 d.
    moved = unit + error / error.norm(dim=-1, keepdim=True) * gap / 8
    pruner = VisPruner(budget, 0.5, order="stable")
    assert torch.equal(pruner(features, attention).kept, pruner(moved, shuffled).kept)


def test_stable_spreads_what_is_left_of_an_even_surface() -> None:
    features, attention = torch.ones(1, 576, 4), torch.full((1, 576), 1 / 576)
    row, column = (VisPruner(64, 0.0, order="stable")(features, attention).kept[0] // d % 24 for d in (24, 1))
    for quarter in range(4):
        assert 12 <= int((row // 6 == quarter).sum()) <= 20
        assert 12 <= int((column // 6 == quarter).sum()) <= 20


@pytest.mark.parametrize(("order", "budget"), [("reference", 24), ("stable", 10)])
def test_duplicates_go_first(order: str, budget: int) -> None:
    """Eight tokens unlike all others in a crowd of two looks stay; `stable` leaves one token of each look."""
    features = torch.cat([torch.eye(10)[:8], torch.eye(10)[8:].repeat_interleave(30, 0)]).unsqueeze(0)
    features = features[:, torch.from_numpy(np.random.default_rng(1).permutation(68))]
    _, attention = ordinary(1, 68, 1)
    found = VisPruner(budget, 0.0, order=order)(features, attention)
    looks = (found.map @ features)[0].sum(0).tolist()
    assert looks[:8] == [1.0] * 8
    assert min(looks[8:]) >= 1.0


# --- batches, precision, gradients ---------------------------------------------------------------------------------


@pytest.mark.parametrize("order", ORDERS)
def test_a_batch_is_its_images_one_by_one(order: str) -> None:
    features, attention = ordinary(5, 49, 24)
    pruner = VisPruner(13, order=order)
    together = pruner(features, attention)
    for i in range(5):
        alone = pruner(features[i : i + 1], attention[i : i + 1])
        assert torch.equal(alone.kept[0], together.kept[i])
        assert torch.equal(alone.map[0], together.map[i])
    assert not torch.equal(together.kept[0], together.kept[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("order", ORDERS)
def test_half_precision_is_decided_in_single(order: str, dtype: torch.dtype) -> None:
    features, attention = (x.to(dtype) for x in ordinary(3, 49, 24))
    pruner = VisPruner(13, order=order)
    expected = pruner(features.float(), attention.float())
    found = pruner(features, attention)
    assert torch.equal(found.kept, expected.kept)
    assert found.map.dtype == torch.float32
    rows = torch.stack([f[k] for f, k in zip(features, found.kept, strict=True)])
    assert torch.equal(found.map.to(dtype) @ features, rows)


@pytest.mark.parametrize("order", ORDERS)
def test_autocast_does_not_reach_the_decisions(order: str) -> None:
    features, attention = ordinary(3, 49, 24)
    pruner = VisPruner(13, order=order)
    expected = pruner(features, attention).kept
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(pruner(features, attention).kept, expected)


def test_gradients_pass_to_the_kept_features_alone() -> None:
    features, attention = ordinary(1, 20, 6)
    features.requires_grad_()
    found = VisPruner(7)(features, attention.requires_grad_())
    assert not found.map.requires_grad
    (found.map @ features).sum().backward()
    touched = features.grad[0].abs().sum(-1).nonzero().flatten()
    assert touched.tolist() == found.kept[0].tolist()


def test_keeps_nothing_for_a_backward_pass() -> None:
    """Every step would save matrices of tokens by tokens."""
    features, attention = (x.requires_grad_() for x in ordinary(1, 40, 6))
    saved: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(saved.append, lambda x: x):
        VisPruner(8)(features, attention)
    assert not saved


def test_has_no_parameters_and_no_state() -> None:
    assert not VisPruner(3).state_dict()


@pytest.mark.parametrize("arguments", [(0,), (-3,), (4, -0.1), (4, 1.5), (4, float("nan")), (4, 0.5, "fast")])
def test_refuses_what_means_nothing(arguments: tuple) -> None:
    order = arguments[2] if len(arguments) > 2 else "reference"
    with pytest.raises(ValueError, match=r"takes a budget of at least 1.* given " + str(arguments[0])):
        VisPruner(*arguments[:2], order=order)


# --- exported ------------------------------------------------------------------------------------------------------


def exported(pruner: VisPruner, features: Tensor, attention: Tensor, path: Path) -> Path:
    """As ONNX, with any number of images."""
    batch = torch.export.Dim("batch", min=1, max=64)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.export.export(pruner, (features, attention), dynamic_shapes=({0: batch}, {0: batch}))
        assert not data_dependent(program.run_decompositions().graph_module)
        torch.onnx.export(program, (), path, input_names=["features", "attention"], output_names=["kept", "map"])
    return path


def operators_of(graph: onnx.GraphProto) -> set[str]:
    """Those of the bodies of its loops among them."""
    bodies = [attribute.g for node in graph.node for attribute in node.attribute if attribute.HasField("g")]
    return {node.op_type for node in graph.node}.union(*map(operators_of, bodies))


@pytest.mark.parametrize("share", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("order", ORDERS)
def test_onnx_equals_eager_and_tensorrt_takes_it(order: str, share: float, tmp_path: Path) -> None:
    pruner = VisPruner(11, share, order=order)
    path = exported(pruner, *ordinary(2, 50, 16), tmp_path / "model.onnx")
    for batch, seed in ((1, 1), (2, 2), (7, 3)):
        features, attention = ordinary(batch, 50, 16, seed)
        expected, gap = slow_batch(features, attention, 11, share, order)
        assert gap > 1e-6
        found = onnx_outputs(path, {"features": features.numpy(), "attention": attention.numpy()})
        assert found["kept"].tolist() == expected
        assert np.array_equal(found["map"], np.eye(50, dtype=np.float32)[found["kept"]])
    operators = operators_of(onnx.load(path).graph)
    assert ("Loop" in operators) == (share < 1)
    forbidden = ("TopK", "Gather", "Scatter", "NonZero", "Unique", "Compress", "ArgMax", "If", "OneHot", "Sort")
    assert not [name for name in operators if name.startswith(forbidden)]
    assert tensorrt_refuses(path) == []


@pytest.mark.parametrize("order", ORDERS)
def test_tensorrt_takes_the_size_of_llava(order: str, tmp_path: Path) -> None:
    """More than 255 tokens, where indices no longer fit a byte; a large budget, so that there are few steps."""
    path = exported(VisPruner(544, order=order), *ordinary(2, 576, 8), tmp_path / "model.onnx")
    assert tensorrt_refuses(path) == []
    features, attention = ordinary(1, 576, 8, seed=5)
    found = onnx_outputs(path, {"features": features.numpy(), "attention": attention.numpy()})
    assert found["kept"].shape == (1, 544)
    assert (np.diff(found["kept"]) > 0).all()


@pytest.mark.parametrize("order", ORDERS)
def test_the_oracle_case_in_onnx(order: str, tmp_path: Path) -> None:
    features, attention, _ = tower()
    case = CASES["T48-r0.5"]
    pruner = VisPruner(case["budget"], case["important_ratio"], order=order)
    path = exported(pruner, features, attention, tmp_path / "model.onnx")
    found = onnx_outputs(path, {"features": features.numpy(), "attention": attention.numpy()})
    assert found["kept"].tolist() == pruner(features, attention).kept.tolist()
    if order == "reference":
        assert found["kept"].tolist() == EXPECTED["T48-r0.5.kept"].tolist()
