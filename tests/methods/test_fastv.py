"""FastV on small models of our own: places, sizes that collide, schedules, refusals."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import pumer_compile as pumer
from pumer_compile import Schedule
from pumer_compile.errors import LocateError, PlanError, ScheduleError
from pumer_compile.reducers import reducers_of
from pumer_compile.reducers.base import Decisions, Forcing
from pumer_compile.reducers.last_query import LastQueryReducer
from tests.support import llava
from tests.support.commands import done, refused
from tests.support.fastv import places_left, rows_of
from tests.support.models import Config, program
from tests.support.published import Vectors, assert_last, kept_and_logits
from tests.support.stages import by_hand as staged
from tests.support.talker import IMAGE, Block, Talker, Tensors, prompts

PUBLISHED = Vectors("prompt-tiny", "fastv")


class Deep(Talker):
    """Some more language layers."""

    def __init__(self, layers: int = 3, width: int = 16, heads: int = 4, cls: bool = True) -> None:
        super().__init__(width, heads, cls)
        self.layers = nn.ModuleList(Block(width, heads, True) for _ in range(layers))


def deep(**options: Any) -> Deep:
    torch.manual_seed(0)
    model = Deep(**options).eval()
    with torch.no_grad():
        for layer in model.layers:
            layer.q.weight.mul_(3)  # type: ignore[union-attr]  # a linear layer
    return model


def attend(block: Any, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
    """A block, and its probabilities."""
    q, k, v = (f(x).unflatten(-1, (block.heads, -1)).transpose(1, 2) for f in (block.q, block.k, block.v))
    scores = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).masked_fill(~mask, -torch.inf)
    weights = scores.softmax(-1).nan_to_num(0.0)  # of padding in front, which may see nothing
    return x + block.out((weights @ v).transpose(1, 2).flatten(2)), weights


def by_hand(model: Deep, inputs: Tensors, layer: int, budget: int) -> tuple[Tensor, Tensor]:
    """Logits, and the kept tokens."""
    ids, length = inputs["input_ids"], inputs["input_ids"].shape[1]
    start, image = int((ids[0] == IMAGE).nonzero()[0]), int((ids[0] == IMAGE).sum())
    with torch.no_grad():
        words, features = model.words(ids), model.projector(model.tower(inputs["pixel_values"]))
        x = torch.cat([words[:, :start], features, words[:, start + image :]], 1) + model.places(torch.arange(length))
        mask = torch.ones(length, length).tril().bool() & inputs["attention_mask"][:, None, None, :].bool()
        kept = torch.empty(0)
        for index, block in enumerate(model.layers):
            x, weights = attend(block, x, mask)
            if index == layer - 1:
                kept = weights[:, :, -1, start : start + image].mean(1).topk(budget).indices.sort(-1).values
                places = places_left(kept, start, image, length)
                x = rows_of(x, places)
                mask = torch.stack([m[:, p][:, :, p] for m, p in zip(mask, places, strict=True)])
        return model.head(x), kept


def reduced(model: nn.Module, inputs: Tensors, layer: int, budget: int, **more: Any) -> Any:
    return pumer.reduce(pumer.capture(model, inputs), Schedule(method="fastv", layer=layer, budget=budget, **more))


def run(module: nn.Module, inputs: Tensors) -> Tensor:
    with torch.no_grad():
        logits: Tensor = module(**inputs)["logits"]
    return logits


def check(model: Deep, inputs: Tensors, layer: int, budget: int) -> None:
    """The same logits, and the same tokens."""
    found = reduced(model, inputs, layer, budget)
    (reducer,) = reducers_of(found.module).values()
    seen: list[Tensor] = []
    reducer.register_forward_hook(lambda module, args, result: seen.append(result.kept))
    logits = run(found.module, inputs)
    wanted, kept = by_hand(model, inputs, layer, budget)
    assert torch.equal(seen[0], kept)
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-5)


# --- What it computes -------------------------------------------------------------------------------------------------


@settings(max_examples=8, deadline=None)
@given(
    before=st.integers(0, 5),
    after=st.integers(1, 5),
    grid=st.tuples(st.integers(1, 4), st.integers(2, 4)),
    batch=st.integers(1, 3),
    layer=st.integers(1, 2),
    cls=st.booleans(),
    data=st.data(),
)
def test_any_sizes(
    before: int, after: int, grid: tuple[int, int], batch: int, layer: int, cls: bool, data: st.DataObject
) -> None:
    budget = data.draw(st.integers(1, grid[0] * grid[1] - 1))
    check(deep(cls=cls), prompts(before, after, batch, grid), layer, budget)


# Words before and after, and tokens left: as many as heads, head size, batch, width, or image tokens.
@pytest.mark.parametrize(("before", "after", "budget"), [(4, 4, 4), (16, 16, 8), (0, 8, 8), (8, 16, 4), (2, 2, 2)])
def test_colliding_sizes(before: int, after: int, budget: int) -> None:
    check(deep(), prompts(before, after, batch=4), 1, budget)


@pytest.mark.parametrize("layer", [1, 2, 3, 4])
def test_every_layer(layer: int) -> None:
    check(deep(layers=5), prompts(3, 5), layer, 5)


def test_padding_in_front() -> None:
    model, inputs = deep(), prompts(4, 5)
    inputs["attention_mask"][1, :2] = 0
    found = run(reduced(model, prompts(4, 5), 1, 6).module, inputs)
    wanted, _ = by_hand(model, inputs, 1, 6)
    torch.testing.assert_close(found[0], wanted[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(found[1, 2:], wanted[1, 2:], atol=1e-5, rtol=1e-5)
    alone = {name: value[1:, 2:] if value.dim() == 2 else value[1:] for name, value in inputs.items()}
    alone["input_ids"] = alone["input_ids"].clone()
    # Without the padding the words and the image choose the same tokens, as far as positions do not count.
    model.places.weight.data.zero_()
    padded = run(reduced(model, prompts(4, 5), 1, 6).module, inputs)
    unpadded = run(reduced(model, alone, 1, 6).module, alone)
    torch.testing.assert_close(padded[1, 2:], unpadded[0], atol=1e-5, rtol=1e-5)


def test_half_precision_votes_in_single() -> None:
    model, inputs = deep().half(), prompts(3, 5)
    inputs["pixel_values"] = inputs["pixel_values"].half()
    found = reduced(model, inputs, 1, 5)
    (reducer,) = reducers_of(found.module).values()
    seen: list[Any] = []
    reducer.register_forward_hook(lambda module, args, result: seen.append((args[1].dtype, result.tokens.dtype)))
    run(found.module, inputs)
    assert seen == [(torch.float32, torch.float16)]


def test_gradients_pass() -> None:
    model, inputs = deep(), prompts(3, 5)
    reduced(model, inputs, 1, 5).module(**inputs)["logits"].sum().backward()
    parameters = {name: p for name, p in model.named_parameters() if "tower" in name or "layers" in name}
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in parameters.values() if p.dim() > 1)


def test_onnx(tmp_path: Path) -> None:
    model, inputs = deep(), prompts(3, 5)
    exported = pumer.export(reduced(model, inputs, 2, 6), tmp_path / "model.onnx", samples=[prompts(3, 5, seed=3)])
    assert exported.report is not None and exported.report.passed and exported.report.decisions_compared
    (row,) = exported.report.reducers
    assert row.judged and row.differ == row.near_ties
    logits = pumer.Engine(exported.path)(**inputs)["logits"]
    torch.testing.assert_close(logits, by_hand(model, inputs, 2, 6)[0], atol=1e-4, rtol=1e-4)


# --- Several stages ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stages", [{1: 72, 2: 30}, {2: 48}])
def test_stages_are_the_layers_given_fewer_tokens_each(stages: dict[int, int]) -> None:
    wanted, places = staged(llava.model(), llava.tensors(), stages, "own", placeholder=299)
    found = pumer.reduce(llava.program(), Schedule(method="fastv", stages=stages))
    kept, logits = kept_and_logits(found, llava.tensors())
    for own, left in zip(kept, places, strict=True):
        assert torch.equal(own + 5, left[:, 5 : 5 + own.shape[1]])
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)
    assert [site.after["prompt_image"] for site in found.plan.sites] == list(stages.values())


def test_one_stage_is_a_layer_and_a_budget() -> None:
    inputs = prompts(3, 5)
    captured = pumer.capture(deep(), inputs)
    one = pumer.reduce(captured, Schedule(method="fastv", layer=1, budget=4))
    staged_one = pumer.reduce(captured, Schedule(method="fastv", stages={1: 4}))
    assert torch.equal(run(one.module, inputs), run(staged_one.module, inputs))
    assert one.schedule.canonical() == {**Schedule(method="fastv", layer=1, budget=4).canonical()}
    assert "stages" not in one.schedule.canonical() and one.schedule.sha256 != staged_one.schedule.sha256


@pytest.mark.parametrize(
    ("stages", "words"),
    [
        ({1: 17, 2: 4}, "more than the 16 tokens"),
        ({1: 16, 2: 4}, "would reduce nothing"),
        ({1: 8, 3: 4}, "`stages: 3` lets the first 3 language layers .* this model has 3: choose 1 to 2"),
    ],
)
def test_stages_that_cannot_be(stages: dict[int, int], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        pumer.reduce(pumer.capture(deep(), prompts(3, 5)), Schedule(method="fastv", stages=stages))


@pytest.mark.parametrize("case", PUBLISHED.cases)
def test_the_published_vectors(case: str) -> None:
    spec, inputs = PUBLISHED.cases[case], PUBLISHED.inputs(case)
    made = PUBLISHED.reduced(case, Schedule(method="fastv", layer=spec["layer"], budget=spec["budget"]))
    (kept,), logits = kept_and_logits(made, inputs)
    assert torch.equal(kept, torch.from_numpy(PUBLISHED.wanted(case, "kept")).long())
    assert_last(logits, PUBLISHED.wanted(case, "logits_last"))


def test_prompts_one_by_one() -> None:
    """The published code decides for all rows by the first one."""
    case = "K2-T24"
    wanted = Schedule(method="fastv", layer=2, budget=24)
    (together,), logits = kept_and_logits(PUBLISHED.reduced(case, wanted), PUBLISHED.inputs(case))
    inputs = PUBLISHED.inputs(case, slice(1, 2))
    alone = pumer.reduce(pumer.capture(PUBLISHED.model, inputs, outputs=["logits"]), wanted)
    (kept,), own = kept_and_logits(alone, inputs)
    assert torch.equal(kept[0], together[1]) and not torch.equal(together[0], together[1])
    torch.testing.assert_close(own[0], logits[1], atol=1e-5, rtol=1e-5)


def test_a_near_tie_is_told_from_a_wrong_choice() -> None:
    reducer, none = LastQueryReducer(4, 2), torch.empty(1, 0, dtype=torch.int64)
    attention = torch.tensor([0.4, 0.2, 0.2 - 1e-7, 0.1]).view(1, 1, 1, 4)
    for kept, least, most in (([0, 1], 0.0, 0.0), ([0, 2], 1e-12, 1e-5), ([0, 3], 0.1, 1.0)):
        reducer.forcing = Forcing(Decisions(torch.tensor([kept]), none, none))
        reducer(torch.zeros(1, 4, 3), attention)
        assert reducer.forcing.comparison is not None
        assert least <= float(reducer.forcing.comparison.margin) <= most


def test_stages_on_the_command_line(tmp_path: Path) -> None:
    (tmp_path / "s.yaml").write_text("method: fastv\nstages: {2: 36, 3: 72}\n", encoding="utf-8")
    options = ("--schedule", tmp_path / "s.yaml", "--inputs", llava.FOLDER / "inputs.npz")
    assert "72 after layer 3 is not less than 36 after layer 2" in refused(2, "plan", llava.FOLDER, *options)
    (tmp_path / "s.yaml").write_text("method: fastv\nstages: {2: 30, 1: 72}\n", encoding="utf-8")
    plan = json.loads(done("plan", llava.FOLDER, *options, "--json").out)
    assert [site["after"] for site in plan["sites"]] == [{"prompt_image": 72}, {"prompt_image": 30}]
    assert Schedule.from_manifest(plan["schedule"]) == Schedule(method="fastv", stages={1: 72, 2: 30})


# --- Several images ---------------------------------------------------------------------------------------------------


class Several(Deep):
    """Two images in a prompt, behind one another among the pixels."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> dict[str, Tensor]:
        features = self.projector(self.tower(pixel_values))
        words = self.words(input_ids)
        prompt = words.masked_scatter((input_ids == IMAGE).unsqueeze(-1).expand_as(words), features)
        return {"logits": self.read(prompt, attention_mask)}


