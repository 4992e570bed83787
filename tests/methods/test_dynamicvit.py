"""DynamicViT: predictors written again by hand, masks against dropped tokens, what learns, and what is refused."""

from __future__ import annotations

import functools
import math
from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import pumer_compile as pumer
from pumer_compile import Schedule
from pumer_compile.distill import keep_ratio_loss, noted_masks, save_predictors, token_distillation_loss
from pumer_compile.errors import LocateError, PlanError, ScheduleError, UsageError
from pumer_compile.reducers import LearnedReducer, noted_decisions
from pumer_compile.reducers.base import Decisions, forced_decisions
from tests.support.models import Config, Fusion, inputs_for, make, program
from tests.support.towers import Images, given

FUSION = Config(mask="additive", form="sdpa", patch_mask=True, dynamic=True)
SQUARE = Config(mask="none", cls=False, grid=(2, 4), heads=4, width=32, text=8)  # text = image = head size
TOWER = Config(mask="bool", patch_mask=True, dynamic=True)


def weights_of(width: int, name: str, seed: int) -> dict[str, Tensor]:
    """A predictor's weights by the names of its file, large enough that tokens differ."""
    g = torch.Generator().manual_seed(seed)
    sizes = {"entry.1": (width, width), "exit.0": (width // 2, width), "exit.2": (width // 4, width // 2)}
    sizes["exit.4"] = (2, width // 4)
    found = {"entry.0.weight": torch.rand(width, generator=g) + 0.5, "entry.0.bias": torch.rand(width, generator=g)}
    for layer, (out, inner) in sizes.items():
        found[f"{layer}.weight"] = torch.randn(out, inner, generator=g) * 2 / math.sqrt(inner)
        found[f"{layer}.bias"] = torch.randn(out, generator=g) / 3
    return {f"{name}.{key}": value for key, value in found.items()}


def file_for(folder: Path, config: Config, layers: tuple[int, ...], group: str = "cross_modal") -> Path:
    path = folder / "predictors.safetensors"
    every = [weights_of(config.width, f"before_{group}_{layer}.image", layer) for layer in layers]
    save_file({key: value for weights in every for key, value in weights.items()}, path)
    return path


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / math.sqrt(2)))


def scores_by_hand(weights: dict[str, Tensor], tokens: Tensor, real: list[bool]) -> list[float]:
    """Of one sample's tokens, `[n, width]`: how sure the predictor is that each stays."""
    w = {key.split(".", 2)[2]: value for key, value in weights.items()}
    mean, variance = tokens.mean(1, keepdim=True), tokens.var(1, keepdim=True, unbiased=False)
    x = (tokens - mean) / (variance + 1e-5).sqrt() * w["entry.0.weight"] + w["entry.0.bias"]
    x = gelu(x @ w["entry.1.weight"].T + w["entry.1.bias"])
    half = x.shape[1] // 2
    shared = x[torch.tensor(real)][:, half:].mean(0)
    found = []
    for token in x:
        y = torch.cat([token[:half], shared])
        for layer in ("exit.0", "exit.2"):
            y = gelu(w[f"{layer}.weight"] @ y + w[f"{layer}.bias"])
        stay, go = (w["exit.4.weight"] @ y + w["exit.4.bias"]).tolist()
        found.append(-math.log1p(math.exp(go - stay)))
    return found


def by_hand(
    model: Fusion, inputs: dict[str, Tensor], file: Path, layers: tuple[int, ...], keep: float, group: str
) -> tuple[Tensor, list[list[list[int]]]]:
    """The model with tokens left out, sample by sample: its output, and what each stage keeps."""
    config, weights, outputs, kept_all = model.config, load_file(file), [], []
    for b in range(len(inputs["pixel_values"])):
        one = {name: value[b : b + 1] for name, value in inputs.items()}
        if group == "vision":
            x, text = model.start(one["pixel_values"])[0], 0
            opened = torch.cat([torch.ones(1), one["patch_mask"][0].float()])
        else:
            text = config.text
            x = model.embed(one["input_ids"], one["pixel_values"])[0]
            opened = torch.ones(len(x))
            if "attention_mask" in one:
                opened = model.tokens_open(x[None], one["attention_mask"], one.get("patch_mask"))[0].float()
        whole, kept_of = config.image - config.cls, []
        for index, layer in enumerate(model.layers):
            if index in layers:
                stage = layers.index(index)
                lead = text + config.cls
                real = (opened[lead:] > 0).tolist()
                mine = {k: v for k, v in weights.items() if k.startswith(f"before_{group}_{index}.")}
                scores = scores_by_hand(mine, x[lead:], real)
                order = sorted(range(len(scores)), key=lambda i: (not real[i], -scores[i], i))
                chosen = sorted(order[: int(whole * keep ** (stage + 1))])
                kept_of.append([*range(config.cls), *(i + config.cls for i in chosen)])
                places = [*range(text), *(text + i for i in kept_of[-1])]
                x, opened = x[places], opened[places]
            x = layer(x[None], (opened > 0)[None, None, None] if len(opened) else None)[0]
        outputs.append(model.conclude(model.last(x[None]))[0] if group == "vision" else model.finish(x[None], text)[0])
        kept_all.append(kept_of)
    return torch.stack(outputs), kept_all


def like_bool(config: Config) -> Config:
    """The same with a mask of truth values, which `by_hand` gives."""
    import dataclasses

    return dataclasses.replace(config, mask="bool", form="sdpa")


@functools.cache
def captured(config: Config, group: str) -> pumer.Program:
    if group == "cross_modal":
        return program(config)
    return pumer.capture(make(config, kind=Images), given(config, Images), dynamic_batch=config.dynamic)


@pytest.mark.parametrize(
    ("config", "group", "layers", "keep"),
    [
        (FUSION, "cross_modal", (1, 2), 0.6),
        (FUSION, "cross_modal", (0,), 0.3),
        (SQUARE, "cross_modal", (1,), 0.5),
        (TOWER, "vision", (1, 2), 0.7),
    ],
    ids=["two stages", "before the first layer", "colliding sizes", "tower"],
)
def test_predictors_by_hand(tmp_path: Path, config: Config, group: str, layers: Any, keep: float) -> None:
    file = file_for(tmp_path, config, layers, group)
    reduced = pumer.reduce(
        captured(config, group),
        Schedule(method="dynamicvit", layers=layers, keep=keep, group=group, predictors=str(file)),
    )
    kind = Images if group == "vision" else Fusion
    model = make(like_bool(config), kind=kind)
    seen = set()
    for seed in (5, 6):
        batch = 3 if config.dynamic else config.batch
        inputs = given(config, kind, seed, batch) if group == "vision" else inputs_for(config, seed, batch)
        with torch.no_grad(), noted_decisions(reduced.module) as noted:
            found = reduced.module(**inputs)
        with torch.no_grad():
            wanted, kept = by_hand(model, inputs, file, layers, keep, group)
            assert (make(like_bool(config), kind=kind)(**inputs) - wanted).abs().max() > 1e-3
        for stage, decisions in enumerate(noted.values()):
            assert decisions.kept.tolist() == [of[stage] for of in kept]
            seen.add(tuple(decisions.kept[0].tolist()))
        torch.testing.assert_close(found, wanted, atol=2e-5, rtol=0)
    assert len(seen) == 2 * len(layers)  # another sample keeps others


def test_a_sample_keeps_the_same_alone_and_in_a_batch(tmp_path: Path) -> None:
    file = file_for(tmp_path, FUSION, (1, 2))
    schedule = Schedule(method="dynamicvit", layers=(1, 2), keep=0.6, predictors=str(file))
    module = pumer.reduce(program(FUSION), schedule).module
    inputs = inputs_for(FUSION, 9, 2)
    with torch.no_grad():
        both = module(**inputs)
        for b in range(2):
            one = {name: value[b : b + 1] for name, value in inputs.items()}
            torch.testing.assert_close(module(**one)[0], both[b], atol=1e-5, rtol=0)


def test_masked_tokens_count_as_dropped_ones(tmp_path: Path) -> None:
    """In eval mode a graph that is being trained says what the one with fewer tokens says, but for eps of the softmax;
    and its losses see as many kept tokens."""
    layers, keep = (1, 2), 0.6
    file = file_for(tmp_path, FUSION, layers)
    keys: dict[str, Any] = {"method": "dynamicvit", "layers": layers, "keep": keep, "predictors": str(file)}
    dropping = pumer.reduce(program(FUSION), Schedule(**keys))
    masking = pumer.reduce(program(FUSION), Schedule(**keys, training=True))
    inputs = inputs_for(FUSION, 5, 3)
    with torch.no_grad(), noted_masks(masking.module) as masks, noted_decisions(dropping.module) as noted:
        torch.testing.assert_close(masking.module(**inputs), dropping.module(**inputs), atol=1e-4, rtol=0)
    counts = [int(24 * keep ** (i + 1)) for i in range(2)]
    last = next(iter(masks.values())).mask[0].nonzero().flatten() + 1
    assert last.tolist() == next(iter(noted.values())).kept[0].tolist()[1:]  # the first sample has no padding
    assert [int(kept.mask[0].sum()) for kept in masks.values()] == counts
    assert [site.after["image"] for site in dropping.plan.sites] == [1 + n for n in counts]
    assert [site.after["image"] for site in masking.plan.sites] == [25, 25]


def test_what_learns() -> None:
    """Gradients reach every predictor, through attention and through the ratio; what is drawn is 0 or 1, differs from
    draw to draw, and never comes back."""
    torch.manual_seed(0)
    masking = pumer.reduce(program(FUSION), Schedule(method="dynamicvit", layers=(1, 2), keep=0.5, training=True))
    masking.module.train()
    inputs = inputs_for(FUSION)
    drawn = []
    for what in ("output", "ratio"):
        masking.module.zero_grad()
        with noted_masks(masking.module) as masks:
            output = masking.module(**inputs)
        first, second = (kept.mask for kept in masks.values())
        assert set(first.unique().tolist()) | set(second.unique().tolist()) == {0.0, 1.0}
        assert bool((second <= first).all())
        drawn.append(first)
        (output.square().sum() if what == "output" else keep_ratio_loss(masks.values())).backward()
        for module in masking.module.modules():
            if isinstance(module, LearnedReducer):
                gradients = [p.grad for p in module.predictor.parameters()]
                assert all(g is not None and bool(g.abs().max() > 0) for g in gradients), what
    assert not torch.equal(*drawn)


def test_training_moves_the_kept_share_and_the_file_holds_it(tmp_path: Path) -> None:
    """The ratio loss alone brings the share that is drawn from a half to what is asked; the saved predictors choose in
    the reduced graph as in the trained one."""
    torch.manual_seed(0)
    keys: dict[str, Any] = {"method": "dynamicvit", "layers": (1,), "keep": 0.25}
    masking = pumer.reduce(program(FUSION), Schedule(**keys, training=True))
    (reducer,) = (m for m in masking.module.modules() if isinstance(m, LearnedReducer))
    optimizer = torch.optim.Adam(reducer.predictor.parameters(), lr=3e-3)
    masking.module.train()
    inputs = inputs_for(FUSION, 3, 8)
    inputs["patch_mask"] = torch.ones_like(inputs["patch_mask"])
    shares = []
    for _ in range(60):
        with noted_masks(masking.module) as masks:
            masking.module(**inputs)
        shares.append(next(iter(masks.values())).mask.mean().item())
        optimizer.zero_grad()
        keep_ratio_loss(masks.values()).backward()
        optimizer.step()
    assert sum(shares[:5]) / 5 > 0.4 and sum(shares[-5:]) / 5 < 0.32
    file = tmp_path / "trained.safetensors"
    save_predictors(masking.module, file)
    dropping = pumer.reduce(program(FUSION), Schedule(**keys, predictors=str(file)))
    masking.module.eval()
    with torch.no_grad():
        torch.testing.assert_close(masking.module(**inputs), dropping.module(**inputs), atol=1e-4, rtol=0)


def test_losses_by_hand() -> None:
    from pumer_compile.distill import KeptMask

    masks = [KeptMask(torch.tensor([[1.0, 0, 0, 0], [1, 1, 1, 0]]), 0.5), KeptMask(torch.tensor([[0.0, 0, 0, 1]]), 0.5)]
    assert float(keep_ratio_loss(masks)) == pytest.approx(((0.25**2 + 0.25**2) / 2 + 0.25**2) / 2)
    student, teacher = torch.tensor([[[1.0, 2.0], [5.0, 5.0]]]), torch.tensor([[[0.0, 4.0], [0.0, 0.0]]])
    assert float(token_distillation_loss(student, teacher, torch.tensor([[1.0, 0.0]]))) == pytest.approx(2.5)
    assert float(token_distillation_loss(student, teacher, torch.zeros(1, 2))) == 0
    with pytest.raises(UsageError, match="No masks were noted"):
        keep_ratio_loss([])
    with pytest.raises(UsageError, match="same tokens"):
        token_distillation_loss(student, teacher, torch.zeros(1, 3))


def test_ties_go_to_the_lowest_index_and_near_ties_are_told() -> None:
    reducer = LearnedReducer(6, 3, 8, learned=1)
    nn.init.zeros_(reducer.predictor.exit[4].weight)
    tokens = torch.randn(2, 6, 8)
    weights = torch.tensor([[1.0] * 6, [1, 0, 1, 1, 1, 1]])
    assert reducer(tokens, weights).kept.tolist() == [[0, 1, 2], [0, 2, 3]]
    none = torch.zeros(2, 0, dtype=torch.int64)
    forced = Decisions(torch.tensor([[0, 1, 3], [0, 2, 3]]), none, none)
    with forced_decisions(nn.ModuleDict({"one": reducer}), {"one": forced}) as forcings:
        reducer(tokens, weights)
    comparison = forcings["one"].comparison
    assert comparison is not None
    assert comparison.differs.tolist() == [True, False] and comparison.margin.tolist() == [0, 0]
    reducer.predictor.load_state_dict({key[4:]: value for key, value in weights_of(8, "one", 0).items()})
    kept = reducer(tokens).kept
    others = [[0, *sorted({1, 2, 3, 4, 5} - set(row[1:]))[:2]] for row in kept.tolist()]
    swapped = Decisions(torch.tensor(others), none, none)
    with forced_decisions(nn.ModuleDict({"one": reducer}), {"one": swapped}) as forcings:
        reducer(tokens)
    assert forcings["one"].comparison is not None and bool((forcings["one"].comparison.margin > 1e-3).all())


def test_an_artifact_has_the_predictors_in_it(tmp_path: Path) -> None:
    file = file_for(tmp_path, FUSION, (1,))
    schedule = Schedule(method="dynamicvit", layers=(1,), keep=0.5, predictors=str(file))
    reduced = pumer.reduce(program(FUSION), schedule)
    path = tmp_path / "model.onnx"
    pumer.export(reduced, path)
    assert not {"TopK", "ScatterND", "NonZero"} & {node.op_type for node in onnx.load(path).graph.node}
    file.unlink()  # the artifact does not read it
    inputs = inputs_for(FUSION, 7, 3)
    found = pumer.OnnxSession(path).run(inputs)
    with torch.no_grad():
        wanted = reduced.module(**inputs)
    torch.testing.assert_close(torch.from_numpy(next(iter(found.values()))), wanted, atol=1e-4, rtol=0)


def test_what_is_refused(tmp_path: Path) -> None:
    file = file_for(tmp_path, FUSION, (1,))
    with pytest.raises(ScheduleError, match="its predictors have to be trained"):
        Schedule(method="dynamicvit", layers=(1,))
    with pytest.raises(ScheduleError, match="ascending order"):
        Schedule(method="dynamicvit", layers=(2, 1), training=True)
    gone = Schedule(method="dynamicvit", layers=(1,), predictors=str(tmp_path / "none.safetensors"))
    with pytest.raises(ScheduleError, match="no such file"):
        pumer.reduce(program(FUSION), gone)
    with pytest.raises(ScheduleError, match=r"before_cross_modal_2\.image: it has predictors for before_cross_modal_1"):
        pumer.reduce(program(FUSION), Schedule(method="dynamicvit", layers=(2,), predictors=str(file)))
    with pytest.raises(PlanError, match="of the 24 tokens of image is 0"):
        pumer.reduce(program(FUSION), Schedule(method="dynamicvit", layers=(1,), keep=0.03, predictors=str(file)))
    with pytest.raises(LocateError, match=r"cross_modal\.9"):
        pumer.reduce(program(FUSION), Schedule(method="dynamicvit", layers=(9,), training=True))
    masking = pumer.reduce(program(FUSION), Schedule(method="dynamicvit", layers=(1,), training=True))
    with pytest.raises(UsageError, match="that is being trained, and reduces no token"):
        pumer.export(masking, tmp_path / "masks.onnx")
    dropping = pumer.reduce(program(FUSION), Schedule(method="dynamicvit", layers=(1,), predictors=str(file)))
    with pytest.raises(UsageError, match="no predictors that are being trained"):
        save_predictors(dropping.module, tmp_path / "none")


def test_the_hash_is_of_the_weights_and_not_of_their_place(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    here, there = file_for(tmp_path, FUSION, (1,)), file_for(tmp_path / "a", FUSION, (1,))
    one, same = (Schedule(method="dynamicvit", layers=(1,), predictors=str(path)) for path in (here, there))
    assert one.sha256 == same.sha256
    save_file(weights_of(32, "before_cross_modal_1.image", 8), there)
    assert one.sha256 != Schedule(method="dynamicvit", layers=(1,), predictors=str(there)).sha256
