"""One stream at one site: prune, merge, and the linear map that both come to."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from .merger import LAST_RESORT, Matching, ModalityAwareMerger
from .pruner import TextInformedPruner
from .ranking import identity, one_hot
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
        margin: largest relative score gap between differing choices, `[batch]`; 0 where none differs.
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
        keys = keys.float().mean(1)
        if weights is None:
            weights = torch.ones_like(keys[:, :, 0])
        kept, saliency = self._prune(weights, attention, text_weights)
        matching = self._match(kept, keys, weights)
        if self.forcing is not None:
            kept, matching = self._force(kept, saliency, keys, weights, matching)
        assigned = self._assignment(kept, matching)
        return self._combine(tokens, weights, assigned, decisions_of(kept, matching))

    def _prune(
        self, weights: Tensor, attention: Tensor | None, text_weights: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        if self.pruner is None or attention is None:
            return torch.arange(self.tokens, device=weights.device).expand(weights.shape[0], -1), None
        assert isinstance(self.pruner, TextInformedPruner)
        kept, saliency = self.pruner(attention, text_weights)
        return kept, saliency

    def _match(self, kept: Tensor, keys: Tensor, weights: Tensor) -> Matching | None:
        if self.merger.merge == 0:
            return None
        if self.pruner is not None:
            select = one_hot(kept, self.tokens).float()
            keys, weights = select @ keys, (select @ weights.float().unsqueeze(-1)).squeeze(-1)
        return self.merger.match(keys, weights)

    def _assignment(self, kept: Tensor, matching: Matching | None) -> Tensor:
        """Zeros and ones, `[batch, after, before]`: the old tokens that make each new one."""
        if self.pruner is None and matching is not None:
            return self._interleaved(*self.merger.assignment(matching.source, matching.target, self.tokens))
        select = one_hot(kept, self.tokens).float()
        if matching is None:
            return select
        stay, join = self.merger.assignment(matching.source, matching.target, kept.shape[1])
        even, odd = select[:, 0::2], select[:, 1::2]
        return torch.cat((stay @ even, join @ even + odd), 1)

    def _interleaved(self, stay: Tensor, join: Tensor) -> Tensor:
        """The assignment where nothing is pruned: columns of even and odd tokens in turn, without a product."""
        odd = identity(join.shape[1], join.shape[2], join.device).expand_as(join)
        rows = [torch.stack(pair, -1).flatten(2) for pair in ((stay, torch.zeros_like(stay)), (join, odd))]
        return torch.cat(rows, 1)[:, :, : self.tokens]

    def _combine(self, tokens: Tensor | None, weights: Tensor, assigned: Tensor, decisions: Decisions) -> Reduction:
        carried = weights.float()
        share = assigned
        if self.averaging == "sizes":
            sized = assigned * carried.unsqueeze(1)
            # Padding has size 0: a token made of padding alone is the plain mean of it.
            share = torch.where(sized.sum(-1, keepdim=True) > 0, sized, assigned)
        average = share / share.sum(-1, keepdim=True)
        reduced = None if tokens is None else average.to(tokens.dtype) @ tokens
        if self.carried == "ones":
            after = torch.ones_like(assigned[:, :, 0])
        else:
            rows = average if self.carried == "mean" else assigned
            after = (rows @ carried.unsqueeze(-1)).squeeze(-1)
        return Reduction(reduced, after.to(weights.dtype), average, *decisions, assigned)

    def _force(
        self, kept: Tensor, saliency: Tensor | None, keys: Tensor, weights: Tensor, matching: Matching | None
    ) -> tuple[Tensor, Matching | None]:
        """Compare with the forced decisions, one after the other, and return the forced ones."""
        assert self.forcing is not None
        forced = self.forcing.decisions
        own = decisions_of(kept, matching)
        differs = (kept != forced.kept).any(1)
        margin = torch.zeros(differs.shape, device=differs.device)
        if saliency is not None:
            margin = _gap(saliency, kept, forced.kept) / saliency.abs().amax(1)
        if matching is not None:
            # The merger's own choice among the tokens that the forced pruning kept.
            matching = self._match(forced.kept, keys, weights)
            assert matching is not None
            own = Decisions(kept, *decisions_of(kept, matching)[1:])
            differs = differs | (own.source != forced.source).any(1) | (own.target != forced.target).any(1)
            source, target = forced.source // 2, forced.target // 2
            scale = matching.scores[matching.scores > LAST_RESORT].abs().max()
            margin = torch.maximum(margin, _gap(matching.best, matching.source, source) / scale)
            margin = torch.maximum(margin, _target_gap(matching, source, target) / scale)
            matching = matching._replace(source=source, target=target)
        self.forcing.comparison = Comparison(own, forced, differs, torch.where(differs, margin, 0.0))
        return forced.kept, matching


def decisions_of(kept: Tensor, matching: Matching | None) -> Decisions:
    """Decisions in token numbers."""
    if matching is None:
        return Decisions(kept, kept[:, :0], kept[:, :0])
    return Decisions(kept, 2 * matching.source, 2 * matching.target + 1)


def _gap(scores: Tensor, own: Tensor, forced: Tensor) -> Tensor:
    """Largest score difference between two choices, position by position, `[batch]`."""
    difference = scores.gather(1, own) - scores.gather(1, forced)
    return torch.where(own == forced, 0.0, difference.abs()).amax(1)


def _target_gap(matching: Matching, source: Tensor, target: Tensor) -> Tensor:
    """Largest similarity lost by given targets of given sources, `[batch]`."""
    rows = matching.scores.gather(1, source.unsqueeze(-1).expand(-1, -1, matching.scores.shape[-1]))
    lost = rows.amax(-1) - rows.gather(2, target.unsqueeze(-1)).squeeze(-1)
    return lost.abs().amax(1)


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
