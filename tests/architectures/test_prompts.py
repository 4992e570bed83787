"""transformers' models that put an image into a prompt, against prompts put together by hand."""

from __future__ import annotations

import pytest
import torch

import pumer_compile as pumer
from pumer_compile import Schedule
from tests.support.prompt_models import WORDS, built
from tests.support.visual import logits_by_hand, select, visual_cues

BUDGET = 12


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
