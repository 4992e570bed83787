"""FastV where image tokens do not come straight from a tower, against the models' own layers given fewer tokens."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import nn

import pumer_compile as pumer
from pumer_compile import Schedule
from pumer_compile.errors import PlanError
from pumer_compile.reducers import reducers_of
from tests.support.fastv_families import BUDGET, FEWER_FROM, LAYER, by_hand, images_of
from tests.support.prompt_families import FAMILIES, captured

# What `fastv` does not reduce yet, and issue 17 asks for.
OPEN = {"mllama"}


@functools.cache
def case(name: str) -> tuple[nn.Module, Any, str, pumer.Reduced]:
    model, make, output, program = captured(name)
    return model, make, output, pumer.reduce(program, Schedule(method="fastv", layer=LAYER, budget=BUDGET))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in OPEN])
def test_the_layers_of_the_model(name: str) -> None:
    model, make, output, reduced = case(name)
    kept = []
    for seed in (0, 1):
        wanted, places = by_hand(model, make(seed), FEWER_FROM.get(name, LAYER))
        with torch.no_grad():
            found = reduced.module(**make(seed))[output]
        torch.testing.assert_close(found, wanted, atol=2e-5 * float(wanted.abs().max()), rtol=1e-4)
        kept.append(places)
    assert not torch.equal(*kept)  # another picture keeps other tokens
    ids = make(0)["input_ids"]
    images = images_of(ids[0])
    words = ids.shape[1] - sum(map(len, images))
    assert places.shape[1] == words + len(images) * BUDGET and len(reducers_of(reduced.module)) == len(images)


def test_a_window_that_does_not_reach_the_image() -> None:
    """What the last word does not see gets no vote."""
    torch.manual_seed(0)
    model, make = FAMILIES["gemma3"]()
    model.config.text_config.num_hidden_layers = 3
    model.config.text_config.layer_types = ["sliding_attention", "full_attention", "full_attention"]
    program = pumer.capture(type(model)(model.config).eval(), make(0), outputs=["logits"])
    with pytest.raises(PlanError, match=r"does not see all of prompt_image in language layer 1 .*`layer: 2`, whose"):
        pumer.reduce(program, Schedule(method="fastv", layer=1, budget=BUDGET))
    pumer.reduce(program, Schedule(method="fastv", layer=2, budget=BUDGET))
