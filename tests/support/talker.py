"""A small language model that is given image features in place of some words, written out."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IMAGE = 99


SCATTER = torch.ops.aten.masked_scatter.default


Tensors = dict[str, Tensor]


class Block(nn.Module):
    """Attention and a residual; causal where it is told so."""

    def __init__(self, width: int, heads: int, causal: bool) -> None:
        super().__init__()
        self.q, self.k = nn.Linear(width, width), nn.Linear(width, width)
        self.v, self.out = nn.Linear(width, width), nn.Linear(width, width)
        self.heads, self.causal = heads, causal
        self.seen: Tensor | None = None

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        batch, n, width = x.shape
        q, k, v = (f(x).view(batch, n, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v))
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        return x + self.out(y.transpose(1, 2).reshape(batch, n, width))


class Tower(nn.Module):
    """Patches, with a class token or without."""

    def __init__(self, width: int, heads: int, cls: bool) -> None:
        super().__init__()
        self.patch = nn.Conv2d(3, width, 8, 8)
        self.token = nn.Parameter(torch.randn(1, 1, width)) if cls else None
        self.layers = nn.ModuleList(Block(width, heads, False) for _ in range(2))

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.patch(pixels).flatten(2).transpose(1, 2)
        if self.token is not None:
            x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        for layer in self.layers:
            x = layer(x, None)
        return x[:, 1:] if self.token is not None else x


class Talker(nn.Module):
    """A language model that is given image features in place of some words."""

    def __init__(self, width: int = 16, heads: int = 4, cls: bool = True, learned: bool = True) -> None:
        super().__init__()
        self.tower = Tower(width, heads, cls)
        self.projector = nn.Linear(width, width) if learned else nn.Identity()
        self.words = nn.Embedding(100, width)
        self.places = nn.Embedding(64, width)
        self.layers = nn.ModuleList(Block(width, heads, True) for _ in range(2))
        self.head = nn.Linear(width, 11)

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> dict[str, Tensor]:
        features = self.projector(self.tower(pixel_values))
        words = self.words(input_ids)
        prompt = words.masked_scatter((input_ids == IMAGE).unsqueeze(-1).expand_as(words), features)
        return {"logits": self.read(prompt, attention_mask)}

    def read(self, prompt: Tensor, attention_mask: Tensor) -> Tensor:
        places = torch.arange(prompt.shape[1], device=prompt.device)
        x = prompt + self.places(places)
        mask = (places.unsqueeze(0) <= places.unsqueeze(1)) & attention_mask[:, None, None, :].bool()
        for layer in self.layers:
            x = layer(x, mask)
        return self.head(x)


def talker(**options: Any) -> Talker:
    torch.manual_seed(0)
    return Talker(**options).eval()


def prompts(before: int, after: int, batch: int = 2, grid: tuple[int, int] = (4, 4), seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    image = grid[0] * grid[1]
    ids = torch.randint(0, IMAGE, (batch, before + image + after), generator=generator)
    ids[:, before : before + image] = IMAGE
    pixels = torch.randn(batch, 3, 8 * grid[0], 8 * grid[1], generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}
