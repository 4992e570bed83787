"""Visual-cue pruning (VisPruner, ICCV 2025): the tokens the image itself looks at, and of the others the diverse ones."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from .ranking import descending_rank, one_hot

Order = Literal["reference", "stable"]

STEP = 8
"""Duplicates removed in one step, at most."""

# Below every cosine, and finite: differences of it must not be NaN.
NO_SCORE = -4.0


class VisualSelection(NamedTuple):
    """What a `VisPruner` gives.

    Attributes:
        kept: image tokens that stay, ascending (raster order), `[batch, budget]`, int64.
        map: rows of zeros and a one that select them, `[batch, budget, tokens]`, float32: `map @ features`.
    """

    kept: Tensor
    map: Tensor


class VisPruner(nn.Module):
    """Keeps the image tokens with the most attention, and the least alike of the rest.

    `int(budget * important)` tokens are kept for their attention. The others stand in a list, and in every step those
    at even places (from 0) look for their most similar one at odd places; the most similar `STEP` go, until the list
    has what is left of the budget. Similarity is the cosine of the features that leave the vision tower.

    `order` says how the list is arranged, which decides the pairs of every step:

    - `reference`, as published: by descending attention at first; after a step the surviving even ones by descending
      similarity, then the odd ones. The order of hundreds of values decides the next pairs, so two that
      are nearly equal, wherever they stand, change the result when rounding swaps them.
    - `stable`: by place in the image, always. Attention and similarity are read only as "among the most or
      not": rounding matters where it moves a token across such a boundary, not where it swaps two on one side.

    Where the published code fails or says nothing: a list of odd length has one even place more than odd ones; where a
    step should remove more tokens than there are even places, it removes all of those, and the next step the rest; a
    budget of at least all tokens keeps all; `important` 0 keeps by diversity alone, 1 by attention alone. Ties go
    to the lowest token index. Any budget of at least one token works with any number of tokens.

    Steps depend on sizes alone and are unrolled when traced. Tokens never move: a number for each says where it stands
    in the list, and one similarity matrix serves every step. Decisions are made in float32 whatever the dtype.

    Args:
        budget: tokens to keep, at least 1.
        important: share of the budget that attention decides, 0..1; rounded down.
        order: `reference` or `stable`.

    Raises:
        ValueError: a budget, share or order outside these.
    """

    def __init__(self, budget: int, important: float = 0.5, *, order: Order = "reference") -> None:
        super().__init__()
        if budget < 1 or not 0 <= important <= 1 or order not in ("reference", "stable"):
            raise ValueError(
                f"VisPruner cannot keep {budget} tokens, a share of {important} by attention, in {order} order."
            )
        self.budget, self.important, self.order = budget, important, order

    @property
    def keep(self) -> int:
        """Tokens kept, as other pruners call it."""
        return self.budget

    def forward(self, features: Tensor, attention: Tensor) -> VisualSelection:
        """Select.

        Args:
            features: of the tokens that leave the vision tower for the projector, class token removed,
                `[batch, tokens, width]`, any float.
            attention: each token receives from the class token in the layer that made the features (without a class
                token: from all tokens, in the mean), mean over heads, `[batch, tokens]`, any float.

        Returns:
            the selection; `min(budget, tokens)` tokens of every sample.
        """
        if torch.amp.is_autocast_available(features.device.type) and torch.is_autocast_enabled(features.device.type):
            # Autocast would compute similarities in half precision.
            with torch.autocast(features.device.type, enabled=False):
                return self.forward(features, attention)
        tokens = features.shape[1]
        budget = min(self.budget, tokens)
        important = int(budget * self.important)
        rank = descending_rank(attention.float()).float()
        if important == budget:
            return _selection(rank < budget, budget)
        place = rank - important if self.order == "reference" else _raster(rank >= important)
        similarity, before = _cosines(features), _before(tokens, features.device)
        for length, remove in removals(tokens - important, budget - important):
            place = self._step(place, similarity, before, length, remove)
        return _selection((rank < important) | (place >= 0), budget)

    def _step(self, place: Tensor, similarity: Tensor, before: Tensor, length: int, remove: int) -> Tensor:
        """Remove `remove` tokens from a list of `length`, given and returned as every token's place in it.

        `place` is `[batch, tokens]`, float32; negative for tokens outside the list.
        """
        half = (place * 0.5).floor()
        odd = (place >= 0) & (place != 2 * half)
        even = (place >= 0) & (place == 2 * half)
        best = (similarity + torch.where(odd, 0.0, float("-inf")).unsqueeze(1)).amax(-1)
        # Even tokens have ranks 0, 1, ...: all others come after them.
        rank = _rank(torch.where(even, best, NO_SCORE), before)
        if self.order == "stable":
            return _raster(odd | (even & (rank >= remove)))
        after_even = (length + 1) // 2 - remove
        return torch.where(even, rank - remove, torch.where(odd, half + after_even, -1.0))


def removals(length: int, wanted: int) -> list[tuple[int, int]]:
    """The steps that shrink a list: its length before each, and how many the step removes."""
    steps = []
    while length > wanted:
        remove = min(STEP, length - wanted, (length + 1) // 2)
        steps.append((length, remove))
        length -= remove
    return steps


def _cosines(features: Tensor) -> Tensor:
    """Cosine of every pair, `[batch, tokens, tokens]`, float32; a token of zeros is like nothing."""
    features = features.float()
    unit = features / features.norm(dim=-1, keepdim=True).clamp(min=1e-30)
    return unit @ unit.transpose(-1, -2)


def _before(tokens: int, device: torch.device) -> Tensor:
    """1 where the column's token comes before the row's, `[tokens, tokens]`, float32."""
    index = torch.arange(tokens, device=device)
    return (index < index.unsqueeze(-1)).float()


def _rank(scores: Tensor, before: Tensor) -> Tensor:
    """`descending_rank` of finite scores, float32, in float arithmetic: comparisons are slower, and this runs often."""
    beaten = (scores.unsqueeze(-2) - scores.unsqueeze(-1)).sign() + before
    return beaten.clamp(0, 1).sum(-1)


def _raster(listed: Tensor) -> Tensor:
    """Places of some tokens in a list by token index, -1 for the others: `[batch, tokens]` bool to float32."""
    ones = listed.float()
    return ones.cumsum(-1) * ones - 1


def _selection(keep: Tensor, budget: int) -> VisualSelection:
    """`budget` tokens, those where `keep` (`[batch, tokens]`, bool) is true."""
    rows = one_hot(_raster(keep).long(), budget).transpose(1, 2)
    index = torch.arange(keep.shape[1], device=keep.device)
    return VisualSelection((rows * index).sum(-1), rows.float())
