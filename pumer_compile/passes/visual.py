"""What the walk emits where a vision tower's features leave for a prompt: the visual selection (VisPruner)."""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable
from functools import partial

import torch
from torch import fx

from ..errors import LocateError, PlanError
from ..plan import SitePlan
from ..reducers.vispruner import Order
from ..reducers.visual import VisualReducer
from .attention_rows import attention_rows
from .axes import Dim, Tokens
from .graph import describe, values
from .insert import Insertions, SiteInsertion
from .locate import Attention
from .rewrite import Rewriter, Step
from .rules import aten, shape

log = logging.getLogger("pumer_compile")


class SelectVisual:
    """Emits a `VisualReducer` in place of a mark."""

    def __init__(self, insertions: Insertions, site: SiteInsertion) -> None:
        self.insertions, self.site = insertions, site

    def __call__(self, walk: Rewriter) -> fx.Node:
        mark, attention, schedule = self.site.mark, self.site.attention, self.insertions.schedule
        assert mark is not None and schedule.budget is not None and schedule.important is not None
        (features,) = mark.all_input_nodes
        axis = walk.annotation.axis(Dim(mark, 1))
        assert isinstance(axis, Tokens)
        (segment,) = axis.segments
        stream = str(segment.stream)
        if schedule.budget > segment.length:
            raise PlanError(
                f"A budget of {schedule.budget} is more than the {segment.length} tokens that the vision tower gives. "
                "Choose a smaller one, or `none`."
            )
        if schedule.budget == segment.length:
            log.warning("A budget of %d keeps every token of the image: nothing is reduced.", schedule.budget)
        order: Order = "stable" if schedule.semantics == "stable" else "reference"
        reducer = VisualReducer(segment.length, schedule.budget, schedule.important, order=order)
        self.site.reducers[stream] = reducer
        probabilities = self._attention(walk, attention, features, segment.length)
        name = f"reducer.{attention.name}.{stream}"
        made = walk.call_module(name, reducer, walk.env[features], probabilities)
        tokens, weights, step_map, *_, assigned = (walk.call(operator.getitem, made, index) for index in range(7))
        walk.batch = walk.batch or Dim(mark, 0)
        epoch = walk.add_step(stream, Step(0, step_map, assigned, schedule.budget, False, False))
        self.insertions.weights[stream, epoch] = weights
        walk.bump(Dim(mark, 1), {stream: epoch})
        pruned = {stream: segment.length - schedule.budget}
        before, after = {stream: segment.length}, {stream: schedule.budget}
        self.site.plan = SitePlan(attention.site, attention.module, before, after, pruned, {}, call=attention.call)
        return tokens

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
        if attention.masks:
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


def counted_anew(insertions: Insertions) -> dict[fx.Node, Callable[[Rewriter], fx.Node | None]]:
    """Positions along a prompt, made out of nothing but its length: counted over the tokens that are left.

    With `positions: original` those that become features (rotary angles) are not: they stay where they were, and the
    selection takes them. Comparisons of positions, as in a causal mask, come out the same either way.
    """
    marks = [site.mark for site in insertions.sites if site.mark is not None]
    streams = {s for mark in marks for s in _streams(insertions, mark, 1)}
    found: dict[fx.Node, Callable[[Rewriter], fx.Node | None]] = {}
    for node in insertions.annotation.constraints:
        if node.target is not aten.arange.default or not streams & set(_streams(insertions, node, 0)):
            continue
        if insertions.schedule.positions == "compact" or not _becomes_feature(node):
            found[node] = partial(_count, node)
    return found


def _count(node: fx.Node, walk: Rewriter) -> fx.Node:
    dim = Dim(node, 0)
    kind = walk.annotation.axis(dim)
    assert isinstance(kind, Tokens)
    epochs = {s: len(walk.steps.get(s, ())) for s in kind.streams}
    walk.bump(dim, epochs)
    size = walk.size(kind, epochs)
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
