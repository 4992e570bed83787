"""METER from its weights alone: published key names, matrix products and softmaxes in float64, one sample at a time.

Shares no code with the package or with transformers' modules; the order of operations is that of the published code.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

from pumer_compile.frontends.meter import MeterConfig, MeterForQuestionAnswering
from tests.support.helpers import published_softmax

Model = TypeVar("Model", bound=PreTrainedModel)
Weights = Mapping[str, Tensor]

# Widths, heads and lengths all differ, so that no mix-up of two of them fits.
SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "max_position_embeddings": 48,
    "text_layers": 1,
    "image_size": 48,
    "vit_patch_size": 16,
    "vit_layers": 2,
    "vit_width": 20,
    "vit_heads": 2,
    "num_top_layer": 2,
    "hidden_size": 24,
    "num_heads": 3,
    "mlp_ratio": 2,
    "vqa_label_size": 5,
}


def tiny_meter(model_class: type[Model] = MeterForQuestionAnswering, seed: int = 0, **config: Any) -> Model:
    """A METER with random weights large enough that a wrong position or mask shows in the logits, in eval mode."""
    torch.manual_seed(seed)
    model = model_class(MeterConfig(**{**SIZES, **config}))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            norm = "LayerNorm" in name or ".ln_" in name or "classifier.1." in name
            parameter.normal_(mean=float(norm and name.endswith("weight")), std=0.3)
    return model.eval()


def meter_inputs(batch: int, length: int = 7, images: int = 1, size: int = 48, seed: int = 0) -> dict[str, Tensor]:
    """Random words, padded on the right with token 1 from the second sample on, and images."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(2, 60, (batch, length), generator=generator)
    mask = torch.ones_like(ids)
    for row in range(1, batch):
        mask[row, max(1, length - 2 * row) :] = 0
    shape = (batch, *([images] if images > 1 else []), 3, size, size)
    pixels = torch.randn(shape, generator=generator)
    return {"input_ids": ids.where(mask.bool(), 1), "attention_mask": mask, "pixel_values": pixels}


def pooled_by_hand(
    model: PreTrainedModel, inputs: Mapping[str, Tensor], *, published: bool = False, image_type: int = 1
) -> Tensor:
    """Pooled text and image, `[B, 2 * hidden]`, of the `meter.*` weights of a model with a head.

    `published` uses the published masked softmax in the co-attention layers.
    """
    weights = {name: tensor.detach().double() for name, tensor in model.state_dict().items()}
    samples = zip(inputs["input_ids"], inputs["attention_mask"], inputs["pixel_values"].double(), strict=True)
    return torch.stack([_sample(weights, model.config, *sample, published, image_type) for sample in samples])


def classify_by_hand(model: PreTrainedModel, head: str, pooled: Tensor) -> Tensor:
    """The logits of a released classifier: linear, layer norm, GELU, linear."""
    weights = {name: tensor.detach().double() for name, tensor in model.state_dict().items()}
    hidden = F.gelu(_norm(weights, f"{head}.1", _linear(weights, f"{head}.0", pooled), 1e-5))
    return _linear(weights, f"{head}.3", hidden)


def _sample(
    weights: Weights, config: Any, ids: Tensor, mask: Tensor, pixels: Tensor, published: bool, image_type: int
) -> Tensor:
    types = weights["meter.token_type_embeddings.weight"]
    text = _linear(weights, "meter.cross_modal_text_transform", _roberta(weights, config, ids, mask)) + types[0]
    image = _linear(weights, "meter.cross_modal_image_transform", _clip(weights, config, pixels)) + types[image_type]
    ones = torch.ones(len(image))
    softmax = _published if published else _stock
    for pair in range(config.num_top_layer):
        before = text
        text = _co_attention(weights, config, f"meter.cross_modal_text_layers.{pair}", text, mask, image, ones, softmax)
        seen = {"updated_text": text, "previous_text": before}[config.image_attends_to]
        image = _co_attention(
            weights, config, f"meter.cross_modal_image_layers.{pair}", image, ones, seen, mask, softmax
        )
    pools = [
        torch.tanh(_linear(weights, f"meter.cross_modal_{name}_pooler.dense", states[0]))
        for name, states in (("text", text), ("image", image))
    ]
    return torch.cat(pools)


