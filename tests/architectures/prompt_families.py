"""Small models of families whose image tokens are more than a tower's patches: merged, pooled, looked up, projected."""

from __future__ import annotations

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
        vision_config=hf.SiglipVisionConfig(**_TOWER), text_config=hf.Cohere2Config(**_TEXT), image_token_index=IMAGE
    )
    return hf.AyaVisionForConditionalGeneration(config), _prompts((IMAGE, 4), pixel_values=(3, 32, 32))


@_family
def cohere2_vision() -> Built:
    config = hf.Cohere2VisionConfig(
        vision_config=hf.SiglipVisionConfig(**_TOWER),
        text_config=hf.Cohere2Config(**_TEXT),
        image_token_id=IMAGE,
        alignment_intermediate_size=64,
    )
    return hf.Cohere2VisionForConditionalGeneration(config), _prompts((IMAGE, 4), pixel_values=(3, 32, 32))


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


def built(name: str) -> Built:
    """A model of a family whose attention is uneven, and what makes its inputs of a seed."""
    torch.manual_seed(0)
    model, make = FAMILIES[name]()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.2)
    return model.eval(), make
