"""BLIP: a text encoder whose layers all attend to the finished image tower; its matching head, and its answers."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from tests.architectures.builders import blip, blip_answers, words_and_pixels, words_pixels_and_answers
from tests.architectures.oracle import Oracle
from tests.architectures.suite import Forward, PaperSuite


class TestBlip(PaperSuite):
    build = staticmethod(blip)
    make_inputs = staticmethod(words_and_pixels)
    outputs = ("itm_score",)
    image = 37
    learned = 1
    sites: ClassVar = {0: 0, 1: 1}
    modules: ClassVar = [f"text_encoder.encoder.layer.{i}.crossattention.self" for i in range(2)]

    @classmethod
    def replaced(cls, model: Any, oracle: Oracle, sites: set[int]) -> dict[nn.Module, Forward]:
        """Every layer is given the whole image; it sees what the layers before have left of it."""
        text, image = oracle.text, oracle.image

        def forward(layer: Any, reduces: bool) -> Forward:
            def run(words: Tensor, pixels: Tensor, attention_mask: Tensor, **_: Any) -> Tensor:
                own = oracle.attend(layer.attention.self, words, words, [text], attention_mask)
                words = layer.attention.output(own.output, words)
                asked = oracle.attend(layer.crossattention.self, words, image.bring(pixels), [image])
                words = layer.crossattention.output(asked.output, words)
                if reduces:
                    oracle.reduce(asked.probabilities, asked.keys, own.keys)
                return layer.feed_forward_chunk(text.bring(words))

            return run

        layers = model.text_encoder.encoder.layer
        return {layer: forward(layer, i in sites) for i, layer in enumerate(layers)}


class TestBlipAnswers(TestBlip):
    """The decoder attends to what is left of the question, in layers that hold no cross-modal attention."""

    build = staticmethod(blip_answers)
    make_inputs = staticmethod(words_pixels_and_answers)
    outputs = ("logits",)
