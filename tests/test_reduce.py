"""`reduce`: which semantics a schedule that names none is given."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pumer_compile as pumer
from pumer_compile import Schedule
from tests.support.commands import SCHEDULE, artifact, done, refused
from tests.support.tiny import image_inputs, text_inputs, tiny_vilt

KEYS: dict[str, Any] = {"layers": [0], "prune": 0.2, "merge": {"image": 0.3, "text": 0.2}}
TRAINED = {"layers": [1], "prune": 0.1, "semantics": "reference"}


def inputs() -> dict[str, Tensor]:
    return {**text_inputs(2), **image_inputs([(96, 96), (64, 96)], (96, 96))}


class Wrapped(nn.Module):
    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, **given: Tensor) -> Tensor:
        return self.model(**given).logits


@pytest.mark.parametrize("wrapped", [False, True], ids=["model", "in a module of one's own"])
def test_the_models_training_decides_where_the_schedule_does_not(
    wrapped: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """The numbers are those of `reference`, not only the name."""
    model = tiny_vilt(num_hidden_layers=2, pumer_schedule=TRAINED)
    program = pumer.capture(Wrapped(model) if wrapped else model, inputs())
    with caplog.at_level(logging.WARNING, logger="pumer_compile"):
        found = pumer.reduce(program, Schedule(**KEYS))
        assert found.schedule == Schedule(semantics="reference", **KEYS)
        assert caplog.text.count("taking reference, which the model was fine-tuned with") == 1
        explicit = {s: pumer.reduce(program, Schedule(semantics=s, **KEYS)) for s in ("reference", "safe")}
    assert caplog.text.count("fine-tuned") == 1
    assert explicit["safe"].schedule.semantics == "safe"

    def logits(reduced: pumer.Reduced) -> Tensor:
        with torch.no_grad():
            output = reduced.module(**inputs())
        return output if wrapped else output.logits

    assert torch.equal(logits(found), logits(explicit["reference"]))
    assert (logits(found) - logits(explicit["safe"])).abs().max() > 1e-4


def test_on_the_command_line(tmp_path: Path) -> None:
    """From config.json to the last line, where it is said; `--semantics` goes before both."""
    tiny_vilt(num_hidden_layers=2, pumer_schedule=TRAINED).save_pretrained(tmp_path / "model")
    (tmp_path / "schedule.yaml").write_text(SCHEDULE.partition("\n")[2], encoding="utf-8")
    command = ("plan", tmp_path / "model", "--schedule", tmp_path / "schedule.yaml")
    result = done(*command)
    assert "taking reference, which the model was fine-tuned with" in " ".join(result.err.split())
    assert "pumer, semantics reference; multiply-adds: " in " ".join(result.out.split())
    result = done(*command, "--semantics", "safe")
    assert "fine-tuned" not in result.err
    assert "pumer, semantics safe; multiply-adds: " in " ".join(result.out.split())


def test_compile_and_bench_say_the_semantics_too() -> None:
    result = done("bench", artifact(), "-n", 1, "--warmup", 0)
    assert "pumer, semantics reference" in " ".join(result.out.split())


@pytest.mark.parametrize(
    ("schedule", "semantics", "says"),
    [
        ("none", "safe", "--semantics says how tokens are reduced"),
        ("vilt-vqa", "exact", "one of reference, paper, safe"),
        ("lossless", "safe", "leave out `semantics`"),
    ],
)
def test_semantics_that_do_not_fit(schedule: str, semantics: str, says: str, tmp_path: Path) -> None:
    assert says in refused(2, "no model", "-s", schedule, "--semantics", semantics, "-o", tmp_path / "model.onnx")
