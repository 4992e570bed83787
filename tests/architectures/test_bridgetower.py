"""BridgeTower: co-attention pairs that are fed, from the second on, by two towers that run on beside them."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import pytest
from torch import Tensor, nn
from transformers import BridgeTowerModel

from pumer_compile.errors import AxisError
from tests.architectures.builders import bridgetower, words_and_pixels
from tests.architectures.oracle import Oracle, Stream
from tests.architectures.suite import Forward, FusionSuite

# transformers 5.17 builds a mask over the image for as many queries as there are image tokens. Eager runs leave it out
# because it masks nothing; a trace keeps it, and it does not fit the text's queries.
pytestmark = pytest.mark.skipif(
    "extend_image_masks" in inspect.getsource(BridgeTowerModel.forward),
    reason="this transformers cannot trace BridgeTower",
)


class TestBridgeTower(FusionSuite):
    build = staticmethod(bridgetower)
    make_inputs = staticmethod(words_and_pixels)
    outputs = ("logits",)
    image = 37
    learned = 1
    sites: ClassVar = {0: 0, 2: 1}
    modules: ClassVar = [f"bridgetower.cross_modal_text_layers.{i}.crossattention.self" for i in range(2)]

    @classmethod
    def replaced(cls, model: Any, oracle: Oracle, sites: set[int]) -> dict[nn.Module, Forward]:
        """The text layer of a pair reduces; its image layer gets both streams as they were, and they are reduced by
        then. The towers keep every token, and are averaged where a link joins them to the pairs."""
        tower, text, image = model.bridgetower, oracle.text, oracle.image

        def text_layer(layer: Any, reduces: bool) -> Forward:
            def run(words: Tensor, pixels: Tensor, attention_mask: Tensor, **_: Any) -> tuple[Tensor, None, None]:
                own = oracle.attend(layer.attention.self, words, words, [text], attention_mask)
                words = layer.attention.output(own.output, words)
                asked = oracle.attend(layer.crossattention.self, words, pixels, [image])
                words = layer.crossattention.output(asked.output, words)
                if reduces:
                    oracle.reduce(asked.probabilities, asked.keys, own.keys)
                return layer.feed_forward_chunk(text.bring(words)), None, None

            return run

        def image_layer(layer: Any) -> Forward:
            def run(
                pixels: Tensor, words: Tensor, encoder_attention_mask: Tensor, **_: Any
            ) -> tuple[Tensor, None, None]:
                pixels, words = image.bring(pixels), text.bring(words)
                own = oracle.attend(layer.attention.self, pixels, pixels, [image])
                pixels = layer.attention.output(own.output, pixels)
                asked = oracle.attend(layer.crossattention.self, pixels, words, [text], encoder_attention_mask)
                return layer.feed_forward_chunk(layer.crossattention.output(asked.output, pixels)), None, None

            return run

        def link(module: Any, stream: Stream) -> Forward:
            original = module.forward
            return lambda own, crossed, mask: original(stream.bring(own), crossed, mask)

        return {
            **{layer: text_layer(layer, i in sites) for i, layer in enumerate(tower.cross_modal_text_layers)},
            **{layer: image_layer(layer) for layer in tower.cross_modal_image_layers},
            **{module: link(module, text) for module in tower.cross_modal_text_link_tower},
            **{module: link(module, image) for module in tower.cross_modal_image_link_tower},
        }

    def test_paper_is_refused_because_the_image_class_token_is_read_by_position(self) -> None:
        with pytest.raises(AxisError, match=r"cross_modal_image_pooler.*takes position 0 of the token axis"):
            self.reduced("paper")
