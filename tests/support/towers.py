"""Models of one stream alone: an image tower, a text tower."""

from __future__ import annotations

import torch
from torch import Tensor

from tests.support.models import Config, Fusion, inputs_for


class Tower(Fusion):
    """One stream alone."""

    def run(self, x: Tensor, opened: Tensor | None) -> Tensor:
        mask = None if opened is None else self.mask(x, opened, None)
        for layer in self.layers:
            x = layer(x, mask)
        return self.conclude(self.last(x))

    def tokens_open(self, x: Tensor, attention_mask: Tensor, patch_mask: Tensor | None) -> Tensor:
        return attention_mask


class Images(Tower):
    """An image tower; `patch_mask` hides patches."""

    def forward(self, pixel_values: Tensor, patch_mask: Tensor | None = None) -> Tensor:
        if patch_mask is not None and self.config.cls:
            patch_mask = torch.cat([torch.ones_like(patch_mask[:, :1]), patch_mask], 1)
        return self.run(self.start(pixel_values), patch_mask)

    def start(self, pixel_values: Tensor) -> Tensor:
        image = self.patches(pixel_values).flatten(2).transpose(1, 2)
        if self.config.cls:
            image = torch.cat([self.cls.expand(image.shape[0], -1, -1), image], 1)
        return image + self.image_positions

    def conclude(self, x: Tensor) -> Tensor:
        return self.classify(x.amax(1))


class Words(Tower):
    """A text tower."""

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return self.run(self.start(input_ids), attention_mask)

    def start(self, input_ids: Tensor) -> Tensor:
        return self.words(input_ids) + self.positions(torch.arange(input_ids.shape[1]))

    def conclude(self, x: Tensor) -> Tensor:
        return self.classify(x.mean(1))


def given(config: Config, kind: type[Fusion], seed: int = 1, batch: int | None = None) -> dict[str, Tensor]:
    names = ("pixel_values", "patch_mask") if kind is Images else ("input_ids", "attention_mask")
    return {name: value for name, value in inputs_for(config, seed, batch).items() if name in names}
