"""A stream reduced by visual cues alone: `VisPruner` with the interface of every reducer."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from .base import Choice, Decisions, Reducer, Signal, kept_alone
from .vispruner import Order, VisPruner, selection


class VisualReducer(Reducer):
    """Keeps the tokens that `VisPruner` selects, in their order.

    Args:
        crops: the places that each crop's tokens have in the stream, in the crop's raster order; together all of them,
            but the pinned ones, each once. One image is one crop; an image of high resolution is an overview and
            several crops.
        budget: tokens to keep of each crop; one that has no more keeps all.
        important, order: see `VisPruner`.
        pinned: places of tokens that stay, and count in no budget (the marks at the ends of an image's lines).
    """

    reads = (Signal.CLASS_TOKEN,)
    keeps_order = True
    # A selection of hundreds of steps has no score by which a differing one could be called nearly tied.
    judged = False

    def __init__(
        self,
        crops: Sequence[Sequence[int]],
        budget: int,
        important: float,
        *,
        order: Order = "reference",
        pinned: Sequence[int] = (),
    ) -> None:
        kept = sum(min(budget, len(crop)) for crop in crops)
        super().__init__(sum(map(len, crops)) + len(pinned), kept + len(pinned))
        self.of_crop = VisPruner(budget, important, order=order)
        # Crops of one length are selected from at once.
        self.shapes = [(sum(len(c) == n for c in crops), n) for n in sorted({len(c) for c in crops})]
        places = [place for _, n in self.shapes for crop in crops if len(crop) == n for place in crop] + [*pinned]
        self.pinned = len(pinned)
        self.places = None if places == list(range(self.tokens)) else places

    @property
    def prunes(self) -> bool:
        """See `Reducer`; a budget of all tokens is a selection too."""
        return True

    def choose(self, tokens: Tensor, class_token: Tensor) -> Choice:
        """See `Reducer` and `Signal`; the tokens are the features that leave the vision tower."""
        kept, assigned = selection(self._keeps(tokens, class_token), self.keep)
        return Choice(kept_alone(kept), assigned, torch.ones_like(tokens[:, :, 0]))

    def margin(self, own: Choice, among: Choice, forced: Decisions) -> Tensor:
        """NaN: no score tells how near to one another two choices are."""
        return own.weights.new_full(own.weights.shape[:1], torch.nan, dtype=torch.float32)

    def _keeps(self, tokens: Tensor, attention: Tensor) -> Tensor:
        """Which tokens stay, `[batch, before]`, bool."""
        if self.places is not None:
            places = torch.tensor(self.places).to(tokens.device)
            tokens, attention = tokens.index_select(1, places), attention.index_select(1, places)
        found, start = [], 0
        for count, length in self.shapes:
            stop = start + count * length
            features, votes = tokens[:, start:stop], attention[:, start:stop]
            if count > 1:
                features, votes = features.reshape(-1, length, tokens.shape[2]), votes.reshape(-1, length)
            found.append(self.of_crop.keeps(features, votes).reshape(-1, count * length))
            start = stop
        if self.pinned:
            found.append(torch.ones_like(tokens[:, start:, 0], dtype=torch.bool))
        keeps = torch.cat(found, 1) if len(found) > 1 else found[0]
        if self.places is None:
            return keeps
        back = sorted(range(self.tokens), key=self.places.__getitem__)
        return keeps.index_select(1, torch.tensor(back).to(keeps.device))


class MemberVotes(nn.Module):
    """What each row of a prompt gets of the votes for the tokens that it is made of: their mean.

    Args:
        members: of each row of each prompt, the numbers of its tokens; at least one.
    """

    def __init__(self, members: Sequence[Sequence[Sequence[int]]]) -> None:
        super().__init__()
        most = max(len(tokens) for rows in members for tokens in rows)
        self.shape = [len(members), len(members[0]), most]
        padded = [[*tokens, *[tokens[0]] * (most - len(tokens))] for rows in members for tokens in rows]
        self.index = [token for tokens in padded for token in tokens]
        shares = [[1 / len(tokens)] * len(tokens) + [0.0] * (most - len(tokens)) for rows in members for tokens in rows]
        even = all(len(tokens) == most for rows in members for tokens in rows)
        self.shares = None if even else [share for row in shares for share in row]

    def forward(self, votes: Tensor) -> Tensor:
        """`[tokens]` to `[batch, rows]`."""
        own = votes.index_select(0, torch.tensor(self.index).to(votes.device)).view(self.shape)
        if self.shares is None:
            return own.mean(-1)
        return (own * torch.tensor(self.shares).to(votes).view(self.shape)).sum(-1)


class WithSeparators(nn.Module):
    """The map of a stream, from that of its image tokens, where separators that are dropped stand between these.

    Args:
        origin: for every token with separators, its number among the image tokens; -1 for a separator.
    """

    def __init__(self, origin: Sequence[int]) -> None:
        super().__init__()
        tokens = max(origin) + 1
        self.columns = [tokens if number < 0 else number for number in origin]

    def forward(self, selected: Tensor) -> Tensor:
        """`[batch, after, image tokens]` to `[batch, after, tokens with separators]`."""
        columns = torch.tensor(self.columns).to(selected.device)
        return torch.nn.functional.pad(selected, (0, 1)).index_select(2, columns)
