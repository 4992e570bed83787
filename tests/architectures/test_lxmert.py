"""LXMERT: co-attention whose two directions share their weights, post-norm."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from tests.architectures.builders import lxmert, words_and_regions
from tests.architectures.oracle import Oracle
from tests.architectures.suite import Forward, PaperSuite


class TestLxmert(PaperSuite):
    build = staticmethod(lxmert)
    make_inputs = staticmethod(words_and_regions)
    outputs = ("question_answering_score",)
    image = 18
    sites: ClassVar = {0: 0, 2: 1}
    modules: ClassVar = [f"lxmert.encoder.x_layers.{i}.visual_attention.att" for i in range(2)]

    @classmethod
    def replaced(cls, model: Any, oracle: Oracle, sites: set[int]) -> dict[nn.Module, Forward]:
        """Text asks image, and the text's own last attention says which words are alike: that of the layer before, or
        of the language layers. What the second direction reads, both from before the first, is reduced by then."""
        text, image, latest = oracle.text, oracle.image, {}

        def forward(layer: Any, reduces: bool) -> Forward:
            def run(old: Tensor, mask: Tensor, seen: Tensor, _: Any, **__: Any) -> tuple[Tensor, Tensor]:
                cross = layer.visual_attention
                asked = oracle.attend(cross.att, old, seen, [image])
                words = cross.output(asked.output, old)
                if reduces:
                    oracle.reduce(asked.probabilities, asked.keys, latest["keys"])
                words, old, seen = text.bring(words), text.bring(old), image.bring(seen)
                back = oracle.attend(cross.att, seen, old, [text], mask)
                regions = cross.output(back.output, seen)
                own = oracle.attend(layer.lang_self_att.self, words, words, [text], mask)
                latest["keys"] = own.keys
                words = layer.lang_self_att.output(own.output, words)
                among = oracle.attend(layer.visn_self_att.self, regions, regions, [image])
                regions = layer.visn_self_att.output(among.output, regions)
                return layer.output_fc(words, regions)

            return run

        def remembering(attention: Any) -> Forward:
            original = attention.forward

            def run(hidden: Tensor, context: Tensor, *rest: Any, **options: Any) -> Any:
                latest["keys"] = attention.key(context).unflatten(-1, (-1, attention.attention_head_size))
                latest["keys"] = latest["keys"].transpose(1, 2)
                return original(hidden, context, *rest, **options)

            return run

        encoder = model.lxmert.encoder
        language = [layer.attention.self for layer in encoder.layer]
        return {
            **{attention: remembering(attention) for attention in language},
            **{layer: forward(layer, i in sites) for i, layer in enumerate(encoder.x_layers)},
        }
