"""Locate: find every attention in an annotated graph, and the residual value that carries its output."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor, fx

from ..errors import LocateError
from ..reducers.align import MaskKind
from .annotate import Annotation
from .axes import Dim, Fixed, Segment, Tokens, same_size
from .graph import (
    ancestors,
    constant_value,
    content_inputs,
    depends_on_input,
    depends_on_parameter,
    module_path,
    operator_name,
    values,
)
from .rules import argument, aten, broadcast, rule_for, shape, wrap

_PRODUCTS = {aten.matmul.default, aten.bmm.default}
_SOFTMAX = {aten.softmax.int, aten._softmax.default}
_SDPA = aten.scaled_dot_product_attention.default
_ADD = {aten.add.Tensor, aten.add_.Tensor}
_MASKED_FILL = {
    aten.masked_fill.Scalar,
    aten.masked_fill.Tensor,
    aten.masked_fill_.Scalar,
    aten.masked_fill_.Tensor,
}
_WHERE = {aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf}
_STRETCHES = {aten.expand.default, aten.expand_as.default, aten.unsqueeze.default, aten.squeeze.dim, aten.slice.Tensor}
_KEEPS_VALUES = {
    aten.to.dtype,
    aten.to.device,
    aten.to.dtype_layout,
    aten.dropout.default,
    aten.contiguous.default,
    aten.clone.default,
    aten.alias.default,
}
_RESHAPES = {
    aten.transpose.int,
    aten.permute.default,
    aten.view.default,
    aten.reshape.default,
    aten.flatten.using_ints,
    aten.contiguous.default,
    aten.clone.default,
}
_LINEAR = {aten.linear.default, aten.addmm.default, aten.matmul.default, aten.mm.default}
_NORMS = {aten.layer_norm.default, aten.rms_norm.default}


@dataclass(frozen=True)
class Mask:
    """A mask and how it reads: `additive` to the scores, or boolean: true means `keep` or `drop`."""

    node: fx.Node
    kind: MaskKind

    @property
    def by_query(self) -> bool:
        """Whether it may differ from query to query, as a causal mask does."""
        return not alike_for_queries(self.node)


@dataclass(frozen=True)
class Attention:
    """One attention node.

    Attributes:
        site: its address, `<group>.<index>` in execution order: `cross_modal`, or the stream a tower belongs
            to (`vision` for image, else the stream's name), or `readout` where learned queries read a stream. A
            layer that the model runs again on other inputs (a second image) is the same site.
        module: path of the module it came from.
        call: how many times the layer ran before, on other inputs.
        query: `[batch, heads, queries, head_size]`.
        key_transposed: `[batch, heads, head_size, keys]`, or `key` where the attention is fused.
        key: `[batch, heads, keys, head_size]` of a fused attention, else None.
        scores: scaled scores before any mask (None where fused).
        masks: innermost first.
        unusual: why its softmax cannot be replaced or its rows recomputed, or ''.
        probabilities: the softmax node (None where fused).
        context: probabilities times values, `[batch, heads, queries, head_size]`.
        query_axis, key_axis: what they index.
        carrier: residual value after the output projection, or None with `no_carrier` saying why.
    """

    site: str
    module: str
    call: int
    query: fx.Node
    key_transposed: fx.Node | None
    key: fx.Node | None
    scores: fx.Node | None
    masks: tuple[Mask, ...]
    unusual: str
    probabilities: fx.Node | None
    context: fx.Node
    query_axis: Tokens
    key_axis: Tokens
    carrier: fx.Node | None
    no_carrier: str = ""

    @property
    def fused(self) -> bool:
        """Whether it is a `scaled_dot_product_attention` node."""
        return self.probabilities is None

    @property
    def streams(self) -> tuple[str, ...]:
        """Streams among queries and keys, in order."""
        return tuple(dict.fromkeys((*self.query_axis.streams, *self.key_axis.streams)))

    @property
    def cross_modal(self) -> bool:
        """Whether tokens of different modalities meet in it."""
        return self.site.startswith("cross_modal.")

    @property
    def query_dim(self) -> Dim:
        """The dimension that indexes the queries."""
        return Dim(self.query, len(shape(self.query)) - 2)

    @property
    def key_dim(self) -> Dim:
        """The dimension that indexes the keys."""
        if self.key is not None:
            return Dim(self.key, len(shape(self.key)) - 2)
        assert self.key_transposed is not None
        return Dim(self.key_transposed, len(shape(self.key_transposed)) - 1)

    @property
    def name(self) -> str:
        """Its address as part of a module's name: `cross_modal_2`, or `cross_modal_2.call_1`."""
        return self.site.replace(".", "_") + (f".call_{self.call}" if self.call else "")

    @property
    def described(self) -> str:
        """For messages: `cross_modal.2 (encoder.layer.2.attention)`."""
        return f"{self.site} ({self.module})"


def locate(module: fx.GraphModule, annotation: Annotation) -> list[Attention]:
    """Every attention over token axes, in execution order.

    Raises:
        LocateError: the graph has no attention over tokens at all.
    """
    found: list[Attention] = []
    counts: dict[str, int] = {}
    for node in module.graph.nodes:
        attention = _match(node, annotation, counts, found)
        if attention is not None:
            found.append(attention)
    if not found:
        streams = ", ".join(f"{n} ({c} tokens)" for n, c in annotation.streams.items()) or "none"
        raise LocateError(
            "No attention over tokens was found: looked for softmax between two matmuls and for "
            f"scaled_dot_product_attention whose keys index tokens. Token streams found: {streams}."
        )
    return found


def choose(attentions: list[Attention], site: str) -> list[Attention]:
    """The attention a schedule names: one node, or one for each time its layer runs.

    Raises:
        LocateError: there is none of that name; the message lists what there is.
    """
    found = [attention for attention in attentions if attention.site == site]
    if found:
        return found
    groups: dict[str, int] = {}
    for attention in attentions:
        if attention.site.startswith("readout."):
            continue
        group = attention.site.partition(".")[0]
        groups[group] = groups.get(group, 0) + (attention.call == 0)
    have = ", ".join(f"{g}.0 to {g}.{n - 1}" if n > 1 else f"{g}.0" for g, n in groups.items())
    hint = ""
    if "cross_modal" not in groups:
        hint = " No attention mixes tokens of text and image, so there is nothing for text-informed reduction to read."
    raise LocateError(f"The schedule names {site}, which this graph does not have. Its attention sites: {have}.{hint}")


def _match(node: fx.Node, annotation: Annotation, counts: dict[str, int], earlier: list[Attention]) -> Attention | None:
    if node.target in _SOFTMAX:
        parts = _unfused(node)
    elif node.target is _SDPA:
        parts = _fused(node)
    else:
        return None
    if parts is None:
        return None
    rank = len(shape(parts.query))
    query_axis = annotation.axis(Dim(parts.query, rank - 2))
    key_axis = annotation.axis(Dim(*parts.key_dim))
    if isinstance(query_axis, Fixed) and isinstance(query_axis.size, int):
        query_axis = Tokens((Segment(None, query_axis.size),))
    if not isinstance(query_axis, Tokens) or not isinstance(key_axis, Tokens) or not key_axis.streams:
        return None
    modalities = tuple(tuple(sorted({annotation.modality[s] for s in axis.streams})) for axis in (query_axis, key_axis))
    together = sorted({m for group in modalities for m in group})
    group = "cross_modal" if len(together) > 1 else {"image": "vision"}.get(together[0], together[0])
    if not query_axis.streams:
        group = "readout"
    carrier, why = _carrier(parts.context, annotation)
    path = module_path(node)
    again = _same_layer(path, parts.query, modalities, annotation, earlier)
    if again is None:
        site, call = f"{group}.{counts.get(group, 0)}", 0
        counts[group] = counts.get(group, 0) + 1
    else:
        site, call = again.site, again.call + 1
    return Attention(
        site=site,
        module=path,
        call=call,
        query=parts.query,
        key_transposed=parts.key_transposed,
        key=parts.key,
        scores=parts.scores,
        masks=parts.masks,
        unusual=parts.unusual,
        probabilities=parts.probabilities,
        context=parts.context,
        query_axis=query_axis,
        key_axis=key_axis,
        carrier=carrier,
        no_carrier=why,
    )


def _same_layer(
    path: str,
    query: fx.Node,
    modalities: tuple[tuple[str, ...], ...],
    annotation: Annotation,
    earlier: list[Attention],
) -> Attention | None:
    """The last time the same layer ran, on other inputs: not on what came out of it, as in a model whose layers share
    their weights, and not the other way round, as in cross-attention whose two directions do."""
    for attention in reversed(earlier):
        if not path or attention.module != path:
            continue
        axes = (attention.query_axis, attention.key_axis)
        if tuple(tuple(sorted({annotation.modality[s] for s in axis.streams})) for axis in axes) != modalities:
            continue
        return None if attention.context in ancestors(query) else attention
    return None


@dataclass(frozen=True)
class _Parts:
    query: fx.Node
    key_transposed: fx.Node | None
    key: fx.Node | None
    scores: fx.Node | None
    masks: tuple[Mask, ...]
    unusual: str
    probabilities: fx.Node | None
    context: fx.Node
    key_dim: tuple[fx.Node, int]


def _fused(node: fx.Node) -> _Parts:
    query, key = node.args[0], node.args[1]
    mask = argument(node, 3, "attn_mask")
    assert isinstance(query, fx.Node) and isinstance(key, fx.Node)
    masks: tuple[Mask, ...] = ()
    if isinstance(mask, fx.Node):
        masks = (Mask(mask, "keep" if values(mask)[0].dtype == torch.bool else "additive"),)
    unusual = ""
    if argument(node, 5, "is_causal", False):
        unusual = "it is causal (`is_causal=True`), and reduced tokens have no order to be causal in"
    elif node.kwargs.get("enable_gqa", False):
        unusual = "its queries and keys have different numbers of heads (`enable_gqa=True`)"
    return _Parts(query, None, key, None, masks, unusual, None, node, (key, len(shape(key)) - 2))


def _unfused(node: fx.Node) -> _Parts | None:
    rank = len(shape(node))
    dim = node.args[1]
    if not isinstance(dim, int) or wrap(dim, rank) != rank - 1:
        return None
    found = _scores(node.args[0])
    context = _context(node)
    if found is None or context is None:
        return None
    query, key_transposed = found.product.args[0], found.product.args[1]
    assert isinstance(query, fx.Node) and isinstance(key_transposed, fx.Node)
    return _Parts(
        query, key_transposed, None, found.scores, found.masks, found.unusual, node, context, (node, rank - 1)
    )


@dataclass(frozen=True)
class _Scores:
    """From a softmax's input back to the product of queries and keys; see `Attention`."""

    product: fx.Node
    scores: fx.Node
    masks: tuple[Mask, ...] = ()
    unusual: str = ""


def _scores(node: object) -> _Scores | None:
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    if node.target in _PRODUCTS:
        return _Scores(node, node)
    if not _is_pointwise(node):
        return None
    for operand in node.all_input_nodes:
        below = _scores(operand)
        if below is None:
            continue
        mask = _mask(node, operand)
        if mask is not None:
            return replace(below, masks=(*below.masks, mask))
        if below.masks and node.target not in _KEEPS_VALUES:
            why = f"{node.name} ({operator_name(node)}) changes its scores after the mask is applied"
            return replace(below, unusual=why)
        strange = [n.name for n in node.all_input_nodes if n is not operand and _data(n)]
        if strange:
            why = (
                f"{node.name} ({operator_name(node)}) applies {strange[0]} to its scores in a way that is no known mask"
            )
            return replace(below, unusual=why)
        return below if below.masks else replace(below, scores=node)
    return None


def _mask(node: fx.Node, scores: fx.Node) -> Mask | None:
    """The mask that `node` applies to `scores`, if it does: a value computed without any learned parameter."""
    if node.target in _ADD:
        kind: MaskKind = "additive"
        other = next((n for n in node.all_input_nodes if n is not scores), None)
    elif node.target in _MASKED_FILL:
        other, kind = node.args[1], "drop"  # type: ignore[assignment]  # a node, checked below
    elif node.target in _WHERE:
        other, kind = node.args[0], "keep" if node.args[1] is scores else "drop"  # type: ignore[assignment]  # as above
    else:
        return None
    return Mask(other, kind) if isinstance(other, fx.Node) and _data(other) else None


def _data(node: fx.Node) -> bool:
    """Whether a value has dimensions and is computed without any learned parameter."""
    return bool(values(node)) and bool(shape(node)) and not depends_on_parameter(node)


def alike_for_queries(node: fx.Node) -> bool:
    """Whether a value is the same along its last dimension but one: of size 1, or stretched from that."""
    while values(node):
        sizes = shape(node)
        if len(sizes) < 2 or same_size(sizes[-2], 1):
            return True
        if node.target in (aten.expand.default, *_KEEPS_VALUES):
            node = node.all_input_nodes[0]
        elif not depends_on_input(node):
            constant = constant_value(node)
            if constant is None or constant.is_meta:  # a model planned without its numbers
                return False
            return bool((constant == constant[..., :1, :]).all())
        else:
            pointwise = node.op == "call_function" and _is_pointwise(node)
            return pointwise and all(alike_for_queries(n) for n in content_inputs(node) if values(n))
    return False


def mask_kinds(attentions: list[Attention]) -> dict[fx.Node, MaskKind]:
    """Every mask, and every value that is only reshaped into one, with how it reads."""
    kinds: dict[fx.Node, MaskKind] = {}
    stack = [(mask.node, mask.kind) for attention in attentions for mask in attention.masks]
    while stack:
        node, kind = stack.pop()
        if node in kinds or not values(node):
            continue
        kinds[node] = kind
        if node.target in _RESHAPES | _KEEPS_VALUES | _STRETCHES:
            source = node.all_input_nodes[0]
            if values(source) and values(source)[0].dtype == values(node)[0].dtype:
                stack.append((source, kind))
    return kinds


def _is_pointwise(node: fx.Node) -> bool:
    rule = rule_for(node)
    return rule is not None and rule.__name__ == "pointwise"


def _context(node: fx.Node) -> fx.Node | None:
    """Probabilities times values."""
    for user in node.users:
        if user.target in _PRODUCTS and user.args[0] is node:
            return user
        if user.op == "call_function" and _is_pointwise(user) and (found := _context(user)) is not None:
            return found
    return None


def _carrier(context: fx.Node, annotation: Annotation) -> tuple[fx.Node | None, str]:
    """Follow the attention's output through its projection to the residual addition."""
    node, projected = context, False
    while True:
        users = [u for u in node.users if has_value(u)]
        residual = next((u for u in users if u.target in _ADD and _is_residual(u, node)), None)
        if residual is not None and (projected or len(users) == 1):
            return _after_norm(residual), ""
        if len(users) != 1:
            return None, f"{node.name} has {len(users)} uses and none of them is a residual addition"
        (user,) = users
        if user.target in _LINEAR and user.args[user.target is aten.addmm.default] is node:
            projected = True
        elif user.target not in _RESHAPES and not (user.op == "call_function" and _is_pointwise(user)):
            return None, f"{user.name} ({user.target}) stands between the attention and a residual addition"
        node = user


def has_value(node: fx.Node) -> bool:
    """Whether a node gives a tensor that others compute with."""
    return any(isinstance(v, Tensor) for v in values(node))


def _is_residual(add: fx.Node, branch: fx.Node) -> bool:
    others: Iterator[fx.Node] = (n for n in add.all_input_nodes if n is not branch)
    return any(
        shape(other) == shape(branch) and len(list(broadcast(other, add))) == len(shape(add)) for other in others
    )


def _after_norm(add: fx.Node) -> fx.Node:
    """The carrier: the addition, or the norm that is its only use (post-norm)."""
    users = [u for u in add.users if has_value(u)]
    if len(users) == 1 and users[0].target in _NORMS:
        return users[0]
    return add
