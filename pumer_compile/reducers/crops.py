"""Image tokens that are chosen crop by crop: of one image, or of each tile, frame or crop of several."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .base import Choice, Decisions, Reducer, kept_alone, mask_margin
from .ranking import one_hot
from .vispruner import selection


class CropReducer(Reducer):
    """Keeps some tokens of each crop, in their order. A subclass says which, in `of_crop`.

    Args:
        crops: the places that each crop's tokens have in the stream, in the crop's raster order; together all of them,
            but the pinned ones, each once. One image is one crop; an image of high resolution is an overview and
            several crops.
        budget: tokens to keep of each crop; one that has no more keeps all.
        pinned: places of tokens that stay, and count in no budget (the marks at the ends of an image's lines).
    """

    keeps_order = True

    def __init__(self, crops: Sequence[Sequence[int]], budget: int, *, pinned: Sequence[int] = ()) -> None:
        kept = sum(min(budget, len(crop)) for crop in crops)
        super().__init__(sum(map(len, crops)) + len(pinned), kept + len(pinned))
        self.budget = budget
        # Crops of one length are selected from at once.
        self.shapes = [(sum(len(c) == n for c in crops), n) for n in sorted({len(c) for c in crops})]
        places = [place for _, n in self.shapes for crop in crops if len(crop) == n for place in crop] + [*pinned]
        self.pinned = len(pinned)
        self.places = None if places == list(range(self.tokens)) else places

    @property
    def prunes(self) -> bool:
        """See `Reducer`; a budget of all tokens is a selection too."""
        return True

    def by_token(self, tokens: Tensor, *given: Any, **signals: Any) -> tuple[Tensor, ...]:
        """What is chosen by, an entry for each token: tensors `[batch, before, ...]`. A crop has its part of them.

        Args:
            tokens: `[batch, before, width]`.
            signals: what it `reads`, by name.
        """
        return (tokens, *given, *signals.values())

    def of_crop(self, *parts: Any, **named: Any) -> Tensor:
        """Which tokens of a crop stay: bool `[crops, length]`, with `min(budget, length)` of them true in each row.

        Args:
            parts: of `by_token`, `[crops, length, ...]`: those of all samples and crops of one length.
        """
        raise NotImplementedError

    def scores(self, *parts: Any, **named: Any) -> Tensor | None:
        """What the tokens that stay have most of, `[batch, before]`, float32; None where no score tells how near to one
        another two choices are (then `judged` is False).

        Args:
            parts: of `by_token`.
        """
        return None

    def choose(self, tokens: Tensor, *given: Any, **signals: Any) -> Choice:
        """See `Reducer`."""
        named = {s.value: value for s, value in zip(self.reads, given, strict=False)} | signals
        parts = tuple(part.detach() for part in self.by_token(tokens, **named))
        kept, assigned = selection(self._keeps(parts), self.keep)
        return Choice(kept_alone(kept), assigned, torch.ones_like(tokens[:, :, 0]), self.scores(*parts))

    def margin(self, own: Choice, among: Choice, forced: Decisions) -> Tensor:
        """See `Reducer`; the widest of any crop."""
        scores = own.evidence
        if scores is None:
            return own.weights.new_full(own.weights.shape[:1], torch.nan, dtype=torch.float32)
        mine, theirs = (one_hot(kept, self.tokens).any(1) for kept in (own.decisions.kept, forced.kept))
        scores, mine, theirs = (self._in_crop_order(value) for value in (scores, mine, theirs))
        gaps, start = [], 0
        for count, length in self.shapes:
            cut = slice(start, start + count * length)
            parts = (value[:, cut].reshape(-1, length) for value in (scores, mine, theirs))
            gaps.append(mask_margin(*parts).view(-1, count).amax(1))
            start += count * length
        pinned = (mine[:, start:] == theirs[:, start:]).all(1)
        in_order = (forced.kept[:, 1:] > forced.kept[:, :-1]).all(1)
        return torch.where(in_order & pinned, torch.stack(gaps).amax(0), 1.0)

    def _in_crop_order(self, value: Tensor) -> Tensor:
        """The tokens of the shortest crops first, the pinned ones last."""
        if self.places is None:
            return value
        return value.index_select(1, torch.tensor(self.places).to(value.device))

    def _in_stream_order(self, value: Tensor, dim: int = 1) -> Tensor:
        """Back from the order of `_in_crop_order`."""
        if self.places is None:
            return value
        back = sorted(range(self.tokens), key=self.places.__getitem__)
        return value.index_select(dim, torch.tensor(back).to(value.device))

    def _keeps(self, parts: Sequence[Tensor]) -> Tensor:
        """Which tokens stay, `[batch, before]`, bool."""
        parts = [self._in_crop_order(part) for part in parts]
        found, start = [], 0
        for count, length in self.shapes:
            stop = start + count * length
            own = [part[:, start:stop] for part in parts]
            if count > 1:
                own = [part.reshape(-1, length, *part.shape[2:]) for part in own]
            found.append(self.of_crop(*own).reshape(-1, count * length))
            start = stop
        if self.pinned:
            found.append(torch.ones_like(found[0][:, :1]).expand(-1, self.pinned))
        return self._in_stream_order(torch.cat(found, 1) if len(found) > 1 else found[0])
