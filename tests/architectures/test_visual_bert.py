"""VisualBERT: text and regions in one encoder, post-norm."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from tests.architectures.builders import visual_bert, words_and_visual_embeds
from tests.architectures.oracle import Oracle
from tests.architectures.suite import Forward, PaperSuite


class TestVisualBert(PaperSuite):
    build = staticmethod(visual_bert)
    make_inputs = staticmethod(words_and_visual_embeds)
    outputs = ("logits",)
    image = 18
    sites: ClassVar = {0: 0, 1: 1}
    modules: ClassVar = [f"visual_bert.encoder.layer.{i}.attention.self" for i in range(2)]

    @classmethod
    def replaced(cls, model: Any, oracle: Oracle, sites: set[int]) -> dict[nn.Module, Forward]:
        def forward(layer: Any, reduces: bool) -> Forward:
            def run(hidden: Tensor, attention_mask: Tensor, *_: Any, **__: Any) -> tuple[Tensor]:
                streams = (oracle.text, oracle.image)
                attended = oracle.attend(layer.attention.self, hidden, hidden, streams, attention_mask)
                carrier = layer.attention.output(attended.output, hidden)
                return (layer.feed_forward_chunk(oracle.reduce_joint(carrier, attended, streams, reduces)),)

            return run

        layers = model.visual_bert.encoder.layer
        return {layer: forward(layer, i in sites) for i, layer in enumerate(layers)}