def test_each_of_several_images_keeps_its_budget() -> None:
    torch.manual_seed(0)
    model = Several().eval()
    ids = torch.randint(0, IMAGE, (2, 16))
    ids[:, 2:6], ids[:, 9:13] = IMAGE, IMAGE
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": torch.randn(4, 3, 16, 16)}
    found = reduced(model, inputs, 1, 3)
    (site,) = found.plan.sites
    assert list(site.before.values()) == [4, 4] and list(site.after.values()) == [3, 3]
    with torch.no_grad():
        x = model.words(ids)
        x[:, [*range(2, 6), *range(9, 13)]] = model.projector(model.tower(inputs["pixel_values"])).view(2, 8, 16)
        x, mask = x + model.places(torch.arange(16)), torch.ones(16, 16).tril().bool().expand(2, 1, -1, -1)
        x, weights = attend(model.layers[0], x, mask)
        votes = weights.mean(1)[:, -1]
        gone = torch.stack([votes[:, 2:6].argmin(-1) + 2, votes[:, 9:13].argmin(-1) + 9], 1)
        places = torch.stack([torch.tensor([p for p in range(16) if p not in row.tolist()]) for row in gone])
        x = rows_of(x, places)
        for block in model.layers[1:]:  # type: ignore[union-attr]  # a list of modules
            x, _ = attend(block, x, torch.ones(14, 14).tril().bool())
        wanted = model.head(x)
    torch.testing.assert_close(run(found.module, inputs), wanted, atol=1e-5, rtol=1e-5)


