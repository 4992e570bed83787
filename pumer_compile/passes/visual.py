"""What the walk emits where a vision tower's features leave for a prompt: the visual selection (VisPruner)."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from functools import partial

import torch
from torch import fx

from ..errors import LocateError, PlanError, UsageError
from ..plan import SitePlan
from ..reducers.vispruner import Order
from ..reducers.visual import VisualReducer, WithSeparators
from .annotate import Annotation
from .attention_rows import attention_rows
from .axes import Dim, Tokens
from .graph import describe, values
from .history import Step
from .insert import Insertions, SiteInsertion
from .locate import NOT_KNOWN, Attention
from .prompt import Mark
from .rewrite import Rewriter
from .rules import aten, shape

log = logging.getLogger("pumer_compile")


class SelectVisual:
    """Emits a `VisualReducer` in place of a mark."""

    def __init__(self, insertions: Insertions, site: SiteInsertion, mark: Mark) -> None:
        self.insertions, self.site, self.mark = insertions, site, mark

    def __call__(self, walk: Rewriter) -> fx.Node:
        mark, attention, schedule = self.mark, self.site.attention, self.insertions.schedule
        assert schedule.budget is not None and schedule.important is not None
        (tokens,) = mark.node.all_input_nodes
        stream = only_stream(walk.annotation, mark.node)
        self._check_budget(schedule.budget)
        order: Order = "stable" if schedule.semantics == "stable" else "reference"
        reducer = VisualReducer(mark.crops, schedule.budget, schedule.important, order=order)
        self.site.reducers[stream] = reducer
        votes = self._votes(walk, attention)
        name = f"reducer.{attention.name}.{stream}"
        made = walk.call_module(name, reducer, walk.env[tokens], votes)
        kept, weights, step_map, *_, assigned = (walk.item(made, index) for index in range(7))
        walk.batch = walk.batch or Dim(mark.node, 0)
        self.insertions.weights[stream, take_step(walk, mark.node, step_map, assigned, reducer.tokens_after)] = weights
        self._plan(stream, reducer)
        return kept

    def _check_budget(self, budget: int) -> None:
        given = int(shape(self.mark.features)[1])
        if budget > given:
            raise PlanError(
                f"A budget of {budget} is more than the {given} tokens that the vision tower gives. Choose a smaller "
                "one, or `none`."
            )
        if budget >= max(map(len, self.mark.crops)):
            log.warning("A budget of %d keeps every token of an image: nothing of it is pruned.", budget)

    def _plan(self, stream: str, reducer: VisualReducer) -> None:
        """Add this block's counts to those of the blocks before it."""
        attention, before = self.site.attention, reducer.tokens
        plan = self.site.plan or SitePlan(attention.site, attention.module, {}, {}, {}, {}, call=attention.call)
        self.site.plan = dataclasses.replace(
            plan,
            before={**plan.before, stream: before},
            after={**plan.after, stream: reducer.tokens_after},
            pruned={**plan.pruned, stream: before - reducer.tokens_after},
        )

    def _votes(self, walk: Rewriter, attention: Attention) -> fx.Node:
        """What each token of the mark gets, `[batch, tokens]`, float32."""
        mark = self.mark
        tokens = int(shape(mark.features)[1])
        if self.site.votes is None:
            rows = self._attention(walk, attention, mark.features, tokens)
            self.site.votes = walk.call(aten.mean.dim, rows, [1, 2])
        found = self.site.votes
        if mark.order is None:
            return found
        batch = shape(mark.node)[0]
        own = walk.call(aten.reshape.default, found, [batch, -1])
        # The captured graph brings the features into this order.
        order = next(n for n in mark.node.all_input_nodes[0].all_input_nodes if n.op == "get_attr")
        return walk.call(aten.index_select.default, own, 1, walk.env[order])

    def _attention(self, walk: Rewriter, attention: Attention, features: fx.Node, tokens: int) -> fx.Node:
        """Attention to the image's own tokens, float32: of the class token `[batch, heads, 1, tokens]`, or of every
        token where the tower has none."""
        start = self._offset(features, attention)
        total = shape(attention.query)[2]
        assert isinstance(total, int)
        learned = max((walk.annotation.learned[stream] for stream in attention.query_axis.streams), default=0)
        if start < learned:
            raise LocateError(
                f"{describe(features)} gives the class token of the vision tower to the prompt, beside the image's own "
                "tokens; the selection is by the class token's attention to those. Let the model leave it out "
                "(vision_feature_select_strategy='default')."
            )
        rows = (0, 1) if learned else (0, total)
        if attention.masks or NOT_KNOWN in attention.unusual:
            raise LocateError(
                f"The attention {attention.described} of the vision tower has a mask; which tokens it lets vote is not "
                "known."
            )
        found = attention_rows(walk, attention, rows, f"reducer.{attention.name}.attention")
        return walk.call(aten.slice.Tensor, found, 3, start, start + tokens)

    @staticmethod
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


