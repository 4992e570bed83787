"""Prompts that grow and shrink, and small models that do not say the same word for ever."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from tests.support.prompt_families import WORDS, built

TOKENS = 20


def speaking_words(name: str) -> Any:
    """A model of a family that makes neither placeholders nor an end, and what makes its inputs."""
    family, make = built(name)
    with torch.no_grad():
        family.get_output_embeddings().weight[WORDS:] = 0
        family.get_output_embeddings().weight[:3] = 0
    return family, make


def shortened(inputs: dict[str, Tensor], front: int, back: int) -> dict[str, Tensor]:
    """The prompts without some of their first and last words."""
    length = inputs["input_ids"].shape[1]
    return {name: t[:, front : length - back] if name in _LONGER else t for name, t in inputs.items()}


def widen(family: Any, window: int) -> None:
    """Let sliding windows be longer than the prompt."""
    for module in family.modules():
        if getattr(module, "sliding_window", None):
            module.sliding_window = window
    text = family.config.get_text_config()
    if getattr(text, "sliding_window", None):
        text.sliding_window = window


def longer(inputs: dict[str, Tensor], new: Tensor) -> dict[str, Tensor]:
    """A prompt with more text behind it."""
    more = {name: torch.cat([inputs[name], fill(new)], 1) for name, fill in _LONGER.items() if name in inputs}
    return {**inputs, **more}


_LONGER = {
    "input_ids": lambda new: new,
    "attention_mask": torch.ones_like,
    "mm_token_type_ids": torch.zeros_like,
    "token_type_ids": torch.zeros_like,
}
