"""What every reducer is: it reads signals, chooses tokens, and combines them by one matrix."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, fields, is_dataclass
from enum import Enum
from functools import partial
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from .ranking import one_hot

Averaging = Literal["plain", "sizes"]
Carried = Literal["mean", "ones", "sum"]


class Signal(Enum):
    """What a reducer may read beside its tokens; `rewrite/signals.py` has a function for each.

    Attributes:
        KEYS: keys of the stream, `[batch, heads, tokens, head_size]`.
        WEIGHTS: carried weights of the stream, `[batch, tokens]`: mask fractions or token sizes, 0 is padding; None
            where nothing is padded or merged yet.
        TEXT_TO_IMAGE: attention of the text to the stream after softmax, `[batch, heads, text, tokens]`.
        TEXT_WEIGHTS: carried weights of that text, `[batch, text]`.
        LAST_QUERY: attention of the last query to the stream after softmax, `[batch, heads, 1, tokens]`.
        CLASS_TOKEN: what each token gets from the class token of a vision tower (in one without: from all tokens,
            mean over them), mean over heads, `[batch, tokens]`.
        TOWER_KEYS: keys of the attention that CLASS_TOKEN is of, mean over heads, `[batch, tokens, head_size]`; of a
            row that is made of several tokens their mean.
        CLASS_FEATURE: what the class token of each crop leaves the vision tower as, `[batch, crops, width]`; only of a
            stream with `class_tokens`.
        TEXT_EMBEDDING: mean of the input embeddings of the prompt's text, without padding and the two tokens beside
            each image (where it begins and ends), `[batch, width]`, float32.
        NEXT_QUERY: like `LAST_QUERY`, of the layer that comes next, computed ahead from the tokens before they are
            reduced.
        TEXT_KEYS: keys of the text behind the image, `[batch, heads, text, head_size]`.
        NORMED: the tokens as the model's last norm would leave them, `[batch, tokens, width]`.
        TEXT_NORMED: the text behind the image, likewise.
        BEHIND_TO_IMAGE: attention of the text behind the image to the stream after softmax, `[batch, heads, text,
            tokens]`.
        TEXT_RATING: how much each token of that text has to do with the image, by what enters the language model,
            `[batch, text]`, float32 (`TextRating`).
        TOWER_FEATURES: what each row of the prompt was when it left the vision tower, `[batch, tokens, width]`; of
            rows that are one token of it each.
        TEXT_EMBEDS: an input that a method adds (`Method.adds`): a text in CLIP's space, `[batch, texts, width]`.
        QUESTION_IDS: another: the ids of a question, `[batch, length]`.
    """

    KEYS = "keys"
    WEIGHTS = "weights"
    TEXT_TO_IMAGE = "text_to_image"
    TEXT_WEIGHTS = "text_weights"
    LAST_QUERY = "last_query"
    CLASS_TOKEN = "class_token"
    TOWER_KEYS = "tower_keys"
    CLASS_FEATURE = "class_feature"
    TEXT_EMBEDDING = "text_embedding"
    NEXT_QUERY = "next_query"
    TEXT_KEYS = "text_keys"
    NORMED = "normed"
    TEXT_NORMED = "text_normed"
    BEHIND_TO_IMAGE = "behind_to_image"
    TEXT_RATING = "text_rating"
    TOWER_FEATURES = "tower_features"
    TEXT_EMBEDS = "text_embeds"
    QUESTION_IDS = "question_ids"


@dataclass(frozen=True)
class Decision:
    """A data-dependent choice.

    Attributes:
        name: a field of `Decisions`.
        count: how many indices.
        of: how many tokens they choose among.
        gaps: whether -1 may stand among them, for nothing.
    """

    name: str
    count: int
    of: int
    gaps: bool = False


class Decisions(NamedTuple):
    """Every data-dependent choice of a reducer, as indices (int64).

    Attributes:
        kept: tokens that survive pruning, in their new order, `[batch, keep]`, numbered before the reducer.
        source: tokens that merge away, most similar first or ascending, `[batch, merge]`, numbered among the kept ones.
        target: the token each merges into, `[batch, merge]`, numbered among the kept ones.
    """

    kept: Tensor
    source: Tensor
    target: Tensor


class Reduction(NamedTuple):
    """What a reducer gives.

    Attributes:
        tokens: the reduced stream, `[batch, after, width]`; None where none was given.
        weights: the carried weights of the reduced tokens, `[batch, after]`.
        map: rows that average old tokens into new ones, `[batch, after, before]`, float32.
        kept: see `Decisions`.
        source: see `Decisions`.
        target: see `Decisions`.
        assigned: 1 where an old token went into a new one, else 0, `[batch, after, before]`, float32.
        place: 1 at the old token where a new one stands, else 0, `[batch, after, before]`, float32; the map, of a
            reducer that does not say (`Reducer.tells_place`).
    """

    tokens: Tensor | None
    weights: Tensor
    map: Tensor
    kept: Tensor
    source: Tensor
    target: Tensor
    assigned: Tensor
    place: Tensor

    @property
    def decisions(self) -> Decisions:
        """The choices alone."""
        return Decisions(self.kept, self.source, self.target)


@dataclass
class Choice:
    """What a reducer chooses.

    Attributes:
        decisions: as indices.
        assigned: see `Reduction`.
        weights: carried weights of the tokens before, `[batch, before]`.
        evidence: what it was chosen by, for `Reducer.margin`; of several values the first is what tokens were ranked
            by (`Reducer.ranking`).
        map: see `Reduction`; None: the means that `assigned` says.
        rows: what combines the tokens themselves where that is not the map, `[batch, after, before]`, float32.
        added: what is added to that, `[batch, after, width]`: tokens that come from elsewhere.
        place: see `Reduction`.
    """

    decisions: Decisions
    assigned: Tensor
    weights: Tensor
    evidence: Any = None
    map: Tensor | None = None
    rows: Tensor | None = None
    added: Tensor | None = None
    place: Tensor | None = None


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


class Reducer(nn.Module):
    """Reduces one stream at one site. A subclass says what it `reads` and how it chooses; the rest is written here.

    Decisions are made in float32 whatever the model's dtype. Features are combined by one matmul with `map`;
    no gather, scatter, sort or top-k reaches an exported graph. Gradients flow through `tokens`.

    Args:
        tokens: tokens before.
        keep: tokens kept by pruning.
        merge: of these, merged away.
        averaging: `plain` mean of merged tokens, or weighted by carried `sizes` (0 for padding).
        carried: what becomes of the carried weights: their `mean`, `ones`, or their `sum` (token sizes).

    Attributes:
        reads: the signals that `forward` takes after the tokens, in order.
        judged: whether a choice that differs from eager PyTorch's must be a near-tie (parity); else it is reported.
        first_stays: whether token 0 is token 0 afterwards.
        keeps_order: whether the tokens that it keeps stay in their order.
        tells_place: whether it says where each new token stands, also one that is merged or new (`Choice.place`).
    """

    reads: tuple[Signal, ...] = ()
    judged = True
    first_stays = False
    keeps_order = False
    tells_place = False

    def __init__(
        self, tokens: int, keep: int, merge: int = 0, *, averaging: Averaging = "plain", carried: Carried = "ones"
    ) -> None:
        super().__init__()
        self.tokens, self.keep, self.merge = tokens, keep, merge
        self.averaging, self.carried = averaging, carried
        self.forcing: Forcing | None = None

    @property
    def tokens_after(self) -> int:
        """Tokens after pruning and merging."""
        return self.keep - self.merge

    @property
    def prunes(self) -> bool:
        """Whether it chooses which tokens to keep."""
        return self.keep < self.tokens

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """The choices that it leaves to the data."""
        kept = (Decision("kept", self.keep, self.tokens),) if self.prunes else ()
        pairs = tuple(Decision(name, self.merge, self.keep) for name in ("source", "target"))
        return kept + (pairs if self.merge else ())

    def choose(self, *given: Any, **named: Any) -> Choice:
        """The algorithm: `choose(tokens, **signals)`, a subclass naming the signals that it reads.

        Args:
            tokens: the stream, `[batch, before, width]`; None where only the map is wanted.
            signals: what it `reads`, by name.
            kept: of one that prunes and then merges: take these as the kept tokens, and choose what merges.
        """
        raise NotImplementedError

    def ranking(self, choice: Choice) -> Tensor | None:
        """What the tokens before were ranked by, the more the likelier to stay, `[batch, before]`; None where no one
        score of each says it (for reports)."""
        evidence = choice.evidence
        if is_dataclass(evidence):
            evidence = getattr(evidence, fields(evidence)[0].name)
        elif isinstance(evidence, tuple):
            evidence = evidence[0]
        of_tokens = isinstance(evidence, Tensor) and evidence.ndim == 2 and evidence.shape[1] == self.tokens
        return evidence if of_tokens else None

    def margin(self, own: Choice, among: Choice, forced: Decisions) -> Tensor:
        """How far the scores of differing choices are apart, `[batch]`; NaN where they have none.

        Args:
            own: what the reducer chooses.
            among: what it chooses among the tokens that the forced pruning keeps.
            forced: what it was told.
        """
        raise NotImplementedError

    def assignment(self, forced: Decisions, among: Choice) -> Tensor:
        """`Choice.assigned` of forced decisions."""
        return one_hot(forced.kept, self.tokens).float()

    def follow(self, forced: Decisions, own: Choice, among: Choice) -> Choice:
        """The choice that forced decisions are; arguments as for `margin`."""
        return Choice(forced, self.assignment(forced, among), own.weights)

    def forward(self, tokens: Tensor | None, *signals: Tensor | None, **named: Tensor | None) -> Reduction:
        """Reduce the stream.

        Args:
            tokens: the stream's part of the carrier, `[batch, before, width]`; None where only the map is wanted.
            signals: what it `reads`, in order; the last ones may be left out.
            named: or given by their names.
        """
        if len(signals) > len(self.reads):
            raise TypeError(f"{type(self).__name__} reads {[s.value for s in self.reads]}, and got {len(signals)}")
        named |= {signal.value: value for signal, value in zip(self.reads, signals, strict=False)}
        like = next(value for value in (tokens, *named.values()) if value is not None)
        if torch.amp.is_autocast_available(like.device.type) and torch.is_autocast_enabled(like.device.type):
            # Autocast would compute similarities in half precision, and ties with them.
            with torch.autocast(like.device.type, enabled=False):
                return self.forward(tokens, **named)
        choice = self.choose(tokens, **named)
        if self.forcing is not None:
            forced, depends = self.forcing.decisions, self.prunes and self.merge > 0
            choice = self._compared(choice, self.choose(tokens, **named, kept=forced.kept) if depends else choice)
        return self._combined(tokens, choice)

    def _compared(self, own: Choice, among: Choice) -> Choice:
        """Compare with the forced decisions, and give the choice that they are."""
        assert self.forcing is not None
        forced = self.forcing.decisions
        # What merges is compared among the tokens that the forced pruning kept.
        mine = Decisions(own.decisions.kept, among.decisions.source, among.decisions.target)
        differs = (mine.kept != forced.kept).any(1)
        if self.merge:
            differs = differs | (mine.source != forced.source).any(1) | (mine.target != forced.target).any(1)
        margin = torch.where(differs, self.margin(own, among, forced), 0.0)
        self.forcing.comparison = Comparison(mine, forced, differs, margin)
        return self.follow(forced, own, among)

    def _combined(self, tokens: Tensor | None, choice: Choice) -> Reduction:
        carried, assigned = choice.weights.float(), choice.assigned
        share = assigned
        if self.averaging == "sizes":
            sized = assigned * carried.unsqueeze(1)
            # Padding has size 0: a token made of padding alone is the plain mean of it.
            share = torch.where(sized.sum(-1, keepdim=True) > 0, sized, assigned)
        average = choice.map
        if average is None:
            average = share / share.sum(-1, keepdim=True) if self.merge else assigned
        reduced = None
        if tokens is not None:
            reduced = (average if choice.rows is None else choice.rows).to(tokens.dtype) @ tokens
            reduced = reduced if choice.added is None else reduced + choice.added.to(tokens.dtype)
        if self.carried == "ones":
            after = torch.ones_like(assigned[:, :, 0])
        else:
            rows = average if self.carried == "mean" else assigned
            after = (rows @ carried.unsqueeze(-1)).squeeze(-1)
        place = average if choice.place is None else choice.place
        return Reduction(reduced, after.to(choice.weights.dtype), average, *choice.decisions, assigned, place)


class ApplyMap(nn.Module):
    """Reduces other tokens by the map of a `Reducer`, as that one reduces its own."""

    def forward(self, tokens: Tensor, map_: Tensor) -> Tensor:
        """`[batch, after, width]` from `[batch, before, width]` and a map `[batch, after, before]`, float32."""
        if torch.amp.is_autocast_available(tokens.device.type) and torch.is_autocast_enabled(tokens.device.type):
            # Autocast would round the residual values of a model to half precision.
            with torch.autocast(tokens.device.type, enabled=False):
                return self.forward(tokens, map_)
        return map_.to(tokens.dtype) @ tokens


def kept_alone(kept: Tensor) -> Decisions:
    """The decisions of a reducer that merges nothing."""
    return Decisions(kept, kept[:, :0], kept[:, :0])


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


def set_margin(scores: Tensor, own: Tensor, forced: Tensor) -> Tensor:
    """How far the scores of two sets of kept tokens are apart, relative to them, `[batch]`: the best token that only
    one of them has, and the worst that only the other has. What is no set in its order (a token twice, tokens swapped)
    is as far as can be.

    Args:
        scores: `[batch, tokens]`.
        own, forced: indices, ascending, `[batch, keep]`.
    """
    gap = mask_margin(scores, *(one_hot(kept, scores.shape[1]).any(1) for kept in (own, forced)))
    return torch.where((forced[:, 1:] > forced[:, :-1]).all(1), gap, 1.0)


def mask_margin(scores: Tensor, own: Tensor, forced: Tensor) -> Tensor:
    """The same of sets that are given by a true value for each of their tokens, `[batch, tokens]`."""
    best = torch.where(own & ~forced, scores, -torch.inf).amax(1)
    worst = torch.where(forced & ~own, scores, torch.inf).amin(1)
    apart = relative_gap(best.unsqueeze(1), worst.unsqueeze(1), scores).squeeze(1)
    return torch.where(best > worst, apart, 0.0)


# --- reducers of a module ---------------------------------------------------------------------------------------------


def reducers_of(module: nn.Module) -> dict[str, Reducer]:
    """Reducers inside a module by path."""
    return {name: m for name, m in module.named_modules() if isinstance(m, Reducer)}


@contextmanager
def noted_decisions(module: nn.Module) -> Iterator[dict[str, Decisions]]:
    """Note what the reducers inside `module` decide in a forward pass within the block, by module path.

    Yields the decisions, which a forward pass fills in. Eager PyTorch only.
    """
    noted: dict[str, Decisions] = {}

    def note(name: str, reducer: nn.Module, given: Any, result: Reduction) -> None:
        noted[name] = result.decisions

    hooks = [reducer.register_forward_hook(partial(note, name)) for name, reducer in reducers_of(module).items()]
    try:
        yield noted
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class Noted:
    """What a reducer did in a forward pass.

    Attributes:
        choice: what it chose, also where it was made to follow another.
        reduction: what it gave.
    """

    choice: Choice
    reduction: Reduction


@contextmanager
def noted_reductions(module: nn.Module) -> Iterator[dict[str, Noted]]:
    """Note what the reducers inside `module` choose and give in a forward pass within the block, by module path.

    Yields the notes, which a forward pass fills in. Eager PyTorch only.
    """
    noted: dict[str, Noted] = {}
    chosen: dict[str, Choice] = {}
    reducers = reducers_of(module)

    def choosing(name: str, choose: Any, *args: Any, **named: Any) -> Choice:
        made: Choice = choose(*args, **named)
        if not (named.get("kept") is not None and name in chosen):  # asked once more, among forced tokens
            chosen[name] = made
        return made

    def note(name: str, reducer: nn.Module, given: Any, result: Reduction) -> None:
        noted[name] = Noted(chosen[name], result)

    hooks = [reducer.register_forward_hook(partial(note, name)) for name, reducer in reducers.items()]
    for name, reducer in reducers.items():
        vars(reducer)["choose"] = partial(choosing, name, reducer.choose)
    try:
        yield noted
    finally:
        for hook in hooks:
            hook.remove()
        for reducer in reducers.values():
            del vars(reducer)["choose"]


@contextmanager
def forced_decisions(module: nn.Module, decisions: dict[str, Decisions]) -> Iterator[dict[str, Forcing]]:
    """Make the reducers inside `module` follow `decisions` (by module path) within the block.

    Yields the forcings, whose `comparison` is filled by a forward pass. Eager PyTorch only.
    """
    reducers = reducers_of(module)
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
