"""Small models of every family that puts image features into a prompt, with random weights, and inputs for them.

`make(seed)` keeps the geometry and changes pixels and words. Inputs are what the family's processor makes of a prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from transformers.models.got_ocr2.configuration_got_ocr2 import GotOcr2VisionConfig

Tensors = dict[str, Tensor]
IMAGE, OTHER = 99, 98
_TEXT: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 32,
    "patch_size": 8,
}
_CLIP = {**_TOWER, "projection_dim": 20}
Built = tuple[nn.Module, Callable[[int], Tensors]]
FAMILIES: dict[str, Callable[[], Built]] = {}


def _family(build: Callable[[], Built]) -> Callable[[], Built]:
    FAMILIES[build.__name__] = build
    return build


# What stands beside placeholders in a prompt: start and end of an image, of a row, of a tile.
START, END, ROW, TILE = 97, 96, 95, 94
WORDS = 90


def _ids(generator: torch.Generator, batch: int, *parts: int | list[int]) -> Tensor:
    """Prompts of so many random words, or of these tokens, one after the other: `[batch, length]`."""
    return torch.cat(
        [
            torch.randint(3, WORDS, (batch, part), generator=generator)
            if isinstance(part, int)
            else torch.tensor(part).expand(batch, -1)
            for part in parts
        ],
        1,
    )


def _by_type(ids: Tensor) -> Tensor:
    """`mm_token_type_ids`: 1 for an image's placeholders, 2 for a video's."""
    return (ids == IMAGE) * 1 + (ids == OTHER) * 2


def _pictures(
    parts: list[int | list[int]], *shape: int, batch: int = 2, pixels: str = "pixel_values", **more: Any
) -> Callable[[int], Tensors]:
    """Prompts of such parts, pixels `shape` for all prompts together, and tensors made of the ids or given."""

    def make(seed: int) -> Tensors:
        generator = torch.Generator().manual_seed(seed)
        ids = _ids(generator, batch, *parts)
        images = torch.randn(*shape, generator=generator)
        given = {name: value(ids) if callable(value) else value for name, value in more.items()}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), pixels: images, **given}

    return make


def _packed(
    *grids: tuple[int, int, int], width: int, merge: int = 2, batch: int = 1, video: bool = False
) -> Callable[[int], Tensors]:
    """Prompts with images whose patches are rows of one matrix, as Qwen's processors make them; grids of one prompt.

    Args:
        width: numbers in a patch.
        merge: patches on a side of what is one token.
    """
    token = OTHER if video else IMAGE
    parts: list[int | list[int]] = [3]
    for frames, height, across in grids:
        parts += [[START, *[token] * (frames * height * across // merge**2), END], 4]
    patches = sum(math.prod(grid) for grid in grids) * batch
    thw = torch.tensor(grids).repeat(batch, 1)
    names = ("pixel_values_videos", "video_grid_thw") if video else ("pixel_values", "image_grid_thw")
    more: dict[str, Any] = {names[1]: thw, "mm_token_type_ids": _by_type}
    return _pictures(parts, patches, width, batch=batch, pixels=names[0], **more)


def _prompts(*images: tuple[int, int], **features: tuple[int, ...]) -> Callable[[int], Tensors]:
    """Two prompts of words and runs of placeholders, `(id, how many)`, and features of given shapes."""

    def make(seed: int) -> Tensors:
        generator = torch.Generator().manual_seed(seed)
        parts = [torch.randint(3, OTHER, (2, 3), generator=generator)]
        for token, count in images:
            parts += [torch.full((2, count), token), torch.randint(3, OTHER, (2, 4), generator=generator)]
        ids = torch.cat(parts, 1)
        given = {name: torch.randn(2, *shape, generator=generator) for name, shape in features.items()}
        return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **given}

    return make


@_family
def aya_vision() -> Built:
    config = hf.AyaVisionConfig(
        vision_config=hf.SiglipVisionConfig(**_PICTURE), text_config=hf.Cohere2Config(**_TEXT), image_token_index=IMAGE
    )
    return hf.AyaVisionForConditionalGeneration(config), _prompts((IMAGE, 9), pixel_values=(3, 48, 48))


@_family
def cohere2_vision() -> Built:
    config = hf.Cohere2VisionConfig(
        vision_config=hf.SiglipVisionConfig(**_PICTURE),
        text_config=hf.Cohere2Config(**_TEXT),
        image_token_id=IMAGE,
        alignment_intermediate_size=64,
    )
    return hf.Cohere2VisionForConditionalGeneration(config), _prompts((IMAGE, 9), pixel_values=(3, 48, 48))


@_family
def got_ocr2() -> Built:
    tower = GotOcr2VisionConfig(
        hidden_size=32,
        output_channels=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        image_size=128,
        patch_size=8,
        window_size=3,
        global_attn_indexes=[1],
        mlp_dim=48,
    )
    config = hf.GotOcr2Config(vision_config=tower, text_config=hf.Qwen2Config(**_TEXT), image_token_index=IMAGE)
    return hf.GotOcr2ForConditionalGeneration(config), _prompts((IMAGE, 16), pixel_values=(3, 128, 128))


@_family
def llava_next_video() -> Built:
    config = hf.LlavaNextVideoConfig(
        vision_config=hf.CLIPVisionConfig(**_CLIP),
        text_config=hf.LlamaConfig(**_TEXT),
        image_token_index=OTHER,
        video_token_index=IMAGE,
    )
    model = hf.LlavaNextVideoForConditionalGeneration(config)
    return model, _prompts((IMAGE, 8), pixel_values_videos=(2, 3, 32, 32))


@_family
def video_llava() -> Built:
    """An image and a video of two frames, class tokens included."""
    config = hf.VideoLlavaConfig(
        vision_config=hf.CLIPVisionConfig(**_CLIP),
        text_config=hf.LlamaConfig(**_TEXT),
        image_token_index=OTHER,
        video_token_index=IMAGE,
    )
    features = {"pixel_values": (3, 32, 32), "pixel_values_videos": (2, 3, 32, 32)}
    return hf.VideoLlavaForConditionalGeneration(config), _prompts((OTHER, 16), (IMAGE, 34), **features)


@_family
def emu3() -> Built:
    """Its image tokens are ids, looked up as words are."""
    names = {"<image>": IMAGE, "<|extra_200|>": OTHER, **{f"<|visual token {i:06d}|>": 60 + i for i in range(16)}}
    codes = hf.Emu3VQVAEConfig(
        codebook_size=16,
        embed_dim=4,
        latent_channels=4,
        base_channels=32,
        channel_multiplier=[1, 1],
        num_res_blocks=1,
        attn_resolutions=[],
        hidden_size=32,
        temporal_downsample_factor=2,
    )
    config = hf.Emu3Config(vq_config=codes, text_config=hf.Emu3TextConfig(**_TEXT), vocabulary_map=names)
    make = _prompts((IMAGE, 20), pixel_values=(3, 8, 8))
    return hf.Emu3ForConditionalGeneration(config), lambda seed: {
        **make(seed),
        "image_sizes": torch.tensor([[8, 8], [8, 8]]),
    }


@_family
def fast_vlm() -> Built:
    """With a convolutional tower of transformers in place of timm's."""
    tower = hf.ResNetConfig(embedding_size=8, hidden_sizes=[8, 32], depths=[1, 1], hidden_size=32)
    config = hf.FastVlmConfig(vision_config=tower, text_config=hf.Qwen2Config(**_TEXT), image_token_index=IMAGE)
    return hf.FastVlmForConditionalGeneration(config), _prompts((IMAGE, 16), pixel_values=(3, 32, 32))


