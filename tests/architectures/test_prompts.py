"""transformers' models that put an image into a prompt, against prompts put together by hand."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor

import pumer_compile as pumer
from benchmarks.architecture_models import ARCHITECTURES
from pumer_compile import Schedule
from tests.support.visual import logits_by_hand, select, visual_cues

BUDGET, WORDS = 12, 14


@functools.cache
def built(name: str) -> tuple[Any, dict[str, Tensor]]:
    """A small model with random weights, and two prompts: 36 placeholders, then words."""
    torch.manual_seed(0)
    model, one = ARCHITECTURES[name].build()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.1)
    inputs = {key: torch.cat([t, t]) for key, t in one.items()}
    inputs["pixel_values"] = torch.randn_like(inputs["pixel_values"])
    inputs["input_ids"][:, 36:] = torch.randint(0, 98, (2, WORDS))
    return model.eval(), inputs


@pytest.mark.parametrize("name", ["LLaVA", "PaliGemma"])
@pytest.mark.parametrize("important", [0.0, 0.5])
def test_the_prompt_put_together_by_hand(name: str, important: float) -> None:
    model, inputs = built(name)
    schedule = Schedule(method="vispruner", budget=BUDGET, important=important)
    reduced = pumer.reduce(pumer.capture(model, inputs, outputs=["logits"]), schedule)
    features, votes = visual_cues(model, inputs["pixel_values"])
    kept = select(features, votes, BUDGET, important)
    more = {key: inputs[key][:, : BUDGET + WORDS] for key in ("token_type_ids",) if key in inputs}
    wanted = logits_by_hand(model, inputs, kept, features, **more)
    with torch.no_grad():
        found = reduced.module(**inputs)["logits"]
        whole = model(**inputs).logits
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
    assert (found[:, -1] - whole[:, -1]).abs().max() > 1e-3
    assert reduced.plan.sites[0].after == {"prompt_image": BUDGET}
