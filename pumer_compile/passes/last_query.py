"""What the walk emits in a language layer: the image tokens stay that the last word looks at (FastV)."""

from __future__ import annotations

from torch import fx

from ..errors import LocateError, PlanError
from ..plan import SitePlan
from ..reducers.last_query import LastQueryReducer
from .attention_rows import attention_rows
from .axes import Dim, Tokens
from .graph import describe
from .history import Step
from .insert import Insertions, SiteInsertion
from .rewrite import Rewriter
from .rules import aten

# Fields of `Reduction`.
TOKENS, MAP, ASSIGNED = 0, 2, 6


class KeepForLastQuery:
    """Emits a `LastQueryReducer` for each image after a site's carrier.

    The query that votes stands at the last position of the prompt, so prompts of several lengths are padded in front.
    """

    def __init__(self, insertions: Insertions, site: SiteInsertion) -> None:
        self.insertions, self.site = insertions, site

    def __call__(self, walk: Rewriter) -> None:
        attention, carrier = self.site.attention, self.site.attention.carrier
        assert carrier is not None
        axis = self._axis(walk, carrier)
        self._plan(axis)
        walk.batch = walk.batch or Dim(carrier, 0)
        last = attention.query_axis.size
        votes = attention_rows(walk, attention, (last - 1, last), f"reducer.{attention.name}.attention")
        parts, start = [], 0
        for segment in axis.segments:
            part = walk.call(aten.slice.Tensor, walk.env[carrier], 1, start, start + segment.length)
            if segment.stream in self.site.images:
                part = self._reduce(walk, str(segment.stream), part, votes)
            parts.append(part)
            start += segment.length
        walk.env[carrier] = walk.call(aten.cat.default, parts, 1)
        walk.history.bump(Dim(carrier, 1), dict.fromkeys(self.site.images, 1))

    def _axis(self, walk: Rewriter, carrier: fx.Node) -> Tokens:
        axes = walk.annotation.axes(carrier)
        axis = axes[1] if len(axes) == 3 else None
        if not isinstance(axis, Tokens) or axis != self.site.attention.query_axis:
            raise LocateError(
                f"The carrier of {self.site.attention.described}, {describe(carrier)}, has axes "
                f"({', '.join(map(str, axes))}); expected [batch, {self.site.attention.query_axis}, width]."
            )
        return axis

    def _plan(self, axis: Tokens) -> None:
        budget, attention = self.insertions.schedule.budget, self.site.attention
        assert budget is not None
        before = {str(s.stream): s.length for s in axis.segments if s.stream in self.site.images}
        for stream, tokens in before.items():
            if budget > tokens:
                raise PlanError(
                    f"A budget of {budget} is more than the {tokens} tokens of {stream} in the prompt. Choose a "
                    "smaller one, or `none`."
                )
            self.site.reducers[stream] = LastQueryReducer(tokens, budget)
        after = dict.fromkeys(before, budget)
        pruned = {stream: tokens - budget for stream, tokens in before.items()}
        self.site.plan = SitePlan(attention.site, attention.module, before, after, pruned, {}, call=attention.call)

    def _reduce(self, walk: Rewriter, stream: str, tokens: fx.Node, votes: fx.Node) -> fx.Node:
        attention, reducer = self.site.attention, self.site.reducers[stream]
        span = walk.history.span(attention.key_axis, stream, {})
        to_image = walk.call(aten.slice.Tensor, votes, 3, *span)
        made = walk.call_module(f"reducer.{attention.name}.{stream}", reducer, tokens, to_image)
        step = Step(0, walk.item(made, MAP), walk.item(made, ASSIGNED), reducer.tokens_after, False, False)
        walk.history.add_step(stream, step)
        return walk.item(made, TOKENS)
