"""The control: stock ViLT that drops tokens at random, down to the counts a reduced model keeps.

It shows what choosing the tokens is worth. Padding of the text goes first, so that the control loses words
only when no padding is left.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import ViltForQuestionAnswering

from examples.easy_vqa.training import raster_embeds


@dataclass(frozen=True)
class TokenCounts:
    """Tokens kept after one reduction; each stream counts its own CLS token."""

    text: int
    image: int


class RandomPruning:
    """Logits of `model` with tokens dropped at random between attention and MLP of the layers in `counts`."""

    def __init__(self, model: ViltForQuestionAnswering, counts: Mapping[int, TokenCounts], seed: int) -> None:
        self.model = model
        self.counts = counts
        self.generator = torch.Generator().manual_seed(seed)

    def __call__(self, batch: dict[str, Tensor]) -> Tensor:
        """Answer logits, float [batch, answers], for ViLT's inputs by forward argument."""
        vilt = self.model.vilt
        image_embeds = raster_embeds(self.model, batch["pixel_values"])
        hidden, mask = vilt.embeddings(
            input_ids=batch["input_ids"],
            attention_mask=batch["attention_mask"],
            token_type_ids=None,
            pixel_values=None,
            pixel_mask=torch.ones(image_embeds.shape[:2], dtype=torch.int64),
            inputs_embeds=None,
            image_embeds=image_embeds,
        )
        text_tokens = batch["input_ids"].shape[1]
        for index, layer in enumerate(vilt.encoder.layer):
            bias = (1.0 - mask[:, None, None, :].to(hidden.dtype)) * torch.finfo(hidden.dtype).min
            hidden = hidden + layer.attention(layer.layernorm_before(hidden), bias)[0]
            if index in self.counts:
                kept = self._keep(mask, text_tokens, self.counts[index])
                hidden = hidden.gather(1, kept[:, :, None].expand(-1, -1, hidden.shape[2]))
                mask = mask.gather(1, kept)
                text_tokens = self.counts[index].text
            hidden = layer.output(layer.intermediate(layer.layernorm_after(hidden)), hidden)
        return self.model.classifier(vilt.pooler(vilt.layernorm(hidden)))

    def _keep(self, mask: Tensor, text_tokens: int, counts: TokenCounts) -> Tensor:
        """Positions in [text | image] to keep, int64 [batch, tokens of `counts`]; both CLS tokens stay."""
        # The mask is 1 for words and 0 for padding: added to a number below one, it puts all padding last.
        priority = torch.rand(mask.shape, generator=self.generator) + mask
        priority[:, 0] = priority[:, text_tokens] = torch.inf
        text = priority[:, :text_tokens].topk(counts.text).indices
        image = priority[:, text_tokens:].topk(counts.image).indices + text_tokens
        return torch.cat([text.sort().values, image.sort().values], dim=1)
