"""VisualBERT: text and regions in one encoder, post-norm."""

from __future__ import annotations

from typing import Any, ClassVar

import pytest
import torch
from torch import Tensor, nn

import pumer_compile as pumer
from pumer_compile import Schedule
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


@pytest.mark.parametrize("streams", [{}, {"input_ids": "text", "visual_embeds": "image"}])
def test_kinds_of_regions_are_no_text(streams: dict[str, str]) -> None:
    """With the kinds that the model's documentation gives, as without them, where they are what it takes itself."""
    model, given = visual_bert(), words_and_visual_embeds()
    schedule = Schedule(semantics="safe", layers=[0], prune=0.2, merge={"image": 0.3, "text": 0.2})
    wanted = pumer.reduce(pumer.capture(model, given), schedule)
    kinds = {
        "token_type_ids": torch.zeros_like(given["input_ids"]),
        "visual_token_type_ids": torch.ones_like(given["visual_attention_mask"]),
    }
    found = pumer.reduce(pumer.capture(model, {**given, **kinds}, streams=streams), schedule)
    assert found.plan == wanted.plan
    for seed in (0, 1):
        inputs = words_and_visual_embeds(seed)
        with torch.no_grad():
            logits = wanted.module(**inputs).logits
            assert torch.equal(found.module(**inputs, **kinds).logits, logits)
            others = {**kinds, "visual_token_type_ids": 1 - kinds["visual_token_type_ids"]}
            assert not torch.equal(found.module(**inputs, **others).logits, logits)
