"""Inputs that a method adds to those of a model, such as the features of a text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class AddedInput:
    """An input of the reduced graph, which the model itself does not take.

    Attributes:
        shape: of a sample that nobody gives, without the batch.
        ids: how many ids there are, of an input of ids; None for numbers.
    """

    shape: tuple[int, ...]
    ids: int | None = None

    def sample(self, batch: int) -> Tensor:
        """Made-up values, `[batch, *shape]`, int64 or float32; the same every time."""
        import torch

        generator = torch.Generator().manual_seed(0)
        if self.ids is not None:
            return torch.randint(self.ids, (batch, *self.shape), generator=generator)
        return torch.randn(batch, *self.shape, generator=generator)