@_family
def fuyu() -> Built:
    """Patches go straight into the prompt."""
    text = {key: value for key, value in _TEXT.items() if key != "num_key_value_heads"}
    config = hf.FuyuConfig(
        image_size=32, patch_size=8, text_config={"model_type": "persimmon", **text}, image_token_id=IMAGE
    )
    return hf.FuyuForCausalLM(config), _prompts((IMAGE, 16), pixel_values=(16, 192))


# --- patches in one matrix, merged ------------------------------------------------------------------------------------

_MROPE = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
_SPECIAL = {
    "image_token_id": IMAGE,
    "video_token_id": OTHER,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
_PATCH = 3 * 2 * 4 * 4


def _qwen2_vl() -> nn.Module:
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4}
    text = {**_TEXT, "rope_parameters": _MROPE}
    return hf.Qwen2VLForConditionalGeneration(hf.Qwen2VLConfig(vision_config=vision, text_config=text, **_SPECIAL))


@_family
def qwen2_vl() -> Built:
    return _qwen2_vl(), _packed((1, 6, 8), width=_PATCH)


def _qwen2_5_vl() -> nn.Module:
    """Its first layer attends within windows of 4 x 4 patches, the last one everywhere."""
    vision = {
        "depth": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_heads": 4,
        "patch_size": 4,
        "window_size": 16,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [1],
    }
    text = {**_TEXT, "rope_parameters": _MROPE}
    return hf.Qwen2_5_VLForConditionalGeneration(
        hf.Qwen2_5_VLConfig(vision_config=vision, text_config=text, **_SPECIAL)
    )


