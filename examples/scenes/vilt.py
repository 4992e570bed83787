"""A small ViLT for the scenes, and a forward that asks several questions of one picture at once.

Stock ViLT lets image tokens attend to the question, so every question needs the image tokens computed anew. `packed`
runs the same parameters with one change: image tokens attend to image tokens alone, and each question to itself and to
the image. Several questions then share one picture, five times as many a second. A model learns with `packed` first,
and then for the rest with stock attention: what is saved, reduced and measured is a stock ViLT.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import ViltConfig, ViltForQuestionAnswering

from .data import TEXT_LENGTH
from .draw import CELL
from .questions import ANSWERS
from .scene import SIDE


def build_vilt(vocab_size: int, width: int = 128, layers: int = 6, inner: int = 512) -> ViltForQuestionAnswering:
    """A ViLT of 196 patches and a class token beside sixteen text tokens.

    Matrices start as Glorot and Bengio have it, since 0.02 is too small for this width, and the places of patches as
    sines and cosines of their two coordinates.
    """
    config = ViltConfig(
        vocab_size=vocab_size,
        max_position_embeddings=TEXT_LENGTH,
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=width // 32,
        intermediate_size=inner,
        hidden_dropout_prob=0.0,
        attention_probs_dropout_prob=0.0,
        image_size=SIDE,
        patch_size=CELL,
        pad_token_id=0,
        id2label=dict(enumerate(ANSWERS)),
        label2id={answer: label for label, answer in enumerate(ANSWERS)},
    )
    model = ViltForQuestionAnswering(config)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    embeddings = model.vilt.embeddings
    nn.init.normal_(embeddings.patch_embeddings.projection.weight, std=(3 * CELL**2) ** -0.5)
    nn.init.normal_(embeddings.cls_token, std=0.5)
    with torch.no_grad():
        embeddings.position_embeddings[0, 1:] = 0.5 * waves(SIDE // CELL, width)
    return model


def waves(side: int, width: int) -> Tensor:
    """Sines and cosines of the columns and rows of a square, float32 [side * side, width]."""
    rates = math.pi * torch.logspace(0, math.log10(side / 2), width // 4) / side
    angles = torch.arange(side)[:, None] * rates
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    return torch.cat([axis[None, :].expand(side, -1, -1), axis[:, None].expand(-1, side, -1)], dim=2).flatten(0, 1)


def embed_image(model: ViltForQuestionAnswering, pixels: Tensor) -> Tensor:
    """Class token and patches in raster order with their places, float [batch, 197, width].

    Stock ViLT puts the patches of each picture in a random order, one picture after the other; attention does not see
    the order.
    """
    embeddings = model.vilt.embeddings
    patches = embeddings.patch_embeddings(pixels).flatten(2).transpose(1, 2)
    tokens = torch.cat([embeddings.cls_token.expand(len(patches), -1, -1), patches], dim=1)
    return tokens + embeddings.position_embeddings + embeddings.token_type_embeddings.weight[1]


def embed_text(model: ViltForQuestionAnswering, ids: Tensor) -> Tensor:
    """float [..., width] of ids [..., TEXT_LENGTH]."""
    embeddings = model.vilt.embeddings
    text = embeddings.text_embeddings(input_ids=ids.flatten(0, -2))
    return (text + embeddings.token_type_embeddings.weight[0]).view(*ids.shape, -1)


def packed(
    model: ViltForQuestionAnswering, pixels: Tensor, ids: Tensor, stock: bool
) -> Iterator[tuple[Tensor, Tensor]]:
    """Text and image tokens after each layer, text [batch, questions, tokens, width] and image [batch, 197, width].

    Args:
        model: what computes.
        pixels: float32 [batch, 3, 112, 112].
        ids: int64 [batch, questions, tokens].
        stock: image tokens attend to the question as in stock ViLT; for one question a picture.
    """
    batch, questions, tokens = ids.shape
    if stock and questions != 1:
        raise ValueError(f"stock attention takes one question a picture; found {questions}")
    text, image = embed_text(model, ids).flatten(1, 2), embed_image(model, pixels)
    length, heads = text.shape[1], model.config.num_attention_heads
    told = (ids != 0).flatten(1)
    own = torch.arange(length) // tokens
    mask = torch.cat(
        [told[:, None] & (own[:, None] == own), torch.ones(batch, length, image.shape[1], dtype=torch.bool)], dim=2
    )[:, None]
    if stock:
        mask = mask[:, :, :1]
    mask = torch.zeros(mask.shape).masked_fill_(~mask, -1e9)
    hidden = torch.cat([text, image], dim=1)
    for layer in model.vilt.encoder.layer:
        hidden = hidden + _attend(layer, hidden, mask, length, heads, stock)
        inner = layer.intermediate(layer.layernorm_after(hidden))
        hidden = hidden + layer.output.dense(inner)
        yield hidden[:, :length].unflatten(1, (questions, tokens)), hidden[:, length:]


def see(model: ViltForQuestionAnswering, pixels: Tensor, layers: int) -> Tensor:
    """Image tokens after some layers, float [batch, 197, width]: those of `packed`, which know no question."""
    hidden = embed_image(model, pixels)
    for layer in model.vilt.encoder.layer[:layers]:
        hidden = hidden + _attend(layer, hidden, None, 0, model.config.num_attention_heads, True)
        hidden = hidden + layer.output.dense(layer.intermediate(layer.layernorm_after(hidden)))
    return hidden


def _attend(layer: nn.Module, hidden: Tensor, mask: Tensor | None, length: int, heads: int, stock: bool) -> Tensor:
    """What attention adds to the tokens."""
    attention = layer.attention.attention
    parts = (attention.query, attention.key, attention.value)
    weight, bias = torch.cat([p.weight for p in parts]), torch.cat([p.bias for p in parts])
    projected = functional.linear(layer.layernorm_before(hidden), weight, bias)
    query, key, value = projected.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    query = query * query.shape[-1] ** -0.5
    if stock:
        context = _mix(query, key, value, mask)
    else:
        asked = _mix(query[:, :, :length], key, value, mask)
        context = torch.cat([asked, _mix(*(x[:, :, length:] for x in (query, key, value)))], dim=2)
    return layer.attention.output.dense(context.transpose(1, 2).flatten(2))


def _mix(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
    """Attention as two products: in bfloat16 on processors, they are twice as fast as the fused operator's backward."""
    scores = query @ key.transpose(-1, -2)
    if mask is not None:
        scores = scores + mask.to(scores.dtype)
    return scores.softmax(-1).to(value.dtype) @ value


def answer_logits(model: ViltForQuestionAnswering, text: Tensor) -> Tensor:
    """float [batch, questions, answers] of the last layer's text tokens."""
    pooled = model.vilt.pooler.dense(model.vilt.layernorm(text[:, :, 0])).tanh()
    return model.classifier(pooled)
