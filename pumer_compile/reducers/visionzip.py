"""Dominant image tokens by votes, the others merged by likeness of their keys (VisionZip, Yang et al., CVPR 2025)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from .base import Choice, Decision, Decisions, Signal
from .crops import CropReducer
from .distinct import NONE
from .merge_targets import MergeTargets
from .merged_tokens import MergedTokens
from .ranking import descending_rank, first_largest, indices, one_hot
from .vispruner import Order, selection


@dataclass
class _Evidence:
    """What tokens were chosen by: votes, likeness to the targets `[batch, targets, before]`, and given class tokens."""

    votes: Tensor
    likeness: Tensor
    class_feature: Tensor | None


class VisionZipReducer(CropReducer):
    """Of each crop its class token, the dominant tokens, and contextual ones that all the others are merged into.

    The others stand in a list in raster order. Some of them are targets, and each of the rest joins the target whose
    key is most like its own (cosine; of ties the first). `order` says the rest:

    - `reference`, as published: targets are every n-th of the list, and the last of it is reached by none where that
      does not divide; a merged token is its target plus the mean of those that joined, which doubles its length; crop
      by crop stand the class token, the dominant tokens, the merged ones.
    - `stable`: targets are those that follow places spread evenly over the crop, so that another dominant token moves
      no more than its neighbour; a merged token is the mean of all that are in it; tokens stand in raster order, a
      merged one where its target stood, a class token before its crop.

    Args:
        crops, pinned: see `CropReducer`; pinned tokens stand with the dominant ones.
        dominant: tokens of a crop that stay for their votes, without the class token.
        contextual: tokens of a crop that others are merged into, at least 1.
        class_tokens: whether the class token of each crop is given, and becomes a token.
    """

    keeps_order = False
    tells_place = True

    def __init__(
        self,
        crops: Sequence[Sequence[int]],
        dominant: int,
        contextual: int,
        *,
        class_tokens: bool,
        order: Order = "reference",
        pinned: Sequence[int] = (),
    ) -> None:
        super().__init__(crops, dominant, pinned=pinned)
        self.dominant, self.keep, self.order = self.keep, self.tokens, order
        self.crops, self.classes = [tuple(crop) for crop in crops], len(crops) if class_tokens else 0
        # The shortest first, as `CropReducer` has them.
        lengths = sorted(map(len, crops))
        rest = [max(0, length - dominant) for length in lengths]
        self.targets = MergeTargets(lengths, rest, [min(contextual, left) for left in rest])
        self.merge = sum(rest) - sum(self.targets.counts)
        self.made = MergedTokens(
            self.crops, self.tokens, self.tokens_after, self.classes, published=order == "reference"
        )
        self.reads = (Signal.CLASS_TOKEN, Signal.TOWER_KEYS, *((Signal.CLASS_FEATURE,) if class_tokens else ()))

    @property
    def tokens_after(self) -> int:
        """See `Reducer`; class tokens are new ones."""
        return super().tokens_after + self.classes

    @property
    def decisions(self) -> tuple[Decision, ...]:
        """The dominant tokens, and what each of the others is merged into, numbered before the reducer."""
        pairs = tuple(Decision(name, self.merge, self.tokens) for name in ("source", "target"))
        return (Decision("kept", self.dominant, self.tokens), *(pairs if self.merge else ()))

    def of_crop(self, *parts: Tensor) -> Tensor:
        """See `CropReducer`: the dominant tokens."""
        return descending_rank(parts[0]) < self.budget

    def choose(self, tokens: Tensor, *given: Any, **signals: Any) -> Choice:
        """See `Reducer`; `kept`: these are the dominant tokens."""
        named = {s.value: value for s, value in zip(self.reads, given, strict=False)} | signals
        votes, keys = (named[name].detach().float() for name in ("class_token", "tower_keys"))
        kept = named.get("kept")
        dominant = self._keeps((votes,)) if kept is None else one_hot(kept, self.tokens).any(1)
        targets = self._targets(dominant)
        # A key of zeros is like nothing; without the clamp it would be NaN.
        unit = keys / keys.norm(dim=-1, keepdim=True).clamp(min=1e-30)
        likeness = targets.float() @ unit @ unit.transpose(1, 2)
        if len(self.crops) > 1:
            same = self.targets.same_crop(self.crops, self.tokens).to(likeness.device)
            likeness = torch.where(same, likeness, NONE)
        _, nearest = first_largest(likeness.transpose(1, 2))
        merged = ~dominant & ~targets.any(1)
        joined = (nearest & merged.unsqueeze(-1)).float()
        source, into = selection(merged, self.merge), joined @ indices(targets).float().unsqueeze(-1)
        target = (source.map @ into).squeeze(-1).long()
        decisions = Decisions(selection(dominant, self.dominant).kept, source.kept, target)
        evidence = _Evidence(votes, likeness, named.get("class_feature"))
        return self._made(decisions, dominant, targets.float(), joined.transpose(1, 2), evidence)

    def _targets(self, dominant: Tensor) -> Tensor:
        """Rows that select the targets, crop by crop, `[batch, targets, before]` bool."""
        left = ~self._in_crop_order(dominant)
        rows = self.targets.every_nth(left) if self.order == "reference" else self.targets.evenly_spread(left)
        return self._in_stream_order(rows, 2)

    def _made(
        self, decisions: Decisions, dominant: Tensor, targets: Tensor, joined: Tensor, evidence: _Evidence
    ) -> Choice:
        """The choice, with what it makes of the tokens; arguments as of `MergedTokens.made`."""
        made = self.made.made(dominant, targets, joined, evidence.class_feature)
        return Choice(decisions, made.assigned, torch.ones_like(targets[:, 0]), evidence, *made[1:])

    def follow(self, forced: Decisions, own: Choice, among: Choice) -> Choice:
        """See `Reducer`."""
        dominant = one_hot(forced.kept, self.tokens).any(1)
        targets = self._targets(dominant).float()
        source, target = (one_hot(index, self.tokens).float() for index in (forced.source, forced.target))
        joined = targets @ target.transpose(1, 2) @ source
        return self._made(forced, dominant, targets, joined, among.evidence)

    def margin(self, own: Choice, among: Choice, forced: Decisions) -> Tensor:
        """See `Reducer`; of cosines the difference."""
        gap = super().margin(replace(own, evidence=own.evidence.votes), among, forced)
        if not self.merge:
            return gap
        likeness = among.evidence.likeness.transpose(1, 2)
        scores = likeness.gather(1, forced.source.unsqueeze(-1).expand(-1, -1, likeness.shape[2]))
        targets = self._targets(one_hot(forced.kept, self.tokens).any(1)).float()
        into = one_hot(forced.target, self.tokens).float() @ targets.transpose(1, 2) > 0
        lost = scores.amax(-1) - torch.where(into, scores, NONE).amax(-1)
        same = (forced.source == among.decisions.source).all(1)
        return torch.where(same, torch.maximum(gap, lost.amax(1)), torch.inf)
