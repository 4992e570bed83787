"""The image tokens that are least like a few pivots (DART, EMNLP 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .base import Choice, Decisions, Reducer, Signal, kept_alone, relative_gap
from .ranking import descending_rank, one_hot, top


@dataclass(frozen=True)
class Step:
    """One decision: the tokens with the largest scores among those that are there.

    Attributes:
        scores: `[batch, tokens]`, float32; of the image's tokens but for pivots of the text.
        there: which may be taken, bool like `scores`.
        taken: which are.
    """

    scores: Tensor
    there: Tensor
    taken: Tensor

    def gap(self, others: Tensor) -> Tensor:
        """How far the best of what was taken and is not among `others` is from the best of them that was not taken,
        relative to both, `[batch]`."""
        best = torch.where(self.taken & ~others, self.scores, -torch.inf).amax(1, keepdim=True)
        next_ = torch.where(self.there & ~self.taken & others, self.scores, -torch.inf).amax(1, keepdim=True)
        gap = relative_gap(best, next_, self.scores).squeeze(1)
        return torch.where((best > -torch.inf) & (next_ > -torch.inf), gap.unsqueeze(1), 1.0).squeeze(1)

    def cut(self) -> Tensor:
        """How far the worst of what was taken is from the best of what was not, `[batch]`; 1 where all was taken."""
        worst = torch.where(self.taken, self.scores, torch.inf).amin(1, keepdim=True)
        best = torch.where(self.there & ~self.taken, self.scores, -torch.inf).amax(1, keepdim=True)
        gap = relative_gap(worst, best, self.scores).squeeze(1)
        return torch.where((best > -torch.inf).squeeze(1) & (worst < torch.inf).squeeze(1), gap, 1.0)


class DartReducer(Reducer):
    """Keeps the pivots of an image, and for each pivot, one after the other, the tokens that are least like it.

    Pivots are the tokens of the image, and of the text behind it, whose keys have the largest L1 norms. They take in
    ascending order, each from what those before it left: the same number of tokens each, where they do not come out
    even one more for the last ones. Likeness is the cosine of what the model's last norm makes of the tokens. What
    stays is in its order; ties go to the lowest index.

    Args:
        tokens: of the image, before.
        budget: of them to keep, pivots among them; pinned ones not counted.
        pivots: of the image, and of the text behind it.
        pinned: places of tokens that stay, and neither are pivots nor are taken.
    """

    reads = (Signal.KEYS, Signal.TEXT_KEYS, Signal.NORMED, Signal.TEXT_NORMED)
    keeps_order = True

    def __init__(self, tokens: int, budget: int, pivots: tuple[int, int] = (4, 4), pinned: Sequence[int] = ()) -> None:
        super().__init__(tokens, budget + len(pinned))
        self.pivots, self.pinned = pivots, list(pinned)
        each, more = divmod(budget - pivots[0], sum(pivots))
        self.counts = [each + (number >= sum(pivots) - more) for number in range(sum(pivots))]

    @property
    def prunes(self) -> bool:
        """See `Reducer`; of several images one may be kept whole."""
        return True

    def choose(self, tokens: Tensor, keys: Tensor, text_keys: Tensor, normed: Tensor, text_normed: Tensor) -> Choice:
        """See `Reducer` and `Signal`."""
        pinned = torch.tensor([place in self.pinned for place in range(self.tokens)], device=keys.device)
        steps = [self._largest(keys, self.pivots[0], ~pinned), self._largest(text_keys, self.pivots[1], None)]
        places = [top(step.taken.float(), count) for step, count in zip(steps, self.pivots, strict=True)]
        return self.taken_by(places, normed, text_normed, steps)

    @staticmethod
    def _largest(keys: Tensor, count: int, there: Tensor | None) -> Step:
        norms = keys.detach().float().abs().sum((1, 3))
        possible = torch.ones_like(norms) > 0 if there is None else there.expand_as(norms)
        norms = torch.where(possible, norms, -1.0)
        return Step(norms, possible, descending_rank(norms) < count)

    def taken_by(
        self,
        places: Sequence[Tensor],
        normed: Tensor,
        text_normed: Tensor,
        steps: Sequence[Step],
        order: Tensor | None = None,
    ) -> Choice:
        """What pivots take.

        Args:
            places: of the pivots, ascending, among the image's tokens and among those of the text, `[batch, n]`.
            normed, text_normed: see `Signal`.
            steps: how the pivots came about, for `margin`.
            order: in which pivots take, numbers among all of them, `[batch, pivots]`; None for ascending.
        """
        image, text = (_unit(x.detach().float()) for x in (normed, text_normed))
        rows = [one_hot(place, x.shape[1]).float() @ x for place, x in zip(places, (image, text), strict=True)]
        unlike = -(torch.cat(rows, 1) @ image.transpose(1, 2))
        if order is not None:
            unlike = one_hot(order, unlike.shape[1]).float() @ unlike
        pivots = one_hot(places[0], self.tokens).any(1)
        taken = pivots | torch.tensor([place in self.pinned for place in range(self.tokens)], device=pivots.device)
        for number, count in enumerate(self.counts):
            there = ~taken
            scores = torch.where(there, unlike[:, number], -4.0)  # of a cosine, lower than any
            step = Step(scores, there, descending_rank(scores) < count)
            steps = [*steps, step]
            taken = taken | step.taken
        kept = top(taken.float(), self.keep)
        weights = torch.ones_like(unlike[:, 0])
        return Choice(kept_alone(kept), one_hot(kept, self.tokens).float(), weights, list(steps))

    def margin(self, own: Choice, among: Choice, forced: Decisions) -> Tensor:
        """See `Reducer`: of the first decision after which the choices are known to differ, or of a closer one before
        it, by which they may have differed already."""
        others = one_hot(forced.kept, self.tokens).any(1)
        steps: list[Step] = own.evidence
        smallest = found = torch.ones_like(steps[0].scores[:, 0])
        open_ = smallest > 0
        for number, step in enumerate(steps):
            if number != 1:  # pivots of the text are no choice of what stays
                differs = open_ & (step.taken & ~others).any(1)
                found = torch.where(differs, torch.minimum(smallest, step.gap(others)), found)
                open_ = open_ & ~differs
            smallest = torch.minimum(smallest, step.cut())
        return torch.where((forced.kept[:, 1:] > forced.kept[:, :-1]).all(1), found, 1.0)


def _unit(x: Tensor) -> Tensor:
    length: Tensor = x.norm(dim=-1, keepdim=True)
    return x / length.clamp(min=1e-12)
