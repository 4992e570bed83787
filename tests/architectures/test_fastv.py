"""FastV in transformers' models, against their own layers run one by one."""

from __future__ import annotations

import copy
import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pumer_compile as pumer
from benchmarks.architecture_models import ARCHITECTURES
from pumer_compile import Program, Schedule
from pumer_compile.errors import PlanError
from pumer_compile.reducers import reducers_of
from tests.support import llava
from tests.support.commands import done, inner_manifest, onnx_outputs, refused
from tests.support.fastv import by_hand, places_left, rows_of

MODELS = ["LLaVA", "PaliGemma"]


@functools.cache
def built(name: str) -> tuple[Any, dict[str, Tensor]]:
    """A small model whose attention is uneven, and two prompts."""
    if name == "LLaVA":
        return llava.model(), llava.tensors()
    torch.manual_seed(0)
    model, one = ARCHITECTURES[name].build()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    inputs = {key: torch.cat([t, t]) for key, t in one.items()}
    inputs["pixel_values"] = torch.randn_like(inputs["pixel_values"])
    inputs["input_ids"][:, 36:] = torch.randint(0, 98, (2, 14))
    return model.eval(), inputs


@functools.cache
def captured(name: str, attention: str = "sdpa") -> Program:
    model, inputs = built(name)
    model.set_attn_implementation(attention)
    try:
        return pumer.capture(model, inputs, outputs=["logits", "past_key_values"])
    finally:
        model.set_attn_implementation("sdpa")


def layers(name: str) -> int:
    return len(built(name)[0].model.language_model.layers)


def fastv(layer: int, budget: int, **more: Any) -> Schedule:
    return Schedule(method="fastv", layer=layer, budget=budget, **more)


def run(module: Any, inputs: dict[str, Tensor]) -> Any:
    with torch.no_grad():
        return module(**inputs)


def kept_by(module: Any, inputs: dict[str, Tensor]) -> Tensor:
    seen = []
    (reducer,) = reducers_of(module).values()
    handle = reducer.register_forward_hook(lambda module, args, result: seen.append(result.kept))
    try:
        run(module, inputs)
    finally:
        handle.remove()
    return seen[0]


def check_close(found: Tensor, wanted: Tensor) -> None:
    """To a hundred-thousandth of the largest."""
    torch.testing.assert_close(found, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=1e-5)


CASES = [("LLaVA", 1), ("LLaVA", 2), ("PaliGemma", 1), ("PaliGemma", 2), ("PaliGemma", 3)]


VARIANTS = [("sdpa", 12), ("eager", 1), ("eager", 12), ("sdpa", 35)]


# Every layer with both kinds of attention and two budgets.
@pytest.mark.parametrize(
    ("name", "layer", "attention", "budget"),
    [(*case, *VARIANTS[(2 * i + j) % 4]) for i, case in enumerate(CASES) for j in range(2)],
)
def test_the_layers_run_one_by_one(name: str, layer: int, attention: str, budget: int) -> None:
    model, inputs = built(name)
    wanted = by_hand(model, inputs, layer, budget)
    reduced = pumer.reduce(captured(name, attention), fastv(layer, budget))
    found = run(reduced.module, inputs)
    assert torch.equal(kept_by(reduced.module, inputs), wanted.kept)
    check_close(found["logits"], wanted.logits)
    caches = [found[f"past_key_values.layers.{i}.keys"] for i in range(layers(name))]
    for index, (keys, values) in enumerate(wanted.cache):
        check_close(caches[index], keys)
        check_close(found[f"past_key_values.layers.{index}.values"], values)
    whole, left = inputs["input_ids"].shape[1], wanted.places.shape[1]
    assert [c.shape[2] for c in caches] == [whole] * layer + [left] * (layers(name) - layer)


@pytest.mark.parametrize("name", MODELS)
def test_every_layer_of_a_model_was_tried(name: str) -> None:
    assert [layer for n, layer in CASES if n == name] == list(range(1, layers(name)))
    with pytest.raises(PlanError, match=f"this model has {layers(name)}: choose 1 to {layers(name) - 1}"):
        pumer.reduce(captured(name), fastv(layers(name), 4))