# --- The plan, and what is left alone ---------------------------------------------------------------------------------


def test_the_plan_counts_less() -> None:
    model, inputs = deep(layers=4), prompts(3, 5)
    captured = pumer.capture(model, inputs)
    plans = [pumer.reduce(captured, Schedule(method="fastv", layer=k, budget=4)).plan for k in (1, 2, 3)]
    before = {plan.multiply_adds_before for plan in plans}
    assert len(before) == 1 and plans[0].multiply_adds_after < plans[1].multiply_adds_after < before.pop()
    assert [plan.sites[0].site for plan in plans] == ["cross_modal.0", "cross_modal.1", "cross_modal.2"]
    assert plans[1].layers["cross_modal.0"]["prompt_image"] == 16
    assert plans[1].layers["cross_modal.2"]["prompt_image"] == 4


def test_other_methods_do_not_get_it() -> None:
    captured = pumer.capture(deep(), prompts(3, 5))
    visual = pumer.reduce(captured, Schedule(method="vispruner", budget=4))
    assert not any(isinstance(r, LastQueryReducer) for r in reducers_of(visual.module).values())
    fast = pumer.reduce(captured, Schedule(method="fastv", layer=1, budget=4))
    assert [type(r) for r in reducers_of(fast.module).values()] == [LastQueryReducer]
    targets = [n.target for n in fast.module.graph.nodes]
    assert not {torch.ops.aten.topk.default, torch.ops.aten.sort.default} & set(targets)


