"""Models that run the same text beside each of two images."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from tests.support.models import Config, Fusion, inputs_for

Inputs = Mapping[str, Tensor]


class TwoPasses(Fusion):
    """Everything once for each image, the words' embedding too, like ViLT. `pixel_values` is `[B, 2, 3, H, W]`."""

    def forward(self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        images = pixel_values.unbind(1)
        return torch.cat([super(TwoPasses, self).forward(input_ids, image, attention_mask) for image in images], -1)


class OwnPlaces(TwoPasses):
    """Image positions are looked up by number, so that nothing proves the tokens of two images the same."""

    def __init__(self, config: Config) -> None:
        super().__init__(config)
        self.places = nn.Embedding(config.image, config.width)

    def embed(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        return torch.cat([self.text(input_ids), self.image(pixel_values)], 1)

    def text(self, input_ids: Tensor) -> Tensor:
        return self.words(input_ids) + self.positions(torch.arange(input_ids.shape[1]))

    def image(self, pixel_values: Tensor) -> Tensor:
        image = self.patches(pixel_values).flatten(2).transpose(1, 2)
        if self.config.cls:
            image = torch.cat([self.cls.expand(image.shape[0], -1, -1), image], 1)
        return image + self.places(torch.arange(image.shape[1]))


class TextOnce(OwnPlaces):
    """The words are embedded once and put beside each image in turn."""

    def forward(self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        text, outputs = None, []
        for image in pixel_values.unbind(1):
            x = self.embed(input_ids, image)
            text = x[:, : input_ids.shape[1]] if text is None else text
            x = torch.cat([text, x[:, input_ids.shape[1] :]], 1)
            mask = None if attention_mask is None else self.mask(x, attention_mask, None)
            for layer in self.layers:
                x = layer(x, mask)
            outputs.append(self.finish(x, input_ids.shape[1]))
        return torch.cat(outputs, -1)


def two_images(config: Config, seed: int = 1) -> dict[str, Tensor]:
    inputs = inputs_for(config, seed)
    other = inputs_for(config, seed + 100)["pixel_values"]
    return {**inputs, "pixel_values": torch.stack([inputs["pixel_values"], other], 1)}


def one_image(inputs: Inputs, index: int) -> dict[str, Tensor]:
    return {**inputs, "pixel_values": inputs["pixel_values"][:, index]}
