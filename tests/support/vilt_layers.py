"""Transformers' own ViLT layers run by hand, one sample at a time, with the algorithms of `helpers.py` in between."""

from __future__ import annotations

from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor

from tests.support.helpers import combine, paper_counts, published_counts, reduce_image, reduce_text


def in_order(weights: Tensor, count: int, replacement: bool = False) -> Tensor:
    """`torch.multinomial` without chance: the first `count`."""
    return torch.arange(int(count))


def published_softmax(scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The published masked softmax, `scores [heads, n, n]` and `weights [n]`."""
    n = scores.shape[-1]
    mask = weights[None, :] + (1 - weights[None, :]) * np.eye(n)
    x = np.exp(scores - scores.max(-1, keepdims=True)) * mask
    return (x + 1e-6 / n) / (x.sum(-1, keepdims=True) + 1e-6)


class Sample:
    """One sample on its way: its tokens, how many are text, what is real of each."""

    def __init__(self, x: Tensor, mask: Tensor, text: int) -> None:
        self.x, self.text = x, text
        self.sizes, self.shares = mask.double().tolist(), mask.double().tolist()

    def attend(self, layer: torch.nn.Module, semantics: str) -> tuple[Tensor, np.ndarray, np.ndarray]:
        """Output of the attention module, its probabilities and its keys."""
        attention = layer.attention.attention
        heads, size = attention.num_attention_heads, attention.attention_head_size
        normed = layer.layernorm_before(self.x)
        q, k, v = (
            m(normed).view(-1, heads, size).transpose(0, 1) for m in (attention.query, attention.key, attention.value)
        )
        if semantics == "reference":
            scores = (q @ k.transpose(1, 2) / size**0.5).double().numpy()
            probabilities = torch.from_numpy(published_softmax(scores, np.array(self.sizes))).float()
            context = (probabilities @ v).transpose(0, 1).flatten(1)
        else:
            mask = torch.tensor(self.shares).log().clamp(min=torch.finfo(torch.float32).min).float()
            given = attention(normed.unsqueeze(0), mask.view(1, 1, 1, -1), True)
            context, probabilities = given[0][0], given[1][0]
        return layer.attention.output(context, None), probabilities.double().numpy(), k.double().numpy()

    def reduce(self, probabilities: np.ndarray, keys: np.ndarray, case: dict[str, Any], semantics: str) -> None:
        text, image, safe = self.text, len(self.x) - self.text, semantics == "safe"
        count = paper_counts if semantics == "paper" else published_counts
        keep, merge, words = count(image, text, case["prune"], case["merge_image"], case["merge_text"])
        real = [size > 0 for size in self.sizes]
        kind = "dot" if semantics == "paper" else "cosine"
        members = reduce_text(keys[:, :text], words, similarity=kind, real=real[:text] if safe else None, in_order=safe)
        patches = reduce_image(
            probabilities[:, :text, text:],
            keys[:, text:],
            keep,
            merge,
            similarity=kind,
            votes=real[:text] if safe else None,
            learned=1 if safe else 0,
            real=real[text:] if safe else None,
            in_order=safe,
        )
        self.text = len(members)
        members = members + [[text + i for i in group] for group in patches]
        self.x = combine(self.x, members, self.sizes if safe else None).float()
        sizes, shares = self.sizes, self.shares
        weights = sizes if safe else [1.0] * len(sizes)
        totals = [sum(weights[i] for i in g) for g in members]
        self.shares = [
            sum(weights[i] * shares[i] for i in g) / t if t else 0.0 for g, t in zip(members, totals, strict=True)
        ]
        if safe:
            self.sizes = totals
        else:
            self.sizes = [sum(sizes[i] for i in g) / len(g) for g in members]
            if semantics == "reference":
                self.sizes[self.text :] = [1.0] * len(patches)


def encode(
    vilt: torch.nn.Module, sample: dict[str, Tensor], case: dict[str, Any], semantics: str, kind: int = 1
) -> tuple[Tensor, list[list[int]]]:
    """The pooled output of a `ViltModel`, and `[text, image]` after every layer."""
    size = vilt.config.image_size
    ones, counts = torch.ones(len(sample["input_ids"]), size, size), []
    with torch.no_grad(), mock.patch.object(torch, "multinomial", in_order):
        x, mask = vilt.embeddings(
            sample["input_ids"], sample["attention_mask"], None, sample["pixel_values"], ones, None, None, kind
        )
        samples = [Sample(x[b], mask[b], sample["input_ids"].shape[1]) for b in range(len(x))]
        for index, layer in enumerate(vilt.encoder.layer):
            for s in samples:
                output, probabilities, keys = s.attend(layer, semantics)
                s.x = output + s.x
                if index in case["layers"]:
                    s.reduce(probabilities, keys, case, semantics)
                s.x = layer.output(layer.intermediate(layer.layernorm_after(s.x)), s.x)
            counts.append([samples[0].text, len(samples[0].x) - samples[0].text])
        return vilt.pooler(vilt.layernorm(torch.stack([s.x for s in samples]))), counts