def _roberta(weights: Weights, config: Any, ids: Tensor, mask: Tensor) -> Tensor:
    prefix, eps = "meter.text_transformer", config.layer_norm_eps_text
    position, positions = config.pad_token_id, []
    for token in ids.tolist():
        position += token != config.pad_token_id
        positions.append(position if token != config.pad_token_id else config.pad_token_id)
    tables = {name: weights[f"{prefix}.embeddings.{name}_embeddings.weight"] for name in ("word", "position")}
    x = tables["word"][ids] + tables["position"][positions]
    x = x + weights[f"{prefix}.embeddings.token_type_embeddings.weight"][0]
    x = _norm(weights, f"{prefix}.embeddings.LayerNorm", x, eps)
    for layer in range(config.text_layers):
        name = f"{prefix}.encoder.layer.{layer}"
        x = _attention(weights, f"{name}.attention", x, x, mask, config.num_heads, eps, _stock)
        x = _feed_forward(weights, name, x, eps)
    return x


def _clip(weights: Weights, config: Any, pixels: Tensor) -> Tensor:
    prefix, patch = "meter.vit_model", config.vit_patch_size
    kernel = weights[f"{prefix}.conv1.weight"]
    patches = [
        torch.einsum("oihw,ihw->o", kernel, pixels[:, top : top + patch, left : left + patch])
        for top in range(0, pixels.shape[1], patch)
        for left in range(0, pixels.shape[2], patch)
    ]
    x = torch.stack([weights[f"{prefix}.class_embedding"], *patches]) + weights[f"{prefix}.positional_embedding"]
    x = _norm(weights, f"{prefix}.ln_pre", x, 1e-5)
    for block in range(config.vit_layers - 1):
        name = f"{prefix}.transformer.resblocks.{block}"
        normed = _norm(weights, f"{name}.ln_1", x, 1e-5)
        stacked = normed @ weights[f"{name}.attn.in_proj_weight"].T + weights[f"{name}.attn.in_proj_bias"]
        q, k, v = stacked.chunk(3, 1)
        context = _attend(q, k, v, torch.ones(len(x)), config.vit_heads, _stock)
        x = x + _linear(weights, f"{name}.attn.out_proj", context)
        hidden = _linear(weights, f"{name}.mlp.c_fc", _norm(weights, f"{name}.ln_2", x, 1e-5))
        x = x + _linear(weights, f"{name}.mlp.c_proj", hidden / (1 + torch.exp(-1.702 * hidden)))
    return _norm(weights, f"{prefix}.ln_post", x, 1e-5)


Softmax = Callable[[Tensor, Tensor], Tensor]


def _stock(scores: Tensor, mask: Tensor) -> Tensor:
    x = (scores - scores.max()).exp() * mask
    return x / x.sum(-1, keepdim=True)


def _published(scores: Tensor, mask: Tensor) -> Tensor:
    return torch.from_numpy(published_softmax(scores.numpy(), np.asarray(mask.double())))


def _co_attention(
    weights: Weights,
    config: Any,
    name: str,
    x: Tensor,
    mask: Tensor,
    other: Tensor,
    other_mask: Tensor,
    softmax: Softmax,
) -> Tensor:
    heads, eps = config.num_heads, config.layer_norm_eps_cross
    x = _attention(weights, f"{name}.attention", x, x, mask, heads, eps, softmax)
    x = _attention(weights, f"{name}.crossattention", x, other, other_mask, heads, eps, softmax)
    return _feed_forward(weights, name, x, eps)


def _attention(
    weights: Weights, name: str, x: Tensor, other: Tensor, mask: Tensor, heads: int, eps: float, softmax: Softmax
) -> Tensor:
    query, key, value = (
        _linear(weights, f"{name}.self.{part}", given)
        for part, given in (("query", x), ("key", other), ("value", other))
    )
    context = _attend(query, key, value, mask, heads, softmax)
    return _norm(weights, f"{name}.output.LayerNorm", _linear(weights, f"{name}.output.dense", context) + x, eps)


def _attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, heads: int, softmax: Softmax) -> Tensor:
    parts = []
    for q, k, v in zip(query.chunk(heads, 1), key.chunk(heads, 1), value.chunk(heads, 1), strict=True):
        parts.append(softmax(q @ k.T / math.sqrt(q.shape[1]), mask) @ v)
    return torch.cat(parts, 1)


def _feed_forward(weights: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    hidden = F.gelu(_linear(weights, f"{name}.intermediate.dense", x))
    return _norm(weights, f"{name}.output.LayerNorm", _linear(weights, f"{name}.output.dense", hidden) + x, eps)


def _linear(weights: Weights, name: str, x: Tensor) -> Tensor:
    return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]


def _norm(weights: Weights, name: str, x: Tensor, eps: float) -> Tensor:
    centred = x - x.mean(-1, keepdim=True)
    scaled = centred / torch.sqrt((centred**2).mean(-1, keepdim=True) + eps)
    return scaled * weights[f"{name}.weight"] + weights[f"{name}.bias"]
