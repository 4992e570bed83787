"""Stock ViLT layers run by hand, one sample at a time, with the published reduction in between.

Shares no code with the package: the algorithms are those of `helpers.py`, the weights those of transformers' model.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import ViltForQuestionAnswering

from tests.support.helpers import combine, published_counts, published_softmax, reduce_image, reduce_text

Shares = tuple[float, float, float]
"""Image pruned, image merged, text merged."""


def reduced_vilt(
    model: ViltForQuestionAnswering, inputs: Mapping[str, Tensor], sites: Mapping[int, Shares]
) -> tuple[Tensor, list[tuple[int, int]]]:
    """Logits with reducers after the attention of some layers, and `(text, image)` tokens after each layer.

    Images must fill the canvas: every pixel mask is taken for ones.
    """
    logits, counts = [], []
    with torch.no_grad():
        for row in range(len(inputs["input_ids"])):
            sample = {name: tensor[row : row + 1] for name, tensor in inputs.items()}
            sample_logits, counts = _sample(model, sample, sites)
            logits.append(sample_logits)
    return torch.stack(logits), counts


def _sample(
    model: ViltForQuestionAnswering, sample: Mapping[str, Tensor], sites: Mapping[int, Shares]
) -> tuple[Tensor, list[tuple[int, int]]]:
    stock = model.vilt
    words, patches = _embed(model, sample)
    x, text = torch.cat([words, patches]), len(words)
    weights = [*sample["attention_mask"][0].double().tolist(), *[1.0] * len(patches)]
    counts = []
    for index, layer in enumerate(stock.encoder.layer):
        normed = layer.layernorm_before(x)
        attention = layer.attention.attention
        heads = model.config.num_attention_heads
        query, key, value = (
            linear(normed).view(len(x), heads, -1).transpose(0, 1)
            for linear in (attention.query, attention.key, attention.value)
        )
        scores = query @ key.transpose(1, 2) / key.shape[-1] ** 0.5
        opened = np.stack([published_softmax(head.double().numpy(), np.array(weights)) for head in scores])
        context = (torch.from_numpy(opened).float() @ value).transpose(0, 1).reshape(len(x), -1)
        x = x + layer.attention.output.dense(context)
        if index in sites:
            x, text, weights = _reduced(x, text, weights, opened, key.double().numpy(), sites[index])
        x = x + layer.output.dense(layer.intermediate(layer.layernorm_after(x)))
        counts.append((text, len(x) - text))
    pooled = stock.pooler(stock.layernorm(x).unsqueeze(0))
    return model.classifier(pooled)[0], counts


def _embed(model: ViltForQuestionAnswering, sample: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    embeddings, config = model.vilt.embeddings, model.config
    kinds = embeddings.token_type_embeddings.weight
    words = embeddings.text_embeddings(sample["input_ids"])[0] + kinds[0]
    patches = embeddings.patch_embeddings.projection(sample["pixel_values"])
    grid = config.image_size // config.patch_size
    table = embeddings.position_embeddings[0, 1:].T.reshape(1, config.hidden_size, grid, grid)
    positions = F.interpolate(table, size=patches.shape[2:], mode="bilinear", align_corners=True)
    image = (patches + positions)[0].flatten(1).T
    learned = embeddings.cls_token[0] + embeddings.position_embeddings[0, :1]
    return words, torch.cat([learned, image]) + kinds[1]


def _reduced(
    x: Tensor, text: int, weights: list[float], opened: np.ndarray, keys: np.ndarray, shares: Shares
) -> tuple[Tensor, int, list[float]]:
    image = len(x) - text
    keep, merge_image, merge_text = published_counts(image, text, *shares)
    words = reduce_text(keys[:, :text], merge_text)
    patches = reduce_image(opened[:, :text, text:], keys[:, text:], keep, merge_image)
    members = words + [[text + i for i in group] for group in patches]
    carried = [sum(weights[i] for i in group) / len(group) for group in words]
    return combine(x, members).float(), len(words), [*carried, *[1.0] * len(patches)]
