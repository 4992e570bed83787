"""Visual-cue pruning (VisPruner, ICCV 2025): the tokens the image itself looks at, and of the others a diverse few."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from .distinct import distinct_published, distinct_stable, removals
from .ranking import descending_rank, indices, one_hot

Order = Literal["reference", "stable"]


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
        distinct = distinct_published if self.order == "reference" else distinct_stable
        return (rank < important) | distinct(_cosines(features), rank - important, steps)


def _cosines(features: Tensor) -> Tensor:
    """Cosine of every pair, `[batch, tokens, tokens]`, float32; a token of zeros is like nothing."""
    unit: Tensor = features / features.norm(dim=-1, keepdim=True).clamp(min=1e-30)
    return unit @ unit.transpose(-1, -2)


def selection(keep: Tensor, budget: int) -> VisualSelection:
    """The `budget` tokens where `keep` (`[batch, tokens]`, bool) is true."""
    row = torch.where(keep, keep.long().cumsum(-1) - 1, -1)
    rows = one_hot(row, budget).transpose(1, 2)
    return VisualSelection(indices(rows), rows.float())
