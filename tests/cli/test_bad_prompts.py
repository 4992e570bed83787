"""Prompts and images that an artifact was not compiled for: one clear message each, from the command line and `Engine`.

One small Qwen2.5-VL is compiled by the command line, for one image of 8 x 8 patches (16 rows of the prompt).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import pumer_compile as pumer
from pumer_compile.errors import UsageError
from tests.support.commands import Result, run
from tests.support.prompt_families import Tensors, built

SCHEDULE = "method: vispruner\nbudget: {budget}\npositions: {positions}\n"


@dataclass(frozen=True)
class Work:
    """A folder with a model, sample inputs and an artifact."""

    folder: Path
    model: nn.Module
    artifact: Path

    def npz(self, name: str, inputs: Tensors) -> Path:
        path = self.folder / f"{name}.npz"
        np.savez(path, **{key: tensor.numpy() for key, tensor in inputs.items()})
        return path

    def compile(self, inputs: Tensors, budget: int = 4, positions: str = "original", *more: Any) -> Result:
        schedule = self.folder / f"{budget}-{positions}.yaml"
        schedule.write_text(SCHEDULE.format(budget=budget, positions=positions))
        options = ("--inputs", self.npz("sample", inputs), "--outputs", "logits", "-o", self.artifact, "-q")
        return run(self.folder / "model", "--schedule", schedule, *options, *more)


def sample(seed: int) -> Tensors:
    found: Tensors = built("qwen2_5_vl")[1](seed)
    return found


@pytest.fixture(scope="module")
def work(tmp_path_factory: pytest.TempPathFactory) -> Work:
    folder = tmp_path_factory.mktemp("bad-prompts")
    model = built("qwen2_5_vl")[0]
    model.save_pretrained(folder / "model")
    made = Work(folder, model, folder / "model.onnx")
    done = made.compile(sample(0))
    assert done.code == 0, done.err
    return made


def another_grid() -> Tensors:
    """As many patches, otherwise."""
    return {**sample(1), "image_grid_thw": torch.tensor([[1, 4, 16]])}


def elsewhere() -> Tensors:
    inputs = sample(1)
    return {**inputs, "input_ids": inputs["input_ids"].roll(1, 1)}


def masked_image() -> Tensors:
    inputs = sample(1)
    mask = inputs["attention_mask"].clone()
    mask[0, 6] = 0
    return {**inputs, "attention_mask": mask}


def other_kinds() -> Tensors:
    inputs = sample(1)
    return {**inputs, "mm_token_type_ids": torch.zeros_like(inputs["mm_token_type_ids"])}


CASES = {
    "another grid": (another_grid, r"compiled for image_grid_thw \[\[1, 8, 8\]\].* given \[\[1, 4, 16\]\]"),
    "placeholders elsewhere": (elsewhere, r"at positions 4 to 19 .* input_ids do not have its placeholders \(id 99\)"),
    "an image's tokens masked": (masked_image, "where it looks at attention_mask and mm_token_type_ids"),
    "other kinds of tokens": (other_kinds, "compiled for mm_token_type_ids"),
}


@pytest.mark.parametrize("case", CASES)
def test_inputs_of_another_form(case: str, work: Work) -> None:
    make, message = CASES[case]
    engine = pumer.Engine(work.artifact)
    inputs = make()
    with pytest.raises(UsageError, match=message):
        engine(**inputs)
    with pytest.raises(UsageError, match=message):
        pumer.parity(work.artifact, work.model, inputs)
    # Without those that are written into the artifact the others are looked at all the same.
    taken = {name: inputs[name] for name in engine.inputs}
    if any(not torch.equal(taken[name], sample(1)[name]) for name in taken):
        with pytest.raises(UsageError, match=message):
            engine(**taken)


def test_the_command_line_says_so_in_one_paragraph(work: Work) -> None:
    npz = work.npz("other", another_grid())
    found = run("parity", work.artifact, "--model", work.folder / "model", "--inputs", npz)
    assert found.code == 2 and "\n\n" not in found.message and "Traceback" not in found.err
    assert "compiled for image_grid_thw [[1, 8, 8]]" in " ".join(found.message.split())


def test_another_picture_and_padding_in_front(work: Work) -> None:
    """What it was compiled for: other pixels and words, and a prompt that is shorter by padding."""
    engine, inputs = pumer.Engine(work.artifact), sample(1)
    inputs["attention_mask"][0, :2] = 0
    (logits,) = engine(**inputs).values()
    program = pumer.capture(work.model, sample(0), outputs=["logits"])
    reduced = pumer.reduce(program, pumer.Schedule(method="vispruner", budget=4, positions="original"))
    wanted: Tensor = reduced.module(**inputs)["logits"]
    torch.testing.assert_close(logits[:, 2:], wanted[:, 2:], atol=1e-4, rtol=1e-4)


def test_a_budget_above_the_tokens_of_an_image(work: Work) -> None:
    found = work.compile(sample(0), 17)
    assert found.code == 2 and "\n\n" not in found.message
    assert "A budget of 17 is more than the 16 tokens" in " ".join(found.message.split())


@pytest.mark.parametrize("mask", [True, False])
def test_compact_positions_that_are_constants(mask: bool, work: Work) -> None:
    """Qwen's positions are counted from the grid: nothing counts them anew over the tokens that are left."""
    inputs = sample(0)
    if not mask:
        del inputs["attention_mask"]
    found = work.compile(inputs, 4, "compact")
    assert found.code == 2 and "\n\n" not in found.message
    message = " ".join(found.message.split())
    assert message.startswith("`positions: compact` counts positions anew over the tokens that are left")
    assert "they are constants, counted over the sample's whole prompt (its image_grid_thw" in message
    assert "Choose `positions: original`" in message


def test_an_open_batch(work: Work) -> None:
    found = work.compile(sample(0), 4, "original", "--dynamic-batch")
    assert found.code != 0 and "\n\n" not in found.message
    message = " ".join(found.message.split())
    assert "looks at the numbers of image_grid_thw" in message and "Capture with a fixed batch" in message


def test_an_image_that_is_all_black() -> None:
    """SmolVLM leaves such an image out; a graph has as many images as its sample."""
    model, make = built("smolvlm")
    program = pumer.capture(model, make(0), outputs=["logits"])
    # Its positions are counted, and follow what is left.
    pumer.reduce(program, pumer.Schedule(method="vispruner", budget=4, positions="compact"))
    guards, black = program.guards, make(1)
    for guard in guards:
        guard.check(black)
    black["pixel_values"][1, 0] = 0
    with pytest.raises(UsageError, match=r"where it looks at pixel_values \(.*modeling_smolvlm.py:\d+\), and finds"):
        for guard in guards:
            guard.check(black)
