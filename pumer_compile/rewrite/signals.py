"""Signals: what reducers read, a function each. The set is closed: one is added with a method that reads it."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import fx

from ..analysis.attention import NOT_KNOWN, Attention, Parts, tower_attention
from ..analysis.axes import Dim, Size, Tokens
from ..analysis.carrier import entering_of
from ..analysis.marks import Mark, Votes
from ..analysis.nodes import ancestors, describe, values
from ..analysis.operators import aten
from ..analysis.rules import shape
from ..errors import LocateError, UsageError
from ..reducers import MeanOfWords, MemberVotes, OwnWeights, RowsOfTower, Signal, TextRating
from .attention_rows import attention_rows
from .carried_weights import CarriedWeights
from .epochs import Epochs
from .rewriter import Rewriter
from .sites import LocatedGraph, Site


@dataclass
class Place:
    """Where signals are read.

    Attributes:
        rewriter: which has passed what the site stands after.
        graph: captured.
        site: that is being reduced.
        epochs: of its streams.
        carried: weights.
        mark: that is reduced, where marks are.
        read: what was read for the whole site, by name.
    """

    rewriter: Rewriter
    graph: LocatedGraph
    site: Site
    epochs: Epochs
    carried: CarriedWeights
    mark: Mark | None = None
    read: dict[str, fx.Node] = field(default_factory=dict)

    @property
    def attention(self) -> Attention:
        """Of the site.

        Raises:
            LocateError: it has none.
        """
        if self.site.attention is None:
            raise LocateError(f"Site {self.site.described} has no attention that could be read.")
        return self.site.attention

    def epoch(self, stream: str) -> int:
        """Of one stream."""
        return self.epochs.get(stream, 0)

    def text(self) -> str:
        """The text among the queries; '' without one."""
        streams = self.attention.query_axis.streams
        return next((s for s in streams if self.graph.modality(s) == "text"), "")


def read_signal(signal: Signal, place: Place, stream: str) -> fx.Node | None:
    """What a reducer of a stream reads; see `Signal`.

    Raises:
        LocateError: the site does not have it.
    """
    return _SIGNALS[signal](place, stream)


# --- keys and weights -------------------------------------------------------------------------------------------------


def _keys(place: Place, stream: str) -> fx.Node:
    """This site's keys of a stream, or the nearest self-attention's; of one that comes later, computed ahead."""
    with _passed(place):
        return _known_keys(place, stream)


def _passed(place: Place) -> AbstractContextManager[None]:
    """The keys that the site reads are there."""
    key, after = (place.site.keys or place.attention).key_dim.node, place.site.after
    if key in place.rewriter.env or after is None:
        return nullcontext()
    return place.rewriter.ahead(key, after, after)


def _text_keys(place: Place, stream: str) -> fx.Node:
    attention, rewriter = place.site.keys or place.attention, place.rewriter
    with _passed(place):
        spans = _behind(place, attention.key_axis, stream)
        if attention.key is not None:
            return _joined(rewriter, rewriter.env[attention.key], 2, spans)
        assert attention.key_transposed is not None
        found = _joined(rewriter, rewriter.env[attention.key_transposed], 3, spans)
        return rewriter.call(aten.transpose.int, found, 2, 3)


def _behind(place: Place, axis: Tokens, stream: str) -> list[tuple[int, int]]:
    """Where the text behind an image stands."""
    length, found, stop = place.rewriter.epochs.length, list[tuple[int, int]](), 0
    wanted = [id(segment) for segment in place.graph.behind(axis, stream)]
    for segment in axis.segments:
        start, stop = stop, stop + length(segment, place.epochs)
        if id(segment) in wanted:
            found.append((start, stop))
    return found


def _joined(rewriter: Rewriter, value: fx.Node, dim: int, spans: list[tuple[int, int]]) -> fx.Node:
    parts = [rewriter.call(aten.slice.Tensor, value, dim, *span) for span in spans]
    return rewriter.call(aten.cat.default, parts, dim) if len(parts) > 1 else parts[0]


def _known_keys(place: Place, stream: str) -> fx.Node:
    attention, rewriter = place.site.keys or place.attention, place.rewriter
    at = rewriter.epochs.at(attention.key_dim)
    if stream not in attention.key_axis.streams or at.get(stream, 0) != place.epoch(stream):
        attention = _nearest_self_attention(place, stream)
    span = rewriter.epochs.span(attention.key_axis, stream, rewriter.epochs.at(attention.key_dim))
    if attention.key is not None:
        return rewriter.call(aten.slice.Tensor, rewriter.env[attention.key], 2, *span)
    assert attention.key_transposed is not None
    cut = rewriter.call(aten.slice.Tensor, rewriter.env[attention.key_transposed], 3, *span)
    return rewriter.call(aten.transpose.int, cut, 2, 3)


def _nearest_self_attention(place: Place, stream: str) -> Attention:
    before = ancestors(place.attention.context)
    position = place.graph.attentions.index(place.attention)
    for attention in reversed(place.graph.attentions[:position]):
        reads = stream in attention.query_axis.streams and stream in attention.key_axis.streams
        if reads and attention.context in before:
            if place.rewriter.epochs.at(attention.key_dim).get(stream, 0) == place.epoch(stream):
                return attention
            break
    raise LocateError(
        f"Site {place.attention.described} merges {stream} tokens, but there is no self-attention over the "
        f"{stream} before it whose keys tell which are similar. Set `merge: {{{stream}: 0}}` there."
    )


def _normed(place: Place, stream: str) -> fx.Node:
    value, axis = _all_normed(place)
    return place.rewriter.call(aten.slice.Tensor, value, 1, *place.rewriter.epochs.span(axis, stream, place.epochs))


def _text_normed(place: Place, stream: str) -> fx.Node:
    value, axis = _all_normed(place)
    return _joined(place.rewriter, value, 1, _behind(place, axis, stream))


def _all_normed(place: Place) -> tuple[fx.Node, Tokens]:
    """What the model's last norm makes of the values that are reduced, and their axis."""
    after = place.site.after
    assert after is not None
    axis = place.graph.annotation.axis(Dim(after, 1))
    assert isinstance(axis, Tokens)
    if "normed" not in place.read:
        leaving, norm = place.graph.last_norm(after)
        with place.rewriter.ahead(norm, leaving, after):
            place.read["normed"] = place.rewriter.env[norm]
    return place.read["normed"], axis


