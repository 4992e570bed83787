"""`inspect`: the answer for models of several kinds, and why not."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor, nn

import pumer_compile as pumer
from pumer_compile.inspection.architectures import architectures
from pumer_compile.inspection.inspect import Inspection, inspect_program
from pumer_compile.inspection.suggest import suggest
from pumer_compile.methods import METHODS
from pumer_compile.methods.proposing import Outline
from pumer_compile.reduce import Analysed, reduce
from tests.support.prompt_families import captured
from tests.support.tiny import image_inputs, text_inputs, tiny_vilt


@pytest.fixture(scope="module")
def fusion() -> pumer.Program:
    return pumer.capture(tiny_vilt(), {**text_inputs(2), **image_inputs([(96, 96)] * 2, (96, 96))})


@pytest.fixture(scope="module")
def inspected(fusion: pumer.Program) -> Inspection:
    return inspect_program(fusion)


def verdicts(found: Inspection) -> dict[str, bool]:
    return {verdict.method: verdict.schedule is not None for verdict in found.verdicts}


def test_a_fusion_model(inspected: Inspection, fusion: pumer.Program) -> None:
    assert inspected.fits and inspected.outline.streams == {"text": 7, "image": 37}
    assert inspected.outline.informed == ("cross_modal.0", "cross_modal.1")
    assert [attention["address"] for attention in inspected.attentions] == ["cross_modal.0", "cross_modal.1"]
    assert set(verdicts(inspected)) == set(METHODS)
    assert {name for name, fits in verdicts(inspected).items() if fits} >= {"pumer", "tome", "random"}
    assert "in a prompt" in next(v.reason for v in inspected.verdicts if v.method == "vispruner")
    # What is suggested is what `torch.compile` takes without a schedule.
    assert inspected.suggestion is not None
    from pumer_compile.torch_compile.backend import default_schedule

    assert inspected.suggestion.schedule.sha256 == default_schedule([0, 1]).sha256
    assert inspected.suggestion.reduced.plan == reduce(fusion, inspected.suggestion.schedule).plan
    json.dumps(inspected.to_dict())


def test_a_prompt() -> None:
    *_, program = captured("llava")
    found = inspect_program(program)
    assert (found.outline.crops, found.outline.rows, found.outline.layers) == (16, 16, 2)
    fits = verdicts(found)
    assert fits["vispruner"] and fits["fastv"] and fits["divprune"] and not fits["pumer"] and not fits["evs"]
    assert found.suggestion is not None and found.suggestion.schedule.method == "vispruner"
    assert found.suggestion.reduced.plan.ratio > 1
    assert "5 image tokens" in found.package() and "one length" in found.package()


class Pools(nn.Module):
    """Text that attends to itself and to one pooled token of an image."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(50, 16)
        self.patches = nn.Conv2d(3, 16, 8, 8)
        self.query, self.key, self.out = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 3)

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> dict[str, Tensor]:
        text = self.words(input_ids) + self.patches(pixel_values).mean((2, 3))[:, None]
        weights = (self.query(text) @ self.key(text).transpose(1, 2) / 4).softmax(-1)
        return {"logits": self.out(text + weights @ text)[:, 0]}


def test_a_model_that_pools_its_image() -> None:
    inputs = {"input_ids": torch.randint(1, 50, (2, 6)), "pixel_values": torch.randn(2, 3, 32, 32)}
    found = inspect_program(pumer.capture(Pools().eval(), inputs))
    assert not found.fits and found.suggestion is None
    assert "No image tokens" in found.why_not or "no attention among them" in found.why_not, found.why_not
    assert "Traceback" not in found.why_not and found.package() == ""
    json.dumps(found.to_dict())


def test_one_token_an_image_in_the_users_words(fusion: pumer.Program) -> None:
    from pumer_compile.inspection.reasons import why_not

    outline = Outline({"text": 9, "prompt_image": 1}, crops=1, rows=1, layers=4)
    assert why_not(fusion, outline, {}).startswith("This model pools its image features before the prompt")


def test_a_model_that_was_trained_with_a_schedule() -> None:
    model = tiny_vilt(pumer_schedule={"method": "tome", "layers": [0], "merge": {"image": 0.25}})
    program = pumer.capture(model, {**text_inputs(2), **image_inputs([(96, 96)] * 2, (96, 96))})
    found = suggest(Analysed(program), Outline())
    assert found.schedule.method == "tome" and "pumer_schedule" in found.why


def test_one_analysis_for_many_schedules(fusion: pumer.Program) -> None:
    """Reduced graphs are those of `reduce`, in whatever order, and no schedule leaves a trace for the next."""
    analysed, inputs = Analysed(fusion), fusion.inputs
    schedules = [pumer.Schedule(layers=(at,), prune=share, semantics="safe") for at, share in ((0, 0.4), (1, 0.2))]
    for schedule in (*schedules, *reversed(schedules)):
        one, other = analysed.reduce(schedule), reduce(fusion, schedule)
        assert one.plan == other.plan
        with torch.no_grad():
            mine, theirs = dict(one.module(**inputs)), dict(other.module(**inputs))
        assert mine.keys() == theirs.keys() and all(torch.equal(mine[name], theirs[name]) for name in mine)


def test_the_models_that_ship_are_those_of_the_page() -> None:
    from benchmarks.architectures import kept, shipped

    assert architectures() == [shipped(result) for result in kept()]
    assert all(row["reduced"] or row["refused"] for row in architectures())
