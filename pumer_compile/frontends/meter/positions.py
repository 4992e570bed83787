"""Position embeddings of a checkpoint made for another image size, resized when it is loaded."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers.core_model_loading import ConversionOps, WeightConverter

_TABLE = "vit_model.positional_embedding"


def resize_positions(table: Tensor, tokens: int) -> Tensor:
    """A table `[1 + g * g, width]` (class token first, then a square grid) resized to `tokens` rows, bicubically.

    A table that already fits, or whose rows are no such grid, is returned as it is.
    """
    before, after = math.isqrt(len(table) - 1), math.isqrt(tokens - 1)
    if before == after or before**2 != len(table) - 1:
        return table
    # In float32: torch has no bicubic interpolation in half precision on every device.
    grid = table[1:].float().T.reshape(1, -1, before, before)
    resized = F.interpolate(grid, size=(after, after), mode="bicubic", align_corners=False)
    return torch.cat([table[:1], resized.flatten(2)[0].T.to(table.dtype)])


class ResizePositions(ConversionOps):
    """The conversion that transformers applies while it loads a METER's weights, and does not undo on saving."""

    def convert(
        self, input_dict: dict[str, Any], source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> dict[str, Any]:
        """`input_dict` with its one table resized to `kwargs["config"].image_size`."""
        (table,) = input_dict[source_patterns[0]]
        return {target_patterns[0]: [resize_positions(table, kwargs["config"].image_tokens)]}

    @property
    def reverse_op(self) -> ConversionOps:
        """Saving keeps the table, which fits the config that is saved beside it."""
        return self


def position_conversion() -> WeightConverter:
    """What `register_checkpoint_conversion_mapping` asks for."""
    return WeightConverter(_TABLE, _TABLE, [ResizePositions()])