# --- Refused ----------------------------------------------------------------------------------------------------------


def test_a_budget_of_everything() -> None:
    with pytest.raises(PlanError, match=r"budget of 16 would reduce nothing: the image has 16 tokens \(prompt_image\)"):
        reduced(deep(), prompts(3, 5), 1, 16)


def test_a_budget_of_more_than_there_is() -> None:
    with pytest.raises(PlanError, match="more than the 16 tokens of prompt_image"):
        reduced(deep(), prompts(3, 5), 1, 17)


@pytest.mark.parametrize("layer", [3, 4, 99])
def test_a_layer_with_none_after_it(layer: int) -> None:
    with pytest.raises(PlanError, match=f"first {layer} language layers .* this model has 3: choose 1 to 2"):
        reduced(deep(), prompts(3, 5), layer, 4)


def test_a_model_of_one_layer() -> None:
    with pytest.raises(PlanError, match="has 1: there is none to choose"):
        reduced(deep(layers=1), prompts(3, 5), 1, 4)


def test_a_prompt_that_ends_with_its_image() -> None:
    with pytest.raises(LocateError, match="ends with an image"):
        reduced(deep(), prompts(3, 0), 1, 4)


def test_a_model_without_a_prompt() -> None:
    with pytest.raises(LocateError, match=r"`method: fastv` keeps image tokens of a prompt, and nothing is scattered"):
        pumer.reduce(program(Config(layers=1)), Schedule(method="fastv", layer=1, budget=4))