def _weights(place: Place, stream: str) -> fx.Node | None:
    """By the masks of this attention, then of those before it, the nearest first."""
    position, rewriter, after = place.graph.attentions.index(place.attention), place.rewriter, place.site.after
    readers = [place.attention, *reversed(place.graph.attentions[:position])]
    early = ExitStack()
    if place.site.enters and after is not None and place.carried.known(stream, place.epoch(stream)) is None:
        # What enters the first layer may be computed before the masks are.
        for mask in place.attention.masks:
            if mask.of_input and mask.node not in rewriter.env:
                early.enter_context(rewriter.ahead(mask.node, after, after))
    with early:
        return place.carried.of(rewriter, stream, place.epoch(stream), readers)


def _text_weights(place: Place, stream: str) -> fx.Node | None:
    text = place.text()
    return _weights(place, text) if text else None


# --- rows of attention ------------------------------------------------------------------------------------------------


def _text_to_image(place: Place, stream: str) -> fx.Node:
    attention, rewriter = place.attention, place.rewriter
    rows = rewriter.epochs.span(attention.query_axis, place.text(), place.epochs)
    keys = rewriter.epochs.span(attention.key_axis, stream, place.epochs)
    found = attention_rows(rewriter, attention, rows, f"reducer.{attention.name}.attention.{stream}")
    return rewriter.call(aten.slice.Tensor, found, 3, *keys)


def _last_query(place: Place, stream: str) -> fx.Node:
    attention, rewriter = place.attention, place.rewriter
    if "last_query" not in place.read:
        last = int(rewriter.epochs.size(attention.query_axis, place.epochs))
        name = f"reducer.{place.site.name}.attention"
        place.read["last_query"] = attention_rows(rewriter, attention, (last - 1, last), name)
    span = rewriter.epochs.span(attention.key_axis, stream, place.epochs)
    return rewriter.call(aten.slice.Tensor, place.read["last_query"], 3, *span)


def _next_query(place: Place, stream: str) -> fx.Node:
    """Of the site's attention, which comes later: it is computed ahead, from the tokens as they are."""
    after = place.site.after
    assert after is not None
    if "last_query" in place.read:
        return _last_query(place, stream)
    with place.rewriter.ahead(place.attention.context, after, after):
        return _last_query(place, stream)


