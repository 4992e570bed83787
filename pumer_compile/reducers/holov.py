"""Image tokens shared out over runs of the picture, by votes and by how varied each run is (HoloV, 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .base import Choice, Decision, Decisions, Signal
from .crops import CropReducer
from .ranking import descending_rank, identity, indices, one_hot
from .shares import shared_out
from .vispruner import Order

# As published: what attention is multiplied by, the share of variety in a score, and against division by zero.
ATTENTION, VARIETY, EPSILON = 1000.0, 0.09, 1e-6


class HoloVReducer(CropReducer):
    """Gives each run of a crop a share of the budget, and keeps the tokens of the run that get the most votes.

    A crop (the image of a model without tiles) is cut into `runs` of neighbours in raster order, the first ones a token
    longer where they don't come out even. A run weighs the mean score of its tokens: votes, and the variance of their
    cosines to the others of the run. Its share is `weight * budget`, rounded down, and what is left goes one each to
    the heaviest runs. `order` says the rest:

    - `reference`, as published: what exceeds a run is lost, and as many tokens of zeros stand at the end of the crop.
      Crop by crop and run by run stand the kept ones, inside a run the one with the most votes first; a run that is
      kept whole stays in raster order. Pinned tokens must stand behind all crops, and do so afterwards.
    - `stable`: what exceeds a run goes to those with room, round by round, the heaviest first. Raster order.

    Args:
        crops, budget, pinned: see `CropReducer`.
        runs: how many each crop is cut into, 1 to its length.
    """

    reads = (Signal.CLASS_TOKEN,)
    # A share is a number of whole tokens; no score tells how near two ways to share out are.
    judged = False

    def __init__(
        self,
        crops: Sequence[Sequence[int]],
        budget: int,
        runs: int,
        *,
        order: Order = "reference",
        pinned: Sequence[int] = (),
    ) -> None:
        super().__init__(crops, budget, pinned=pinned)
        self.runs, self.order = runs, order
        self.keeps_order, self.tells_place = order == "stable", order == "reference"
        # Of every token, the first row of its crop among those that are left; and the last token of each row's crop.
        self.first, self.last = [0] * self.tokens, list[int]()
        for crop in crops:
            for place in crop:
                self.first[place] = len(self.last)
            self.last += [max(crop)] * min(budget, len(crop))
        for place in pinned:  # `_keeps` gives 1 for each of these
            self.first[place] = len(self.last) - 1
            self.last.append(place)

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """See `Reducer`; a token of zeros is -1."""
        return (Decision("kept", self.keep, self.tokens, gaps=self.order == "reference"),)

    def by_token(self, tokens: Tensor, **signals: Any) -> tuple[Tensor, ...]:
        """Features and votes."""
        return tokens.float(), signals["class_token"].float()

    def of_crop(self, *parts: Tensor) -> Tensor:
        """See `CropReducer`; of `reference` the row that each token becomes, from 0, and -1 of those that go."""
        features, votes = parts
        groups = list(zip(self._by_run(features), self._by_run(votes), strict=True))
        lengths = torch.tensor([v.shape[2] for _, v in groups for _ in range(v.shape[1])]).to(votes)
        share = self._shares(self._weights(groups), lengths, min(self.budget, votes.shape[1]))
        left = torch.minimum(share, lengths)
        start = left.cumsum(-1) - left
        found, done = [], 0
        for _, own in groups:
            _, count, length = own.shape
            mine, first = (x[:, done : done + count].unsqueeze(-1) for x in (share, start))
            rank = descending_rank(own)
            place = torch.arange(length, device=own.device).float()
            row = first + torch.where(mine >= length, place, rank)
            stays = rank < mine
            found.append(stays if self.order == "stable" else torch.where(stays, row, -1.0))
            done += count
        return torch.cat([part.flatten(1) for part in found], 1)

    def _by_run(self, value: Tensor) -> list[Tensor]:
        """The longer runs and the shorter ones, `[crops, runs, length, ...]`."""
        length, longer = divmod(value.shape[1], self.runs)
        cut = longer * (length + 1)
        parts = [(value[:, :cut], longer), (value[:, cut:], self.runs - longer)]
        return [part.unflatten(1, (count, -1)) for part, count in parts if count]

    @staticmethod
    def _weights(groups: list[tuple[Tensor, Tensor]]) -> Tensor:
        """Of each run, `[crops, runs]`."""
        found = []
        for features, votes in groups:
            length = votes.shape[2]
            unit = features / (features.norm(dim=-1, keepdim=True) + EPSILON)
            alike = unit @ unit.transpose(-1, -2) * (1 - identity(length, length, votes.device))
            others = max(1, length - 1)
            mean = alike.sum(-1, keepdim=True) / others
            variety = ((alike - mean) ** 2).sum(-1) / others
            votes = ATTENTION * votes
            scale = votes.abs().mean(-1, keepdim=True) / (variety.abs().mean(-1, keepdim=True) + EPSILON)
            found.append((votes + VARIETY * variety * scale).mean(-1))
        scores = torch.cat(found, 1)
        weights: Tensor = scores / (scores.sum(-1, keepdim=True) + EPSILON)
        return weights

    def _shares(self, weights: Tensor, lengths: Tensor, budget: int) -> Tensor:
        """Tokens of each run, `[crops, runs]`, whole numbers in float32; of `reference` they may exceed it."""
        if self.order == "stable":
            return shared_out(weights * budget, weights, lengths, budget)
        share = (weights * budget).floor()
        return share + (descending_rank(weights) < budget - share.sum(-1, keepdim=True)).float()

    def choose(self, tokens: Tensor, *given: Any, **signals: Any) -> Choice:
        """See `Reducer`."""
        if self.order == "stable":
            return super().choose(tokens, *given, **signals)
        named = {s.value: value for s, value in zip(self.reads, given, strict=False)} | signals
        row = self._keeps([part.detach() for part in self.by_token(tokens, **named)])
        row = torch.where(row < 0, -1.0, row + torch.tensor(self.first).to(row))
        chosen = row.unsqueeze(1) == torch.arange(self.keep, device=row.device).to(row).unsqueeze(-1)
        kept = torch.where(chosen.any(-1), indices(chosen), -1)
        return self._made(Decisions(kept, kept[:, :0], kept[:, :0]), chosen.float())

    def _made(self, decisions: Decisions, chosen: Tensor) -> Choice:
        """The choice, with a row of zeros for each token of zeros. In masks it counts as the whole image does, and it
        stands at the end of its crop."""
        choice = Choice(decisions, chosen, torch.ones_like(chosen[:, 0]), rows=chosen)
        nothing = 1 - chosen.sum(-1, keepdim=True)
        last = one_hot(torch.tensor(self.last), self.tokens).to(chosen)
        choice.map, choice.place = chosen + nothing / self.tokens, chosen + nothing * last
        return choice

    def follow(self, forced: Decisions, own: Choice, among: Choice) -> Choice:
        """See `Reducer`."""
        choice = super().follow(forced, own, among)
        return choice if self.order == "stable" else self._made(forced, choice.assigned)
