"""CLIP's image encoder as METER uses it: every token, without the last block."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.activations import ACT2FN

from ...errors import UsageError
from .configuration import MeterConfig


class VisionAttention(nn.Module):
    """Self-attention with CLIP's parameters: query, key and value weights stacked, in this order."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.in_proj_weight = nn.Parameter(torch.empty(3 * width, width))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * width))
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, tokens, width]` to the same."""
        query, key, value = (
            projected.unflatten(-1, (self.heads, -1)).transpose(1, 2)
            for projected in F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
        )
        scores = torch.matmul(query, key.transpose(-1, -2)) * query.shape[-1] ** -0.5
        context = torch.matmul(scores.softmax(dim=-1), value)
        result: Tensor = self.out_proj(context.transpose(1, 2).flatten(2))
        return result


class VisionBlock(nn.Module):
    """One pre-norm transformer block."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attn = VisionAttention(width, heads)
        self.ln_1 = nn.LayerNorm(width)
        # CLIP's ratio; the config's `mlp_ratio` is that of the text and co-attention layers.
        layers = {
            "c_fc": nn.Linear(width, 4 * width),
            "gelu": ACT2FN["quick_gelu"],
            "c_proj": nn.Linear(4 * width, width),
        }
        self.mlp = nn.Sequential()
        for name, layer in layers.items():
            self.mlp.add_module(name, layer)
        self.ln_2 = nn.LayerNorm(width)

    def forward(self, x: Tensor) -> Tensor:
        """`[B, tokens, width]` to the same."""
        x = x + self.attn(self.ln_1(x))
        x = x + self.mlp(self.ln_2(x))
        return x


class VisionTransformer(nn.Module):
    """`pixel_values [B, C, H, W]` to `[B, 1 + patches, vit_width]`, the class token first, normed."""

    def __init__(self, config: MeterConfig) -> None:
        super().__init__()
        width, patch = config.vit_width, config.vit_patch_size
        self.image_size = config.image_size
        self.conv1 = nn.Conv2d(config.num_channels, width, kernel_size=patch, stride=patch, bias=False)
        self.class_embedding = nn.Parameter(torch.zeros(width))
        self.positional_embedding = nn.Parameter(torch.zeros(config.image_tokens, width))
        self.ln_pre = nn.LayerNorm(width)
        blocks = [VisionBlock(width, config.vit_heads) for _ in range(config.vit_layers - 1)]
        self.transformer = nn.ModuleDict({"resblocks": nn.Sequential(*blocks)})
        self.ln_post = nn.LayerNorm(width)

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Raises UsageError for images of another size than the config's."""
        if pixel_values.ndim != 4 or pixel_values.shape[2:] != (self.image_size, self.image_size):
            raise UsageError(
                f"METER's image encoder takes images [B, C, {self.image_size}, {self.image_size}], the size of its "
                f"position table; found {list(pixel_values.shape)}. Resize the images, or load the model with the "
                "config's image_size set to theirs."
            )
        patches = self.conv1(pixel_values).flatten(2).transpose(1, 2)
        learned = self.class_embedding.expand(patches.shape[0], 1, -1)
        x = torch.cat([learned, patches], dim=1) + self.positional_embedding
        encoded: Tensor = self.ln_post(self.transformer["resblocks"](self.ln_pre(x)))
        return encoded
