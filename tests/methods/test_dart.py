"""DART: the published vectors, other models by lists and their own layers, near-ties, and what is refused."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pumer_compile as pumer
from pumer_compile import Schedule
from pumer_compile.errors import LocateError, PlanError, ScheduleError
from pumer_compile.reducers import DartReducer, forced_decisions, reducers_of
from pumer_compile.reducers.base import Decisions
from tests.support import llava
from tests.support.commands import done, inner_manifest, onnx_outputs, refused
from tests.support.prompt_families import captured, decoder_of
from tests.support.published import Vectors, assert_last, kept_and_logits
from tests.support.stages import Staged, by_hand

PUBLISHED = Vectors("prompt-tiny", "dart")
IMAGE, PLACEHOLDER = 144, 299  # of llava-tiny


def schedule(case: str) -> Schedule:
    spec = PUBLISHED.cases[case]
    pivots = {"image": spec["pivot_image"], "text": spec["pivot_text"]}
    return Schedule(method="dart", layer=spec["layer"], budget=spec["kept"], pivots=pivots)


# --- What is published ------------------------------------------------------------------------------------------------


def in_published_order(reducer: DartReducer, case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Let pivots take in the order of the published code's hash table, and check that they are the published ones."""
    ids, taken_by = PUBLISHED.inputs(case)["input_ids"], reducer.taken_by
    start = int((ids[0] == 199).nonzero()[0])

    def ordered(places: Any, normed: Tensor, text_normed: Tensor, steps: Any) -> Any:
        absolute = torch.cat([places[0] + start, places[1] + start + IMAGE], 1)
        wanted = torch.from_numpy(PUBLISHED.wanted(case, "pivot_order")).long()
        np.testing.assert_array_equal(places[0], np.sort(PUBLISHED.wanted(case, "pivots_image"), 1))
        order = (wanted.unsqueeze(2) == absolute.unsqueeze(1)).float().argmax(-1)
        assert torch.equal(absolute.gather(1, order), wanted)
        return taken_by(places, normed, text_normed, steps, order)

    monkeypatch.setattr(reducer, "taken_by", ordered)


