"""Prompts of several crops or images, put together by hand: transformers' own packing says where tokens stand."""

from __future__ import annotations

import functools
from typing import Any

import torch
import transformers as hf
from torch import Tensor

from tests.support.visual import select, visual_cues

IMAGE, SIDE, PATCH = 99, 48, 8
TOKENS = (SIDE // PATCH) ** 2
_TOWER = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "image_size": SIDE,
    "patch_size": PATCH,
}
_LANGUAGE = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 100,
    "max_position_embeddings": 512,
    # With the usual small weights every next token would be the same.
    "initializer_range": 0.3,
}
MODELS = ["LLaVA-NeXT", "LLaVA-OneVision"]
PINPOINTS = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE]]


@functools.cache
def crops_model(name: str) -> Any:
    """A small model with random weights: `LLaVA-NeXT` (CLIP, class token) or `LLaVA-OneVision` (SigLIP, none)."""
    torch.manual_seed(0)
    shared = {"image_token_index": IMAGE, "image_grid_pinpoints": PINPOINTS}
    if name == "LLaVA-NeXT":
        clip = {"model_type": "clip_vision_model", **_TOWER}
        text = {"model_type": "llama", **_LANGUAGE}
        config: Any = hf.LlavaNextConfig(vision_config=clip, text_config=text, vision_feature_layer=-2, **shared)
        model: Any = hf.LlavaNextForConditionalGeneration(config)
    else:
        siglip = {"model_type": "siglip_vision_model", "vision_use_head": False, **_TOWER}
        text = {"model_type": "qwen2", **_LANGUAGE}
        config = hf.LlavaOnevisionConfig(vision_config=siglip, text_config=text, **shared)
        model = hf.LlavaOnevisionForConditionalGeneration(config)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    torch.nn.init.normal_(model.model.image_newline)
    return model.eval()


def crops_inputs(model: Any, size: tuple[int, int], batch: int = 1, seed: int = 0) -> dict[str, Tensor]:
    """Prompts with one image of a size (height, width) each: 3 words, its tokens, 5 words."""
    generator = torch.Generator().manual_seed(seed)
    crops = len(packed_rows(model, size))
    pixels = torch.randn(batch, crops, 3, SIDE, SIDE, generator=generator)
    image = len(packing(model, size))
    ids = torch.randint(0, IMAGE - 5, (batch, 3 + image + 5), generator=generator)
    ids[:, 3 : 3 + image] = IMAGE
    sizes = torch.tensor([size] * batch)
    return {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": pixels,
        "image_sizes": sizes,
    }


def packed_rows(model: Any, size: tuple[int, int]) -> list[Tensor]:
    """Token numbers of every crop that the model cuts an image of a size into."""
    from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches

    count = image_size_to_num_patches(list(size), PINPOINTS, SIDE)
    return list(torch.arange(count * TOKENS).view(count, TOKENS))


def packing(model: Any, size: tuple[int, int]) -> list[int]:
    """Where each place of an image in the prompt comes from, by the model's own packing of token numbers:
    `crop * tokens + token`, or -1 for the newline."""
    numbers = torch.stack(packed_rows(model, size)).float().unsqueeze(-1)
    given: dict[str, Any] = {"image_newline": torch.tensor([-1.0])}
    if isinstance(model, hf.LlavaNextForConditionalGeneration):
        given["vision_feature_select_strategy"] = "default"
    (packed,), _ = model.model.pack_image_features([numbers], torch.tensor([size]), **given)
    return [int(number) for number in packed.flatten()]


def kept_places(model: Any, pixels: Tensor, size: tuple[int, int], budget: int, important: float) -> list[int]:
    """The tokens (`crop * tokens + token`) of one image that stay, in the prompt's order: of each crop, `budget` of
    those that the model shows at all."""
    features, attention = visual_cues(model, pixels)
    order = [number for number in packing(model, size) if number >= 0]
    chosen: set[int] = set()
    for crop in range(len(pixels)):
        shown = sorted(number - crop * TOKENS for number in order if number // TOKENS == crop)
        if len(shown) <= budget:
            chosen |= {crop * TOKENS + token for token in shown}
            continue
        (kept,) = select(features[crop, shown].unsqueeze(0), attention[crop, shown].unsqueeze(0), budget, important)
        chosen |= {crop * TOKENS + shown[token] for token in kept.tolist()}
    return [number for number in order if number in chosen]


def logits_of_crops(model: Any, inputs: dict[str, Tensor], budget: int, important: float, **more: Any) -> Tensor:
    """Logits of prompts whose images are their kept tokens alone, without newlines."""
    return run_by_hand(model, *prompt_of_crops(model, inputs, budget, important)[:1], **more)


def prompt_of_crops(
    model: Any, inputs: dict[str, Tensor], budget: int, important: float
) -> tuple[Tensor, list[list[int]]]:
    """Embeddings of those prompts, and the places of the whole prompt that they are."""
    found, places = [], []
    with torch.no_grad():
        for ids, pixels, size in zip(inputs["input_ids"], inputs["pixel_values"], inputs["image_sizes"], strict=True):
            shape = (int(size[0]), int(size[1]))
            kept = kept_places(model, pixels, shape, budget, important)
            features, _ = visual_cues(model, pixels)
            image = model.model.multi_modal_projector(features.flatten(0, 1)[kept])
            words = model.get_input_embeddings()(ids)
            where = packing(model, shape)
            found.append(torch.cat([words[:3], image, words[3 + len(where) :]]))
            held = [3 + where.index(number) for number in kept]
            places.append([0, 1, 2, *held, *range(3 + len(where), len(ids))])
    return torch.stack(found), places


def run_by_hand(model: Any, prompt: Tensor, **more: Any) -> Tensor:
    with torch.no_grad():
        mask = torch.ones(prompt.shape[:2], dtype=torch.int64)
        logits: Tensor = model(inputs_embeds=prompt, attention_mask=mask, **more).logits
    return logits
