"""A shorter text between two images in the frame of an artifact, against the model's own modules without padding."""

from __future__ import annotations

import torch

import pumer_compile as pumer
from pumer_compile import Schedule
from pumer_compile.generation.framing import frame
from tests.support.prompt_families import Tensors, captured, placeholders
from tests.support.prompt_oracle import by_hand

BUDGET = 4
WORDS = 14  # where those between the images begin, behind a mark


def without(inputs: Tensors, words: int) -> Tensors:
    """A prompt without some of the words between its images."""
    length = inputs["input_ids"].shape[1]
    keep = [place for place in range(length) if not WORDS <= place < WORDS + words]
    by_token = ("input_ids", "attention_mask", "mm_token_type_ids")
    return {name: value[:, keep] if name in by_token else value for name, value in inputs.items()}


def test_positions_and_rows_are_those_of_the_prompt_alone() -> None:
    """Positions in three dimensions, which the artifact counts over its mask."""
    model, make, output, program = captured("qwen2_5_vl_two")
    reduced = pumer.reduce(program, Schedule(method="vispruner", budget=BUDGET, positions="original"))
    manifest = {
        "schedule": {"method": "vispruner", "budget": BUDGET, "positions": "original"},
        "plan": reduced.plan.to_dict(),
        "inputs": {name: {"shape": list(value.shape)} for name, value in program.inputs.items()},
        "counted_masks": list(program.counted),
    }
    last = []
    for seed, words in ((0, 2), (1, 3)):
        inputs = without(make(seed), words)
        wanted, _ = by_hand(model, inputs, BUDGET, placeholders("qwen2_5_vl_two"))
        framed = frame(manifest, inputs)
        assert framed.padding == (words,) and framed.back == (0,) and framed.front == (0,)
        with torch.no_grad():
            found = reduced.module(**framed.inputs)[output][:, -1]
        torch.testing.assert_close(found, wanted[:, -1], atol=1e-5 * float(wanted.abs().max()), rtol=0.0)
        last.append(found)
    assert not torch.allclose(*last)
