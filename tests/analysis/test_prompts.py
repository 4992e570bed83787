"""Prompts spelled out: a scatter over placeholders becomes what it is, words and an image side by side."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import pumer_compile as pumer
from pumer_compile import Program, Schedule
from pumer_compile.analysis.annotate import annotate
from pumer_compile.analysis.axes import Dim
from pumer_compile.analysis.marks import visual_tokens
from pumer_compile.analysis.prompts import lower_masked_scatter
from pumer_compile.errors import AxisError, LocateError, PlanError, ScheduleError, UsageError
from tests.support.models import Config, program
from tests.support.talker import IMAGE, SCATTER, Talker, Tensors, Tower, prompts, talker
from tests.support.visual import select


def captured(model: nn.Module, inputs: Tensors) -> Program:
    return pumer.capture(model, inputs)


def by_hand(model: Talker, inputs: Tensors, budget: int, important: float) -> Tensor:
    """The prompt put together without the tokens that `tests.support.visual.select` leaves out."""
    tower, start = model.tower, int((inputs["input_ids"][0] == IMAGE).nonzero()[0])
    with torch.no_grad():
        x = tower.patch(inputs["pixel_values"]).flatten(2).transpose(1, 2)
        cls = tower.token is not None
        if tower.token is not None:
            x = torch.cat([tower.token.expand(x.shape[0], -1, -1), x], 1)
        last = tower.layers[-1]
        before = tower.layers[0](x, None)
        q, k = (
            f(before).view(*before.shape[:2], last.heads, -1).transpose(1, 2)
            for f in (last.q, last.k)  # type: ignore[union-attr]
        )
        attention = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1).mean(1)
        features = tower(inputs["pixel_values"])
        votes = attention[:, 0, 1:] if cls else attention.mean(1)
        kept = select(features, votes, budget, important)
        image = model.projector(torch.stack([f[i] for f, i in zip(features, kept, strict=True)]))
        words = model.words(inputs["input_ids"])
        stop = start + features.shape[1]
        prompt = torch.cat([words[:, :start], image, words[:, stop:]], 1)
        mask = torch.cat([inputs["attention_mask"][:, : start + budget], inputs["attention_mask"][:, stop:]], 1)
        return model.read(prompt, mask)


def reduced(model: nn.Module, inputs: Tensors, budget: int, **more: Any) -> Any:
    return pumer.reduce(captured(model, inputs), Schedule(method="vispruner", budget=budget, **more))


# --- Spelling out -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after"), [(3, 5), (0, 5), (3, 0), (0, 0), (1, 1)])
@pytest.mark.parametrize("batch", [1, 2])
def test_it_computes_the_same(before: int, after: int, batch: int) -> None:
    model, inputs = talker(), prompts(before, after, batch)
    whole = captured(model, inputs)
    prompt = lower_masked_scatter(whole.module, inputs)
    assert prompt is not None and len(prompt.marks) == 1
    for arrangement in (inputs, prompts(before, after, batch, seed=5)):
        with torch.no_grad():
            torch.testing.assert_close(prompt.module(**arrangement)["logits"], model(**arrangement)["logits"])


def test_what_changes_in_the_graph() -> None:
    whole = captured(talker(), prompts(3, 5))
    before = [n.target for n in whole.module.graph.nodes]
    prompt = lower_masked_scatter(whole.module, prompts(3, 5))
    assert prompt is not None
    after = [n.target for n in prompt.module.graph.nodes]
    assert before.count(SCATTER) == 1 and after.count(SCATTER) == 0
    assert before.count(visual_tokens) == 0 and after.count(visual_tokens) == 1
    cat = torch.ops.aten.cat.default
    assert after.count(cat) == before.count(cat) + 1
    assert torch.ops.aten.eq.Scalar in before and torch.ops.aten.eq.Scalar not in after  # nothing looks for places now
    # The captured graph is as it was, and the copy has its parameters.
    assert [n.target for n in whole.module.graph.nodes] == before
    assert {id(p) for p in prompt.module.parameters()} <= {id(p) for p in whole.module.parameters()}


def test_a_model_without_a_prompt_is_left_alone() -> None:
    whole = program(Config(layers=1))
    assert lower_masked_scatter(whole.module, whole.inputs) is None


def test_a_scatter_that_is_no_image_is_left_alone() -> None:
    class Patching(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.other = nn.Embedding(100, 8), nn.Linear(8, 8)

        def forward(self, input_ids: Tensor, rows: Tensor) -> Tensor:
            words = self.words(input_ids)
            return words.masked_scatter((input_ids == IMAGE).unsqueeze(-1).expand_as(words), self.other(rows))

    inputs = {"input_ids": prompts(3, 5)["input_ids"], "rows": torch.randn(32, 8)}
    whole = captured(Patching().eval(), inputs)
    assert lower_masked_scatter(whole.module, inputs) is None


# Text as long as the heads, the head size, the batch, the budget, or the image itself.
PLACES = [(4, 4, (4, 4)), (8, 8, (4, 4)), (2, 2, (2, 2)), (16, 16, (4, 4))]


@pytest.mark.parametrize(("before", "after", "grid"), PLACES)
def test_axes_by_provenance(before: int, after: int, grid: tuple[int, int]) -> None:
    inputs = prompts(before, after, grid=grid)
    prompt = lower_masked_scatter(captured(talker(), inputs).module, inputs)
    assert prompt is not None
    annotation = annotate(prompt.module)
    image = grid[0] * grid[1]
    (joined,) = [n for n in prompt.module.graph.nodes if n.name == "cat_default"]
    assert str(annotation.axis(Dim(joined, 1))) == f"[text:{before} | prompt_image:{image} | text:{after}]"
    assert str(annotation.axis(Dim(prompt.marks[0].node, 1))) == f"[prompt_image:{image}]"


# --- Refused ----------------------------------------------------------------------------------------------------------


def other_place(ids: Tensor) -> None:
    ids[1] = ids[1].roll(1)


def two_blocks(ids: Tensor) -> None:
    ids[:, 2], ids[:, 5] = IMAGE, 1


def too_few(ids: Tensor) -> None:
    ids[:, 3] = 1


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (other_place, "at other places in another prompt"),
        (too_few, "do not fit"),
        (lambda ids: ids.fill_(1), "no image placeholder in the sample"),
    ],
)
def test_prompts_that_are_refused(change: Any, words: str) -> None:
    inputs = prompts(3, 5)
    whole = captured(talker(), inputs)
    ids = inputs["input_ids"].clone()
    change(ids)
    with pytest.raises(AxisError, match=words):
        lower_masked_scatter(whole.module, {**inputs, "input_ids": ids})


def test_text_between_the_blocks_of_one_image_stays() -> None:
    inputs = prompts(3, 5)
    two_blocks(inputs["input_ids"])
    whole = captured(talker(), inputs)
    prompt = lower_masked_scatter(whole.module, inputs)
    assert prompt is not None
    (mark,) = prompt.marks
    assert mark.pinned == (3,) and mark.votes is not None and mark.crops == ((0, 1, 2, *range(4, 17)),)
    found = pumer.reduce(whole, Schedule(method="vispruner", budget=4))
    with torch.no_grad():
        logits = found.module(**inputs)["logits"]
    assert logits.shape[1] == 2 + 4 + 1 + 5


def test_features_without_a_projector_are_marked_in_the_prompt() -> None:
    inputs = prompts(3, 5)
    prompt = lower_masked_scatter(captured(talker(learned=False), inputs).module, inputs)
    assert prompt is not None and prompt.marks[0].votes is not None


class Chosen(Talker):
    """The features that a mask chooses, in rows or flat."""

    def __init__(self, flat: bool) -> None:
        super().__init__()
        self.flat = flat

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> dict[str, Tensor]:
        features = self.projector(self.tower(pixel_values)).flatten(0, 1)
        features = features[pixel_values.flatten(0, 2).sum(-1)[: len(features)] > -100]
        words = self.words(input_ids)
        mask = (input_ids == IMAGE).unsqueeze(-1).expand_as(words)
        prompt = words.masked_scatter(mask, features.flatten() if self.flat else features)
        return {"logits": self.read(prompt, attention_mask)}


@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("method", ["vispruner", "fastv"])
def test_features_that_a_mask_chooses_are_those_of_the_sample(method: str, flat: bool) -> None:
    keys = {"layer": 1} if method == "fastv" else {}
    inputs = prompts(3, 5)
    whole = captured(Chosen(flat), inputs)
    pumer.reduce(whole, Schedule(method=method, budget=4, **keys))
    (guard,) = (guard for guard in whole.guards if guard.inputs == ("pixel_values",))
    guard.check(prompts(3, 5, seed=1))
    black = inputs["pixel_values"].clone()
    black[:, 0] = -1000.0
    with pytest.raises(UsageError, match=r"the model finds .* where it looks at pixel_values \(.*:\d+\), and finds"):
        guard.check({"pixel_values": black})


# --- The selection in it ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("cls", [True, False], ids=["class token", "no class token"])
@pytest.mark.parametrize(("budget", "important"), [(4, 0.5), (9, 0.0), (5, 1.0), (15, 0.3), (1, 0.5)])
def test_equals_the_prompt_put_together_by_hand(cls: bool, budget: int, important: float) -> None:
    model, inputs = talker(cls=cls), prompts(3, 5)
    found = reduced(model, inputs, budget, important=important)
    with torch.no_grad():
        logits = found.module(**inputs)["logits"]
    torch.testing.assert_close(logits, by_hand(model, inputs, budget, important), atol=1e-5, rtol=1e-5)
    assert logits.shape[1] == 3 + budget + 5


@pytest.mark.parametrize(("before", "after", "budget"), [(4, 4, 4), (8, 8, 8), (0, 4, 4), (4, 0, 2)])
def test_colliding_sizes(before: int, after: int, budget: int) -> None:
    model, inputs = talker(), prompts(before, after, batch=4)
    with torch.no_grad():
        logits = reduced(model, inputs, budget).module(**inputs)["logits"]
    torch.testing.assert_close(logits, by_hand(model, inputs, budget, 0.5), atol=1e-5, rtol=1e-5)


def test_padding_in_the_prompt() -> None:
    model, inputs = talker(), prompts(3, 5)
    inputs["attention_mask"][1, 0] = 0
    inputs["attention_mask"][1, -2:] = 0
    with torch.no_grad():
        logits = reduced(model, inputs, 6).module(**inputs)["logits"]
    wanted = by_hand(model, inputs, 6, 0.5)
    torch.testing.assert_close(logits[0], wanted[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(logits[1, 1:-2], wanted[1, 1:-2], atol=1e-5, rtol=1e-5)


def test_onnx(tmp_path: Any) -> None:
    model, inputs = talker(), prompts(3, 5)
    exported = pumer.export(reduced(model, inputs, 6), tmp_path / "model.onnx", samples=[prompts(3, 5, seed=3)])
    assert exported.report is not None and exported.report.passed and exported.report.decisions_compared
    assert all(row.differ == 0 for row in exported.report.reducers)


def test_gradients_reach_the_tower() -> None:
    model, inputs = talker(), prompts(3, 5)
    reduced(model, inputs, 6).module(**inputs)["logits"].sum().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.tower.parameters())


def test_a_budget_of_everything_is_said(caplog: pytest.LogCaptureFixture) -> None:
    """It is published with vectors (`T144-r1.0`)."""
    model, inputs = talker(), prompts(3, 5)
    with caplog.at_level("WARNING", "pumer_compile"):
        found = reduced(model, inputs, 16)
    assert "keeps every token" in caplog.text
    with torch.no_grad():
        torch.testing.assert_close(found.module(**inputs)["logits"], model(**inputs)["logits"], atol=1e-5, rtol=1e-5)
    assert reduced(model, inputs, 15).plan.sites[0].after == {"prompt_image": 15}
    with pytest.raises(PlanError, match="more than the 16 tokens"):
        reduced(model, inputs, 17)


def test_a_model_without_a_prompt_is_refused() -> None:
    with pytest.raises(LocateError, match="nothing is scattered into one"):
        pumer.reduce(program(Config(layers=1)), Schedule(method="vispruner", budget=4))


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({}, "needs a `budget`"),
        ({"budget": 0}, "expected at least 1"),
        ({"budget": 0.5}, "integer"),
        ({"budget": 4, "layers": [0]}, "leave out `layers`"),
        ({"budget": 4, "important": 1.5}, "expected at most 1"),
        ({"budget": 4, "semantics": "paper"}, "`semantics: paper` is for `method: pumer`"),
        ({"budget": 4, "positions": "sorted"}, "compact"),
    ],
)
def test_schedules_that_are_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ScheduleError, match=words):
        Schedule(method="vispruner", **keys)


@pytest.mark.parametrize("keys", [{"budget": 4}, {"important": 0.5}, {"positions": "compact"}, {"semantics": "stable"}])
def test_keys_of_vispruner_alone(keys: dict[str, Any]) -> None:
    with pytest.raises(ScheduleError, match=r"is for .*`method: vispruner`"):
        Schedule(layers=[0], prune=0.1, **keys)


class MaskedTower(Tower):
    """Black patches are hidden from the others."""

    def forward(self, pixels: Tensor) -> Tensor:
        black = F.max_pool2d(pixels.abs().amax(1), 8).flatten(1) == 0
        mask = torch.zeros(black.shape, dtype=pixels.dtype).masked_fill(black, -1e9)[:, None, None]
        x = self.patch(pixels).flatten(2).transpose(1, 2)
        for layer in self.layers:
            x = layer(x, mask)
        return x


def test_a_tower_with_a_mask_is_refused() -> None:
    """Which tokens the mask lets vote is not read."""
    model = talker(cls=False)
    model.tower = MaskedTower(16, 4, cls=False).eval()
    program_ = captured(model, prompts(3, 5))
    with pytest.raises(LocateError, match=r"vision\.1 .* of the vision tower has a mask"):
        pumer.reduce(program_, Schedule(method="vispruner", budget=6))