def test_a_model_whose_prompt_no_attention_reads() -> None:
    class Bag(Deep):
        def read(self, prompt: Tensor, attention_mask: Tensor) -> Tensor:
            return self.head(F.gelu(prompt))

    torch.manual_seed(0)
    with pytest.raises(LocateError, match="reads the attention of a language model, and none was found"):
        reduced(Bag().eval(), prompts(3, 5), 1, 4)


# --- Schedules --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"layer": 2}, "needs a `budget`"),
        ({"budget": 64}, "needs a `layer`"),
        ({"budget": 64, "layer": 0}, "counts the language layers that see every token, at least 1"),
        ({"budget": 64, "layer": -1}, "got -1"),
        ({"budget": 64, "layer": 2.0}, "layer: .*integer"),
        ({"budget": 64, "layer": True}, "layer: .*integer"),
        ({"budget": 0, "layer": 2}, "budget: .*expected at least 1"),
        ({"budget": 0.5, "layer": 2}, "budget: .*integer"),
        ({"budget": 64, "layer": 2, "positions": "compact"}, "at their original positions"),
        ({"budget": 64, "layer": 2, "important": 0.5}, "leave out `important`"),
        ({"budget": 64, "layer": 2, "prune": 0.1}, "leave out `prune`"),
        ({"budget": 64, "layer": 2, "merge": {"image": 0.1}}, "leave out `merge`"),
        ({"budget": 64, "layer": 2, "layers": [1]}, "leave out `layers`"),
        ({"budget": 64, "layer": 2, "sites": [{"at": "vision.1", "prune": 1}]}, "leave out `sites`"),
        ({"budget": 64, "layer": 2, "semantics": "stable"}, "leave out `semantics`"),
        ({"budget": 64, "layer": 2, "semantics": "paper"}, "leave out `semantics`"),
        ({"budget": 64, "layer": 2, "k": 2}, "unknown key"),
        ({"stages": {2: 64}, "budget": 4}, "leave out `budget`"),
        ({"stages": {2: 64}, "layer": 2, "budget": 4}, "leave out `layer`, `budget`"),
        ({"stages": {2: 0.5}}, "a number of tokens, at least 1, got 0.5"),
        ({"stages": {0: 4}}, "an integer of at least 1, got 0"),
        ({"stages": {"two": 4}}, "an integer of at least 1, got 'two'"),
        ({"stages": 4}, r"expected a mapping, .* such as \{2: 72, 3: 36\}; got 4"),
    ],
)
def test_schedules_that_are_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ScheduleError, match=words):
        Schedule(method="fastv", **keys)


@pytest.mark.parametrize("method", ["pumer", "tome"])
def test_its_key_is_of_fastv_alone(method: str) -> None:
    with pytest.raises(ScheduleError, match=r"`layer` is for .*`method: fastv`"):
        Schedule(method=method, layers=[0], merge={"image": 0.1}, layer=2)
    with pytest.raises(ScheduleError, match="leave out `layer`"):
        Schedule(method="vispruner", budget=4, layer=2)


def test_the_schedule() -> None:
    schedule = Schedule.from_yaml("method: fastv\nlayer: 2\nbudget: 64\n")
    assert (schedule.layer, schedule.budget, schedule.positions, schedule.outputs) == (2, 64, "original", "reduced")
    assert schedule == Schedule(method="fastv", layer=2, budget=64, positions="original", semantics="reference")
    others = [Schedule(method="fastv", layer=3, budget=64), Schedule(method="fastv", layer=2, budget=63)]
    others.append(Schedule(method="vispruner", budget=64))
    assert len({s.sha256 for s in (schedule, *others)}) == 4
    assert Schedule.from_manifest(schedule.model_dump(exclude_none=True)).sha256 == schedule.sha256
