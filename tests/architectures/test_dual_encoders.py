"""CLIP and SigLIP: towers that meet in one product. No text informs their image tokens; merging alone reduces them."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from pumer_compile import Program, Reduced, Schedule, export, reduce
from pumer_compile.errors import LocateError, PlanError
from tests.architectures.builders import Build, Inputs, clip, siglip, words_and_pixels
from tests.architectures.suite import Forward, built, captured, cast, difference, forwards, located, run
from tests.support.commands import tensorrt_refuses
from tests.support.helpers import combine, groups, match

OUTPUT = ("logits_per_image",)
MERGED = {0: 6, 1: 9}
LAYERS = 3


@dataclass(frozen=True)
class Tower:
    """A model by name, with the tokens of its image and how many class tokens lead them."""

    name: str
    build: Build
    tokens: int
    learned: int


TOWERS = (Tower("clip", clip, 37, 1), Tower("siglip", siglip, 36, 0))
each_tower = pytest.mark.parametrize("tower", TOWERS, ids=lambda tower: tower.name)
METHODS: dict[str, dict[str, str]] = {
    "tome": {"method": "tome"},
    "safe": {"method": "pumer", "semantics": "safe"},
    "reference": {"method": "pumer", "semantics": "reference"},
    "paper": {"method": "pumer", "semantics": "paper"},
}
each_method = pytest.mark.parametrize("method", METHODS)


def program(tower: Tower, dtype: torch.dtype = torch.float64) -> Program:
    return captured(tower.build, words_and_pixels, OUTPUT, dtype)


@functools.cache
def reduced(tower: Tower, method: str, dtype: torch.dtype = torch.float64) -> Reduced:
    sites = [{"at": f"vision.{layer}", "merge": {"image": count}} for layer, count in MERGED.items()]
    return reduce(program(tower, dtype), Schedule(sites=sites, **METHODS[method]))


def by_hand(
    tower: Tower, method: str, inputs: Inputs, merged: dict[int, int] | None = None, wrong: int | None = None
) -> dict[str, Tensor]:
    """The model's own forward, its vision layers run by hand and `merged` tokens away after their attention.

    `wrong` is a layer whose last merge takes its second best target.
    """
    model: Any = built(tower.build, torch.float64)
    sizes = [[1.0] * tower.tokens for _ in inputs["pixel_values"]]

    def heads(layer: nn.Module, hidden: Tensor) -> Tensor:
        return layer(hidden).unflatten(-1, (model.config.vision_config.num_attention_heads, -1)).transpose(1, 2)

    def bias() -> Tensor:
        """Logarithms of the sizes, `[batch, 1, 1, tokens]`: only ToMe counts a merged token as many."""
        counted = method == "tome"
        return torch.tensor([[math.log(s) if counted else 0.0 for s in sample] for sample in sizes])[:, None, None]

    def shrink(carrier: Tensor, keys: Tensor, count: int, wrongly: bool) -> Tensor:
        samples = []
        for b, (tokens, own) in enumerate(zip(carrier, keys.mean(1).double().numpy(), strict=True)):
            protected = tower.learned if method == "tome" else max(1, tower.learned)
            pairs = match(own, count, "dot" if method == "paper" else "cosine", protected=protected)
            if wrongly:
                source, target = pairs[-1]
                pairs[-1] = (source, target + 2 if target + 2 < len(own) else target - 2)
            members = groups(len(own), pairs, in_order=method == "safe")
            weighted = method in ("tome", "safe")
            samples.append(combine(tokens, members, sizes[b] if weighted else None))
            sizes[b] = [sum(sizes[b][i] for i in group) for group in members]
        return torch.stack(samples).to(carrier.dtype)

    def layer_forward(layer: Any, index: int) -> Forward:
        def run(hidden: Tensor, *_: Any, **__: Any) -> Tensor:
            attention, normed = layer.self_attn, layer.layer_norm1(hidden)
            query, keys, values = (heads(p, normed) for p in (attention.q_proj, attention.k_proj, attention.v_proj))
            scores = query @ keys.transpose(-1, -2) / math.sqrt(query.shape[-1]) + bias()
            context = (scores.softmax(-1) @ values).transpose(1, 2).flatten(2)
            carrier = hidden + attention.out_proj(context)
            count = (MERGED if merged is None else merged).get(index, 0)
            if count:
                carrier = shrink(carrier, keys, count, wrong == index)
            return carrier + layer.mlp(layer.layer_norm2(carrier))

        return run

    layers = model.vision_model.encoder.layers
    replaced: dict[nn.Module, Callable[..., Any]] = {layer: layer_forward(layer, i) for i, layer in enumerate(layers)}
    if tower.name == "siglip":
        pool = model.vision_model.head.attention
        original = pool.forward

        def pooled(probe: Tensor, keys: Tensor, values: Tensor) -> Any:
            mask = bias()[:, 0].repeat_interleave(pool.num_heads, 0)
            return original(probe, keys, values, attn_mask=mask.to(keys.dtype))

        replaced[pool] = pooled
    with forwards(replaced):
        return run(model, cast(inputs, torch.float64), OUTPUT)


# --- text-informed schedules ----------------------------------------------------------------------------------------


@each_tower
def test_there_are_vision_and_text_sites_and_no_others(tower: Tower) -> None:
    sites = [a.address for a in located(program(tower))]
    assert {s for s in sites if s.startswith("vision")} >= {f"vision.{i}" for i in range(LAYERS)}
    assert not [s for s in sites if s.startswith("cross_modal")]


@each_tower
def test_a_text_informed_schedule_is_refused_by_name(tower: Tower) -> None:
    with pytest.raises(LocateError, match=r"cross_modal\.1.*No attention mixes tokens of text and image") as error:
        reduce(program(tower), Schedule(layers=[1], prune=0.1, merge={"image": 0.3, "text": 0.2}))
    assert "vision.0" in str(error.value)


@each_tower
def test_pruning_at_a_vision_site_is_refused(tower: Tower) -> None:
    with pytest.raises(PlanError, match=r"vision\.1 prunes image tokens by the attention of the text"):
        reduce(program(tower), Schedule(sites=[{"at": "vision.1", "prune": 0.1}]))


# --- merging alone --------------------------------------------------------------------------------------------------


@each_tower
def test_the_oracle_without_sites_is_the_model(tower: Tower) -> None:
    inputs = words_and_pixels()
    expected = run(built(tower.build, torch.float64), cast(inputs, torch.float64), OUTPUT)
    assert difference(by_hand(tower, "tome", inputs, {}), expected) <= 1e-9


@each_tower
@each_method
def test_token_counts(tower: Tower, method: str) -> None:
    plan = reduced(tower, method).plan
    n = tower.tokens
    assert [(s.before, s.after) for s in plan.sites] == [
        ({"image": n}, {"image": n - 6}),
        ({"image": n - 6}, {"image": n - 15}),
    ]
    assert plan.ratio > 1


@each_tower
@each_method
@pytest.mark.parametrize("seed", range(3))
def test_outputs_are_those_of_the_oracle(tower: Tower, method: str, seed: int) -> None:
    inputs = words_and_pixels(seed)
    expected = by_hand(tower, method, inputs)
    found = run(reduced(tower, method).module, cast(inputs, torch.float64), OUTPUT)
    assert difference(found, expected) <= 1e-5
    unreduced = run(program(tower).module, cast(inputs, torch.float64), OUTPUT)
    assert difference(expected, unreduced) > 1e-3


@each_tower
@each_method
@pytest.mark.parametrize("site", MERGED)
def test_one_wrong_merge_shows(tower: Tower, method: str, site: int) -> None:
    inputs = words_and_pixels()
    expected = by_hand(tower, method, inputs)
    assert difference(by_hand(tower, method, inputs, wrong=site), expected) > 1e-4


@each_tower
def test_methods_differ(tower: Tower) -> None:
    inputs = words_and_pixels()
    found = [by_hand(tower, method, inputs) for method in METHODS]
    assert all(difference(a, b) > 1e-4 for i, a in enumerate(found) for b in found[:i])


@pytest.mark.parametrize(("tower", "method"), [(TOWERS[0], "safe"), (TOWERS[1], "tome")], ids=["clip", "siglip"])
def test_onnx(tower: Tower, method: str, tmp_path: Path) -> None:
    report = export(reduced(tower, method, torch.float32), tmp_path / "model.onnx").report
    assert report is not None and report.passed
    assert tensorrt_refuses(tmp_path / "model.onnx") == []
    judged = [o for o in report.outputs if o.judged]
    assert judged and all(o.required_atol <= 1e-5 for o in judged)
