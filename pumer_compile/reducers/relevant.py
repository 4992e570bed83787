"""Image tokens that are relevant to a text and unlike each other: `Determinantal` as a reducer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from .base import Signal
from .cdpruner import Determinantal, Order, halved
from .clip import ClipRelevance
from .crops import CropReducer
from .relevance import spread, to_text

EPSILON = 1e-6


class RelevantReducer(CropReducer):
    """Keeps the tokens of each crop that `Determinantal` picks for the text, in their order, as OpenVINO GenAI does.

    Relevance is the cosine of a row of the prompt and the mean of its words, spread over 0..1 for each part that is
    chosen from.

    Args:
        crops, budget, pinned: see `CropReducer`.
        weight, order: see `Determinantal`.
        split: whether each half of a crop is chosen from by itself, with half of the budget.
    """

    reads: tuple[Signal, ...] = (Signal.TEXT_EMBEDDING,)
    # What a pick is worth depends on those before it: no score tells how near two choices are.
    judged = False

    def __init__(
        self,
        crops: Sequence[Sequence[int]],
        budget: int,
        weight: float,
        *,
        split: bool = False,
        order: Order = "reference",
        pinned: Sequence[int] = (),
    ) -> None:
        super().__init__(crops, budget, pinned=pinned)
        self.split = split
        self.select = Determinantal(budget, weight, EPSILON, order)

    def by_token(self, tokens: Tensor, text_embedding: Tensor) -> tuple[Tensor, Tensor]:
        """See `CropReducer`: the rows that enter the prompt, and their relevance."""
        tokens = tokens.float()
        return tokens, to_text(tokens, text_embedding.float().unsqueeze(1), EPSILON).squeeze(-1)

    def of_crop(self, features: Tensor, relevance: Tensor) -> Tensor:
        """See `CropReducer`."""
        length = features.shape[1]
        budget, found = min(self.budget, length), []
        for start, stop, share in halved(length, budget) if self.split else [(0, length, budget)]:
            own = spread(relevance[:, start:stop], below=EPSILON)
            found.append(self.select(features[:, start:stop], own, share))
        return torch.cat(found, 1)


class ClipReducer(CropReducer):
    """The same with the paper's relevance: of what a row was when it left the vision tower, to a question, in CLIP's
    space, spread over 0..1 for all crops of a prompt together.

    Args:
        crops, budget: see `CropReducer`.
        weight, order: see `Determinantal`.
        clip: what says how relevant a token is; frozen.
    """

    judged = False

    def __init__(
        self,
        crops: Sequence[Sequence[int]],
        budget: int,
        weight: float,
        clip: ClipRelevance,
        *,
        order: Order = "reference",
    ) -> None:
        super().__init__(crops, budget)
        self.reads = (Signal.TOWER_FEATURES, Signal.TEXT_EMBEDS if clip.text is None else Signal.QUESTION_IDS)
        self.clip = clip
        self.select = Determinantal(budget, weight, 0.0, order)

    def by_token(self, tokens: Tensor, tower_features: Tensor, **text: Tensor) -> tuple[Tensor, Tensor]:
        """See `CropReducer`: the rows that enter the prompt, and their relevance."""
        (given,) = text.values()
        return tokens.float(), spread(self.clip(tower_features, given), above=EPSILON)

    def of_crop(self, features: Tensor, relevance: Tensor) -> Tensor:
        """See `CropReducer`."""
        kept: Tensor = self.select(features, relevance)
        return kept
