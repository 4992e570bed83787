"""Visual-cue pruning (VisPruner, ICCV 2025): the tokens the image itself looks at, and of the others a diverse few."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from .greedy import repeated
from .ranking import descending_rank, indices, one_hot

Order = Literal["reference", "stable"]

STEP = 8
"""Duplicates removed in one step, at most."""

# Below every cosine, also when it is added to one.
NONE = -4.0


class VisualSelection(NamedTuple):
    """What a `VisPruner` gives.

    Attributes:
        kept: image tokens that stay, ascending (raster order), `[batch, budget]`, int64.
        map: rows of zeros and a one that select them, `[batch, budget, tokens]`, float32: `map @ features`.
    """

    kept: Tensor
    map: Tensor


class VisPruner(nn.Module):
    """Keeps the image tokens with the most attention, and those least alike of the rest.

    `int(budget * important)` tokens are kept for their attention. From the others duplicates are removed, `STEP` at a
    time, until the rest of the budget is left. Similarity is the cosine of the features that leave the vision tower.

    `order` says which pairs are compared:

    - `reference`, as published: the others stand in a list, by descending attention. In each step the tokens at even
      places (from 0) look for their most similar one at odd places, and the most similar ones go. The remaining even
      ones, by descending similarity, and then the odd ones make the next list. The order of hundreds of values thus
      decides the next pairs: where rounding swaps two nearly equal ones, other tokens survive.
    - `stable`: no list. Each token looks for its most similar one among those that precede it in a fixed order, and the
      most similar ones go. Values only decide which are the most, so rounding changes nothing but a choice
      between nearly equal tokens. The fixed order leaps over the image by the golden ratio: in raster order, the first
      of several alike would be kept, and with it the top of the image.

    What the published code leaves open or fails on: a list of odd length has one even place more than odd ones; where
    a step would remove more tokens than there are even places, it removes these, and later steps the rest; a budget of
    at least all tokens keeps all; `important` 0 keeps for diversity alone, 1 for attention alone. Of ties the lowest
    token number comes first; of equally similar ones `stable` removes the last in its order, so that what is left of an
    even surface is spread over it.

    The steps depend on sizes alone; traced, they are one loop (`greedy.repeated`). Tokens do not move: numbers beside
    them say where they stand, and all steps read one similarity matrix. Decisions are made in float32 whatever the
    dtype.

    Args:
        budget: tokens to keep, at least 1.
        important: share of the budget that goes by attention, 0..1; the count is rounded down.
        order: `reference` or `stable`.

    Raises:
        ValueError: an argument outside these.
    """

    def __init__(self, budget: int, important: float = 0.5, *, order: Order = "reference") -> None:
        super().__init__()
        if budget < 1 or not 0 <= important <= 1 or order not in ("reference", "stable"):
            raise ValueError(
                f"VisPruner takes a budget of at least 1, an important share of 0 to 1, and the order reference or "
                f"stable; it was given {budget}, {important} and {order!r}."
            )
        self.budget, self.important, self.order = budget, important, order

    @property
    def keep(self) -> int:
        """Tokens kept, as other pruners call it."""
        return self.budget

    def forward(self, features: Tensor, attention: Tensor) -> VisualSelection:
        """Select `min(budget, tokens)` tokens of every sample.

        Args:
            features: as they leave the vision tower for the projector, class token removed, `[batch, tokens, width]`,
                any float.
            attention: what each token receives from the class token in the layer that made the features (in a tower
                without one: from all tokens, mean over them), mean over heads, `[batch, tokens]`, any float.
        """
        return selection(self.keeps(features, attention), min(self.budget, features.shape[1]))

    def keeps(self, features: Tensor, attention: Tensor) -> Tensor:
        """Which tokens stay, `[batch, tokens]`, bool; arguments as for `forward`."""
        if torch.amp.is_autocast_available(features.device.type) and torch.is_autocast_enabled(features.device.type):
            # Autocast would compute similarities in half precision.
            with torch.autocast(features.device.type, enabled=False):
                return self.keeps(features, attention)
        # A choice has no gradient, and the steps would hold on to much memory.
        features, attention = features.detach().float(), attention.detach().float()
        tokens = features.shape[1]
        budget = min(self.budget, tokens)
        important = int(budget * self.important)
        rank = descending_rank(attention)
        if important == budget or budget == tokens:
            return rank < budget
        steps = removals(tokens - important, budget - important)
        distinct = _distinct_published if self.order == "reference" else _distinct_stable
        return (rank < important) | distinct(_cosines(features), rank - important, steps)


def removals(length: int, wanted: int) -> list[tuple[int, int]]:
    """The steps from `length` to `wanted` tokens: how many there are before each, and how many it removes."""
    steps = []
    while length > wanted:
        remove = min(STEP, length - wanted, (length + 1) // 2)
        steps.append((length, remove))
        length -= remove
    return steps


def _distinct_published(similarity: Tensor, place: Tensor, steps: list[tuple[int, int]]) -> Tensor:
    """The tokens that no step removes, `[batch, tokens]`, bool.

    `similarity` is `[batch, tokens, tokens]`, float32; `place` is where each token stands in the list, `[batch,
    tokens]`, float32, negative for those outside it.
    """
    earlier = _smaller(torch.arange(place.shape[1], device=place.device))
    # What a step removes, and how many even ones it leaves.
    counts = torch.tensor([[remove, (length + 1) // 2 - remove] for length, remove in steps]).to(place)

    def step(number: Tensor, place: Tensor, similarity: Tensor, earlier: Tensor, counts: Tensor) -> tuple[Tensor]:
        remove, left = _of_step(counts, number).unbind()
        half = (place * 0.5).floor()
        listed = place >= 0
        even, odd = listed & (place == 2 * half), listed & (place > 2 * half)
        rank = descending_rank(torch.where(even, _best(similarity, odd), NONE), earlier)
        # The even ones have the ranks from 0; those removed get places below 0.
        return (torch.where(even, rank - remove, torch.where(odd, half + left, -1.0)),)

    (place,) = repeated(step, len(steps), [place], similarity, earlier, counts)
    return place >= 0


def _distinct_stable(similarity: Tensor, place: Tensor, steps: list[tuple[int, int]]) -> Tensor:
    """The same in a fixed order; of `place` only the sign is read."""
    tokens = place.shape[1]
    order = torch.arange(tokens, device=place.device) * leap(tokens) % tokens
    precedes, follows = _smaller(order), _smaller(-order)
    similarity = torch.where(precedes, similarity, NONE)
    counts = torch.tensor([[remove] for _, remove in steps]).to(place)

    def step(number: Tensor, listed: Tensor, similarity: Tensor, follows: Tensor, counts: Tensor) -> tuple[Tensor]:
        # The first of the order has none to look at: it is beaten by all others, and stays.
        rank = descending_rank(torch.where(listed, _best(similarity, listed), NONE), follows)
        return (listed & (rank >= _of_step(counts, number)),)

    (listed,) = repeated(step, len(steps), [place >= 0], similarity, follows, counts)
    return listed


def _of_step(counts: Tensor, number: Tensor) -> Tensor:
    """The row of a step in a table of all."""
    steps = torch.arange(counts.shape[0], device=counts.device)
    return torch.where((steps == number).unsqueeze(-1), counts, 0.0).sum(0)


def leap(tokens: int) -> int:
    """The step near the golden section that visits all tokens, modulo their number."""
    return next(n for n in range(round(tokens * (math.sqrt(5) - 1) / 2), 2 * tokens + 2) if math.gcd(n, tokens) == 1)


def _cosines(features: Tensor) -> Tensor:
    """Cosine of every pair, `[batch, tokens, tokens]`, float32; a token of zeros is like nothing."""
    unit: Tensor = features / features.norm(dim=-1, keepdim=True).clamp(min=1e-30)
    return unit @ unit.transpose(-1, -2)


def _best(similarity: Tensor, to: Tensor) -> Tensor:
    """Largest similarity of every token to one where `to` (`[batch, tokens]`, bool) is true; `[batch, tokens]`."""
    return (similarity + torch.where(to, 0.0, NONE).unsqueeze(1)).amax(-1)


def _smaller(order: Tensor) -> Tensor:
    """Where the column's number is smaller than the row's: `[n]` to `[n, n]`, bool."""
    return order < order.unsqueeze(-1)


def selection(keep: Tensor, budget: int) -> VisualSelection:
    """The `budget` tokens where `keep` (`[batch, tokens]`, bool) is true."""
    row = torch.where(keep, keep.long().cumsum(-1) - 1, -1)
    rows = one_hot(row, budget).transpose(1, 2)
    return VisualSelection(indices(rows), rows.float())
