"""Tokens of a film that differ from others: from those of the frame before (EVS), or from all of them (VidCom2)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .crops import CropReducer
from .ranking import descending_rank
from .shares import shared_out

# Above every distance of two directions.
STAYS = 3.0
# As published: variances of the Gaussians that similarity is the sum of, and the temperature of a frame's share.
WIDTHS = (0.125, 0.25, 0.5, 1.0, 2.0)
TEMPERATURE = 0.01
# Of a whole number of tokens, for rounding.
SLACK = 1e-3


class FrameReducer(CropReducer):
    """Keeps some tokens of a film, in their order. A subclass says which.

    Args:
        frames: the places that each frame's tokens have in the stream, in raster order; all frames have as many.
        keep: tokens to keep of all frames together.
        pinned: see `CropReducer`.
    """

    def __init__(self, frames: Sequence[Sequence[int]], keep: int, *, pinned: Sequence[int] = ()) -> None:
        super().__init__([[place for frame in frames for place in frame]], keep, pinned=pinned)
        self.frames = len(frames)

    def of_crop(self, *parts: Any, **named: Any) -> Tensor:
        """See `CropReducer`: those with the highest score."""
        (features,) = parts
        return descending_rank(self.of_film(features.unflatten(1, (self.frames, -1))).flatten(1)) < self.budget

    def by_token(self, tokens: Tensor, *given: Any, **signals: Any) -> tuple[Tensor, ...]:
        """Features."""
        return (tokens.float(),)

    def of_film(self, features: Tensor) -> Tensor:
        """A score for each token, `[batch, frames, length]`.

        Args:
            features: `[batch, frames, length, width]`, float32.
        """
        raise NotImplementedError


class ChangeReducer(FrameReducer):
    """Keeps the first frame, and the tokens that are least like the one at the same place of the frame before (EVS,
    Bagrov et al. 2025), by one minus their cosine.

    Args:
        frames, keep, pinned: see `FrameReducer`; at least the tokens of a frame are kept.
    """

    def of_film(self, features: Tensor) -> Tensor:
        """See `FrameReducer`."""
        unit = features / features.norm(dim=-1, keepdim=True).clamp(min=1e-30)
        change = 1 - (unit[:, 1:] * unit[:, :-1]).sum(-1)
        return torch.cat((torch.full_like(change[:, :1], STAYS), change), 1)

    def scores(self, *parts: Any, **named: Any) -> Tensor:
        """See `CropReducer`."""
        film = self._in_crop_order(parts[0])
        found = self.of_film(film[:, : film.shape[1] - self.pinned].unflatten(1, (self.frames, -1))).flatten(1)
        return self._in_stream_order(torch.nn.functional.pad(found, (0, self.pinned)))


class UniqueReducer(FrameReducer):
    """Keeps the tokens that are least like the mean of the film and of their frame, more of frames that are unlike the
    film (VidCom2, Liu et al., EMNLP 2025).

    Of the features the half with the least variance is looked at. Likeness is a sum of Gaussians of the distance
    between directions. A frame wants `1 + p - mean(p)` times an equal share, `p` the softmax over frames of minus the
    mean likeness to the film. As published these are rounded, so that their sum depends on the film; here they are
    rounded down, and what is left goes to the frames that are least like the film.

    Args:
        frames, keep, pinned: see `FrameReducer`.
    """

    # A share is a number of whole tokens; no score tells how near two ways to share out are.
    judged = False

    def of_crop(self, *parts: Any, **named: Any) -> Tensor:
        """See `CropReducer`."""
        (features,) = parts
        film, frame = self._likeness(features.unflatten(1, (self.frames, -1)))
        length = film.shape[2]
        unlike = -film.mean(-1)
        share = (unlike / TEMPERATURE).softmax(-1)
        wanted = (self.budget / self.frames * (1 + share - share.mean(-1, keepdim=True))).clamp(max=float(length))
        lengths = torch.full_like(wanted[0], length)
        # Where one frame has all of the softmax, the others want an equal share, which may be a whole number.
        tokens = shared_out(wanted + SLACK, unlike, lengths, self.budget)
        return (descending_rank(-(film + frame)) < tokens.unsqueeze(-1)).flatten(1)

    @staticmethod
    def _likeness(features: Tensor) -> tuple[Tensor, Tensor]:
        """Of every token to the mean of the film, and of its frame, `[batch, frames, length]`."""
        variance = features.flatten(1, 2).var(1, unbiased=False)
        calm = descending_rank(-variance) < features.shape[-1] // 2
        features = features * calm.unsqueeze(1).unsqueeze(1)
        unit = features / features.norm(dim=-1, keepdim=True).clamp(min=1e-12)
        found = []
        for centre in (unit.mean((1, 2), keepdim=True), unit.mean(2, keepdim=True)):
            distance = ((unit - centre) ** 2).sum(-1)
            found.append(torch.stack([(-distance / (2 * width)).exp() for width in WIDTHS]).sum(0))
        return found[0], found[1]
