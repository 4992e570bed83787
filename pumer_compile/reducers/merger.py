"""Modality-aware merging by bipartite soft matching (PuMer, section 4.2 and Algorithm 1)."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from .ranking import first_argmax, one_hot, top

# Below every similarity: pairs that may not merge come after all that may, and before the class token (-inf).
LAST_RESORT = -1e30
Similarity = Literal["cosine", "dot"]


class Matching(NamedTuple):
    """Which tokens merge into which, and the scores that decided it.

    Attributes:
        source: even tokens that merge away, most similar first, `[batch, merge]`; s is token `2 * s`.
        target: the odd token each merges into, `[batch, merge]`; t is token `2 * t + 1`.
        best: similarity of each even token to its target, `[batch, even]`.
        scores: all similarities, `[batch, even, odd]`.
    """

    source: Tensor
    target: Tensor
    best: Tensor
    scores: Tensor


class ModalityAwareMerger(nn.Module):
    """Merges the most similar pairs of tokens of one modality.

    Tokens are split by position: even ones look for their most similar odd one, and the `merge` best pairs
    become one token each. Token 0 never merges away. Unmerged even tokens come first, in order, then the odd
    ones.

    Args:
        merge: tokens to merge away.
        similarity: of the keys, mean over heads: `cosine` (published code) or `dot` (paper).
        protected: leading tokens that neither merge away nor are merged into.
        keep_padding_apart: real tokens merge with padding only where nothing else is left to merge.
    """

    def __init__(
        self,
        merge: int,
        *,
        similarity: Similarity = "cosine",
        protected: int = 1,
        keep_padding_apart: bool = False,
    ) -> None:
        super().__init__()
        self.merge, self.similarity, self.protected = merge, similarity, protected
        self.keep_padding_apart = keep_padding_apart

    def match(self, keys: Tensor, weights: Tensor | None = None) -> Matching:
        """Find the pairs.

        Args:
            keys: mean over heads, `[batch, tokens, head_size]`.
            weights: `[batch, tokens]`; 0 is padding.
        """
        keys = keys.float()
        if self.similarity == "cosine":
            # A key of zeros is like nothing; without the clamp it would be NaN and undo the order of others.
            keys = keys / keys.norm(dim=-1, keepdim=True).clamp(min=1e-30)
        even, odd = keys[:, 0::2], keys[:, 1::2]
        scores = even @ odd.transpose(-1, -2)
        if self.keep_padding_apart and weights is not None:
            real = weights > 0
            same = real[:, 0::2].unsqueeze(-1) == real[:, 1::2].unsqueeze(-2)
            scores = torch.where(same, scores, LAST_RESORT)
        even_position = 2 * torch.arange(even.shape[1], device=keys.device)
        odd_position = 2 * torch.arange(odd.shape[1], device=keys.device) + 1
        if self.protected > 1:
            scores = torch.where(odd_position < self.protected, float("-inf"), scores)
        best, target = first_argmax(scores)
        best = torch.where(even_position < self.protected, float("-inf"), best)
        source = top(best, self.merge)
        return Matching(source, self.targets_of(source, target), best, scores)

    @staticmethod
    def targets_of(source: Tensor, target: Tensor) -> Tensor:
        """`target` at `source`, `[batch, merge]`, by comparison (a gather without an index operator)."""
        return (one_hot(source, target.shape[1]) * target.unsqueeze(1)).sum(-1)

    @staticmethod
    def assignment(source: Tensor, target: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """Which even tokens stay, and which join an odd one.

        Args:
            source, target: as in `Matching`, `[batch, merge]`.
            tokens: tokens before merging.

        Returns:
            the even tokens that stay, `[batch, even - merge, even]`, and the even tokens that join each odd
            one, `[batch, odd, even]`; float32 of zeros and ones.
        """
        n_even, n_odd = (tokens + 1) // 2, tokens // 2
        chosen = one_hot(source, n_even)
        merged = chosen.any(1)
        index = torch.arange(n_even, device=source.device)
        # Row of an unmerged even token: how many unmerged even tokens come before it.
        before = (~merged).unsqueeze(1) & (index < index.unsqueeze(-1))
        row = torch.where(merged, -1, before.sum(-1))
        rows = torch.arange(n_even - source.shape[1], device=source.device).unsqueeze(-1)
        stay = (row.unsqueeze(1) == rows).float()
        join = one_hot(target, n_odd).float().transpose(1, 2) @ chosen.float()
        return stay, join
