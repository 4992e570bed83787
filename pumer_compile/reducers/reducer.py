"""One stream at one site: prune, merge, and the linear map that both come to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .merger import LAST_RESORT, Matching, ModalityAwareMerger
from .pruner import TextInformedPruner
from .ranking import indices, leading, one_hot, ranked
from .vispruner import VisPruner

Averaging = Literal["plain", "sizes"]
Carried = Literal["mean", "ones", "sum"]


class Reduction(NamedTuple):
    """What a `StreamReducer` gives.

    Attributes:
        tokens: the reduced stream, `[batch, after, width]`; None where none was given.
        weights: the carried weights of the reduced tokens, `[batch, after]`.
        map: rows that average old tokens into new ones, `[batch, after, before]`, float32.
        kept: see `Decisions`.
        source: see `Decisions`.
        target: see `Decisions`.
        assigned: 1 where an old token went into a new one, else 0, `[batch, after, before]`, float32.
    """

    tokens: Tensor | None
    weights: Tensor
    map: Tensor
    kept: Tensor
    source: Tensor
    target: Tensor
    assigned: Tensor


class Decisions(NamedTuple):
    """Every data-dependent choice of a reducer, as indices (int64).

    Attributes:
        kept: tokens that survive pruning, in their new order, `[batch, keep]`, numbered before the reducer.
        source: tokens that merge away, most similar first, `[batch, merge]`, numbered among the kept ones.
        target: the token each merges into, `[batch, merge]`, numbered among the kept ones.
    """

    kept: Tensor
    source: Tensor
    target: Tensor


@dataclass
class Comparison:
    """A reducer's own decisions beside those forced on it.

    Attributes:
        own: what the reducer decides on its inputs.
        forced: what it was told to do.
        differs: samples where any index differs, `[batch]` bool.
        margin: largest gap between the scores of differing choices, relative to them, `[batch]`; 0 where none differs,
            NaN where choices differ that have no score.
    """

    own: Decisions
    forced: Decisions
    differs: Tensor
    margin: Tensor


@dataclass
class Forcing:
    """Decisions to force on one reducer, and what came of it (parity)."""

    decisions: Decisions
    comparison: Comparison | None = field(default=None)


class _Pruned(NamedTuple):
    kept: Tensor
    rows: tuple[Tensor, ...]
    saliency: Tensor | None


class StreamReducer(nn.Module):
    """Prunes (image only) and merges one stream at one site.

    Decisions are made in float32 whatever the model's dtype. Features are combined by one matmul with `map`;
    no gather, scatter, sort or top-k reaches an exported graph. Gradients flow through `tokens`.

    Args:
        tokens: tokens before.
        pruner: keeps `pruner.keep` of them; None prunes nothing and keeps the order.
        merger: merges `merger.merge` of the kept ones away.
        averaging: `plain` mean of merged tokens, or weighted by carried `sizes` (0 for padding).
        carried: what becomes of the carried weights: their `mean` (published code, text), `ones` (published
            code, image) or their `sum` (token sizes).
    """

    # Whether a choice that differs from eager PyTorch's must be a near-tie (parity); else it is reported.
    judged = True

    def __init__(
        self,
        tokens: int,
        pruner: TextInformedPruner | VisPruner | None,
        merger: ModalityAwareMerger,
        *,
        averaging: Averaging = "plain",
        carried: Carried = "mean",
    ) -> None:
        super().__init__()
        self.tokens, self.pruner, self.merger = tokens, pruner, merger
        self.averaging, self.carried = averaging, carried
        self.forcing: Forcing | None = None

    @property
    def tokens_after(self) -> int:
        """Tokens after pruning and merging."""
        keep = self.pruner.keep if self.pruner else self.tokens
        return keep - self.merger.merge

    def forward(
        self,
        tokens: Tensor | None,
        keys: Tensor,
        weights: Tensor | None = None,
        attention: Tensor | None = None,
        text_weights: Tensor | None = None,
    ) -> Reduction:
        """Reduce the stream.

        Args:
            tokens: the stream's carrier, `[batch, before, width]`; None where only the map is wanted.
            keys: the site's keys, `[batch, heads, before, head_size]`.
            weights: carried weights, `[batch, before]`: mask fractions or token sizes; 0 is padding; None is
                ones.
            attention: text-to-image attention after softmax, `[batch, heads, text, before]`; image streams
                only.
            text_weights: carried weights of the text, `[batch, text]`; image streams only.
        """
        if torch.amp.is_autocast_available(keys.device.type) and torch.is_autocast_enabled(keys.device.type):
            # Autocast would compute similarities in half precision, and ties with them.
            with torch.autocast(keys.device.type, enabled=False):
                return self.forward(tokens, keys, weights, attention, text_weights)
        if weights is None:
            weights = torch.ones_like(keys[:, 0, :, 0], dtype=torch.float32)
        # Decisions have no gradient, and autograd would hold on to what they are made from.
        units = self.merger.units(keys.detach().float().mean(1)) if self.merger.merge else None
        kept, rows, saliency = self._prune(weights, attention, text_weights)
        matching = self._match(rows, units, weights)
        if self.forcing is not None:
            kept, rows, matching = self._force(kept, saliency, units, weights, matching)
        assigned = self._assignment(rows, matching)
        return self._combine(tokens, weights, assigned, decisions_of(kept, matching))

    def _prune(self, weights: Tensor, attention: Tensor | None, text_weights: Tensor | None) -> _Pruned:
        if self.pruner is None or attention is None:
            place = torch.arange(self.tokens, device=weights.device)
            kept = place.expand(weights.shape[0], -1)
            # One row of places for all samples: a constant in the exported graph.
            rank = place.unsqueeze(0) if self.merger.merge else kept
            return _Pruned(kept, self._rows(rank.float()), None)
        assert isinstance(self.pruner, TextInformedPruner)
        rank, saliency = self.pruner.rank(attention.detach(), text_weights)
        kept = indices(leading(rank, self.pruner.keep))
        return _Pruned(kept, self._rows(rank), saliency)

    def _rows(self, rank: Tensor) -> tuple[Tensor, ...]:
        """What selects the kept tokens, in order; or the even and the odd ones of them, where some merge."""
        keep = self.pruner.keep if self.pruner else self.tokens
        return tuple(ranked(rank, places).float() for places in self._split(torch.arange(keep, device=rank.device)))

    def _split(self, kept: Tensor) -> tuple[Tensor, ...]:
        return (kept[..., 0::2], kept[..., 1::2]) if self.merger.merge else (kept,)

    def _match(self, rows: tuple[Tensor, ...], units: Tensor | None, weights: Tensor) -> Matching | None:
        if units is None:
            return None
        if self.pruner is None:
            return self.merger.match(units, weights)
        even, odd = rows
        weighed = []
        if self.merger.keep_padding_apart:
            weighed = [(half @ weights.float().unsqueeze(-1)).squeeze(-1) for half in rows]
        return self.merger.pair(even @ units, odd @ units, *weighed)

    def _assignment(self, rows: tuple[Tensor, ...], matching: Matching | None) -> Tensor:
        """Zeros and ones, `[batch, after, before]`: the old tokens that make each new one."""
        if matching is None:
            return rows[0]
        even, odd = rows
        stay, join = self.merger.assignment(matching.merged, matching.pairs)
        return torch.cat((stay @ even, join @ even + odd), 1)

    def _combine(self, tokens: Tensor | None, weights: Tensor, assigned: Tensor, decisions: Decisions) -> Reduction:
        carried = weights.float()
        share = assigned
        if self.averaging == "sizes":
            sized = assigned * carried.unsqueeze(1)
            # Padding has size 0: a token made of padding alone is the plain mean of it.
            share = torch.where(sized.sum(-1, keepdim=True) > 0, sized, assigned)
        average = share / share.sum(-1, keepdim=True) if self.merger.merge else assigned
        reduced = None if tokens is None else average.to(tokens.dtype) @ tokens
        if self.carried == "ones":
            after = torch.ones_like(assigned[:, :, 0])
        else:
            rows = average if self.carried == "mean" else assigned
            after = (rows @ carried.unsqueeze(-1)).squeeze(-1)
        return Reduction(reduced, after.to(weights.dtype), average, *decisions, assigned)

    def _force(
        self,
        kept: Tensor,
        saliency: Tensor | None,
        units: Tensor | None,
        weights: Tensor,
        matching: Matching | None,
    ) -> tuple[Tensor, tuple[Tensor, ...], Matching | None]:
        """Compare with the forced decisions, one after the other, and return the forced ones."""
        assert self.forcing is not None
        forced = self.forcing.decisions
        own = decisions_of(kept, matching)
        differs = (kept != forced.kept).any(1)
        margin = torch.zeros(differs.shape, device=differs.device)
        if saliency is not None:
            margin = relative_gap(saliency.gather(1, kept), saliency.gather(1, forced.kept), saliency).amax(1)
        rows = tuple(one_hot(part, self.tokens).float() for part in self._split(forced.kept))
        if matching is not None:
            # The merger's own choice among the tokens that the forced pruning kept.
            matching = self._match(rows, units, weights)
            assert matching is not None
            own = Decisions(kept, *decisions_of(kept, matching)[1:])
            differs = differs | (own.source != forced.source).any(1) | (own.target != forced.target).any(1)
            scale = self._similarity_scale(matching)
            source, target = forced.source // 2, forced.target // 2  # among the even tokens, among the odd ones
            margin = torch.maximum(margin, _gap(matching.best, matching.source // 2, source) / scale)
            margin = torch.maximum(margin, _target_gap(matching, source, target) / scale)
            matching = self.merger.forced(matching, forced.source, forced.target)
        self.forcing.comparison = Comparison(own, forced, differs, torch.where(differs, margin, 0.0))
        return forced.kept, rows, matching

    def _similarity_scale(self, matching: Matching) -> Tensor | float:
        """What similarities are rounded in proportion to, `[batch]`: cosines to 1, products to the largest."""
        if self.merger.similarity == "cosine":
            return 1.0
        allowed = torch.where(matching.scores > LAST_RESORT, matching.scores, 0.0)
        return allowed.abs().amax((1, 2)).clamp(min=1e-30)


class ApplyMap(nn.Module):
    """Reduces other tokens by the map of a `StreamReducer`, as that one reduces its own."""

    def forward(self, tokens: Tensor, map_: Tensor) -> Tensor:
        """`[batch, after, width]` from `[batch, before, width]` and a map `[batch, after, before]`, float32."""
        if torch.amp.is_autocast_available(tokens.device.type) and torch.is_autocast_enabled(tokens.device.type):
            # Autocast would round the residual values of a model to half precision.
            with torch.autocast(tokens.device.type, enabled=False):
                return self.forward(tokens, map_)
        return map_.to(tokens.dtype) @ tokens


def decisions_of(kept: Tensor, matching: Matching | None) -> Decisions:
    """Decisions of pruning and of merging."""
    if matching is None:
        return Decisions(kept, kept[:, :0], kept[:, :0])
    return Decisions(kept, matching.source, matching.target)


# Scores below this share of the largest one are rounded in proportion to it, not to themselves.
FLOOR = 1e-5


def relative_gap(own: Tensor, forced: Tensor, scores: Tensor) -> Tensor:
    """Differences of two choices' scores, relative to these scores and not to the largest: beside a token that draws
    nearly all attention, those at the cut would all count as tied.

    Args:
        own, forced: scores of what was chosen, `[batch, n]`.
        scores: all of them, `[batch, tokens]`.

    Returns:
        `[batch, n]`.
    """
    floor = (FLOOR * scores.abs().amax(1, keepdim=True)).clamp(min=1e-30)
    return (own - forced).abs() / torch.maximum(torch.maximum(own.abs(), forced.abs()), floor)


def _gap(scores: Tensor, own: Tensor, forced: Tensor) -> Tensor:
    """Largest score difference between two choices, position by position, `[batch]`."""
    difference = scores.gather(1, own) - scores.gather(1, forced)
    return torch.where(own == forced, 0.0, difference.abs()).amax(1)


def _target_gap(matching: Matching, source: Tensor, target: Tensor) -> Tensor:
    """Largest similarity lost by given targets (among the odd tokens) of given sources (even), `[batch]`."""
    rows = matching.scores.gather(1, source.unsqueeze(-1).expand(-1, -1, matching.scores.shape[-1]))
    lost = rows.amax(-1) - rows.gather(2, target.unsqueeze(-1)).squeeze(-1)
    return lost.abs().amax(1)


@contextmanager
def noted_decisions(module: nn.Module) -> Iterator[dict[str, Decisions]]:
    """Note what the reducers inside `module` decide in a forward pass within the block, by module path.

    Yields the decisions, which a forward pass fills in. Eager PyTorch only.
    """
    noted: dict[str, Decisions] = {}

    def note(name: str, reducer: nn.Module, given: Any, result: Reduction) -> None:
        noted[name] = Decisions(result.kept, result.source, result.target)

    reducers = {name: m for name, m in module.named_modules() if isinstance(m, StreamReducer)}
    hooks = [reducer.register_forward_hook(partial(note, name)) for name, reducer in reducers.items()]
    try:
        yield noted
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def forced_decisions(module: nn.Module, decisions: dict[str, Decisions]) -> Iterator[dict[str, Forcing]]:
    """Make the reducers inside `module` follow `decisions` (by module path) within the block.

    Yields the forcings, whose `comparison` is filled by a forward pass. Eager PyTorch only.
    """
    reducers = {name: m for name, m in module.named_modules() if isinstance(m, StreamReducer)}
    unknown = sorted(set(decisions) - set(reducers))
    if unknown:
        raise KeyError(f"no reducer named {unknown}; there are {sorted(reducers)}")
    forcings = {name: Forcing(value) for name, value in decisions.items()}
    try:
        for name, forcing in forcings.items():
            reducers[name].forcing = forcing
        yield forcings
    finally:
        for reducer in reducers.values():
            reducer.forcing = None
