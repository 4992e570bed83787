"""The published masked softmax in place of an attention's own (semantics `reference` of `pumer`)."""

from __future__ import annotations

import torch
from torch import fx

from ..analysis.attention import Attention
from ..analysis.axes import Dim
from ..analysis.nodes import values
from ..analysis.operators import aten
from ..analysis.rules import shape
from ..errors import LocateError
from ..reducers import PublishedMaskedSoftmax
from .attention_rows import for_each_query_head
from .carried_weights import CarriedWeights, key_streams
from .epochs import Epochs
from .rewriter import Rewriter, inside
from .sites import LocatedGraph, Replacements, cross_modal_layers, repeated_module


def published_softmaxes(graph: LocatedGraph) -> Replacements:
    """The published softmax for every attention in a layer where modalities meet."""
    layers = cross_modal_layers(graph.attentions) - {""}
    chosen = [a for a in graph.attentions if a.cross_modal or any(inside(repeated_module(a.module), x) for x in layers)]
    return {a.probabilities or a.context: _PublishedSoftmax(a) for a in chosen}


def masked_softmaxes(graph: LocatedGraph, first: Attention, streams: set[str]) -> Replacements:
    """The same softmax for every attention to some streams, from one on: tokens that carry the weight 0 are hidden, and
    the gradient goes through the weights."""
    later = [a for a in graph.attentions_from(first) if streams & set(a.key_axis.streams)]
    remedy = "Train it with layers whose attention hides padding alone"
    return {a.probabilities or a.context: _PublishedSoftmax(a, remedy) for a in later}


class _PublishedSoftmax:
    """Emits the published masked softmax in place of a softmax (or of a fused attention)."""

    def __init__(self, attention: Attention, remedy: str = "Use semantics `paper` or `safe`") -> None:
        self.attention, self.remedy = attention, remedy

    def __call__(self, rewriter: Rewriter, carried: CarriedWeights) -> fx.Node:
        attention = self.attention
        self._check()
        dim = attention.key_dim
        epochs = rewriter.epochs.at(dim)
        weights = {
            s.stream: self._weights(rewriter, carried, s.stream, epochs.get(s.stream, 0))
            for s in attention.key_axis.segments
            if s.stream
        }
        present = []
        if any(weights.values()):
            # A stream without a mask, or learned tokens of no stream, are all real.
            like = rewriter.env[attention.query]
            for segment in attention.key_axis.segments:
                known = weights.get(segment.stream or "")
                present.append(known or carried.ones(rewriter, rewriter.epochs.length(segment, epochs), like))
        module = PublishedMaskedSoftmax()
        name = f"published_softmax.{attention.name}"
        if not attention.fused:
            assert attention.scores is not None and attention.probabilities is not None
            rewriter.epochs.adopt_epochs(attention.probabilities, attention.scores)
            scores = rewriter.env[attention.scores]
        else:
            scores = scaled_scores(rewriter, attention)
        for bias in attention.biases:
            scores = rewriter.call(aten.add.Tensor, scores, self._aligned(rewriter, bias))
        exact = rewriter.call_module(name, module, scores, *present)
        # A reducer decides by what the softmax gives before it is rounded to the model's dtype.
        rewriter.note_probabilities(attention.context, exact)
        dtype = values(attention.query)[0].dtype
        probabilities = exact if dtype == torch.float32 else rewriter.call(aten.to.dtype, exact, dtype)
        if not attention.fused:
            return probabilities
        value = attention.context.args[2]
        assert isinstance(value, fx.Node)
        rewriter.epochs.adopt_epochs(attention.context, attention.query)
        return rewriter.call(aten.matmul.default, probabilities, for_each_query_head(rewriter, attention, value))

    def _aligned(self, rewriter: Rewriter, bias: fx.Node) -> fx.Node:
        """A bias at the epochs of queries and keys."""
        attention, rank, targets = self.attention, len(shape(bias)), dict[int, Epochs]()
        for index, dim in ((rank - 2, attention.query_dim), (rank - 1, attention.key_dim)):
            epochs = rewriter.epochs.at(dim)
            if index >= 0 and rewriter.epochs.behind(Dim(bias, index), epochs):
                targets[index] = epochs
        return rewriter.aligner.value(rewriter, attention.context, bias, targets)

    def _check(self) -> None:
        attention = self.attention
        by_query = [mask.node.name for mask in attention.masks if mask.by_query]
        why = attention.unusual or (f"its mask {by_query[0]} differs from query to query" if by_query else "")
        if why:
            raise LocateError(
                f"The attention {attention.described} cannot have the published softmax, because {why}. {self.remedy}."
            )
        if len(shape(attention.query)) != 4:
            raise LocateError(
                f"The attention {attention.described} has queries of shape {list(shape(attention.query))}; the "
                f"published softmax needs [batch, heads, tokens, head size]. {self.remedy}."
            )

    def _weights(self, rewriter: Rewriter, carried: CarriedWeights, stream: str, epoch: int) -> fx.Node | None:
        masked = any(stream in key_streams(rewriter, mask.node) for mask in self.attention.masks)
        return carried.of(rewriter, stream, epoch, [self.attention]) if masked or epoch > 0 else None


def scaled_scores(rewriter: Rewriter, attention: Attention) -> fx.Node:
    """Scores of a fused attention, computed beside it."""
    assert attention.key is not None
    head_size = shape(attention.query)[-1]
    scale = attention.context.kwargs.get("scale")
    factor = float(scale) if isinstance(scale, int | float) else float(head_size) ** -0.5
    keys = rewriter.call(aten.transpose.int, for_each_query_head(rewriter, attention, attention.key), -2, -1)
    product = rewriter.call(aten.matmul.default, rewriter.env[attention.query], keys)
    return rewriter.call(aten.mul.Tensor, product, factor)