@_family
def qwen2_5_vl() -> Built:
    return _qwen2_5_vl(), _packed((1, 8, 8), width=_PATCH)


@_family
def qwen2_5_vl_uneven() -> Built:
    """Windows at the right and at the bottom are smaller."""
    return _qwen2_5_vl(), _packed((1, 6, 10), width=_PATCH)


@_family
def qwen2_5_vl_two() -> Built:
    """Two images of other sizes, words between them."""
    return _qwen2_5_vl(), _packed((1, 6, 6), (1, 8, 6), width=_PATCH)


@_family
def qwen2_5_vl_batch() -> Built:
    return _qwen2_5_vl(), _packed((1, 6, 6), width=_PATCH, batch=2)


@_family
def qwen2_5_vl_video() -> Built:
    """Three frames, each attended to alone."""
    return _qwen2_5_vl(), _packed((3, 6, 6), width=_PATCH, video=True)


_QWEN3_VISION: dict[str, Any] = {
    "depth": 3,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "patch_size": 4,
    "out_hidden_size": 32,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [0, 1],
}
_QWEN3_TEXT = {**_TEXT, "head_dim": 8, "rope_parameters": {**_MROPE, "mrope_interleaved": True}}


def _qwen3_vl() -> nn.Module:
    """Features of the first two layers of the tower are added behind the first two of the language model."""
    return hf.Qwen3VLForConditionalGeneration(
        hf.Qwen3VLConfig(vision_config=_QWEN3_VISION, text_config=_QWEN3_TEXT, **_SPECIAL)
    )


@_family
def qwen3_vl() -> Built:
    return _qwen3_vl(), _packed((1, 6, 8), width=_PATCH)


@_family
def qwen3_vl_two() -> Built:
    return _qwen3_vl(), _packed((1, 6, 6), (1, 8, 6), width=_PATCH)


# --- pictures of one size, merged -------------------------------------------------------------------------------------

_PICTURE = {**_TOWER, "image_size": 48}  # 36 patches, 9 rows
_NINE = [IMAGE] * 9


def _internvl() -> nn.Module:
    vision = {**_PICTURE, "image_size": (48, 48), "patch_size": (8, 8)}
    text = {"model_type": "qwen2", **_TEXT}
    return hf.InternVLForConditionalGeneration(
        hf.InternVLConfig(vision_config=vision, text_config=text, image_token_id=IMAGE, image_seq_length=9)
    )


@_family
def internvl() -> Built:
    return _internvl(), _pictures([3, [START, *_NINE, END], 4], 2, 3, 48, 48)


@_family
def internvl_tiles() -> Built:
    """Three tiles of an image, their rows in one block."""
    return _internvl(), _pictures([3, [START, *_NINE * 3, END], 4], 3, 3, 48, 48, batch=1)


def _gemma3() -> nn.Module:
    """Rows of an image see each other both ways; every other layer has a sliding window."""
    text = {
        **_TEXT,
        "head_dim": 8,
        "sliding_window": 8,
        "layer_types": ["sliding_attention", "full_attention", "sliding_attention"],
        "query_pre_attn_scalar": 8,
    }
    return hf.Gemma3ForConditionalGeneration(
        hf.Gemma3Config(
            vision_config={"model_type": "siglip_vision_model", **_PICTURE, "vision_use_head": False},
            text_config=text,
            mm_tokens_per_image=9,
            image_token_index=IMAGE,
            boi_token_index=START,
            eoi_token_index=END,
        )
    )


