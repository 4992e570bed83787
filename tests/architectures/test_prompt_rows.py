"""VisPruner on rows that are made of several tokens of a tower, against the model's own modules."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pumer_compile as pumer
from pumer_compile import Schedule
from pumer_compile.reducers import reducers_of
from tests.support.prompt_families import IMAGE, OTHER, built
from tests.support.prompt_oracle import by_hand, eagerly, kept_places, kept_rows, logits, look

BUDGET = 4
HOLDERS = (IMAGE, OTHER)
# Of every family, how many pictures, tiles or frames there are in a prompt.
ROWS = {
    "aya_vision": 1,
    "cohere2_vision": 1,
    "gemma3": 1,
    "gemma3_two": 2,
    "idefics3": 1,
    "internvl": 1,
    "internvl_tiles": 3,
    "mistral3": 1,
    "ovis2": 1,
    "qwen2_5_vl": 1,
    "qwen2_5_vl_batch": 1,
    "qwen2_5_vl_two": 2,
    "qwen2_5_vl_uneven": 1,
    "qwen2_5_vl_video": 3,
    "qwen2_vl": 1,
    "qwen3_vl": 1,
    "qwen3_vl_two": 2,
    "smolvlm": 1,
    "smolvlm_split": 3,
}


@functools.cache
def case(name: str) -> tuple[nn.Module, Any, pumer.Reduced]:
    model, make = built(name)
    program = pumer.capture(model, make(0), outputs=["logits"])
    return model, make, pumer.reduce(program, Schedule(method="vispruner", budget=BUDGET, positions="original"))


@pytest.mark.parametrize("name", ROWS)
def test_the_rows_that_enter_the_prompt(name: str) -> None:
    model, make, reduced = case(name)
    kept = []
    for seed in (0, 1):
        inputs = make(seed)
        wanted, places = by_hand(model, inputs, BUDGET, HOLDERS)
        with torch.no_grad():
            found = reduced.module(**inputs)["logits"]
        torch.testing.assert_close(found, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0.0)
        kept.append(places)
    assert not torch.equal(*kept)  # another picture keeps other rows
    words = int((~torch.isin(inputs["input_ids"][0], torch.tensor(HOLDERS))).sum())
    assert found.shape[1] == words + ROWS[name] * BUDGET and len(reducers_of(reduced.module)) == 1


@pytest.mark.parametrize("name", ROWS)
def test_the_oracle_with_every_row_is_the_model(name: str) -> None:
    model, make = built(name)
    inputs = make(0)
    sight = look(model, inputs, HOLDERS)
    rows = kept_rows(sight, max(map(len, sight.groups)))
    assert rows == list(range(len(sight.places)))
    with eagerly(model), torch.no_grad():
        wanted = model(**inputs).logits
    found: Tensor = logits(model, inputs, kept_places(sight, inputs, rows), rows, len(rows))
    torch.testing.assert_close(found, wanted, atol=0.0, rtol=0.0)
    assert len(sight.groups) == ROWS[name] * len(inputs["input_ids"])
