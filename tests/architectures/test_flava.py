"""FLAVA: one encoder, pre-norm, over a learned token, the image tower's tokens and the text tower's."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from tests.architectures.builders import flava, words_and_pixels
from tests.architectures.oracle import Oracle
from tests.architectures.suite import Forward, PaperSuite


class TestFlava(PaperSuite):
    build = staticmethod(flava)
    make_inputs = staticmethod(words_and_pixels)
    outputs = ("multimodal_output.pooler_output",)
    image = 37
    learned = 1
    sites: ClassVar = {0: 0, 1: 1}
    modules: ClassVar = [f"multimodal_model.encoder.layer.{i}.attention.attention" for i in range(2)]

    @classmethod
    def replaced(cls, model: Any, oracle: Oracle, sites: set[int]) -> dict[nn.Module, Forward]:
        """The learned token that leads both streams belongs to neither."""
        streams = (1, oracle.image, oracle.text)

        def forward(layer: Any, reduces: bool) -> Forward:
            def run(hidden: Tensor, attention_mask: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
                normed = layer.layernorm_before(hidden)
                attended = oracle.attend(layer.attention.attention, normed, normed, streams, attention_mask)
                carrier = layer.attention.output(attended.output, normed) + hidden
                carrier = oracle.reduce_joint(carrier, attended, streams, reduces)
                return (layer.output(layer.intermediate(layer.layernorm_after(carrier)), carrier),)

            return run

        layers = model.multimodal_model.encoder.layer
        return {layer: forward(layer, i in sites) for i, layer in enumerate(layers)}
