"""A small LLaVA for the scenes: a CLIP tower, a projector and a Llama, which writes its answer as a word.

Image tokens stand before the question in a causal prompt and never see it, so that several questions share one picture
without any change to what the model computes: `packed` is stock LLaVA.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from transformers import (
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedTokenizerFast,
)

from .data import TEXT_LENGTH, build_tokenizer
from .draw import CELL
from .questions import ANSWERS
from .scene import SIDE

IMAGE_TOKENS = (SIDE // CELL) ** 2
IMAGE = "<image>"
PREFIX = 1 + IMAGE_TOKENS
"""Tokens before the question: [CLS] and the image."""


@dataclass(frozen=True)
class Vocabulary:
    """The tokens of questions, and of what else a prompt has."""

    tokenizer: PreTrainedTokenizerFast

    @classmethod
    def made(cls) -> Vocabulary:
        """The words of questions, with the answers that are none of them, and the image's token behind."""
        tokenizer = build_tokenizer()
        known = tokenizer.get_vocab()
        tokenizer.add_tokens([answer for answer in ANSWERS if answer not in known])
        tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE]})
        return cls(tokenizer)

    @property
    def image(self) -> int:
        """The image's token."""
        return int(self.tokenizer.convert_tokens_to_ids(IMAGE))

    @property
    def answers(self) -> Tensor:
        """The token of each answer, int64 [answers]."""
        return torch.tensor(self.tokenizer.convert_tokens_to_ids(list(ANSWERS)))

    def prompts(self, ids: Tensor) -> Tensor:
        """int64 [batch, PREFIX + TEXT_LENGTH - 1]: [CLS], the image, the question, [SEP], and padding behind.

        Args:
            ids: of questions, int64 [batch, TEXT_LENGTH], as `data.Split` has them: [CLS], words, [SEP], padding.
        """
        image = torch.full((len(ids), IMAGE_TOKENS), self.image)
        return torch.cat([ids[:, :1], image, ids[:, 1:]], dim=1)


def build_llava(
    vocabulary: Vocabulary, width: int = 128, seen: int = 3, layers: int = 4
) -> LlavaForConditionalGeneration:
    """A LLaVA of 196 image tokens; like LLaVA it takes them from before the tower's last layer.

    Args:
        vocabulary: of its prompts.
        width: of both its parts.
        seen: layers of the tower that are used.
        layers: of the language model.
    """
    heads = width // 32
    vision = CLIPVisionConfig(
        hidden_size=width, intermediate_size=4 * width, num_hidden_layers=seen + 1, num_attention_heads=heads,
        image_size=SIDE, patch_size=CELL,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(vocabulary.tokenizer), hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=heads, max_position_embeddings=256, tie_word_embeddings=False,
        pad_token_id=0, bos_token_id=vocabulary.tokenizer.cls_token_id, eos_token_id=vocabulary.tokenizer.sep_token_id,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=vocabulary.image)
    return LlavaForConditionalGeneration(config)


class Packed(NamedTuple):
    """What `packed` gives.

    Attributes:
        logits: behind each word, float [batch, questions, TEXT_LENGTH - 1, vocabulary].
        words: before the language model's last layer, float [batch, questions, TEXT_LENGTH - 1, width].
        features: what the projector is given, float [batch, 196, width].
    """

    logits: Tensor
    words: Tensor
    features: Tensor


def tower_features(model: LlavaForConditionalGeneration, pixels: Tensor) -> Tensor:
    """What the projector is given, float [batch, 196, width]."""
    states = model.model.vision_tower(pixels, output_hidden_states=True).hidden_states
    return states[model.config.vision_feature_layer][:, 1:]


def packed(model: LlavaForConditionalGeneration, pixels: Tensor, ids: Tensor) -> Packed:
    """Several questions about each picture.

    Args:
        model: what computes.
        pixels: float32 [batch, 3, 112, 112].
        ids: int64 [batch, questions, TEXT_LENGTH], as `data.Split` has them.
    """
    inner, questions = model.model, ids.shape[1]
    features = tower_features(model, pixels)
    table = model.get_input_embeddings()
    image = inner.multi_modal_projector(features)
    told = ids[:, :, 1:]
    text = table(told).flatten(1, 2)
    embeds = torch.cat([table(ids[:, 0, :1]).to(image.dtype), image, text.to(image.dtype)], dim=1)
    places, mask = _arranged(told)
    how = {"use_cache": False, "output_hidden_states": True}
    out = inner.language_model(inputs_embeds=embeds, attention_mask=mask, position_ids=places, **how)
    logits, words = model.lm_head(out.last_hidden_state[:, PREFIX:]), out.hidden_states[-2][:, PREFIX:]
    shape = (questions, TEXT_LENGTH - 1)
    return Packed(logits.unflatten(1, shape), words.unflatten(1, shape), features)


def _arranged(told: Tensor) -> tuple[Tensor, Tensor]:
    """Positions, int64 [1, tokens], and an additive mask, float32 [batch, 1, tokens, tokens]: each token sees the
    prefix and its own question, up to itself."""
    batch, questions, length = told.shape
    behind = PREFIX + torch.arange(length).repeat(questions)
    places = torch.cat([torch.arange(PREFIX), behind])[None]
    owner = torch.cat([torch.full((PREFIX,), -1), torch.arange(questions).repeat_interleave(length)])
    same = (owner[None] == -1) | (owner[:, None] == owner[None])
    seen = same & (places[0, None] <= places[0, :, None])
    real = torch.cat([torch.ones(batch, PREFIX, dtype=torch.bool), (told != 0).flatten(1)], dim=1)
    # A token of padding sees itself: a row of nothing would be no number.
    seen = (seen & real[:, None]) | torch.eye(len(owner), dtype=torch.bool)
    return places, torch.zeros(seen.shape).masked_fill_(~seen, torch.finfo(torch.float32).min)[:, None]


def answer_places(ids: Tensor) -> Tensor:
    """Where the logits of the answer stand among those of `packed`: behind [SEP], int64 like `ids` without its last
    dimension."""
    return (ids != 0).sum(-1) - 2
