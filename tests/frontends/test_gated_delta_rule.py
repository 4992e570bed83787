"""Linear attention by the gated delta rule as one operator, over as many tokens as are left."""

from __future__ import annotations

import torch
from torch import Tensor

import pumer_compile as pumer
from pumer_compile import Schedule
from pumer_compile.frontends.gated_delta_rule import FUNCTION, gated_delta_rule
from tests.support.fastv_families import BUDGET, by_hand
from tests.support.prompt_families import Tensors, built

WORDS = 50  # more than a chunk of 64 tokens before the reduction, fewer after it


def long_prompt(inputs: Tensors, seed: int) -> Tensors:
    words = torch.randint(3, 90, (1, WORDS), generator=torch.Generator().manual_seed(seed))
    more = {
        "input_ids": words,
        "attention_mask": torch.ones_like(words),
        "mm_token_type_ids": torch.zeros_like(words),
    }
    return {name: torch.cat([value, more[name]], 1) if name in more else value for name, value in inputs.items()}


def test_fewer_chunks_than_the_model_has() -> None:
    model, make = built("qwen3_5")
    program = pumer.capture(model, long_prompt(make(0), 0), outputs=["logits"])
    kept = [node for node in program.module.graph.nodes if node.target is gated_delta_rule]
    assert len(kept) == 2  # one for each of its layers
    reduced = pumer.reduce(program, Schedule(method="fastv", layer=1, budget=BUDGET))
    places = []
    for seed in (0, 1):
        inputs = long_prompt(make(seed), seed)
        wanted, left = by_hand(model, inputs, 2)
        assert left.shape[1] < 64 < inputs["input_ids"].shape[1]
        with torch.no_grad():
            found: Tensor = reduced.module(**inputs)["logits"]
        # Over this many tokens the model's own two forms of attention give logits 7e-5 of the largest apart.
        torch.testing.assert_close(found, wanted, atol=2e-4 * float(wanted.abs().max()), rtol=0.0)
        places.append(left)
    assert not torch.equal(*places)


def test_models_are_left_as_they_were() -> None:
    from transformers.models.qwen3_5 import modeling_qwen3_5

    assert not hasattr(vars(modeling_qwen3_5)[FUNCTION], "original")