def _behind_to_image(place: Place, stream: str) -> fx.Node:
    attention, rewriter, found = place.site.keys or place.attention, place.rewriter, list[fx.Node]()
    for rows in _behind(place, attention.query_axis, stream):
        key = f"rows.{rows[0]}"
        if key not in place.read:
            name = f"reducer.{place.site.name}.attention_{rows[0]}"
            place.read[key] = attention_rows(rewriter, attention, rows, name)
        found.append(place.read[key])
    joined = rewriter.call(aten.cat.default, found, 2) if len(found) > 1 else found[0]
    span = rewriter.epochs.span(attention.key_axis, stream, place.epochs)
    return rewriter.call(aten.slice.Tensor, joined, 3, *span)


def _class_token(place: Place, stream: str) -> fx.Node:
    mark, rewriter = place.mark, place.rewriter
    if mark is None:
        raise LocateError(f"Site {place.attention.described} is not where image tokens leave a vision tower.")
    if mark.votes is not None:
        return _votes_of_members(place, mark.votes, stream)
    if "class_token" not in place.read:
        place.read["class_token"] = rewriter.call(aten.mean.dim, _tower_rows(place, mark), [1, 2])
    found = place.read["class_token"]
    return _in_order(place, mark, found)


def _in_order(place: Place, mark: Mark, found: fx.Node, *width: Size) -> fx.Node:
    """What a tower has for its tokens, `[rows, tokens, *width]`, as the prompt has them, `[batch, tokens, *width]`."""
    if mark.order is None:
        return found
    call = place.rewriter.call
    own = call(aten.reshape.default, found, [shape(mark.node)[0], -1, *width])
    # The captured graph brings the features into this order.
    order = next(n for n in mark.node.all_input_nodes[0].all_input_nodes if n.op == "get_attr")
    return call(aten.index_select.default, own, 1, place.rewriter.env[order])


def _votes_of_members(place: Place, votes: Votes, stream: str) -> fx.Node:
    """What each row of a prompt gets: the mean of what its tokens get, `[batch, rows]`, float32."""
    if "members" not in place.read:
        found = [_received(place, parts, i, votes) for i, parts in enumerate(votes.deciding)]
        call = place.rewriter.call
        place.read["members"] = call(aten.cat.default, found, 0) if len(found) > 1 else found[0]
    name = f"reducer.{place.attention.name}.members.{stream}"
    return place.rewriter.call_module(name, MemberVotes(votes.members), place.read["members"])


def _received(place: Place, parts: Parts, number: int, votes: Votes) -> fx.Node:
    """What every token of an attention gets, mean over heads and those who vote, `[images * tokens]`, float32."""
    attention, call = tower_attention(parts, number), place.rewriter.call
    masks = [mask for mask in attention.masks if mask.of_input]
    if parts.unusual or len(masks) > 1:
        raise LocateError(
            f"The attention {place.attention.described} of the vision tower decides, and "
            f"{parts.unusual or 'has several masks'}; which tokens it lets vote is not known. `method: fastv` does not "
            "read it."
        )
    queries, keys = int(shape(parts.query)[-2]), int(attention.key_axis.size)
    rows = (0, 1) if votes.by_class else (0, queries)
    name = place.rewriter.free_name(f"reducer.{place.attention.name}.attention_{number}")
    found = attention_rows(place.rewriter, attention, rows, name)
    if keys != queries:  # those who vote are no padding, which is among what they read
        first = votes.own[number]
        found, masks = call(aten.slice.Tensor, found, 3, first, first + queries), []
    if not masks or votes.by_class:
        return call(aten.reshape.default, call(aten.mean.dim, found, [-3, -2]), [-1])
    real = place.rewriter.call_module(f"{name}.real", OwnWeights(masks[0].kind), place.rewriter.env[masks[0].node])
    # Padding has no vote, and gets none.
    share = call(aten.div.Tensor, real, call(aten.sum.dim_IntList, real, [1], True))
    means = call(aten.mean.dim, found, [1])
    voted = call(aten.sum.dim_IntList, call(aten.mul.Tensor, means, call(aten.unsqueeze.default, share, 2)), [1])
    return call(aten.reshape.default, call(aten.mul.Tensor, voted, real), [-1])