@_family
def gemma3() -> Built:
    return _gemma3(), _pictures([3, [START, *_NINE, END], 4], 2, 3, 48, 48, token_type_ids=_by_type)


@_family
def gemma3_two() -> Built:
    parts = [3, [START, *_NINE, END], 2, [START, *_NINE, END], 4]
    return _gemma3(), _pictures(parts, 2, 3, 48, 48, batch=1, token_type_ids=_by_type)


def _split(config: type, model: type, **more: Any) -> nn.Module:
    text = {"model_type": "llama", **_TEXT}
    return model(config(vision_config=_PICTURE, text_config=text, image_token_id=IMAGE, **more))


def _images(parts: list[int | list[int]], images: int, batch: int = 2) -> Callable[[int], Tensors]:
    """Pixels by prompt and image, and which of them are no padding."""
    there = torch.ones(batch, images, 48, 48, dtype=torch.int64)
    return _pictures(parts, batch, images, 3, 48, 48, batch=batch, pixel_attention_mask=there)


def _smolvlm() -> nn.Module:
    return _split(hf.SmolVLMConfig, hf.SmolVLMForConditionalGeneration, pad_token_id=0)


@_family
def smolvlm() -> Built:
    return _smolvlm(), _images([3, [START, *_NINE, START], 4], 1)


@_family
def smolvlm_split() -> Built:
    """An image in two parts and the whole of it: three blocks of rows with marks between them."""
    parts = [3, [START, ROW, *_NINE, START, TILE, *_NINE, START, END, *_NINE, START], 4]
    return _smolvlm(), _images(parts, 3, batch=1)


@_family
def idefics3() -> Built:
    return _split(hf.Idefics3Config, hf.Idefics3ForConditionalGeneration, pad_token_id=0), _images(
        [3, [START, *_NINE, START], 4], 1
    )


@_family
def ovis2() -> Built:
    """Its rows are mixtures of a visual vocabulary, and marks beside them are looked up in the same table."""
    vision = {**_PICTURE, "hidden_stride": 2, "vocab_size": 40, "num_visual_indicator_tokens": 5}
    config = hf.Ovis2Config(
        vision_config=vision,
        text_config={"model_type": "qwen2", **_TEXT},
        image_token_id=IMAGE,
        visual_indicator_token_ids=[START, END, ROW, TILE, 93],
        vocab_size=_TEXT["vocab_size"],
        hidden_size=32,
    )
    return hf.Ovis2ForConditionalGeneration(config), _pictures([3, [START, *_NINE, ROW, END], 4], 2, 3, 48, 48)


@_family
def vipllava() -> Built:
    """Features of five layers of the tower, joined; one row a patch."""
    config = hf.VipLlavaConfig(
        vision_config={"model_type": "clip_vision_model", **_CLIP, "num_hidden_layers": 3},
        text_config={"model_type": "llama", **_TEXT},
        image_token_index=IMAGE,
        vision_feature_layer=[-2, -1, 1, 2, 0],
        image_seq_length=16,
    )
    return hf.VipLlavaForConditionalGeneration(config), _pictures([3, [IMAGE] * 16, 4], 2, 3, 32, 32)


@_family
def mistral3() -> Built:
    """Every row of the picture ends in a mark of its own, so that an image stands in several blocks."""
    vision = {**_PICTURE, "head_dim": 8, "model_type": "pixtral"}
    text = {"model_type": "mistral", **_TEXT, "head_dim": 8}
    config = hf.Mistral3Config(vision_config=vision, text_config=text, image_token_index=IMAGE)
    line = [IMAGE] * 3
    parts = [3, [*line, ROW, *line, ROW, *line, END], 4]
    return hf.Mistral3ForConditionalGeneration(config), _pictures(
        parts, 1, 3, 48, 48, batch=1, image_sizes=torch.tensor([[48, 48]])
    )


def built(name: str) -> Built:
    """A model of a family whose attention is uneven, and what makes its inputs of a seed."""
    torch.manual_seed(0)
    model, make = FAMILIES[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model.eval(), make
