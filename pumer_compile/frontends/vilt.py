"""ViLT's `visual_embed`, rewritten so that torch.export can trace it.

The stock method (transformers' `modeling_vilt.py`) loops over the samples of the batch, resizes the position
grid to each image's own height and width, and picks its patches with `nonzero` and `multinomial`: shapes that
depend on data, in a random order. Attention does not depend on the order of the patches, so the rewrite keeps
*all* patches of the canvas in raster order, the padded ones masked, and every shape is static:

- the pixel mask is sampled at the same rows and columns as `interpolate(mode="nearest")` reads;
- `interpolate(mode="bilinear", align_corners=True)` is linear in the position grid and separable, so it
  becomes two small matrix products with hat functions, one for the rows and one for the columns; their widths
  are tensors that follow each image's own size, and beyond that size they are zero, which is how the stock
  method pads.

The result equals the stock model (its outputs at the text tokens and the class token; its image tokens up to
their order) for every mask the image processor makes, that is one rectangle of ones from the top left corner.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ..errors import CaptureError

TARGET = "transformers.models.vilt.modeling_vilt.ViltEmbeddings.visual_embed"
FIXES_ORDER = True


def nearest_indices(size: int, target: int) -> list[int]:
    """The positions that `interpolate(mode="nearest")` reads to resize `size` entries to `target`.

    torch computes `floor(i * scale)` in float32; so does this, because in higher precision a few sizes round
    to the neighbouring entry. The two branches are torch's own exact cases (`nearest_idx` in `UpSample.h`).
    """
    if target == size:
        return list(range(size))
    if target == 2 * size:
        return [i // 2 for i in range(target)]
    scale = _float32(size / target)
    return [min(int(_float32(i * scale)), size - 1) for i in range(target)]


def _float32(value: float) -> float:
    """The float32 nearest to a positive number (or 0). Dynamo would put NumPy's arithmetic into the graph."""
    mantissa, exponent = math.frexp(value)
    return math.ldexp(round(math.ldexp(mantissa, 24)), exponent - 24)


def hat_weights(lengths: Tensor, size: int, grid: int, dtype: torch.dtype) -> Tensor:
    """Bilinear (`align_corners=True`) weights from `grid` entries to `lengths[b]` of `size` positions, zero beyond.

    `lengths` is int64 `[B]`; the result is `[B, size, grid]` of the floating `dtype`.
    """
    position = torch.arange(size, device=lengths.device, dtype=dtype).unsqueeze(0).unsqueeze(2)
    knots = torch.arange(grid, device=lengths.device, dtype=dtype)
    length = lengths.unsqueeze(1).unsqueeze(2).to(dtype)
    # A length of one reads entry 0, as torch does; the clamp only avoids 0 / 0.
    source = position * (grid - 1) / (length - 1).clamp(min=1)
    hat = (1 - (source - knots).abs()).clamp(min=0)
    return hat * (position < length)


def visual_embed(
    self: Any, pixel_values: Tensor, pixel_mask: Tensor, max_image_length: int = 200
) -> tuple[Tensor, Tensor, tuple[None, tuple[int, int]]]:
    """`ViltEmbeddings.visual_embed` on `pixel_values [B, C, h, w]` and `pixel_mask [B, h', w']` (any dtype).

    Returns the image tokens `[B, 1 + H * W, hidden]` (class token first, patches in raster order), their
    int64 mask `[B, 1 + H * W]`, and the canvas `(H, W)` where the stock method has the indices of the chosen
    patches, which nothing in transformers reads.

    Raises CaptureError where the stock method would drop patches at random (`config.max_image_length`).
    """
    x = self.patch_embeddings(pixel_values)
    batch, channels, height, width = x.shape
    # The canvas is fixed in the graph: operator.index fixes a size that Dynamo left open.
    height, width = operator.index(height), operator.index(width)
    check_max_image_length(max_image_length, height, width)

    rows = torch.tensor(nearest_indices(operator.index(pixel_mask.shape[1]), height), device=pixel_mask.device)
    columns = torch.tensor(nearest_indices(operator.index(pixel_mask.shape[2]), width), device=pixel_mask.device)
    mask = pixel_mask.index_select(1, rows).index_select(2, columns).long()

    # The stock method takes an image's height from its first column and its width from its first row.
    grid = self.config.image_size // self.config.patch_size
    dtype = self.position_embeddings.dtype
    # Half precision cannot tell neighbouring positions of a large grid apart.
    exact = torch.float64 if dtype == torch.float64 else torch.float32
    by_row = hat_weights(mask.select(2, 0).sum(dim=1), height, grid, exact)
    by_column = hat_weights(mask.select(1, 0).sum(dim=1), width, grid, exact)
    table = self.position_embeddings[0, 1:].to(exact).view(grid, grid * channels)
    positions = torch.matmul(by_row, table).view(batch, height, grid, channels)
    positions = torch.matmul(by_column.unsqueeze(1), positions).flatten(1, 2).to(dtype)

    tokens = torch.cat((self.cls_token.expand(batch, -1, -1), x.flatten(2).transpose(1, 2)), dim=1)
    cls_position = self.position_embeddings[:, :1].expand(batch, -1, -1)
    tokens = self.dropout(tokens + torch.cat((cls_position, positions), dim=1))
    token_mask = torch.cat((torch.ones(batch, 1).to(mask), mask.flatten(1)), dim=1)
    return tokens, token_mask, (None, (height, width))


def check_max_image_length(max_image_length: Any, height: int, width: int) -> None:
    """Refuse a limit on patches that a canvas of `height * width` patches can exceed.

    As in the stock method, a negative limit or one that is not an integer means no limit.
    """
    if isinstance(max_image_length, int) and 0 <= max_image_length < height * width:
        raise CaptureError(
            f"config.max_image_length is {max_image_length}, but the images have {height * width} patches "
            f"({height} x {width}): ViLT then drops patches at random, which no fixed graph can do. Set "
            f"config.max_image_length to -1 (no limit) or to at least {height * width}, or capture with "
            "smaller images."
        )


def patch(original: Callable[..., Any]) -> Callable[..., Any]:
    """What `register_patch` asks for: the method that takes the place of `original`."""
    return visual_embed