def _tower_rows(place: Place, mark: Mark) -> fx.Node:
    """Attention to the image's own tokens, float32: of the class token `[batch, heads, 1, tokens]`, or of every
    token where the tower has none."""
    attention, features, learned_of = place.attention, mark.features, place.graph.annotation.learned
    start, tokens = _offset(features, attention), int(shape(features)[1])
    total = shape(attention.query)[2]
    assert isinstance(total, int)
    learned = max((learned_of[stream] for stream in attention.query_axis.streams), default=0)
    if start < learned:
        raise LocateError(
            f"{describe(features)} gives the class token of the vision tower to the prompt, beside the image's own "
            "tokens; the selection is by the class token's attention to those. Let the model leave it out "
            "(vision_feature_select_strategy='default')."
        )
    if any(mask.of_input for mask in attention.masks) or NOT_KNOWN in attention.unusual:
        raise LocateError(
            f"The attention {attention.described} of the vision tower has a mask; which tokens it lets vote is not "
            "known."
        )
    rows = (0, 1) if learned else (0, total)
    found = attention_rows(place.rewriter, attention, rows, f"reducer.{attention.name}.attention")
    return place.rewriter.call(aten.slice.Tensor, found, 3, start, start + tokens)


def _offset(features: fx.Node, attention: Attention) -> int:
    """Where the features begin among the tokens of the tower (behind its class token)."""
    start, node = 0, features
    while shape(node)[1] != attention.query_axis.size:
        cut = node.target is aten.slice.Tensor and node.args[1] == 1
        first = node.args[2] if cut and len(node.args) > 2 else None
        source = node.args[0] if node.args else None
        if not cut or not isinstance(first, int) or first < 0 or not isinstance(source, fx.Node):
            raise LocateError(
                f"{describe(features)} has {shape(features)[1]} tokens, and the attention {attention.described} "
                f"before it {attention.query_axis.size}; which of them these are is not found."
            )
        start, node = start + first, source
    return start


# --- of a tower -------------------------------------------------------------------------------------------------------


def _tower_keys(place: Place, stream: str) -> fx.Node:
    mark, call = place.mark, place.rewriter.call
    if mark is None:
        raise LocateError(f"Site {place.attention.described} is not where image tokens leave a vision tower.")
    if mark.votes is None:
        if "tower_keys" not in place.read:
            start, tokens = _offset(mark.features, place.attention), int(shape(mark.features)[1])
            keys = _keys_of_heads(place, place.attention)
            place.read["tower_keys"] = call(aten.slice.Tensor, keys, 1, start, start + tokens)
        width = shape(place.attention.query)[3]
        return _in_order(place, mark, place.read["tower_keys"], width)
    if "member_keys" not in place.read:
        found = []
        for number, (parts, first) in enumerate(zip(mark.votes.deciding, mark.votes.own, strict=True)):
            keys = _keys_of_heads(place, tower_attention(parts, number))
            own = call(aten.slice.Tensor, keys, 1, first, first + int(shape(parts.query)[-2]))
            found.append(call(aten.reshape.default, own, [-1, shape(parts.query)[3]]))
        place.read["member_keys"] = call(aten.cat.default, found, 0) if len(found) > 1 else found[0]
    name = f"reducer.{place.attention.name}.keys.{stream}"
    return place.rewriter.call_module(name, MemberVotes(mark.votes.members), place.read["member_keys"])


def _keys_of_heads(place: Place, attention: Attention) -> fx.Node:
    """The mean over heads of the keys of an attention, `[rows, tokens, head_size]`, float32."""
    key, call = attention.key or attention.key_transposed, place.rewriter.call
    assert key is not None
    if len(shape(key)) != 4:
        raise LocateError(
            f"The attention {attention.described} of the vision tower has keys of shape {list(shape(key))}, and "
            "[images, heads, tokens, head size] is expected: tokens are merged by the mean of their keys over heads."
        )
    given = place.rewriter.env[key]
    if values(key)[0].dtype != torch.float32:
        given = call(aten.to.dtype, given, torch.float32)
    mean = call(aten.mean.dim, given, [1])
    return mean if attention.key is not None else call(aten.transpose.int, mean, 1, 2)


def has_class_token(graph: LocatedGraph, attention: Attention, mark: Mark) -> bool:
    """Whether a mark is where tokens leave a tower whose class token leaves it beside them."""
    learned = max((graph.annotation.learned[s] for s in attention.query_axis.streams), default=0)
    return mark.votes is None and learned > 0 and _offset(mark.features, attention) > 0


