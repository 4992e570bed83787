"""Several methods in one schedule: a tower's tokens, then those inside the language model."""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import pumer_compile as pumer
from pumer_compile import Program, Schedule
from pumer_compile.capture.loading import load_model
from pumer_compile.errors import ScheduleError
from tests.support.commands import done, onnx_outputs
from tests.support.fastv import by_hand_after
from tests.support.stages import Staged
from tests.support.stages import by_hand as inside_by_hand
from tests.support.visual import logits_by_hand, select, visual_cues

FOLDER = Path(__file__).parents[1] / "oracle" / "llava-tiny"
TOWER = {"method": "vispruner", "budget": 48}
LAYERS = {"method": "fastv", "layer": 2, "budget": 20}


@functools.cache
def model() -> Any:
    return load_model(FOLDER).source.eval()


def tensors() -> dict[str, Tensor]:
    arrays = np.load(FOLDER / "inputs.npz")
    made = {name: torch.from_numpy(arrays[name]) for name in arrays}
    return {name: t.float() if t.is_floating_point() else t for name, t in made.items()}


@functools.cache
def program() -> Program:
    return pumer.capture(model(), tensors(), outputs=["logits"])


def wanted(inputs: dict[str, Tensor]) -> Tensor:
    """48 tokens by VisPruner, and 20 of these by FastV, by hand."""
    features, votes = visual_cues(model(), inputs["pixel_values"])
    kept = select(features, votes, 48, 0.5)
    ids = inputs["input_ids"]
    (places,) = (ids[0] == model().config.image_token_id).nonzero(as_tuple=True)
    short = torch.cat([ids[:, : int(places[0]) + 48], ids[:, int(places[-1]) + 1 :]], 1)
    return by_hand_after(model(), lambda: logits_by_hand(model(), inputs, kept, features), short, 2, 20).logits


def test_a_tower_method_and_one_inside_the_language_model() -> None:
    reduced = pumer.reduce(program(), Schedule(stages=[TOWER, LAYERS]))
    inputs = tensors()
    for pictures in (inputs["pixel_values"], inputs["pixel_values"].flip(0)):
        given = {**inputs, "pixel_values": pictures}
        with torch.no_grad():
            found = reduced.module(**given)["logits"]
        torch.testing.assert_close(found, wanted(given), atol=1e-4, rtol=1e-4)
    first, second = reduced.plan.sites
    assert first.site.startswith("vision.") and second.site == "cross_modal.1"
    assert [next(iter(site.after.values())) for site in (first, second)] == [48, 20]
    alone = [pumer.reduce(program(), Schedule(**keys)).plan.multiply_adds_after for keys in (TOWER, LAYERS)]
    assert reduced.plan.multiply_adds_after < min(alone)


LATER = {
    "pyramiddrop": [{"method": "pyramiddrop", "stages": {1: 0.5, 2: 0.25}}],
    "pyramiddrop and fastv": [
        {"method": "pyramiddrop", "stages": {1: 0.5}, "positions": "original"},
        {"method": "fastv", "layer": 2, "budget": 12},
    ],
}


@pytest.mark.parametrize("name", LATER)
def test_stages_inside_the_language_model(name: str) -> None:
    """Shares are of what the tower's method leaves; two stages at one layer, one before it and one in it."""
    inputs, stages = tensors(), [TOWER, *LATER[name]]
    features, votes = visual_cues(model(), inputs["pixel_values"])
    kept, ids = select(features, votes, 48, 0.5), inputs["input_ids"]
    short = {"input_ids": torch.cat([ids[:, : 5 + 48], ids[:, 5 + 144 :]], 1)}
    found = pumer.reduce(program(), Schedule(stages=stages))
    assert [site.after["prompt_image"] for site in found.plan.sites[1:]] == [24, 12]

    class Both(Staged):
        """The second of two stages decides by its own attention."""

        def _choose(self, states: Tensor, budget: int) -> Tensor:
            chosen = super()._choose(states, budget)
            self.rule = "own" if "fastv" in name else "next"
            return chosen

    wanted, _ = inside_by_hand(
        model(),
        short,
        {1: 24, 2: 12},
        "next",
        compact=name == "pyramiddrop",
        placeholder=int(model().config.image_token_id),
        kind=Both,
        call=lambda: logits_by_hand(model(), inputs, kept, features),
    )
    with torch.no_grad():
        torch.testing.assert_close(found.module(**inputs)["logits"], wanted, atol=1e-4, rtol=1e-4)


def test_two_stages_at_one_place() -> None:
    stages = [
        {"method": "dart", "layer": 1, "budget": 50},
        {"method": "pyramiddrop", "stages": {1: 0.2}, "positions": "original"},
    ]
    with pytest.raises(ScheduleError, match="out of order: `method: pyramiddrop` reduces after"):
        pumer.reduce(program(), Schedule(stages=stages))


def test_through_the_command_line(tmp_path: Path) -> None:
    schedule = tmp_path / "schedule.yaml"
    schedule.write_text(
        "stages:\n  - {method: vispruner, budget: 48}\n  - {method: fastv, layer: 2, budget: 20}\n", encoding="utf-8"
    )
    out = tmp_path / "model.onnx"
    done(str(FOLDER), "--schedule", str(schedule), "--inputs", str(FOLDER / "inputs.npz"), "-o", str(out))
    (logits,) = (
        value
        for name, value in onnx_outputs(out, {n: t.numpy() for n, t in tensors().items()}).items()
        if name == "logits"
    )
    assert np.abs(logits - wanted(tensors()).numpy()).max() < 1e-3
    manifest = json.loads((tmp_path / "model.onnx.manifest.json").read_text(encoding="utf-8"))
    again = Schedule.from_manifest(manifest["schedule"])
    assert again == Schedule(stages=[TOWER, LAYERS]) and again.sha256 == Schedule(stages=[TOWER, LAYERS]).sha256


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([TOWER], "for two methods and more"),
        ([LAYERS, TOWER], "`method: vispruner` acts before the language model, and cannot follow `method: fastv`"),
        ([TOWER, {"method": "tome", "layers": [1], "merge": {"image": 3}}], "`method: tome` reduces no image inside"),
        ([TOWER, {**LAYERS, "outputs": "restored"}], "`outputs` is of the whole schedule"),
        ([TOWER, {**LAYERS, "budgets": 3}], "unknown key; did you mean budget"),
        ([TOWER, {**LAYERS, "method": "fastw"}], "expected one of .*fastv.*got 'fastw'"),
    ],
)
def test_what_is_no_list_of_stages(stages: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ScheduleError, match=message):
        Schedule(method="stages", stages=stages)


def test_stages_out_of_order() -> None:
    stages = [LAYERS, {**LAYERS, "layer": 1, "budget": 10}]
    with pytest.raises(ScheduleError, match=r"out of order: `method: fastv` reduces after .*cross_modal.0"):
        pumer.reduce(program(), Schedule(stages=stages))


def test_another_stage_is_another_schedule() -> None:
    one, other = (Schedule(stages=[TOWER, {**LAYERS, "budget": budget}]) for budget in (20, 21))
    assert one.sha256 != other.sha256
