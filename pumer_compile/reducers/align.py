"""Bring values computed before a reducer to the tokens after it."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

AlignMode = Literal["mean", "log_mean_exp", "any", "all", "gather", "restore"]
MaskKind = Literal["additive", "keep", "drop"]


class AlignAxis(nn.Module):
    """Applies reducers' maps along one axis of a value.

    Features are averaged, additive masks take the logarithm of the mean of their exponentials (a mask of 0
    and -inf becomes the logarithm of the share of real tokens), boolean masks are true where any merged token
    is, and integer positions are gathered (only after pruning; the caller refuses it after a merge). `restore` is for
    maps that copy: infinities stay what they are.

    Args:
        dim: the axis.
        segments: its segments in order: tokens before, and whether the next map in `maps` applies to it.
        mode: how values combine.
        fold: rows of the value for each sample, where heads are folded into its batch.
    """

    def __init__(self, dim: int, segments: tuple[tuple[int, bool], ...], mode: AlignMode, fold: int = 1) -> None:
        super().__init__()
        self.dim, self.segments, self.mode, self.fold = dim, segments, mode, fold

    def forward(self, value: Tensor, *maps: Tensor) -> Tensor:
        """Align.

        Args:
            value: any rank of at least 2, batch (or 1) first.
            maps: one for each reduced segment, `[batch, after, before]`, float32.
        """
        if value.is_complex():  # rotary angles
            return torch.view_as_complex(self(torch.view_as_real(value), *maps))
        if self.fold > 1:
            maps = tuple(map_.repeat_interleave(self.fold, 0) for map_ in maps)
        if self.mode == "mean" and self.dim == 1 and value.dim() == 3 and len(self.segments) == 1:
            return (maps[0] @ value.float()).to(value.dtype)
        if self.mode == "restore":
            return self._restored(value, maps)
        moved = value.movedim(self.dim, -1)
        moved = moved.exp() if self.mode == "log_mean_exp" else moved
        parts, remaining = [], list(maps)
        for part, (_, reduced) in zip(moved.split([n for n, _ in self.segments], -1), self.segments, strict=True):
            parts.append(_along_last(part, remaining.pop(0)) if reduced else part.expand(_batched(part, maps)))
        result = torch.cat([p.float() for p in parts], -1) if len(parts) > 1 else parts[0].float()
        # Contiguous, as the captured value was: a `view` of it must not fail.
        return self._back(result, value.dtype).movedim(-1, self.dim).contiguous()

    def _restored(self, value: Tensor, maps: tuple[Tensor, ...]) -> Tensor:
        """Each row of a map takes one entry whole, also where that is infinite: a product would make it NaN of zero."""
        copy = AlignAxis(self.dim, self.segments, "mean", self.fold)
        result: Tensor = copy(value.nan_to_num(0.0, 0.0, 0.0), *maps)
        for odd in (float("inf"), float("-inf"), float("nan")):
            there = value.isnan() if odd != odd else value == odd
            result = torch.where(copy(there.to(value.dtype), *maps) > 0.5, odd, result)
        return result

    def _back(self, result: Tensor, dtype: torch.dtype) -> Tensor:
        if self.mode == "any":
            return result > 0
        if self.mode == "all":
            # The share of true ones is a sum of rounded fractions: compare with half a token less than all.
            return result > 1 - 0.5 / sum(tokens for tokens, _ in self.segments)
        if self.mode == "gather":
            return result.to(dtype)  # exact: each row of the maps has one 1
        if self.mode == "log_mean_exp":
            # A token of masked ones has log(0): a very low value masks without making a row NaN. Not the lowest there
            # is, by which transformers' exporters know rows that attend to nothing and give 0 where PyTorch does not.
            return result.log().to(dtype).clamp(min=torch.finfo(dtype).min / 2)
        return result.to(dtype)


def _batched(part: Tensor, maps: tuple[Tensor, ...]) -> list[int]:
    return [maps[0].shape[0], *part.shape[1:]]


def _along_last(value: Tensor, map_: Tensor) -> Tensor:
    """`out[b, ..., new] = sum over old of map[b, new, old] * value[b, ..., old]`."""
    columns = map_.transpose(-1, -2)
    if value.dim() == 2:
        return (value.float().unsqueeze(1) @ columns).squeeze(1)
    for _ in range(value.dim() - 3):
        columns = columns.unsqueeze(1)
    return value.float() @ columns


class TokenWeights(nn.Module):
    """The weight of every key from an attention mask: 1 is a real token, 0 is padding.

    Args:
        start: first key of the stream on the mask's key axis.
        length: its number of tokens.
        kind: how the mask reads: `additive` to the scores, or boolean, where true means `keep` or `drop`.
    """

    def __init__(self, start: int, length: int, kind: MaskKind = "additive") -> None:
        super().__init__()
        self.start, self.length, self.kind = start, length, kind

    def forward(self, mask: Tensor) -> Tensor:
        """`[batch, length]` float32 from a mask `[batch, heads or 1, queries or 1, keys]`. A key is real when any query
        of any head may attend to it."""
        keys = mask[..., self.start : self.start + self.length]
        if self.kind == "additive":
            return keys.float().exp().amax((1, 2))
        return (keys if self.kind == "keep" else ~keys).float().amax((1, 2))


class OwnWeights(nn.Module):
    """The weight of every token of a self-attention from its mask: 1 is a real token, which sees itself; 0 is padding.
    In a mask of pairs padding may be hidden from padding alone (Mllama's).

    Args:
        kind: see `TokenWeights`.
    """

    def __init__(self, kind: MaskKind = "additive") -> None:
        super().__init__()
        self.kind = kind

    def forward(self, mask: Tensor) -> Tensor:
        """`[batch, tokens]` float32 from a mask `[batch, heads or 1, tokens or 1, tokens]`."""
        tokens = mask.shape[3]
        # The diagonal, as a slice: every so many numbers of all rows.
        own = mask.flatten(2)[..., :: tokens + 1] if mask.shape[2] > 1 else mask.flatten(2)
        if self.kind == "additive":
            return own.float().exp().amax(1)
        return (own if self.kind == "keep" else ~own).float().amax(1)


class UnitWeights(nn.Module):
    """The weights of tokens that no mask covers: all 1.

    Args:
        length: number of tokens.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self.length = length

    def forward(self, like: Tensor) -> Tensor:
        """`[batch, length]` float32 of ones, on the device of a value with the batch first."""
        return torch.ones(like.shape[0], self.length, device=like.device)
