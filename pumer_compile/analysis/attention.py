"""Locate: find every attention in an annotated graph, and the residual value that carries its output."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor, fx

from ..errors import LocateError
from ..reducers.align import MaskKind
from .annotate import Annotation
from .axes import Dim, Fixed, Segment, Tokens
from .carrier import carrier_of
from .masks import Addends, Mask, MaskReader
from .nodes import ancestors, depends_on_parameter, describe, module_path, operator_name, values
from .operators import ADD, ATTENTION, KEEPS_VALUES, MASKED_FILL, MATMULS, RESHAPES, SOFTMAX, STRETCHES, WHERE
from .rules import argument, is_pointwise, shape, wrap

NOT_KNOWN = "no known mask"
"""What `Attention.unusual` says where something is added to scores that is neither a mask nor a bias."""


@dataclass(frozen=True)
class Attention:
    """One attention node.

    Attributes:
        address: `<group>.<index>` in execution order: `cross_modal`, or the stream a tower belongs to (`vision`
            for image, else the stream's name), or `readout` where learned queries read a stream. A layer that the
            model runs again on other inputs (a second image) has the same address.
        module: path of the module it came from.
        call: how many times the layer ran before, on other inputs.
        query: `[batch, heads, queries, head_size]`.
        key_transposed: `[batch, heads, head_size, keys]`, or `key` where the attention is fused.
        key: `[batch, heads, keys, head_size]` of a fused attention, else None.
        scores: scaled scores before any mask (None where fused).
        masks: innermost first.
        biases: what is added to the scores beside the masks and is not among `scores`.
        sums: values that hold masks and biases in one.
        unusual: why its softmax cannot be replaced or its rows recomputed, or ''.
        probabilities: the softmax node (None where fused).
        context: probabilities times values, `[batch, heads, queries, head_size]`.
        query_axis, key_axis: what they index.
        carrier: residual value after the output projection, or None with `no_carrier` saying why.
    """

    address: str
    module: str
    call: int
    query: fx.Node
    key_transposed: fx.Node | None
    key: fx.Node | None
    scores: fx.Node | None
    masks: tuple[Mask, ...]
    biases: tuple[fx.Node, ...]
    sums: tuple[fx.Node, ...]
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
        return self.address.startswith("cross_modal.")

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
        return self.address.replace(".", "_") + (f".call_{self.call}" if self.call else "")

    @property
    def described(self) -> str:
        """For messages: `cross_modal.2 (encoder.layer.2.attention)`."""
        return f"{self.address} ({self.module})"


def locate(
    module: fx.GraphModule, annotation: Annotation, inputs: Mapping[str, Tensor] | None = None
) -> list[Attention]:
    """Every attention over token axes, in execution order.

    Args:
        module: whose graph is not changed.
        annotation: its axes.
        inputs: the sample; see `MaskReader`.

    Raises:
        LocateError: the graph has no attention over tokens at all.
    """
    found: list[Attention] = []
    counts: dict[str, int] = {}
    reader = MaskReader(inputs)
    for node in module.graph.nodes:
        attention = _match(node, annotation, reader, counts, found)
        if attention is not None:
            found.append(attention)
    if not found:
        streams = ", ".join(f"{n} ({c} tokens)" for n, c in annotation.streams.items()) or "none"
        raise LocateError(
            "No attention over tokens was found: looked for softmax over the last dimension between two matmuls (or "
            "einsums that are matrix products) and for scaled_dot_product_attention whose keys index tokens. Token "
            f"streams found: {streams}.{''.join(_in_the_way(module, annotation))}"
        )
    return found


def choose(attentions: list[Attention], address: str) -> list[Attention]:
    """The attention a schedule names: one node, or one for each time its layer runs.

    Raises:
        LocateError: there is none of that name; the message lists what there is.
    """
    found = [attention for attention in attentions if attention.address == address]
    if found:
        return found
    groups: dict[str, int] = {}
    for attention in attentions:
        if attention.address.startswith("readout."):
            continue
        group = attention.address.partition(".")[0]
        groups[group] = groups.get(group, 0) + (attention.call == 0)
    have = ", ".join(f"{g}.0 to {g}.{n - 1}" if n > 1 else f"{g}.0" for g, n in groups.items())
    hint = ""
    if "cross_modal" not in groups:
        hint = " No attention mixes tokens of text and image, so there is nothing for text-informed reduction to read."
    raise LocateError(
        f"The schedule names {address}, which this graph does not have. Its attention sites: {have}.{hint}"
    )


def _match(
    node: fx.Node, annotation: Annotation, reader: MaskReader, counts: dict[str, int], earlier: list[Attention]
) -> Attention | None:
    if node.target in SOFTMAX:
        parts = _unfused(node, reader)
    elif node.target is ATTENTION:
        parts = _fused(node, reader)
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
    carrier, why = carrier_of(parts.context)
    path = module_path(node)
    again = _same_layer(path, parts.query, modalities, annotation, earlier)
    if again is None:
        address, call = f"{group}.{counts.get(group, 0)}", 0
        counts[group] = counts.get(group, 0) + 1
    else:
        address, call = again.address, again.call + 1
    return _attention(parts, address, path, call, (query_axis, key_axis), (carrier, why))


def _attention(
    parts: Parts,
    address: str,
    module: str,
    call: int,
    axes: tuple[Tokens, Tokens],
    carrier: tuple[fx.Node | None, str],
) -> Attention:
    """An attention of its parts, at an address; with its carrier, or why there is none."""
    return Attention(
        address=address,
        module=module,
        call=call,
        query=parts.query,
        key_transposed=parts.key_transposed,
        key=parts.key,
        scores=parts.scores,
        masks=parts.added.masks,
        biases=parts.added.biases,
        sums=parts.added.sums,
        unusual=parts.unusual,
        probabilities=parts.probabilities,
        context=parts.context,
        query_axis=axes[0],
        key_axis=axes[1],
        carrier=carrier[0],
        no_carrier=carrier[1],
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
class Parts:
    """What an attention is made of; see `Attention`.

    Attributes:
        added: masks and biases.
        key_dim: the dimension that indexes the keys.
    """

    query: fx.Node
    key_transposed: fx.Node | None
    key: fx.Node | None
    scores: fx.Node | None
    added: Addends
    unusual: str
    probabilities: fx.Node | None
    context: fx.Node
    key_dim: tuple[fx.Node, int]


def attention_parts(source: fx.Node) -> list[Parts]:
    """Every attention that a value is computed from, whatever its tokens are, in execution order."""
    reader, before = MaskReader(), ancestors(source) | {source}
    found = [
        _fused(node, reader) if node.target is ATTENTION else _unfused(node, reader)
        for node in source.graph.nodes
        if node in before and (node.target is ATTENTION or node.target in SOFTMAX)
    ]
    return [parts for parts in found if parts is not None]


def tower_attention(parts: Parts, number: int) -> Attention:
    """An attention whose tokens belong to no stream (those of a tower that is not followed), as a place to read from.

    Args:
        parts: of it.
        number: among the attentions of its tower.
    """
    keys, dim = parts.key_dim
    sizes = (shape(parts.query)[-2], shape(keys)[dim])
    queries_axis, keys_axis = (Tokens((Segment(None, int(size)),)) for size in sizes)
    without = (None, "its tokens are not followed")
    path = module_path(parts.context)
    return _attention(parts, f"vision.{number}", path, 0, (queries_axis, keys_axis), without)


def _fused(node: fx.Node, reader: MaskReader) -> Parts:
    query, key = node.args[0], node.args[1]
    mask = argument(node, 3, "attn_mask")
    assert isinstance(query, fx.Node) and isinstance(key, fx.Node)
    added = reader.addends(mask) if isinstance(mask, fx.Node) else Addends()
    unusual = _not_known(node, added.unknown) if added.unknown else ""
    if argument(node, 5, "is_causal", False):
        unusual = "it is causal (`is_causal=True`), and reduced tokens have no order to be causal in"
    return Parts(query, None, key, None, added, unusual, None, node, (key, len(shape(key)) - 2))


def _unfused(node: fx.Node, reader: MaskReader) -> Parts | None:
    rank = len(shape(node))
    dim = node.args[1]
    if not isinstance(dim, int) or wrap(dim, rank) != rank - 1:
        return None
    found = _scores(node.args[0], reader)
    context = _context(node)
    if found is None or context is None:
        return None
    query, key_transposed = found.product.args[0], found.product.args[1]
    assert isinstance(query, fx.Node) and isinstance(key_transposed, fx.Node)
    return Parts(query, key_transposed, None, found.scores, found.added, found.unusual, node, context, (node, rank - 1))


@dataclass(frozen=True)
class _Scores:
    """From a softmax's input back to the product of queries and keys; see `Attention`."""

    product: fx.Node
    scores: fx.Node
    added: Addends = field(default_factory=Addends)
    unusual: str = ""


def _scores(node: object, reader: MaskReader) -> _Scores | None:
    if not isinstance(node, fx.Node) or node.op != "call_function":
        return None
    if node.target in MATMULS:
        return _Scores(node, node)
    if not is_pointwise(node):
        return None
    for operand in node.all_input_nodes:
        below = _scores(operand, reader)
        if below is not None:
            return _applied(node, operand, below, reader)
    return None


def _applied(node: fx.Node, scores: fx.Node, below: _Scores, reader: MaskReader) -> _Scores:
    """Scores with what one more operator does to them."""
    added = _added(node, scores, reader)
    if added is not None and not added.unknown:
        if added.masks or below.added.masks:
            return replace(below, added=below.added + added)
        return replace(below, scores=node)  # a bias belongs to the scores
    if added is not None:
        return replace(below, unusual=_not_known(node, added.unknown))
    if below.added.masks and node.target not in KEEPS_VALUES:
        why = f"{node.name} ({operator_name(node)}) changes its scores after the mask is applied"
        return replace(below, unusual=why)
    strange = [n.name for n in node.all_input_nodes if n is not scores and _data(n)]
    if strange:
        return replace(below, unusual=_not_known(node, strange[0]))
    return below if below.added.masks else replace(below, scores=node)


def _not_known(node: fx.Node, value: str) -> str:
    return (
        f"{describe(node)} applies {value} to its scores in a way that is {NOT_KNOWN}: not a boolean one, not one "
        "made of 0 and very low numbers alone, and no learned or constant bias either"
    )


def _added(node: fx.Node, scores: fx.Node, reader: MaskReader) -> Addends | None:
    """What `node` adds to `scores`, or hides of them; None where it does something else."""
    if node.target in ADD:
        other = next((n for n in node.all_input_nodes if n is not scores), None)
        plain = other is not None and bool(shape(other)) and argument(node, 2, "alpha", 1) == 1
        return reader.addends(other) if other is not None and plain else None
    if node.target in MASKED_FILL:
        mask, fill, kind = node.args[1], node.args[2], "drop"
    elif node.target in WHERE:
        mask, kind = node.args[0], "keep" if node.args[1] is scores else "drop"
        fill = node.args[2 if kind == "keep" else 1]
    else:
        return None
    hidden = isinstance(mask, fx.Node) and _data(mask) and reader.hides(fill)
    return Addends((Mask(mask, kind),)) if hidden else None  # type: ignore[arg-type]  # a node and a kind


def _data(node: fx.Node) -> bool:
    """Whether a value has dimensions and is computed without any learned parameter."""
    return bool(values(node)) and bool(shape(node)) and not depends_on_parameter(node)


def mask_kinds(attentions: list[Attention]) -> dict[fx.Node, MaskKind]:
    """Every mask, and every value that is only reshaped into one, with how it reads."""
    kinds: dict[fx.Node, MaskKind] = {}
    stack = [(mask.node, mask.kind) for attention in attentions for mask in attention.masks]
    while stack:
        node, kind = stack.pop()
        if node in kinds or not values(node):
            continue
        kinds[node] = kind
        if node.target in RESHAPES | KEEPS_VALUES | STRETCHES:
            source = node.all_input_nodes[0]
            if values(source) and values(source)[0].dtype == values(node)[0].dtype:
                stack.append((source, kind))
    return kinds


def _context(node: fx.Node) -> fx.Node | None:
    """Probabilities times values."""
    for user in node.users:
        if user.target in MATMULS and user.args[0] is node:
            return user
        if user.op == "call_function" and is_pointwise(user) and (found := _context(user)) is not None:
            return found
    return None


def _in_the_way(module: fx.GraphModule, annotation: Annotation) -> list[str]:
    """What keeps each softmax and fused attention from being one over tokens, in a sentence each; the first three."""
    found: list[str] = []
    for node in module.graph.nodes:
        why = _obstacle(node, annotation) if node.target in SOFTMAX or node.target is ATTENTION else ""
        if why and why not in found:
            found.append(why)
    return found[:3]


def _obstacle(node: fx.Node, annotation: Annotation) -> str:
    parts = _fused(node, MaskReader()) if node.target is ATTENTION else _unfused(node, MaskReader())
    if parts is not None:
        lost = _where_tokens_are_lost(parts.key_dim[0], annotation)
        return "" if lost is None else f" {describe(lost)} stands before an attention and mixes its tokens up."
    if wrap(argument(node, 1, "dim"), len(shape(node))) != len(shape(node)) - 1:
        return f" {describe(node)} is over dimension {argument(node, 1, 'dim')} of {list(shape(node))}."
    before = node
    while before.target in SOFTMAX or (before.target not in MATMULS and is_pointwise(before)):
        before = max(filter(values, before.all_input_nodes), key=lambda n: values(n)[0].dim())
    if before.op == "call_function" and before.target not in MATMULS:
        return f" {describe(before)} stands before {describe(node)}, where a product of queries and keys was expected."
    after = next((u for u in node.users if values(u) and not is_pointwise(u)), None)
    wanted = "where a product with values was expected"
    return "" if after is None else f" {describe(after)} stands behind {describe(node)}, {wanted}."


def _where_tokens_are_lost(node: fx.Node, annotation: Annotation) -> fx.Node | None:
    """The last operator before a value without tokens that was given some."""
    pending, seen = [node], {node}
    while pending:
        current = pending.pop(0)
        if any(_has_tokens(x, annotation) for x in current.all_input_nodes):
            return None if _has_tokens(current, annotation) else current
        fresh = [x for x in current.all_input_nodes if x not in seen]
        seen.update(fresh)
        pending.extend(fresh)
    return None


def _has_tokens(node: fx.Node, annotation: Annotation) -> bool:
    return any(isinstance(axis, Tokens) and axis.streams for axis in annotation.axes(node)) if values(node) else False