@pytest.mark.parametrize("name", MODELS)
def test_the_attention_that_transformers_gives(name: str) -> None:
    """The kept tokens again, from the model's own `output_attentions`."""
    model, inputs = built(name)
    model.set_attn_implementation("eager")
    with torch.no_grad():
        attention = model(**inputs, output_attentions=True).attentions[0]
    model.set_attn_implementation("sdpa")
    start, image = (5, 144) if name == "LLaVA" else (0, 36)
    kept = attention.mean(1)[:, -1, start : start + image].topk(12).indices.sort().values
    reduced = pumer.reduce(captured(name), fastv(1, 12))
    assert torch.equal(kept_by(reduced.module, inputs), kept)


@pytest.mark.parametrize("name", MODELS)
def test_the_by_hand_layers_are_the_models(name: str) -> None:
    """With all tokens kept they are the unreduced model; with others kept they are something else."""
    model, inputs = built(name)
    image = 144 if name == "LLaVA" else 36
    whole = run(model, inputs).logits
    check_close(by_hand(model, inputs, 1, image).logits, whole)
    assert (by_hand(model, inputs, 1, 12).logits[:, -1] - whole[:, -1]).abs().max() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_padding_in_front(name: str) -> None:
    model, inputs = built(name)
    inputs = {**inputs, "attention_mask": inputs["attention_mask"].clone()}
    inputs["attention_mask"][1, :3] = 0  # words of LLaVA's prompt, image tokens of PaliGemma's
    wanted = by_hand(model, inputs, 1, 12)
    reduced = pumer.reduce(captured(name), fastv(1, 12))
    found = run(reduced.module, inputs)["logits"]
    assert torch.equal(kept_by(reduced.module, inputs), wanted.kept)
    real = rows_of(inputs["attention_mask"], wanted.places).bool()
    check_close(found[real], wanted.logits[real])


