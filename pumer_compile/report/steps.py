"""From what reducers gave to the fate of each token of each sample."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ..plan import Plan
from ..reducers.base import Noted, Reducer, Signal, reducers_of
from .data import Fate, Place, Step

SAYS = {
    Signal.KEYS: "keys of the tokens (how alike they are)",
    Signal.WEIGHTS: "how much each token counts (padding, sizes)",
    Signal.TEXT_TO_IMAGE: "attention from the text",
    Signal.TEXT_WEIGHTS: "which of the text is padding",
    Signal.LAST_QUERY: "attention from the last word",
    Signal.NEXT_QUERY: "attention from the last word, in the next layer",
    Signal.CLASS_TOKEN: "attention in the vision tower, from its class token or all tokens",
    Signal.TOWER_KEYS: "keys in the vision tower (how alike tokens are)",
    Signal.CLASS_FEATURE: "the feature of the class token",
    Signal.TEXT_EMBEDDING: "the mean embedding of the question",
    Signal.TEXT_KEYS: "keys of the text behind the image",
    Signal.NORMED: "the tokens behind the last norm",
    Signal.TEXT_NORMED: "the text behind the last norm",
    Signal.BEHIND_TO_IMAGE: "attention from the text behind the image",
    Signal.TEXT_RATING: "how much each word has to do with the image",
    Signal.TOWER_FEATURES: "features of the vision tower",
}
"""What decisions are made from, in words; of a signal that is not here, its name."""


def reads_of(reducer: Reducer) -> tuple[str, ...]:
    """What a reducer decides by, in words."""
    return tuple(SAYS.get(signal, signal.value.replace("_", " ")) for signal in reducer.reads)


def execution_order(module: fx.GraphModule) -> list[str]:
    """Names of the reducers of a module, as they run."""
    own = reducers_of(module)
    called = [str(node.target) for node in module.graph.find_nodes(op="call_module")]
    return [name for name in dict.fromkeys(called) if name in own]


def site_and_stream(name: str, plan: Plan | None = None) -> tuple[str, str]:
    """`reducer.cross_modal_2.image` apart; the site by its address in the plan (`cross_modal.2`), where it has one."""
    site, _, stream = name.removeprefix("reducer.").rpartition(".")
    for known in plan.sites if plan is not None else ():
        own = known.site.replace(".", "_") + (f".call_{known.call}" if known.call else "")
        if site in (own, f"before_{own}"):
            return known.name, stream
    return site, stream


@dataclass
class Track:
    """A stream on its way through its reducers.

    Attributes:
        first: its first reducer.
        now: of each sample and each token, its number now, -1 where it is gone, `[batch, tokens]`.
        merged: whether it is in one token with others, bool likewise.
        length: how many tokens there are now.
    """

    first: str
    now: Tensor
    merged: Tensor
    length: int

    @classmethod
    def start(cls, name: str, batch: int, tokens: int) -> Track:
        """Before the first reducer."""
        now = torch.arange(tokens).expand(batch, -1)
        return cls(name, now, torch.zeros(batch, tokens) > 0, tokens)

    def pass_(self, assigned: Tensor) -> Tensor:
        """Take a reducer's step; gives where each token was before it, `[batch, tokens]`.

        Args:
            assigned: see `Reduction`.
        """
        before = self.now
        share, to = assigned.max(1)
        to = torch.where(share > 0, to, -1)
        self.now = torch.where(before >= 0, to.gather(1, before.clamp(min=0)), -1)
        self.length = assigned.shape[1]
        counts = torch.zeros(len(self.now), self.length + 1).scatter_add_(
            1, self.now + 1, torch.ones_like(self.now).float()
        )
        self.merged = (self.now >= 0) & (counts.gather(1, self.now + 1) > 1)
        return before


def tracks(noted: Mapping[str, Noted], order: Sequence[str]) -> dict[str, tuple[Track, Tensor, Tensor, Tensor]]:
    """Of every reducer: its stream's track; where tokens were before it, where afterwards, and which of these are in
    one with others. A stream that does not go on where it was left (that of a tower, then of a prompt) begins anew."""
    open_: dict[str, Track] = {}
    found = {}
    for name in order:
        assigned = noted[name].reduction.assigned.detach().cpu()
        stream = site_and_stream(name)[1]
        track = open_.get(stream)
        if track is None or track.length != assigned.shape[2]:
            track = open_[stream] = Track.start(name, assigned.shape[0], assigned.shape[2])
        before = track.pass_(assigned)
        found[name] = (track, before, track.now, track.merged)
    return found


def step_of(
    name: str,
    reducer: Reducer,
    noted: Noted,
    moved: tuple[Track, Tensor, Tensor, Tensor],
    row: int,
    places: Sequence[Place | None],
    words: Sequence[str],
    plan: Plan,
) -> Step:
    """One reducer on one sample; arguments as of `Step`."""
    site, stream = site_and_stream(name, plan)
    _, before, after, merged = (moved[0], *(part[row].tolist() for part in moved[1:]))
    fates = tuple(_fate(was, now, many) for was, now, many in zip(before, after, merged, strict=True))
    ranking = reducer.ranking(noted.choice)
    scores = None
    if ranking is not None and (reducer.prunes or reducer.merge):
        own = ranking.detach().float().cpu()
        own = own[row if own.shape[0] > 1 else 0]
        scores = tuple(float(own[was]) if was >= 0 else float("nan") for was in before)
    reads = reads_of(reducer)
    return Step(
        site,
        stream,
        reducer.tokens,
        reducer.tokens_after,
        reads,
        fates,
        tuple(after),
        scores,
        tuple(places),
        tuple(words),
    )


def _fate(was: int, now: int, merged: bool) -> Fate:
    if was < 0:
        return "gone"
    if now < 0:
        return "pruned"
    return "merged" if merged else "kept"
