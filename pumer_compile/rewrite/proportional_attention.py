"""Attention that counts merged tokens by their sizes (ToMe, section 3.3)."""

from __future__ import annotations

from torch import fx

from ..analysis.attention import Attention
from ..errors import LocateError
from ..reducers import SizeBias
from .carried_weights import CarriedWeights
from .rewriter import Rewriter
from .sites import LocatedGraph, Replacements


def proportional_attentions(graph: LocatedGraph) -> Replacements:
    """Scores that know the sizes of merged tokens, for every attention."""
    return {a.probabilities or a.context: _ProportionalAttention(a) for a in graph.attentions}


class _ProportionalAttention:
    """Adds the logarithm of merged tokens' sizes to an attention's scores."""

    def __init__(self, attention: Attention) -> None:
        self.attention = attention

    def __call__(self, rewriter: Rewriter, carried: CarriedWeights) -> fx.Node | None:
        attention = self.attention
        epochs = rewriter.epochs.at(attention.key_dim)
        sizes = [carried.known(s.stream or "", epochs.get(s.stream or "", 0)) for s in attention.key_axis.segments]
        if not any(epochs.values()):
            return None
        if "causal" in attention.unusual:
            raise LocateError(
                f"The attention {attention.described} cannot weigh merged tokens by their sizes: {attention.unusual}."
            )
        like = rewriter.env[attention.query]
        present = [
            carried.ones(rewriter, rewriter.epochs.length(s, epochs), like) if size is None else size
            for s, size in zip(attention.key_axis.segments, sizes, strict=True)
        ]
        softmax = attention.probabilities or attention.context
        position = 3 if attention.fused else 0
        rewriter.visit(softmax)
        new = rewriter.env[softmax]
        given = new.args[position] if len(new.args) > position else new.kwargs.get("attn_mask")
        with rewriter.graph.inserting_before(new):
            name = f"reducer.sizes.{attention.name}"
            scores = given if isinstance(given, fx.Node) else None
            biased = rewriter.call_module(name, SizeBias(), scores, rewriter.env[attention.query], *present)
        if attention.fused:
            new.kwargs = {**new.kwargs, "attn_mask": biased}
            new.args = (*new.args[:3], biased, *new.args[4:]) if len(new.args) > 3 else new.args
            if len(new.args) > 3:
                new.kwargs = {k: v for k, v in new.kwargs.items() if k != "attn_mask"}
        else:
            new.args = (biased, *new.args[1:])
        return new