class DropSeparators:
    """Leaves out the separators between image tokens, as the published code does: its budget is of image tokens."""

    def __init__(self, mark: Mark) -> None:
        self.mark = mark

    def __call__(self, walk: Rewriter) -> fx.Node:
        separated = self.mark.separated
        assert separated is not None
        image = separated.args[0]
        assert isinstance(image, fx.Node)
        inner, outer = (only_stream(walk.annotation, node) for node in (self.mark.node, separated))
        (step,) = walk.history.steps[inner]
        module = WithSeparators(self.mark.origin)
        step_map = walk.call_module(f"reducer.separators.{outer}", module, step.map)
        take_step(walk, separated, step_map, step_map, step.after)
        return walk.env[image]


def take_step(walk: Rewriter, node: fx.Node, step_map: fx.Node, assigned: fx.Node, after: int) -> int:
    """Note that the stream along dimension 1 of a node is `after` tokens long from there on; the new epoch."""
    stream = only_stream(walk.annotation, node)
    epoch = walk.history.add_step(stream, Step(0, step_map, assigned, after, False, False))
    walk.history.bump(Dim(node, 1), {stream: epoch})
    return epoch


def only_stream(annotation: Annotation, node: fx.Node) -> str:
    """The stream whose tokens are dimension 1 of a mark."""
    axis = annotation.axis(Dim(node, 1))
    assert isinstance(axis, Tokens)
    (segment,) = axis.segments
    return str(segment.stream)


def counted_anew(insertions: Insertions) -> dict[fx.Node, Callable[[Rewriter], fx.Node | None]]:
    """Positions along a prompt, made out of nothing but its length: counted over the tokens that are left.

    With `positions: original` those that become features (rotary angles) are not: they stay where they were, and the
    selection takes them. Comparisons of positions, as in a causal mask, come out the same either way.

    Raises:
        UsageError: positions are to be counted anew, and the caller gives them.
    """
    marks = [mark for site in insertions.sites for mark in site.marks]
    streams = {s for mark in marks for s in _streams(insertions, mark.prompted, 1)}
    if insertions.schedule.positions == "compact":
        _check_not_given(insertions, streams)
    found: dict[fx.Node, Callable[[Rewriter], fx.Node | None]] = {}
    for node in insertions.annotation.constraints:
        if node.target is not aten.arange.default or not streams & set(_streams(insertions, node, 0)):
            continue
        if insertions.schedule.positions == "compact" or not _becomes_feature(node):
            found[node] = partial(_count, node)
    return found


def _check_not_given(insertions: Insertions, streams: set[str]) -> None:
    for node in insertions.attentions[0].context.graph.find_nodes(op="placeholder"):
        tensors = [value for value in values(node) if not value.is_floating_point()]
        along = any(streams & set(_streams(insertions, node, i)) for value in tensors for i in range(value.dim()))
        if along and ("position" in str(node.target) or _becomes_angle(node)):
            raise UsageError(
                "`positions: compact` counts positions anew over the tokens that are left, and here they are given, in "
                f"the input {node.target}, counted over the whole prompt. Leave that input out, or choose "
                "`positions: original` (transformers' `generate` always gives them)."
            )


def _becomes_angle(node: fx.Node) -> bool:
    """Whether the numbers of an input themselves are taken the cosine or sine of (rotary positions)."""
    pending, seen = [node], {node}
    while pending:
        for user in pending.pop().users:
            if user.target in (aten.cos.default, aten.sin.default):
                return True
            if user.target not in (aten.embedding.default, aten.cumsum.default) and user not in seen:
                seen.add(user)
                pending.append(user)
    return False


def _count(node: fx.Node, walk: Rewriter) -> fx.Node:
    dim = Dim(node, 0)
    kind = walk.annotation.axis(dim)
    assert isinstance(kind, Tokens)
    epochs = {s: len(walk.history.steps.get(s, ())) for s in kind.streams}
    walk.history.bump(dim, epochs)
    size = walk.history.size(kind, epochs)
    new = walk.graph.node_copy(node, lambda n: walk.env[n])
    new.args = (size, *new.args[1:])
    return new


def _streams(insertions: Insertions, node: fx.Node, index: int) -> tuple[str, ...]:
    kind = insertions.annotation.axis(Dim(node, index))
    return kind.streams if isinstance(kind, Tokens) else ()


def _becomes_feature(node: fx.Node) -> bool:
    """Whether integers are turned into floating-point numbers."""
    pending, seen = [node], {node}
    while pending:
        for user in pending.pop().users:
            found = values(user)
            if found and found[0].is_floating_point():
                return True
            if found and found[0].dtype != torch.bool and user not in seen:
                seen.add(user)
                pending.append(user)
    return False
