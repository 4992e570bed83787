"""Small models that put an image into a prompt: prompts of 36 placeholders and words, or of several images."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from benchmarks.architecture_models import ARCHITECTURES
from tests.support.visual import select, visual_cues

WORDS = 14


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


def images(blocks: list[tuple[int, int]], rows: int, length: int, batch: int = 1) -> tuple[Any, dict[str, Tensor]]:
    """LLaVA's small model, and prompts with placeholders at given places."""
    model, _ = built("LLaVA")
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(0, 98, (batch, length), generator=generator)
    for start, stop in blocks:
        ids[:, start:stop] = 99
    pixels = torch.randn(batch * rows, 3, 48, 48, generator=generator)
    return model, {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def by_hand(model: Any, inputs: dict[str, Tensor], blocks: list[tuple[int, int]], budget: int) -> Tensor:
    features, votes = visual_cues(model, inputs["pixel_values"])
    kept = select(features, votes, budget, 0.5)
    batch = len(inputs["input_ids"])
    with torch.no_grad():
        chosen = torch.stack([one[index] for one, index in zip(features, kept, strict=True)])
        image = model.model.multi_modal_projector(chosen).view(batch, -1, budget, model.config.text_config.hidden_size)
        words = model.get_input_embeddings()(inputs["input_ids"])
        parts, position, row = [], 0, 0
        for start, stop in blocks:
            parts.append(words[:, position:start])
            for _ in range((stop - start) // features.shape[1]):
                parts.append(image[:, row])
                row += 1
            position = stop
        prompt = torch.cat([*parts, words[:, position:]], 1)
        logits: Tensor = model(inputs_embeds=prompt, attention_mask=torch.ones(prompt.shape[:2])).logits
    return logits


# With words between, side by side, both, and at the ends of the prompt.
BLOCKS = [
    ([(2, 38), (41, 77)], 2, 80),
    ([(2, 74)], 2, 80),
    ([(0, 36), (38, 110)], 3, 110),
]
