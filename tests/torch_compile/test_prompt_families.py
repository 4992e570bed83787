"""Prompts whose rows are made of several tokens under `torch.compile`, where Dynamo needs no sample to trace."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import pytest
import torch

from pumer_compile.generation import whole_forward
from tests.support.prompt_families import built, placeholders
from tests.support.prompt_oracle import by_hand
from tests.support.speaking import TOKENS, longer, shortened, speaking_words


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    """Images of other sizes in another test would leave sizes open that transformers' code does not stand open."""
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("name", ["internvl", "aya_vision"])
def test_the_rows_that_enter_the_prompt(name: str) -> None:
    model, make = built(name)
    schedule = {"method": "vispruner", "budget": 4, "positions": "original"}
    compiled = torch.compile(model, backend="pumer", options={"schedule": schedule}, fullgraph=True)
    kept = []
    for seed in (0, 1):
        wanted, places = by_hand(model, make(seed), 4, placeholders(name))
        with torch.no_grad():
            found = compiled(**make(seed)).logits
        torch.testing.assert_close(found, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0.0)
        kept.append(places)
    assert not torch.equal(*kept)


def test_generate() -> None:
    """Twenty tokens of prompts of two lengths; of families that need a sample, `tests/generation/test_captured.py`."""
    model, make = speaking_words("internvl")
    options = {"schedule": {"method": "vispruner", "budget": 4, "positions": "original"}, "inner": "eager"}
    served = copy.deepcopy(model)
    served.forward = torch.compile(whole_forward(served), backend="pumer", options=options, fullgraph=True)
    for inputs in (make(0), shortened(make(1), 0, 2)):
        length = inputs["input_ids"].shape[1]
        found = served.generate(**inputs, max_new_tokens=TOKENS, min_new_tokens=TOKENS, do_sample=False)[:, length:]
        logits, _ = by_hand(model, longer(inputs, found[:, :-1]), 4, placeholders("internvl"))
        assert torch.equal(logits[:, -TOKENS:].argmax(-1), found)