def _class_feature(place: Place, stream: str) -> fx.Node:
    mark, call = place.mark, place.rewriter.call
    assert mark is not None  # only of streams with a class token
    node, tokens = mark.features, int(shape(mark.features)[1])
    while shape(node)[1] != place.attention.query_axis.size:
        (node,) = node.all_input_nodes
    first = call(aten.slice.Tensor, place.rewriter.env[node], 1, 0, 1)
    if mark.order is None:
        return first
    own = call(aten.reshape.default, first, [shape(mark.node)[0], -1, shape(mark.node)[2]])
    rows = [mark.order[crop[0]] // tokens for crop in mark.crops]
    parts = [call(aten.slice.Tensor, own, 1, row, row + 1) for row in rows]
    return call(aten.cat.default, parts, 1) if len(parts) > 1 else parts[0]


# --- of the text ------------------------------------------------------------------------------------------------------


def _text_embedding(place: Place, stream: str) -> fx.Node:
    words, rewriter = None if place.mark is None else place.mark.words, place.rewriter
    if words is None or not words.places:
        what = "has no text beside the image" if words is not None else "comes from no single table of words"
        raise LocateError(
            f"The method asks how relevant an image token is to the text, and the prompt {what}. "
            "`method: divprune` reads no text."
        )
    if "text_embedding" not in place.read:
        # Whatever says of every id of the prompt whether it is padding; as made-up samples find it.
        masks = [
            node
            for node in words.node.graph.find_nodes(op="placeholder")
            if str(node.target).endswith("mask") and shape(node) == shape(words.node)[:2]
        ]
        given = [rewriter.env[words.node], *(rewriter.env[mask] for mask in masks[:1])]
        name = f"reducer.{place.site.name}.text"
        place.read["text_embedding"] = rewriter.call_module(name, MeanOfWords(words.places), *given)
    return place.read["text_embedding"]


def _text_rating(place: Place, stream: str) -> fx.Node:
    """Of what enters the first layer of the language model; the same for all sites."""
    rewriter, name = place.rewriter, f"reducer.rating.{stream}"
    made: list[fx.Node] = list(rewriter.graph.find_nodes(op="call_module", target=name))
    if made:
        return made[0]
    first = place.graph.prompt_layers()[0]
    entering = entering_of(first.context)
    axis = None if entering is None else place.graph.annotation.axis(Dim(entering, 1))
    if entering is None or not isinstance(axis, Tokens) or stream not in axis.streams:
        raise LocateError(
            f"The text is rated by the embeddings that enter the language model, [batch, tokens, width], and what "
            f"enters the layer of {first.described} is not {stream} and text in this form."
        )
    then = replace(place, epochs=rewriter.epochs.at(Dim(entering, 1)))
    spans = [rewriter.epochs.span(axis, stream, then.epochs)], _behind(then, axis, stream)
    parts = [_joined(rewriter, rewriter.env[entering], 1, list(found)) for found in spans]
    return rewriter.call_module(name, TextRating(), *parts)


def _tower_features(place: Place, stream: str) -> fx.Node:
    tower = None if place.mark is None else place.mark.tower
    if tower is None:
        raise LocateError(
            "The method reads what image tokens are when they leave a vision tower, and the rows of this prompt are "
            "not one of its tokens each."
        )
    name = f"reducer.{place.site.name}.tower.{stream}"
    return place.rewriter.call_module(name, RowsOfTower(tower.order, tower.count), place.rewriter.env[tower.features])


def _added_input(name: str, place: Place, stream: str) -> fx.Node:
    """An input of the graph that the model does not take, by its name."""
    for captured, node in place.rewriter.env.items():
        if captured.op == "placeholder" and captured.target == name:
            return node
    raise UsageError(
        f"The schedule adds the input {name} to those of the model, and a graph that is compiled where the model runs "
        "(torch.compile) takes no other inputs. Compile it to an artifact."
    )


_SIGNALS: dict[Signal, Callable[[Place, str], fx.Node | None]] = {
    Signal.KEYS: _keys,
    Signal.WEIGHTS: _weights,
    Signal.TEXT_TO_IMAGE: _text_to_image,
    Signal.TEXT_WEIGHTS: _text_weights,
    Signal.LAST_QUERY: _last_query,
    Signal.CLASS_TOKEN: _class_token,
    Signal.TOWER_KEYS: _tower_keys,
    Signal.CLASS_FEATURE: _class_feature,
    Signal.TEXT_EMBEDDING: _text_embedding,
    Signal.NEXT_QUERY: _next_query,
    Signal.TEXT_KEYS: _text_keys,
    Signal.NORMED: _normed,
    Signal.TEXT_NORMED: _text_normed,
    Signal.BEHIND_TO_IMAGE: _behind_to_image,
    Signal.TEXT_RATING: _text_rating,
    Signal.TOWER_FEATURES: _tower_features,
    Signal.TEXT_EMBEDS: partial(_added_input, Signal.TEXT_EMBEDS.value),
    Signal.QUESTION_IDS: partial(_added_input, Signal.QUESTION_IDS.value),
}
