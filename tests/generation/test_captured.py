"""transformers' own `generate` over a prefill that was captured, for models that Dynamo cannot trace."""

from __future__ import annotations

import copy
import functools
from typing import Any

import pytest
import torch
from torch import Tensor

from pumer_compile.errors import UsageError
from pumer_compile.generation import reduced_forward
from tests.support.prompt_families import placeholders
from tests.support.prompt_oracle import by_hand
from tests.support.speaking import TOKENS, longer, shortened, speaking_words, widen
from tests.support.tiny import tiny_vilt

SCHEDULE = {"method": "vispruner", "budget": 4, "positions": "original"}


@functools.cache
def given(name: str) -> Any:
    model, make = speaking_words(name)
    widen(model, 64)
    return model, make


def served(name: str, schedule: dict[str, Any] | None = None, inner: str = "eager") -> Any:
    torch._dynamo.reset()
    model = copy.deepcopy(given(name)[0])
    model.forward = reduced_forward(model, schedule or SCHEDULE, inner=inner)
    return model


def generated(model: Any, inputs: dict[str, Tensor], **more: Any) -> Tensor:
    more = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, **more}
    made: Tensor = model.generate(**inputs, **more)[:, inputs["input_ids"].shape[1] :]
    return made


@pytest.mark.parametrize("name", ["qwen2_5_vl", "smolvlm", "gemma3"])
def test_generate(name: str) -> None:
    """Prompts of two lengths, each token the most likely one of the model's own modules given the rows that stay."""
    model, (whole, make) = served(name), given(name)
    for inputs in (make(0), make(1), shortened(make(2), 0, 2)):
        found = generated(model, inputs)
        logits, _ = by_hand(whole, longer(inputs, found[:, :-1]), 4, placeholders(name))
        assert torch.equal(logits[:, -TOKENS:].argmax(-1), found)
    assert len(forms(model)) == 2


def forms(model: Any) -> list[Any]:
    (prefills,) = (c.cell_contents for c in model.forward.__closure__ if type(c.cell_contents).__name__ == "_Prefills")
    found: list[Any] = prefills._forms
    return found


def test_forms_of_prompts() -> None:
    """Another place of the image is another form, and so is another length; a text alone is none."""
    model, (whole, make) = served("llava"), given("llava")
    moved = {**make(0), "input_ids": make(0)["input_ids"].roll(1, 1)}
    with torch._dynamo.config.patch(recompile_limit=2):
        for inputs in (make(0), moved, make(1), moved):
            short = model(**inputs)
            assert short.logits.shape == (2, 3 + 4 + 4, 100)
            assert short.past_key_values.get_seq_length() == 11
        assert len(forms(model)) == 2
        with pytest.raises(UsageError, match="compiled for 2 forms of prompts"):
            model(**shortened(make(0), 0, 1))
    text = {name: make(0)[name][:, -4:] for name in ("input_ids", "attention_mask")}
    assert torch.equal(generated(model, text, max_new_tokens=3, min_new_tokens=3), generated(whole, text)[:, :3])


def test_a_cache_that_is_longer_in_some_layers() -> None:
    """Against a loop of the whole model's steps over such a cache."""
    model, (whole, make) = served("llava", {"method": "fastv", "budget": 4, "layer": 1}), given("llava")
    found = model(**make(0))
    cache, made = found.past_key_values, [found.logits[:, -1:].argmax(-1)]
    assert [layer.keys.shape[2] for layer in cache.layers] == [23, 11]
    for position in range(23, 23 + TOKENS - 1):
        places = torch.full_like(made[-1], position)
        with torch.no_grad():
            step = whole(input_ids=made[-1], past_key_values=cache, position_ids=places)
        made.append(step.logits[:, -1:].argmax(-1))
    assert torch.equal(generated(model, make(0)), torch.cat(made, 1))


# --- refused ----------------------------------------------------------------------------------------------------------


def test_what_a_reduced_prefill_does_not_give() -> None:
    model, (_, make) = served("llava"), given("llava")
    with pytest.raises(UsageError, match="output_attentions=True"):
        model(**make(0), output_attentions=True)
    with pytest.raises(UsageError, match="use_cache=False"):
        model(**make(0), use_cache=False)
    embeds = model.get_input_embeddings()(make(0)["input_ids"])
    with pytest.raises(UsageError, match="would stay whole"):
        model(inputs_embeds=embeds)
    assert not forms(model)


def test_a_token_behind_a_sliding_window() -> None:
    model, (_, make) = served("gemma3"), given("gemma3")
    positions = torch.arange(50, 68).expand(2, -1)
    with pytest.raises(UsageError, match="position 67 is behind the sliding window of 64"):
        model(**make(0), position_ids=positions)


def test_positions_that_are_counted_anew() -> None:
    model, (_, make) = served("llava", {"method": "vispruner", "budget": 4}), given("llava")
    with pytest.raises(UsageError, match=r"position_ids.*positions: original"):
        generated(model, make(0))


def test_models_and_backends_that_cannot() -> None:
    with pytest.raises(UsageError, match="does not generate"):
        reduced_forward(tiny_vilt(), SCHEDULE)
    with pytest.raises(UsageError, match="inner is 'fast'; it must be one of inductor"):
        reduced_forward(given("llava")[0], SCHEDULE, inner="fast")