class LastLogits(nn.Module):
    """LLaVA as generation asks for its prefill."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = model

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> dict[str, Tensor]:
        found = self.model(input_ids, pixel_values, attention_mask, logits_to_keep=1, use_cache=False)
        return {"logits": found.logits}


def test_the_last_logits_alone() -> None:
    model, inputs = built("LLaVA")
    program = pumer.capture(LastLogits(model), inputs)
    found = run(pumer.reduce(program, fastv(2, 30)).module, inputs)["logits"]
    assert found.shape[1] == 1
    check_close(found, by_hand(model, inputs, 2, 30).logits[:, -1:])


def test_prompts_one_by_one() -> None:
    _, inputs = built("LLaVA")
    together = run(pumer.reduce(captured("LLaVA"), fastv(1, 30)).module, inputs)["logits"]
    for row in range(2):
        one = {key: value[row : row + 1] for key, value in inputs.items()}
        alone = pumer.capture(built("LLaVA")[0], one, outputs=["logits"])
        logits = run(pumer.reduce(alone, fastv(1, 30)).module, one)["logits"]
        check_close(logits[0], together[row])


@pytest.mark.parametrize("name", MODELS)
def test_positions_are_not_counted_anew(name: str) -> None:
    model, inputs = built(name)
    kept, anew = by_hand(model, inputs, 1, 12), by_hand(model, inputs, 1, 12, compact=True)
    assert torch.equal(kept.kept, anew.kept)
    found = run(pumer.reduce(captured(name), fastv(1, 12)).module, inputs)["logits"]
    check_close(found, kept.logits)
    assert (found - anew.logits).abs().max() > 1e-3 * found.abs().max()


def test_it_may_differ_from_one_prompt_to_the_next() -> None:
    _, inputs = built("LLaVA")
    kept = kept_by(pumer.reduce(captured("LLaVA"), fastv(1, 30)).module, inputs)
    assert not torch.equal(kept[0], kept[1])


def test_the_plan() -> None:
    plans = {k: pumer.reduce(captured("LLaVA"), fastv(k, 30)).plan for k in (1, 2)}
    for k, plan in plans.items():
        (site,) = plan.sites
        assert (site.site, site.before, site.after) == (
            f"cross_modal.{k - 1}",
            {"prompt_image": 144},
            {"prompt_image": 30},
        )
        assert site.module.endswith(f"layers.{k - 1}.self_attn")
        counts = [plan.layers[f"cross_modal.{i}"]["prompt_image"] for i in range(3)]
        assert counts == [144] * (k - 1) + [30] * (4 - k)
    assert plans[1].ratio > plans[2].ratio > 1
    smaller = pumer.reduce(captured("LLaVA"), fastv(1, 10)).plan
    assert smaller.ratio > plans[1].ratio
    # Tower and projector see everything.
    assert {name: n["image"] for name, n in plans[1].layers.items() if name.startswith("vision")} == {
        f"vision.{i}": 145 for i in range(4)
    }


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_a_plan_without_the_numbers(attention: str) -> None:
    """On the meta device, as a plan of a large model is made."""
    model, inputs = built("LLaVA")
    empty = copy.deepcopy(model).to("meta")
    empty.set_attn_implementation(attention)
    plan = pumer.reduce(pumer.capture(empty, inputs, outputs=["logits"]), fastv(1, 30)).plan
    wanted = pumer.reduce(captured("LLaVA", attention), fastv(1, 30)).plan
    assert plan.layers == wanted.layers and [s.after for s in plan.sites] == [s.after for s in wanted.sites]
    if attention == "eager":  # of fused attention, torch counts another kernel on another device
        assert plan.multiply_adds_after == wanted.multiply_adds_after


def test_what_changes_in_the_graph() -> None:
    """One reducer and the rows of one attention more; no operator that sorts, and no attention that is read less."""
    before = [str(n.target) for n in captured("LLaVA").module.graph.nodes]
    reduced = pumer.reduce(captured("LLaVA"), fastv(1, 30)).module
    after = [str(n.target) for n in reduced.graph.nodes]
    attention = "aten.scaled_dot_product_attention.default"
    # Nothing reads the attention of the tower's last layer.
    assert (before.count(attention), after.count(attention)) == (7, 6)
    assert after.count("reducer.cross_modal_0.attention") == after.count("reducer.cross_modal_0.prompt_image") == 1
    assert sum(name.startswith("reducer.align.") for name in after) == 2 + 2 * 2  # the mask's axes, each layer's angles
    assert before.count("aten.masked_scatter.default") == 1 and after.count("aten.masked_scatter.default") == 0


def test_onnx(tmp_path: Path) -> None:
    model, inputs = built("PaliGemma")
    reduced = pumer.reduce(pumer.capture(model, inputs, outputs=["logits"]), fastv(1, 12))
    other = {**inputs, "pixel_values": torch.randn_like(inputs["pixel_values"])}
    exported = pumer.export(reduced, tmp_path / "model.onnx", samples=[inputs, other])
    assert exported.report is not None and exported.report.passed and exported.report.decisions_compared
    (row,) = exported.report.reducers
    assert row.judged and row.differ == row.near_ties
    outputs = pumer.Engine(exported.path)(**inputs)
    torch.testing.assert_close(outputs["logits"], by_hand(model, inputs, 1, 12).logits, atol=1e-4, rtol=1e-4)


def test_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "fastv.yaml").write_text("method: fastv\nlayer: 2\nbudget: 30\n", encoding="utf-8")
    options = ("--schedule", tmp_path / "fastv.yaml", "--inputs", llava.FOLDER / "inputs.npz")
    path = tmp_path / "model.onnx"
    done(llava.FOLDER, *options, "-o", path, "--outputs", "logits")
    manifest = inner_manifest(path)
    assert manifest["schedule"] == {**manifest["schedule"], "method": "fastv", "layer": 2, "budget": 30}
    assert manifest["tokens"]["cross_modal.1"]["prompt_image"] == 30
    assert manifest["parity"]["passed"] and manifest["parity"]["decisions_compared"]
    assert manifest["parity"]["reducers"][0]["judged"]
    found = onnx_outputs(path, {name: value.numpy() for name, value in llava.tensors().items()})["logits"]
    assert np.abs(found - by_hand(*built("LLaVA"), 2, 30).logits.numpy()).max() <= 1e-4
    (tmp_path / "fastv.yaml").write_text("method: fastv\nlayer: 3\nbudget: 30\n", encoding="utf-8")
    assert "choose 1 to 2" in refused(2, "plan", llava.FOLDER, *options)
    (tmp_path / "fastv.yaml").write_text("method: fastv\nlayer: 0\nbudget: 30\n", encoding="utf-8")
    assert "at least 1" in refused(2, "plan", llava.FOLDER, *options)


def test_places() -> None:
    assert places_left(torch.tensor([[0, 2]]), 2, 3, 7).tolist() == [[0, 1, 2, 4, 5, 6]]
