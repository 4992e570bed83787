"""Models small enough to capture in well under a second."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from transformers import PreTrainedModel, ViltConfig, ViltForQuestionAnswering
from transformers.utils import logging as transformers_logging

Model = TypeVar("Model", bound=PreTrainedModel)

SIZES = {
    "hidden_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 3,
    "intermediate_size": 32,
    "image_size": 96,
    "patch_size": 16,
    "vocab_size": 60,
    "max_position_embeddings": 12,
    "hidden_dropout_prob": 0.1,
    "attention_probs_dropout_prob": 0.1,
}


def tiny_vilt(model_class: type[Model] = ViltForQuestionAnswering, seed: int = 0, **config: Any) -> Model:
    """A ViLT with random weights large enough that a wrong position or mask shows in the logits, in eval mode."""
    torch.manual_seed(seed)
    model = model_class(ViltConfig(num_labels=5, **{**SIZES, **config}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.3)
    return model.eval()


def text_inputs(batch: int, length: int = 7, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random token ids, and a mask whose later samples are padded."""
    generator = torch.Generator().manual_seed(seed)
    mask = torch.ones(batch, length, dtype=torch.int64)
    for row in range(1, batch):
        mask[row, max(1, length - row) :] = 0
    return {"input_ids": torch.randint(1, 60, (batch, length), generator=generator), "attention_mask": mask}


def image_inputs(sizes: list[tuple[int, int]], canvas: tuple[int, int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random images of the given sizes in the top left corner of a canvas, and their pixel mask."""
    generator = torch.Generator().manual_seed(seed)
    pixels = torch.zeros(len(sizes), 3, *canvas)
    mask = torch.zeros(len(sizes), *canvas, dtype=torch.int64)
    for row, (height, width) in enumerate(sizes):
        pixels[row, :, :height, :width] = torch.randn(3, height, width, generator=generator)
        mask[row, :height, :width] = 1
    return {"pixel_values": pixels, "pixel_mask": mask}


@contextmanager
def talkative_transformers() -> Iterator[list[str]]:
    """What transformers logs in the block, at its most talkative; its verbosity must be the same at the end."""
    messages: list[str] = []

    class Recorder(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            messages.append(record.getMessage())

    recorder, before = Recorder(), transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_debug()
    transformers_logging.enable_progress_bar()
    transformers_logging.add_handler(recorder)
    try:
        yield messages
        assert transformers_logging.get_verbosity() == transformers_logging.DEBUG
        assert transformers_logging.is_progress_bar_enabled()
    finally:
        transformers_logging.remove_handler(recorder)
        transformers_logging.set_verbosity(before)
