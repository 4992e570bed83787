"""VisPruner on rows that are made of several tokens of a tower, against the model's own modules."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pumer_compile as pumer
from pumer_compile import Schedule
from pumer_compile.errors import CaptureError, LocateError
from pumer_compile.reducers import reducers_of
from tests.support.prompt_families import IMAGE, OTHER, built, captured, placeholders
from tests.support.prompt_oracle import by_hand, eagerly, kept_places, kept_rows, logits, look, scores
from tests.support.visual import select

BUDGET = 4
# Of every family, how many pictures, tiles or frames there are in a prompt, and how many images (or films) they make.
ROWS = {
    "aya_vision": (1, 1),
    "blip_2": (1, 1),
    "cohere2_vision": (1, 1),
    "colpali": (1, 1),
    "colqwen2": (1, 1),
    "florence2": (1, 1),
    "gemma3": (1, 1),
    "gemma3_two": (2, 2),
    "gemma4": (1, 1),
    "glm46v": (1, 1),
    "glm4v": (1, 1),
    "got_ocr2": (1, 1),
    "granite4_vision": (2, 1),
    "hunyuan_vl": (1, 1),
    "idefics2": (1, 1),
    "idefics3": (1, 1),
    "instructblip": (1, 1),
    "internvl": (1, 1),
    "internvl_tiles": (3, 1),
    "janus": (1, 1),
    "kimi_k25": (1, 1),
    "lfm2_vl": (1, 1),
    "lighton_ocr": (1, 1),
    "llama4": (1, 1),
    "llava_next_video": (2, 1),
    "minicpmv4_6": (1, 1),
    "mistral3": (1, 1),
    "ovis2": (1, 1),
    "paddleocr_vl": (1, 1),
    "qwen2_5_vl": (1, 1),
    "qwen2_5_vl_batch": (1, 1),
    "qwen2_5_vl_two": (2, 2),
    "qwen2_5_vl_uneven": (1, 1),
    "qwen2_5_vl_video": (3, 1),
    "qwen2_5_omni": (1, 1),
    "qwen2_vl": (1, 1),
    "qwen3_5": (1, 1),
    "qwen3_vl": (1, 1),
    "qwen3_vl_two": (2, 2),
    "qwen3_vl_moe": (1, 1),
    "smolvlm": (1, 1),
    "smolvlm_split": (3, 3),
    "video_llava": (3, 2),
    "video_llama3": (1, 1),
    "vipllava": (1, 1),
}


@functools.cache
def case(name: str) -> tuple[nn.Module, Any, str, pumer.Reduced]:
    model, make, output, program = captured(name)
    schedule = Schedule(method="vispruner", budget=BUDGET, positions="original")
    return model, make, output, pumer.reduce(program, schedule)


@pytest.mark.parametrize("name", ROWS)
def test_the_rows_that_enter_the_prompt(name: str) -> None:
    model, make, output, reduced = case(name)
    kept = []
    for seed in (0, 1):
        inputs = make(seed)
        wanted, places = by_hand(model, inputs, BUDGET, placeholders(name))
        with torch.no_grad():
            found = reduced.module(**inputs)[output]
        torch.testing.assert_close(found, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0.0)
        kept.append(places)
    assert not torch.equal(*kept)  # another picture keeps other rows
    for place in reduced.plan.prompts:  # which prompts are checked for
        assert bool((inputs[place.input][:, place.start : place.stop] == place.placeholder).all())
    pictures, images = ROWS[name]
    words = int((~torch.isin(inputs["input_ids"][0], torch.tensor([IMAGE, OTHER]))).sum())
    assert places.shape[1] == words + pictures * BUDGET and len(reducers_of(reduced.module)) == images


@pytest.mark.parametrize("name", ROWS)
def test_the_oracle_with_every_row_is_the_model(name: str) -> None:
    model, make = built(name)
    inputs = make(0)
    sight = look(model, inputs, placeholders(name))
    marks = [row for row, members in enumerate(sight.members) if not members]  # at the ends of lines
    rows = sorted([*kept_rows(sight, max(map(len, sight.groups))), *marks])
    assert rows == list(range(len(sight.places)))
    with eagerly(model), torch.no_grad():
        wanted = scores(model(**inputs))
    found: Tensor = logits(model, inputs, kept_places(sight, inputs, rows), rows, len(rows))
    torch.testing.assert_close(found, wanted, atol=0.0, rtol=0.0)
    assert len(sight.groups) == ROWS[name][0] * len(inputs["input_ids"])


@pytest.mark.parametrize("name", ["paligemma", "colpali"])
def test_what_a_model_makes_up_while_it_is_traced(name: str) -> None:
    """Without token types its mask is causal in a trace, and in eager PyTorch there is none."""
    model, make = built(name)
    inputs = {key: value for key, value in make(0).items() if key != "token_type_ids"}
    with pytest.raises(CaptureError, match=r"eager PyTorch than while it is traced.*token_type_ids"):
        pumer.capture(model, inputs)


def test_learned_positions_counted_anew() -> None:
    """Florence-2's encoder looks them up by place."""
    model, make, output, program = captured("florence2")
    reduced = pumer.reduce(program, Schedule(method="vispruner", budget=BUDGET, positions="compact"))
    kept = []
    for seed in (0, 1):
        inputs = make(seed)
        old, places = by_hand(model, inputs, BUDGET, placeholders("florence2"))
        wanted = logits(model, inputs, places, anew=True)
        with torch.no_grad():
            found = reduced.module(**inputs)[output]
        torch.testing.assert_close(found, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0.0)
        assert float((wanted - old).abs().max()) > 1e-2 * float(wanted.abs().max())
        kept.append(places)
    assert not torch.equal(*kept)


def test_tokens_of_a_quantizer() -> None:
    """Emu 3: a place's token is looked up, from where two frames of the picture attend each by itself; line ends go."""
    model, make, output, program = captured("emu3")
    reduced = pumer.reduce(program, Schedule(method="vispruner", budget=BUDGET, positions="original"))
    attends = model.model.vqmodel.encoder.middle_block.attn_1
    kept, seen = [], list[Tensor]()
    for seed in (0, 1):
        inputs = make(seed)
        handle = attends.register_forward_hook(lambda m, args, result: seen.append(result[1]))
        with eagerly(model), torch.no_grad():
            rows = model.model.get_image_features(inputs["pixel_values"], inputs["image_sizes"]).pooler_output
        handle.remove()
        votes = seen.pop().mean((1, 2)).unflatten(0, (2, 2)).mean(1)  # [prompts, frames, 16 places]
        lines = torch.arange(20).view(4, 5)[:, :4].flatten()  # each ends in a token that says so
        chosen = select(torch.stack([own[lines] for own in rows]), votes, BUDGET, 0.5)
        stays = inputs["input_ids"] != IMAGE
        first = int((inputs["input_ids"][0] == IMAGE).nonzero()[0])
        for prompt, own in enumerate(chosen):
            stays[prompt, first + lines[own]] = True
        places = torch.stack([row.nonzero().flatten() for row in stays])
        wanted = logits(model, inputs, places)
        with torch.no_grad():
            found = reduced.module(**inputs)[output]
        torch.testing.assert_close(found, wanted, atol=1e-5 * float(wanted.abs().max()), rtol=0.0)
        kept.append(places)
    assert not torch.equal(*kept)


def test_patches_that_no_attention_has_seen_have_no_votes() -> None:
    *_, program = captured("fuyu")
    with pytest.raises(LocateError, match=r"what is scattered into the prompt comes from none .*fastv"):
        pumer.reduce(program, Schedule(method="vispruner", budget=4, positions="original"))
