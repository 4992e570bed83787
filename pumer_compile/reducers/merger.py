"""Modality-aware merging by bipartite soft matching (PuMer, section 4.2 and Algorithm 1)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from .ranking import by_place, descending_rank, first_largest, leading, one_hot, picked

# Below every similarity: pairs that may not merge come after all that may, and before the class token (-inf).
LAST_RESORT = -1e30
Similarity = Literal["cosine", "dot"]


class Matching(NamedTuple):
    """Which tokens merge into which, and the scores that decided it.

    Attributes:
        source: even tokens that merge away, most similar first, or in their order (`in_order`), `[batch, merge]`.
        target: the odd token each merges into, `[batch, merge]`.
        best: similarity of each even token to its target, `[batch, even]`.
        scores: all similarities, `[batch, even, odd]`.
        merged: the even tokens that merge away, `[batch, even]` bool.
        pairs: the same pairs as source and target, `[batch, even, odd]` bool.
    """

    source: Tensor
    target: Tensor
    best: Tensor
    scores: Tensor
    merged: Tensor
    pairs: Tensor


class ModalityAwareMerger(nn.Module):
    """Merges the most similar pairs of tokens of one modality.

    Tokens are split by position: even ones look for their most similar odd one, and the `merge` best pairs
    become one token each. Token 0 never merges away. Unmerged even tokens come first, in order, then the odd
    ones, as published; or all stand where they stood (`in_order`), a merged token at its odd one's place.

    Args:
        merge: tokens to merge away.
        similarity: of the keys, mean over heads: `cosine` (published code) or `dot` (paper).
        protected: leading tokens that neither merge away nor are merged into.
        keep_padding_apart: real tokens merge with padding only where nothing else is left to merge.
        in_order: whether tokens stay in their old order.
    """

    def __init__(
        self,
        merge: int,
        *,
        similarity: Similarity = "cosine",
        protected: int = 1,
        keep_padding_apart: bool = False,
        in_order: bool = False,
    ) -> None:
        super().__init__()
        self.merge, self.similarity, self.protected = merge, similarity, protected
        self.keep_padding_apart, self.in_order = keep_padding_apart, in_order

    def units(self, keys: Tensor) -> Tensor:
        """What similarities are products of: the keys, or keys of length 1 for cosines; float32.

        Args:
            keys: mean over heads, `[batch, tokens, head_size]`.
        """
        keys = keys.float()
        if self.similarity == "dot":
            return keys
        # A key of zeros is like nothing; without the clamp it would be NaN and undo the order of others.
        units: Tensor = keys / keys.norm(dim=-1, keepdim=True).clamp(min=1e-30)
        return units

    def match(self, units: Tensor, weights: Tensor | None = None) -> Matching:
        """Find the pairs.

        Args:
            units: from `units`, `[batch, tokens, head_size]`.
            weights: `[batch, tokens]`; 0 is padding.
        """
        weighed = (None, None) if weights is None else (weights[:, 0::2], weights[:, 1::2])
        return self.pair(units[:, 0::2], units[:, 1::2], *weighed)

    def pair(
        self, even: Tensor, odd: Tensor, even_weights: Tensor | None = None, odd_weights: Tensor | None = None
    ) -> Matching:
        """Find the pairs of tokens that are split already.

        Args:
            even, odd: from `units`, `[batch, even or odd tokens, head_size]`.
            even_weights, odd_weights: `[batch, even or odd tokens]`; 0 is padding.
        """
        scores = even @ odd.transpose(-1, -2)
        if self.keep_padding_apart and even_weights is not None and odd_weights is not None:
            same = (even_weights > 0).unsqueeze(-1) == (odd_weights > 0).unsqueeze(-2)
            scores = torch.where(same, scores, LAST_RESORT)
        even_position = 2 * torch.arange(even.shape[1], device=even.device)
        odd_position = 2 * torch.arange(odd.shape[1], device=even.device) + 1
        if self.protected > 1:
            scores = torch.where(odd_position < self.protected, float("-inf"), scores)
        best, nearest = first_largest(scores)
        best = torch.where(even_position < self.protected, float("-inf"), best.squeeze(-1))
        rank = descending_rank(best)
        merged = rank < self.merge
        order = leading(by_place(rank, self.merge) if self.in_order else rank, self.merge)
        source, target = picked(order, even_position), picked(order, picked(nearest, odd_position))
        pairs = nearest & merged.unsqueeze(-1)
        return Matching(source.long(), target.long(), best, scores, merged, pairs)

    @staticmethod
    def forced(matching: Matching, source: Tensor, target: Tensor) -> Matching:
        """The matching with other pairs: `source` and `target` as in `Matching`."""
        chosen = one_hot(source // 2, matching.scores.shape[1])
        pairs = chosen.float().transpose(1, 2) @ one_hot(target // 2, matching.scores.shape[2]).float() > 0
        return matching._replace(source=source, target=target, merged=chosen.any(1), pairs=pairs)

    def assignment(self, merged: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """Which even tokens stay, and which join an odd one.

        Args:
            merged, pairs: as in `Matching`.

        Returns:
            the even tokens that stay, `[batch, even - merge, even]`, and the even tokens that join each odd
            one, `[batch, odd, even]`; float32 of zeros and ones.
        """
        index = torch.arange(merged.shape[1], device=merged.device)
        # Row of an unmerged even token, counted from 1: how many unmerged even tokens come up to it.
        row = (~merged).float() @ (index.unsqueeze(-1) <= index).float()
        rows = torch.arange(1, merged.shape[1] - self.merge + 1, device=merged.device, dtype=row.dtype)
        stay = (row.unsqueeze(1) == rows.unsqueeze(-1)) & ~merged.unsqueeze(1)
        return stay.float(), pairs.float().transpose(1, 2)

    def assignment_in_order(self, merged: Tensor, pairs: Tensor) -> tuple[Tensor, Tensor]:
        """Which even and which odd tokens make each new one, where tokens stay in their old order.

        Args:
            merged, pairs: as in `Matching`.

        Returns:
            `[batch, tokens - merge, even]` and `[batch, tokens - merge, odd]`; float32 of zeros and ones.
        """
        even, odd = pairs.shape[1:]
        index, stays = torch.arange(even, device=merged.device), (~merged).float()
        before = stays @ (index.unsqueeze(-1) < index).float()  # how many even tokens stay that come before each
        place_even, place_odd = before + index, (before + stays + index)[:, :odd]
        rows = torch.arange(even + odd - self.merge, device=merged.device, dtype=before.dtype).unsqueeze(-1)
        stay = (place_even.unsqueeze(1) == rows) & ~merged.unsqueeze(1)
        target = (place_odd.unsqueeze(1) == rows).float()
        return stay.float() + target @ pairs.float().transpose(1, 2), target
