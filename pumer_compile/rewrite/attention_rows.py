"""Some rows of an attention, in float32, wherever its probabilities are."""

from __future__ import annotations

import torch
from torch import fx

from ..analysis.attention import Attention
from ..analysis.axes import same_size
from ..analysis.nodes import values
from ..analysis.operators import aten
from ..analysis.rules import argument, shape
from ..errors import LocateError
from ..reducers import TextRowsAttention
from .rewriter import Rewriter


def attention_rows(rewriter: Rewriter, attention: Attention, rows: tuple[int, int], name: str) -> fx.Node:
    """Probabilities `[batch, heads, rows, keys]`, float32 or wider: those written out already, the model's own, or
    recomputed beside a fused operator.

    Args:
        rewriter: which has passed the attention.
        attention: whose rows.
        rows: first and last-but-one query.
        name: of the inserted module, where one is needed.

    Raises:
        LocateError: a fused attention whose rows cannot be recomputed.
    """
    found = rewriter.probabilities.get(attention.context)
    if found is None and attention.probabilities is not None:
        found = _exact_softmax(rewriter, attention.probabilities)
    if found is not None:
        return rewriter.call(aten.slice.Tensor, found, 2, *rows)
    if attention.unusual:
        raise LocateError(f"Site {attention.described} cannot be reduced, because {attention.unusual}.")
    assert attention.key is not None
    query = rewriter.call(aten.slice.Tensor, rewriter.env[attention.query], 2, *rows)
    given = argument(attention.context, 3, "attn_mask")
    mask = [rewriter.used.get((attention.context, given), rewriter.env[given])] if isinstance(given, fx.Node) else []
    scale = attention.context.kwargs.get("scale")
    module = TextRowsAttention(float(scale) if isinstance(scale, int | float) else None, rows)
    return rewriter.call_module(name, module, query, for_each_query_head(rewriter, attention, attention.key), *mask)


def for_each_query_head(rewriter: Rewriter, attention: Attention, given: fx.Node) -> fx.Node:
    """Keys or values of a fused attention, `[batch, heads, tokens, head size]`, repeated where they have fewer heads
    than the queries (`enable_gqa=True`)."""
    heads, own = shape(attention.query)[1], shape(given)[1]
    if same_size(heads, own):
        return rewriter.env[given]
    assert isinstance(heads, int) and isinstance(own, int)
    apart = rewriter.call(aten.unsqueeze.default, rewriter.env[given], 2)
    repeated = rewriter.call(aten.expand.default, apart, [-1, -1, heads // own, -1, -1])
    return rewriter.call(aten.flatten.using_ints, repeated, 1, 2)


def _exact_softmax(rewriter: Rewriter, softmax: fx.Node) -> fx.Node:
    """The model's softmax, computed anew in float32 where it gives less than that."""
    if values(softmax)[0].dtype.itemsize >= 4:
        return rewriter.env[softmax]
    scores, dim = softmax.args[:2]
    assert isinstance(scores, fx.Node)
    return rewriter.call(aten.softmax.int, rewriter.env[scores], dim, torch.float32)
