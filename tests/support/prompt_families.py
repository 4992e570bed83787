"""Small models of every family that puts image features into a prompt, with random weights, and inputs for them.

`make(seed)` keeps the geometry and changes pixels and words. Inputs are what the family's processor makes of a prompt.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from transformers.models.got_ocr2.configuration_got_ocr2 import GotOcr2VisionConfig

import pumer_compile as pumer

Tensors = dict[str, Tensor]
IMAGE, OTHER = 99, 98
_TEXT: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
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
        vision_config=hf.CLIPVisionConfig(**{**_CLIP, "image_size": 48}),
        text_config=hf.LlamaConfig(**_TEXT),
        image_token_index=OTHER,
        video_token_index=IMAGE,
    )
    model = hf.LlavaNextVideoForConditionalGeneration(config)
    return model, _prompts((IMAGE, 18), pixel_values_videos=(2, 3, 48, 48))


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
    "depth": 2,
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
    """Rows of an image see each other both ways; the last layer has a sliding window."""
    text = {
        **_TEXT,
        "head_dim": 8,
        "sliding_window": 8,
        "layer_types": ["full_attention", "sliding_attention"],
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
    """Every line of the picture ends in a mark, so that an image stands in several blocks; a sliding window."""
    vision = {**_PICTURE, "head_dim": 8, "model_type": "pixtral"}
    text = {"model_type": "mistral", **_TEXT, "head_dim": 8, "sliding_window": 16}
    config = hf.Mistral3Config(vision_config=vision, text_config=text, image_token_index=IMAGE)
    line = [IMAGE] * 3
    parts = [3, [*line, ROW, *line, ROW, *line, END], 4]
    return hf.Mistral3ForConditionalGeneration(config), _pictures(
        parts, 1, 3, 48, 48, batch=1, image_sizes=torch.tensor([[48, 48]])
    )


@_family
def lighton_ocr() -> Built:
    """Its tower attends within each picture, by a mask that is written block by block."""
    vision = {**_PICTURE, "head_dim": 8, "model_type": "pixtral"}
    text = {"model_type": "qwen3", **_TEXT, "head_dim": 8}
    config = hf.LightOnOcrConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
    return hf.LightOnOcrForConditionalGeneration(config), _pictures(
        [3, _NINE, 4], 1, 3, 48, 48, batch=1, image_sizes=torch.tensor([[48, 48]])
    )


# --- more of patches in one matrix ------------------------------------------------------------------------------------


@_family
def qwen3_vl_moe() -> Built:
    text = {**_QWEN3_TEXT, "moe_intermediate_size": 24, "num_experts_per_tok": 2, "num_experts": 4}
    config = hf.Qwen3VLMoeConfig(vision_config=_QWEN3_VISION, text_config=text, **_SPECIAL)
    return hf.Qwen3VLMoeForConditionalGeneration(config), _packed((1, 6, 8), width=_PATCH)


_HYBRID = {
    **_TEXT,
    "head_dim": 8,
    "rope_parameters": {**_MROPE, "mrope_interleaved": True, "partial_rotary_factor": 1.0},
    "layer_types": ["linear_attention", "full_attention"],
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
}


def _qwen3_5(**text: Any) -> nn.Module:
    vision = {name: value for name, value in _QWEN3_VISION.items() if name != "deepstack_visual_indexes"}
    config = hf.Qwen3_5Config(vision_config=vision, text_config={**_HYBRID, **text}, **_SPECIAL)
    return hf.Qwen3_5ForConditionalGeneration(config)


@_family
def qwen3_5() -> Built:
    """Every other layer carries a state from token to token (a gated delta rule) in place of attention."""
    return _qwen3_5(num_hidden_layers=4, layer_types=["linear_attention", "full_attention"] * 2), _packed(
        (1, 6, 8), width=_PATCH
    )


@_family
def qwen2_5_omni() -> Built:
    """Sound in front of a picture, as many tokens as that has rows: it stays."""
    sound, ends = 93, [92, 91]
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
    config = hf.Qwen2_5OmniThinkerConfig(
        audio_config={
            "d_model": 32,
            "encoder_attention_heads": 4,
            "encoder_ffn_dim": 48,
            "encoder_layers": 1,
            "num_mel_bins": 20,
            "output_dim": 32,
        },
        vision_config=vision,
        text_config={**_TEXT, "rope_parameters": _MROPE},
        audio_token_index=sound,
        image_token_index=IMAGE,
        video_token_index=OTHER,
        audio_start_token_id=ends[0],
        audio_end_token_id=ends[1],
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    packed = _packed((1, 6, 8), width=_PATCH)

    def make(seed: int) -> Tensors:
        inputs, generator = packed(seed), torch.Generator().manual_seed(seed)
        ids = inputs["input_ids"]
        heard = torch.tensor([[ends[0], *[sound] * 12, ends[1]]])
        ids = torch.cat([ids[:, :2], heard, ids[:, 2:]], 1)
        return {
            "input_ids": ids,
            "attention_mask": torch.ones_like(ids),
            "input_features": torch.randn(1, 20, 48, generator=generator),
            "feature_attention_mask": torch.ones(1, 48, dtype=torch.int64),
            "pixel_values": inputs["pixel_values"],
            "image_grid_thw": inputs["image_grid_thw"],
        }

    return hf.Qwen2_5OmniThinkerForConditionalGeneration(config), make


@_family
def video_llama3() -> Built:
    """Patches of 2 x 2 are averaged by resizing the grid."""
    vision = {**{n: v for n, v in _TOWER.items() if n != "image_size"}, "patch_size": 4}
    config = hf.VideoLlama3Config(
        vision_config={"model_type": "video_llama_3_vision", **vision},
        text_config={"model_type": "qwen2", **_TEXT},
        image_token_id=IMAGE,
        video_token_id=OTHER,
    )
    packed = _packed((1, 6, 8), width=48)

    def make(seed: int) -> Tensors:
        inputs = packed(seed)
        del inputs["mm_token_type_ids"]
        return {**inputs, "image_merge_sizes": torch.tensor([2])}

    return hf.VideoLlama3ForConditionalGeneration(config), make


@_family
def hunyuan_vl() -> Built:
    """Learned rows at both ends of a picture and behind each of its lines."""
    vision = {**_TOWER, "patch_size": 4, "image_size": 32, "temporal_patch_size": 1, "spatial_merge_size": 2}
    vision |= {"text_hidden_size": 32, "out_hidden_size": 32, "num_key_value_heads": 4}
    vision |= {"max_image_size": 32, "min_image_size": 32, "anyres_vit_max_image_size": 32, "max_vit_seq_len": 64}
    text = {**_TEXT, "head_dim": 8, "rope_parameters": {**_MROPE, "mrope_section": [1, 1, 1, 1]}}
    config = hf.HunYuanVLConfig(vision_config=vision, text_config=text, image_token_id=IMAGE)
    rows = [IMAGE] * (3 * (4 + 1) + 2)
    grid = torch.tensor([[1, 6, 8]])
    make = _pictures([3, rows, 4], 48, 48, batch=1, image_grid_thw=grid, mm_token_type_ids=_by_type)
    return hf.HunYuanVLForConditionalGeneration(config), make


_GLM_VISION: dict[str, Any] = {
    "depth": 2,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "patch_size": 4,
    "image_size": 32,
    "out_hidden_size": 32,
}
_GLM_ENDS = {"image_start_token_id": START, "image_end_token_id": END}
_GLM_SPECIAL = {"image_token_id": IMAGE, "video_token_id": OTHER, **_GLM_ENDS}
_GLM_TEXT = {**_TEXT, "rope_parameters": {**_MROPE, "partial_rotary_factor": 1.0}}


@_family
def glm4v() -> Built:
    """Its merger is a convolution."""
    config = hf.Glm4vConfig(vision_config=_GLM_VISION, text_config=_GLM_TEXT, **_GLM_SPECIAL)
    return hf.Glm4vForConditionalGeneration(config), _packed((1, 6, 8), width=_PATCH)


@_family
def glm46v() -> Built:
    text, vision = {"model_type": "glm4v_text", **_GLM_TEXT}, {"model_type": "glm4v_vision", **_GLM_VISION}
    config = hf.Glm46VConfig(vision_config=vision, text_config=text, **_GLM_SPECIAL)
    return hf.Glm46VForConditionalGeneration(config), _packed((1, 6, 8), width=_PATCH)


@_family
def paddleocr_vl() -> Built:
    vision = {**_TOWER, "patch_size": 4}
    text = {**_TEXT, "head_dim": 8, "rope_parameters": _MROPE}
    config = hf.PaddleOCRVLConfig(vision_config=vision, text_config=text, **_SPECIAL)
    packed = _packed((1, 6, 8), width=48)

    def make(seed: int) -> Tensors:
        inputs = packed(seed)
        return {**inputs, "pixel_values": inputs["pixel_values"].view(-1, 3, 4, 4)}

    return hf.PaddleOCRVLForConditionalGeneration(config), make


@_family
def kimi_k25() -> Built:
    """Patches as pictures of their own, a table of positions resampled to the grid, a language model with experts."""
    vision = {
        "patch_size": 4,
        "pos_emb_height": 8,
        "pos_emb_width": 8,
        "num_attention_heads": 4,
        "num_hidden_layers": 2,
        "hidden_size": 32,
        "intermediate_size": 48,
    }
    text = {
        **_TEXT,
        "model_type": "deepseek_v3",
        "num_key_value_heads": 4,
        "q_lora_rank": 16,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 8,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "n_shared_experts": 1,
        "moe_intermediate_size": 24,
        "first_k_dense_replace": 1,
    }
    config = hf.Kimi_K25Config(
        vision_config=vision, text_config=text, projection_hidden_size=32, image_token_id=IMAGE, video_token_id=OTHER
    )
    packed = _packed((1, 6, 8), width=48)

    def make(seed: int) -> Tensors:
        inputs = packed(seed)
        del inputs["mm_token_type_ids"]
        return {**inputs, "pixel_values": inputs["pixel_values"].view(-1, 3, 4, 4)}

    return hf.Kimi_K25ForConditionalGeneration(config), make


@_family
def minicpmv4_6() -> Built:
    """Merges windows of 2 x 2 behind its first layer, and 2 x 2 of those before the prompt: 16 patches a row."""
    vision = {**_PICTURE, "patch_size": 4, "image_size": 64}
    text = {"model_type": "qwen3_5_text", **_HYBRID, "layer_types": ["full_attention"] * 2}
    config = hf.MiniCPMV4_6Config(
        vision_config=vision, text_config=text, insert_layer_id=0, image_token_id=IMAGE, video_token_id=OTHER
    )
    shape = (1, 3, 4, 12 * 16 * 4)
    return hf.MiniCPMV4_6ForConditionalGeneration(config), _pictures(
        [3, [START, *[IMAGE] * 12, END], 4], *shape, batch=1, target_sizes=torch.tensor([[12, 16]])
    )


@_family
def lfm2_vl() -> Built:
    """Patches in rows of one length with a mask; short convolutions in the language model."""
    vision = {
        "model_type": "siglip2_vision_model",
        **{name: value for name, value in _TOWER.items() if name != "image_size"},
        "num_patches": 36,
        "vision_use_head": False,
    }
    text = {
        "model_type": "lfm2",
        **_TEXT,
        "num_hidden_layers": 4,
        "layer_types": ["conv", "full_attention"] * 2,
        "block_multiple_of": 8,
    }
    config = hf.Lfm2VlConfig(
        vision_config=vision, text_config=text, image_token_id=IMAGE, projector_hidden_size=40, downsample_factor=2
    )
    make = _pictures(
        [3, [START, *_NINE, END], 4],
        *(2, 36, 192),
        pixel_attention_mask=torch.ones(2, 36, dtype=torch.int64),
        spatial_shapes=torch.tensor([[6, 6]] * 2),
    )
    return hf.Lfm2VlForConditionalGeneration(config), make


@_family
def gemma4() -> Built:
    """Patches with their places, averaged 3 x 3; embeddings for each layer of the language model."""
    vision = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 4,
        "head_dim": 8,
        "patch_size": 4,
        "position_embedding_size": 16,
    }
    text = {
        **_TEXT,
        "head_dim": 8,
        "global_head_dim": 8,
        "sliding_window": 8,
        "num_hidden_layers": 3,
        "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "vocab_size_per_layer_input": 100,
        "hidden_size_per_layer_input": 4,
        "use_bidirectional_attention": "vision",
    }
    config = hf.Gemma4Config(
        vision_config=vision, text_config=text, image_token_id=IMAGE, video_token_id=OTHER, audio_token_id=93
    )
    at = torch.stack(torch.meshgrid(torch.arange(12), torch.arange(9), indexing="xy"), -1).reshape(1, 108, 2)
    make = _pictures(
        [3, [START, *[IMAGE] * 12, END], 4],
        *(2, 108, 48),
        image_position_ids=at.expand(2, -1, -1).contiguous(),
        mm_token_type_ids=_by_type,
    )
    model = hf.Gemma4ForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("q_norm.weight"):
                parameter.fill_(0.3)  # its scores have no scale of their own, and these sizes no training
    return model, make


# --- resamplers and query transformers --------------------------------------------------------------------------------


@_family
def idefics2() -> Built:
    """Nine latents read the picture: their rows are no patches."""
    perceiver = {
        "hidden_size": 32,
        "resampler_n_latents": 9,
        "resampler_depth": 2,
        "resampler_n_heads": 4,
        "resampler_head_dim": 8,
        "num_key_value_heads": 2,
    }
    config = hf.Idefics2Config(
        vision_config=_PICTURE,
        perceiver_config=perceiver,
        text_config={"model_type": "mistral", **_TEXT},
        image_token_id=IMAGE,
    )
    return hf.Idefics2ForConditionalGeneration(config), _images([3, [START, *_NINE, START], 4], 1)


_QFORMER: dict[str, Any] = {
    "vocab_size": 100,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "encoder_hidden_size": 32,
}


@_family
def blip_2() -> Built:
    """Nine queries, in front of the words as its processor puts them."""
    text = {**_TEXT, "model_type": "opt", "ffn_dim": 48, "word_embed_proj_dim": 32}
    config = hf.Blip2Config(
        vision_config=_PICTURE, qformer_config=_QFORMER, text_config=text, num_query_tokens=9, image_token_index=IMAGE
    )
    return hf.Blip2ForConditionalGeneration(config), _pictures([_NINE, 6], 2, 3, 48, 48)


@_family
def instructblip() -> Built:
    """Its queries read the instruction too."""
    text = {"model_type": "llama", **_TEXT}
    config = hf.InstructBlipConfig(
        vision_config=_PICTURE, qformer_config=_QFORMER, text_config=text, num_query_tokens=9, image_token_index=IMAGE
    )
    make = _pictures(
        [_NINE, 6],
        *(2, 3, 48, 48),
        qformer_input_ids=lambda ids: ids[:, 9:14],
        qformer_attention_mask=torch.ones(2, 5, dtype=torch.int64),
    )
    return hf.InstructBlipForConditionalGeneration(config), make


# --- pictures of one size, other ways ---------------------------------------------------------------------------------


@_family
def llama4() -> Built:
    """A class token behind the patches, pixel shuffle, experts, and layers that attend within chunks."""
    vision = {
        **_PICTURE,
        "vision_output_dim": 32,
        "projector_input_dim": 32,
        "projector_output_dim": 32,
        "intermediate_size": 128,
    }
    text = {
        **_TEXT,
        "intermediate_size_mlp": 48,
        "head_dim": 8,
        "num_local_experts": 2,
        "attention_chunk_size": 16,
        "layer_types": ["full_attention", "chunked_attention"],
        "no_rope_layer_interval": 2,
        "interleave_moe_layer_step": 2,
    }
    config = hf.Llama4Config(
        vision_config=vision, text_config=text, image_token_index=IMAGE, boi_token_index=START, eoi_token_index=END
    )
    return hf.Llama4ForConditionalGeneration(config), _pictures([3, [START, *_NINE, END], 4], 2, 3, 48, 48)


@_family
def florence2() -> Built:
    """A tower of windows and channels; a mean of the picture and its grid; an encoder and a decoder of words."""
    vision = {
        "depths": [1, 1],
        "patch_size": [7, 3],
        "patch_stride": [4, 2],
        "patch_padding": [3, 1],
        "patch_prenorm": [False, True],
        "embed_dim": [16, 32],
        "num_heads": [2, 4],
        "num_groups": [2, 4],
        "window_size": 2,
        "projection_dim": 32,
        "max_position_embeddings": 8,
    }
    text = {
        "model_type": "bart",
        "vocab_size": 100,
        "d_model": 32,
        "encoder_layers": 2,
        "decoder_layers": 1,
        "encoder_ffn_dim": 48,
        "decoder_ffn_dim": 48,
        "encoder_attention_heads": 4,
        "decoder_attention_heads": 4,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "decoder_start_token_id": 2,
    }
    config = hf.Florence2Config(vision_config=vision, text_config=text, image_token_id=IMAGE)
    make = _pictures([[IMAGE] * 17, 5], 2, 3, 32, 32, decoder_input_ids=lambda ids: ids[:, -4:])
    return hf.Florence2ForConditionalGeneration(config), make


@_family
def mllama() -> Built:
    """No placeholder becomes a row: some layers of the language model read the tiles as keys."""
    vision = {
        **{name: value for name, value in _PICTURE.items() if name != "num_attention_heads"},
        "attention_heads": 4,
        "num_global_layers": 1,
        "vision_output_dim": 64,
        "max_num_tiles": 2,
        "intermediate_layers_indices": [0],
        "supported_aspect_ratios": [[1, 1], [1, 2], [2, 1]],
    }
    text = {**_TEXT, "cross_attention_layers": [1], "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
    config = hf.MllamaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE)

    def reads(ids: Tensor) -> Tensor:
        return torch.ones(*ids.shape, 1, 2, dtype=torch.int64)

    make = _pictures(
        [[IMAGE], 6],
        *(2, 1, 2, 3, 48, 48),
        aspect_ratio_ids=torch.tensor([[2], [2]]),
        aspect_ratio_mask=torch.ones(2, 1, 2, dtype=torch.int64),
        cross_attention_mask=reads,
    )
    model = hf.MllamaForConditionalGeneration(config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "gate" in name and parameter.dim() < 2 and parameter.numel() == 1:
                parameter.fill_(0.7)  # closed at first: no picture would be read
    return model, make


# --- one row a patch --------------------------------------------------------------------------------------------------

_SIGLIP = {"model_type": "siglip_vision_model", **_TOWER, "vision_use_head": False}
_PROMPT_16: list[int | list[int]] = [3, [IMAGE] * 16, 4]


def _paligemma() -> hf.PaliGemmaConfig:
    vision = {**_SIGLIP, "projection_dim": 32}
    text = {"model_type": "gemma", **_TEXT, "head_dim": 8}
    return hf.PaliGemmaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE, projection_dim=32)


@_family
def paligemma() -> Built:
    make = _pictures([[IMAGE] * 16, 5], 2, 3, 32, 32, token_type_ids=torch.zeros_like)
    return hf.PaliGemmaForConditionalGeneration(_paligemma()), make


@_family
def llava() -> Built:
    config = hf.LlavaConfig(
        vision_config={"model_type": "clip_vision_model", **_CLIP, "num_hidden_layers": 3},
        text_config={"model_type": "llama", **_TEXT},
        image_token_index=IMAGE,
        image_seq_length=16,
    )
    return hf.LlavaForConditionalGeneration(config), _pictures(_PROMPT_16, 2, 3, 32, 32)


@_family
def llava_next() -> Built:
    """The whole picture and two halves; a row end behind each line of those."""
    config = hf.LlavaNextConfig(
        vision_config={"model_type": "clip_vision_model", **_CLIP, "num_hidden_layers": 3},
        text_config={"model_type": "llama", **_TEXT},
        image_token_index=IMAGE,
        image_grid_pinpoints=[[32, 64]],
        image_seq_length=16,
    )
    make = _pictures([3, [IMAGE] * (16 + 32 + 4), 4], 1, 3, 3, 32, 32, batch=1, image_sizes=torch.tensor([[32, 64]]))
    return hf.LlavaNextForConditionalGeneration(config), make


@_family
def granite4_vision() -> Built:
    """The whole picture and one crop of it with a row end behind each line; features of several depths are added to the
    places of the image in front of several layers, the first included."""
    config = hf.Granite4VisionConfig(
        vision_config=hf.SiglipVisionConfig(**{**_TOWER, "image_size": 96, "patch_size": 16}),
        text_config={
            "model_type": "granite4_vision_text",
            **{**_TEXT, "num_hidden_layers": 3, "embedding_multiplier": 2.0},
        },
        qformer_config={
            "model_type": "blip_2_qformer",
            "num_hidden_layers": 1,
            "intermediate_size": 48,
            "cross_attention_frequency": 1,
            "vocab_size": 100,
        },
        image_token_index=IMAGE,
        downsample_rate="3/6",
        deepstack_layer_map=[[-1, 0], [1, 1]],
        spatial_target_layers=[2],
        vision_feature_select_strategy="full",
        image_grid_pinpoints=[[96, 96]],
    )
    config.qformer_config.num_attention_heads = 4
    sizes = torch.tensor([[96, 96]] * 2)
    make = _pictures([3, [IMAGE] * (9 + 9 + 3), 4], 2, 2, 3, 96, 96, image_sizes=sizes)
    return hf.Granite4VisionForConditionalGeneration(config), make


@_family
def llava_onevision() -> Built:
    config = hf.LlavaOnevisionConfig(
        vision_config=_SIGLIP,
        text_config={"model_type": "qwen2", **_TEXT},
        image_token_index=IMAGE,
        video_token_index=OTHER,
        image_grid_pinpoints=[[32, 64]],
        vision_aspect_ratio="anyres_max_9",
    )
    make = _pictures([3, [IMAGE] * (16 + 32 + 4), 4], 1, 3, 3, 32, 32, batch=1, image_sizes=torch.tensor([[32, 64]]))
    return hf.LlavaOnevisionForConditionalGeneration(config), make


@_family
def janus() -> Built:
    vision = {**{n: v for n, v in _TOWER.items() if n != "intermediate_size"}, "projection_dim": 32, "mlp_ratio": 1.5}
    codes = {
        "embed_dim": 4,
        "num_embeddings": 16,
        "latent_channels": 4,
        "base_channels": 32,
        "channel_multiplier": [1, 1],
        "num_res_blocks": 1,
        "projection_dim": 32,
        "num_patches": 4,
        "image_token_embed_dim": 32,
    }
    config = hf.JanusConfig(
        vision_config=vision,
        vq_config=codes,
        text_config={"model_type": "llama", **_TEXT},
        image_token_id=IMAGE,
    )
    return hf.JanusForConditionalGeneration(config), _pictures(_PROMPT_16, 2, 3, 32, 32)


# --- retrieval --------------------------------------------------------------------------------------------------------


@_family
def colpali() -> Built:
    """An embedding for every token of the prompt."""
    make = _pictures([[IMAGE] * 16, 5], 2, 3, 32, 32, token_type_ids=torch.zeros_like)
    return hf.ColPaliForRetrieval(hf.ColPaliConfig(vlm_config=_paligemma(), embedding_dim=12)), make


@_family
def colqwen2() -> Built:
    """Patches come padded to the longest picture of a batch, as its processor makes them."""
    vision = {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 4, "patch_size": 4}
    vlm = hf.Qwen2VLConfig(vision_config=vision, text_config={**_TEXT, "rope_parameters": _MROPE}, **_SPECIAL)
    packed = _packed((1, 6, 8), width=_PATCH)

    def make(seed: int) -> Tensors:
        inputs = packed(seed)
        del inputs["mm_token_type_ids"]
        return {**inputs, "pixel_values": inputs["pixel_values"][None]}

    return hf.ColQwen2ForRetrieval(hf.ColQwen2Config(vlm_config=vlm, embedding_dim=12)), make


@functools.cache
def captured(name: str) -> tuple[nn.Module, Callable[[int], Tensors], str, pumer.Program]:
    """A model of a family, what makes its inputs, what it gives for every token (logits, or embeddings), and its graph;
    captured once for all tests of a process."""
    model, make = built(name)
    with torch.no_grad():  # Emu3 keeps tensors that it makes at first, and would keep those of a trace
        output = "logits" if "logits" in model(**make(0)) else "embeddings"
    return model, make, output, pumer.capture(model, make(0), outputs=[output])


PUBLISHED = {
    "colpali": {IMAGE: "multi_modal_projector"},
    "janus": {IMAGE: "aligner"},
    "llava": {IMAGE: "multi_modal_projector"},
    "paligemma": {IMAGE: "multi_modal_projector"},
    "video_llava": {OTHER: "multi_modal_projector"},
}
"""Of families with one row a token, by placeholder, the projector in front of which VisPruner selects as published."""


def placeholders(name: str) -> dict[int, str]:
    """The tokens of a family that features take the places of, and that projector or ""."""
    return {IMAGE: "", OTHER: "", **PUBLISHED.get(name, {})}


def decoder_of(model: nn.Module) -> nn.Module:
    """The module that reads the prompt's embeddings; of two that read and write, the one that reads."""
    found = next(m for path, m in model.named_modules() if path.endswith(("language_model", "text_model")))
    return found.encoder if hasattr(found, "encoder") else found


def layers_of(model: nn.Module) -> list[nn.Module]:
    """The layers of that."""
    return list(next(m for path, m in decoder_of(model).named_modules() if path.split(".")[-1] == "layers"))


def built(name: str) -> Built:
    """A model of a family whose attention is uneven, and what makes its inputs of a seed."""
    torch.manual_seed(0)
    model, make = FAMILIES[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model.eval(), make