@pytest.mark.parametrize("case", PUBLISHED.cases)
def test_the_published_selection_and_logits(case: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, inputs = PUBLISHED.reduced(case, schedule(case)), PUBLISHED.inputs(case)
    wanted, logits_last = PUBLISHED.wanted(case, "kept"), PUBLISHED.wanted(case, "logits_last")
    (kept,), logits = kept_and_logits(made, inputs)
    for row, ascending in enumerate(PUBLISHED.cases[case]["pivot_order_ascending"]):
        if ascending:
            np.testing.assert_array_equal(kept[row], wanted[row])
            assert_last(logits[row : row + 1], logits_last[row : row + 1])
    (reducer,) = reducers_of(made.module).values()
    assert isinstance(reducer, DartReducer)
    in_published_order(reducer, case, monkeypatch)
    (kept,), logits = kept_and_logits(made, inputs)
    np.testing.assert_array_equal(kept, wanted)
    assert_last(logits, logits_last)


def test_some_rows_are_published_in_ascending_order() -> None:
    """And the order of pivots decides: other rows come out otherwise."""
    flags = [flag for spec in PUBLISHED.cases.values() for flag in spec["pivot_order_ascending"]]
    assert flags.count(True) == 2
    case = "K1-4+4-r.8"
    (kept,), _ = kept_and_logits(PUBLISHED.reduced(case, schedule(case)), PUBLISHED.inputs(case))
    assert not np.array_equal(kept, PUBLISHED.wanted(case, "kept"))


def test_prompts_one_by_one() -> None:
    case = "K3-2+2-r.5"
    (together,), logits = kept_and_logits(PUBLISHED.reduced(case, schedule(case)), PUBLISHED.inputs(case))
    for row in range(2):
        inputs = PUBLISHED.inputs(case, slice(row, row + 1))
        alone = pumer.reduce(pumer.capture(PUBLISHED.model, inputs, outputs=["logits"]), schedule(case))
        (kept,), own = kept_and_logits(alone, inputs)
        assert torch.equal(kept[0], together[row])
        torch.testing.assert_close(own[0], logits[row], atol=1e-5, rtol=1e-5)


def test_the_command_line(tmp_path: Path) -> None:
    """On the second row of a case, whose published order is the ascending one."""
    case = "K3-2+2-r.5"
    inputs = {name: value.numpy() for name, value in PUBLISHED.inputs(case, slice(1, 2)).items()}
    np.savez(tmp_path / "inputs.npz", **inputs)
    file, path = tmp_path / "dart.yaml", tmp_path / "model.onnx"
    file.write_text("method: dart\nlayer: 3\nbudget: 74\npivots: {image: 2, text: 2}\n", encoding="utf-8")
    options = ("--schedule", file, "--inputs", tmp_path / "inputs.npz", "--outputs", "logits")
    done(PUBLISHED.path, *options, "-o", path)
    manifest = inner_manifest(path)
    assert manifest["parity"]["passed"] and manifest["parity"]["decisions_compared"]
    assert Schedule.from_manifest(manifest["schedule"]) == schedule(case)
    assert_last(onnx_outputs(path, inputs)["logits"], PUBLISHED.wanted(case, "logits_last")[1:])
    file.write_text("method: dart\nlayer: 4\nbudget: 74\n", encoding="utf-8")
    assert "this model has 4: choose 0 to 3" in refused(2, "plan", PUBLISHED.path, *options)
    file.write_text("method: dart\nlayer: 2\nbudget: 3\n", encoding="utf-8")
    assert "is not from 4 (its pivots) to 143" in refused(2, "plan", PUBLISHED.path, *options)


def test_torch_compile() -> None:
    """A prompt whose pivots are published in ascending order; nothing is read of any attention."""
    case, row = "K3-2+2-r.5", slice(1, 2)
    torch._dynamo.reset()
    options = {"schedule": schedule(case), "inner": "aot_eager"}
    compiled = torch.compile(copy.deepcopy(PUBLISHED.model), backend="pumer", options=options, fullgraph=True)
    with torch.no_grad():
        logits = compiled(**PUBLISHED.inputs(case, row), use_cache=False).logits
    assert_last(logits, PUBLISHED.wanted(case, "logits_last")[row])


# --- Other models, by lists -------------------------------------------------------------------------------------------


class Recorder:
    """A cache that remembers the keys of the last layer that wrote to it, as they were attended to."""

    keys: Tensor

    def update(self, keys: Tensor, values: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys = keys
        return keys, values


def unlike(rows: Tensor, image: list[int], pivots: tuple[int, int], keys: Tensor, budget: int) -> list[int]:
    """The image's places that stay in one prompt: `rows` normalised states, `keys` `[heads, places, size]`."""
    norm = keys.double().abs().sum((0, 2)).tolist()
    behind = list(range(image[-1] + 1, len(norm)))
    ranked = [sorted(of, key=lambda i: (-norm[i], i)) for of in (image, behind)]
    chosen = [sorted(of[:n]) for of, n in zip(ranked, pivots, strict=True)]
    stay, rest = list(chosen[0]), budget - pivots[0]
    order, shape = [*chosen[0], *chosen[1]], torch.nn.functional.normalize(rows.double(), dim=-1)
    for number, pivot in enumerate(order):
        left = sum(pivots) - number
        take = rest // left  # what is left over goes to the last
        alike = (shape @ shape[pivot]).tolist()
        stay += sorted((i for i in image if i not in stay), key=lambda i, alike=alike: (alike[i], i))[:take]
        rest -= take
    return sorted(stay)


class Unlike(Staged):
    """Chooses by pivots."""

    pivots = (4, 4)
    norm: nn.Module
    recorder = Recorder()

    def _cut(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        found = super()._cut(kwargs)
        return {name: self.recorder if "past" in name else value for name, value in found.items()}

    def _choose(self, states: Tensor, budget: int) -> Tensor:
        normed, (image,) = self.norm(states), self.images
        left = []
        for row in range(len(states)):
            kept = unlike(normed[row], image, self.pivots, self.recorder.keys[row], budget)
            left.append([i for i in range(self.length) if i not in image or i in kept])
        self.places = torch.tensor(left)
        self.kept.append(self.places)
        return states.gather(1, self.places[..., None].expand(-1, -1, states.shape[-1]))


def dart_by_hand(
    model: Any, inputs: Any, layer: int, budget: int, pivots: tuple[int, int], placeholder: int = 0
) -> Any:
    kind = type("Of", (Unlike,), {"pivots": pivots, "norm": decoder_of(model).norm, "recorder": Recorder()})
    # Before the first layer, its keys are computed ahead.
    rule: Literal["own", "next"] = "own" if layer else "next"
    return by_hand(model, inputs, {layer: budget}, rule, placeholder=placeholder, kind=kind)


@pytest.mark.parametrize(
    ("layer", "budget", "pivots"), [(0, 36, (4, 4)), (1, 50, (4, 4)), (2, 7, (0, 3)), (2, 143, (5, 0)), (1, 2, (2, 3))]
)
def test_grouped_queries_and_any_budget(layer: int, budget: int, pivots: tuple[int, int]) -> None:
    """Also such as do not come out even: 50 = 4 + 8 * 5 + 6."""
    wanted, (places,) = dart_by_hand(llava.model(), llava.tensors(), layer, budget, pivots, PLACEHOLDER)
    keys = {"layer": layer, "budget": budget, "pivots": {"image": pivots[0], "text": pivots[1]}}
    (kept,), logits = kept_and_logits(pumer.reduce(llava.program(), Schedule(method="dart", **keys)), llava.tensors())
    assert torch.equal(kept + 5, places[:, 5 : 5 + budget])
    torch.testing.assert_close(logits, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["qwen2_5_vl", "internvl"])
def test_other_families(name: str) -> None:
    model, make, output, program = captured(name)
    pivots = {"image": 1, "text": 2}
    made = pumer.reduce(program, Schedule(method="dart", layer=1, budget=5, pivots=pivots))
    kept = []
    for seed in (0, 1):
        wanted, places = dart_by_hand(model, make(seed), 1, 5, (1, 2))
        with torch.no_grad():
            found = made.module(**make(seed))[output]
        torch.testing.assert_close(found, wanted, atol=2e-5 * float(wanted.abs().max()), rtol=1e-4)
        kept.append(places[-1])
    assert not torch.equal(*kept)


# --- Near-ties --------------------------------------------------------------------------------------------------------


def test_a_near_tie_is_told_from_a_wrong_choice() -> None:
    module = nn.Module()
    module.dart = DartReducer(5, 3, (1, 0))
    keys = torch.tensor([9.0, 1, 1, 1, 1]).view(1, 1, 5, 1)
    angles = torch.tensor([0.0, 0.5, 1.0, 1.0 + 1e-6, 1.5])
    normed, none = torch.stack([angles.cos(), angles.sin()], -1)[None], torch.empty(1, 0, dtype=torch.int64)
    signals = {"keys": keys, "text_keys": keys[:, :, :1], "normed": normed, "text_normed": normed[:, :1]}
    assert module.dart(normed, **signals).kept.tolist() == [[0, 3, 4]]

    def margin(*kept: int) -> float:
        with forced_decisions(module, {"dart": Decisions(torch.tensor([kept]), none, none)}) as forcings:
            module.dart(normed, **signals)
        comparison = forcings["dart"].comparison
        assert comparison is not None
        return float(comparison.margin)

    assert margin(0, 3, 4) == 0 and 0 < margin(0, 2, 4) < 1e-5 and margin(0, 1, 4) > 0.1 and margin(4, 3, 0) == 1
    assert margin(2, 3, 4) > 0.1  # without its pivot
    signals["keys"] = torch.ones_like(keys)  # the lowest index is the pivot
    assert module.dart(normed, **signals).kept.tolist() == [[0, 3, 4]]


def test_pinned_tokens_stay_and_take_no_part() -> None:
    keys, angles = torch.tensor([9.0, 1, 1, 8, 1, 1]).view(1, 1, 6, 1), torch.tensor([0.0, 0.5, 1.0, 1.2, 1.5, 1.6])
    normed = torch.stack([angles.cos(), angles.sin()], -1)[None]
    found = DartReducer(6, 2, (1, 0), pinned=(0, 5))(normed, keys, keys[:, :, :1], normed, normed[:, :1])
    assert found.kept.tolist() == [[0, 1, 3, 5]]  # 3 is the pivot, 1 the least like it


# --- Refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"layer": 2}, "needs a `budget`"),
        ({"budget": 4}, "needs a `layer`"),
        ({"layer": -1, "budget": 4}, "layer: expected at least 0"),
        ({"layer": 2, "budget": 0.5}, "budget: expected an integer"),
        ({"layer": 2, "budget": 9, "pivots": {"image": -1}}, "pivots.image: expected at least 0"),
        ({"layer": 2, "budget": 9, "pivots": {"words": 2}}, "unknown key"),
        ({"layer": 2, "budget": 9, "pivots": 8}, "pivots: expected"),
        ({"layer": 2, "budget": 9, "positions": "compact"}, "leave out `positions`"),
    ],
)
def test_schedules_that_are_refused(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(ScheduleError, match=words):
        Schedule(method="dart", **keys)


@pytest.mark.parametrize(
    ("keys", "words"),
    [
        ({"layer": 1, "budget": 144}, "is not from 4 .* to 143"),
        ({"layer": 3, "budget": 20}, "this model has 3: choose 0 to 2"),
        ({"layer": 1, "budget": 20, "pivots": {"text": 10}}, "more than the 9 tokens of text behind prompt_image"),
        ({"layer": 1, "budget": 20, "pivots": {"image": 0, "text": 0}}, "leaves nothing to compare"),
    ],
)
def test_plans_that_cannot_be(keys: dict[str, Any], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        pumer.reduce(llava.program(), Schedule(method="dart", **keys))


def test_images_that_stand_in_no_prompt() -> None:
    with pytest.raises(LocateError, match="by cross-attention alone"):
        pumer.reduce(captured("mllama")[3], Schedule(method="dart", layer=1, budget=4))
