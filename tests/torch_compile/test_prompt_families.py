"""Prompts whose rows are made of several tokens under `torch.compile`, where Dynamo needs no sample to trace."""

from __future__ import annotations

import pytest
import torch

from tests.support.prompt_families import built, placeholders
from tests.support.prompt_oracle import by_hand


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
