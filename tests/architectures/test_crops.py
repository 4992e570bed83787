"""Several rows of a vision tower in one prompt: crops of an image (LLaVA-NeXT, LLaVA-OneVision), several images."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import pumer_compile as pumer
from pumer_compile import Program, Schedule
from pumer_compile.artifacts.engine import Engine
from pumer_compile.capture.image_prompt import make_image_prompt
from pumer_compile.errors import PlanError, UsageError
from tests.support.commands import tensorrt_refuses
from tests.support.crops import (
    MODELS,
    TOKENS,
    crops_inputs,
    crops_model,
    logits_of_crops,
    packing,
    prompt_of_crops,
    run_by_hand,
)
from tests.support.prompt_models import BLOCKS, by_hand, images

# Height and width: a picture that is padded above and below, left and right, one that fills two crops, a tiny one.
SIZES = [(90, 120), (130, 60), (48, 96), (20, 31)]


BUDGETS = [(9, 0.5), (4, 0.0), (20, 1.0)]
# Every budget with every size, and every model with every size and every budget.
CASES = [(MODELS[(i + j) % 2], size, *budget) for i, size in enumerate(SIZES) for j, budget in enumerate(BUDGETS)]


@functools.cache
def crops(name: str, size: tuple[int, int]) -> tuple[Any, dict[str, Tensor], Program]:
    model = crops_model(name)
    inputs = crops_inputs(model, size)
    return model, inputs, pumer.capture(model, inputs, outputs=["logits"])


def vispruner(budget: int, important: float = 0.5, **more: Any) -> Schedule:
    return Schedule(method="vispruner", budget=budget, important=important, **more)


def reduced(model: Any, inputs: dict[str, Tensor], budget: int) -> Any:
    return pumer.reduce(pumer.capture(model, inputs, outputs=["logits"]), vispruner(budget))


@pytest.mark.parametrize(("name", "size", "budget", "important"), CASES)
def test_crops_equal_the_prompt_put_together_by_hand(
    name: str, size: tuple[int, int], budget: int, important: float
) -> None:
    model, inputs, captured = crops(name, size)
    found = pumer.reduce(captured, vispruner(budget, important))
    with torch.no_grad():
        logits = found.module(**inputs)["logits"]
    wanted = logits_of_crops(model, inputs, budget, important)
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-4)
    where = packing(model, size)
    assert sum(number < 0 for number in where) > 0 and logits.shape[1] < len(where) + 8
    # What is padding of the picture was never asked for.
    assert found.plan.sites[0].before == {"crops_image": sum(number >= 0 for number in where)}
    assert found.plan.layers["cross_modal.0"] == {"text": 8, "prompt_image": logits.shape[1] - 8}


def test_original_positions() -> None:
    model, inputs, captured = crops("LLaVA-NeXT", SIZES[0])
    with torch.no_grad():
        logits = pumer.reduce(captured, vispruner(9, positions="original")).module(**inputs)["logits"]
    prompt, places = prompt_of_crops(model, inputs, 9, 0.5)
    wanted = run_by_hand(model, prompt, position_ids=torch.tensor(places))
    torch.testing.assert_close(logits, wanted, atol=1e-5, rtol=1e-4)
    compact = run_by_hand(model, prompt)
    assert (wanted - compact).abs().max() > 1e-3


def test_a_batch_equals_its_images_one_by_one() -> None:
    model = crops_model("LLaVA-NeXT")
    inputs = crops_inputs(model, SIZES[0], batch=2)
    with torch.no_grad():
        logits = reduced(model, inputs, 7).module(**inputs)["logits"]
        for row in range(2):
            one = {key: tensor[row : row + 1] for key, tensor in inputs.items()}
            alone = reduced(model, one, 7).module(**one)["logits"]
            torch.testing.assert_close(logits[row : row + 1], alone, atol=1e-5, rtol=1e-4)


def test_a_budget_of_everything_leaves_the_newlines_out(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs, captured = crops("LLaVA-NeXT", SIZES[0])
    with caplog.at_level("WARNING", "pumer_compile"), torch.no_grad():
        logits = pumer.reduce(captured, vispruner(TOKENS)).module(**inputs)["logits"]
    assert "keeps every token" in caplog.text
    torch.testing.assert_close(logits, logits_of_crops(model, inputs, TOKENS, 0.5), atol=1e-5, rtol=1e-4)
    with pytest.raises(PlanError, match=f"more than the {TOKENS} tokens"):
        pumer.reduce(captured, vispruner(TOKENS + 1))


def test_one_artifact(tmp_path: Path) -> None:
    model, _, captured = crops("LLaVA-NeXT", SIZES[0])
    exported = pumer.export(pumer.reduce(captured, vispruner(9)), tmp_path / "next.onnx")
    assert exported.report is not None and exported.report.passed and exported.report.decisions_compared
    engine = Engine(exported.path)
    assert engine.inputs == ["input_ids", "pixel_values", "attention_mask"]
    others = crops_inputs(model, SIZES[0], seed=5)
    logits = engine(**others)["logits"]
    torch.testing.assert_close(logits, logits_of_crops(model, others, 9, 0.5), atol=1e-4, rtol=1e-3)
    with pytest.raises(UsageError, match="compiled for image_sizes"):
        engine(**{**others, "image_sizes": torch.tensor([[91, 120]])})
    assert pumer.parity(exported.path, model, [others]).passed
    assert tensorrt_refuses(exported.path) == []


def test_a_sample_of_crops_has_to_be_given() -> None:
    with pytest.raises(UsageError, match="wants more than pixels"):
        make_image_prompt(crops_model("LLaVA-NeXT"))


# --- several images in a prompt --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("blocks", "rows", "length", "batch"), [(*BLOCKS[0], 1), (*BLOCKS[0], 2), (*BLOCKS[1], 2), (*BLOCKS[2], 1)]
)
def test_several_images(blocks: list[tuple[int, int]], rows: int, length: int, batch: int) -> None:
    model, inputs = images(blocks, rows, length, batch)
    found = reduced(model, inputs, 8)
    with torch.no_grad():
        logits = found.module(**inputs)["logits"]
    torch.testing.assert_close(logits, by_hand(model, inputs, blocks, 8), atol=1e-5, rtol=1e-4)
    assert logits.shape[1] == length - rows * (36 - 8)
    assert len(found.plan.sites) == 1 and sum(found.plan.sites[0].after.values()) == 8 * rows
    assert [(place.start, place.stop) for place in found.plan.prompts] == blocks


def test_several_images_in_one_artifact(tmp_path: Path) -> None:
    blocks, rows, length = BLOCKS[0]
    model, inputs = images(blocks, rows, length)
    exported = pumer.export(reduced(model, inputs, 8), tmp_path / "model.onnx", verify=False)
    logits = Engine(exported.path)(**inputs)["logits"]
    torch.testing.assert_close(logits, by_hand(model, inputs, blocks, 8), atol=1e-4, rtol=1e-3)
    moved = {**inputs, "input_ids": inputs["input_ids"].roll(1)}
    with pytest.raises(UsageError, match="2 to 37 and 41 to 76"):
        Engine(exported.path)(**moved)


def test_whole_captures_keep_their_other_outputs() -> None:
    blocks, rows, length = BLOCKS[0]
    model, inputs = images(blocks, rows, length)
    found = pumer.reduce(pumer.capture(model, inputs), Schedule(method="vispruner", budget=8))
    with torch.no_grad():
        made = found.module(**inputs)
    assert made.image_hidden_states.shape == (2 * 8, model.config.text_config.hidden_size)
    assert made.past_key_values.get_seq_length() == length - 2 * 28
