"""Clusters of tokens around peaks of density (Rodriguez and Laio, 2014), as SparseVLM merges by them."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from .greedy import repeated
from .ranking import descending_rank, first_largest, identity


class DensityPeaks(nn.Module):
    """Parts tokens into clusters, each around a token of it.

    A token is as dense as its `clusters` nearest ones are near, itself among them; it is a center if it is dense, and
    far from any that is denser. Of equally dense ones the lowest index is denser, where the published code adds noise.
    Every other token belongs to the nearest center.

    Args:
        clusters: how many, 1 to the number of tokens.
    """

    def __init__(self, clusters: int) -> None:
        super().__init__()
        self.clusters = clusters

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Which tokens are centers, `[n, tokens]` bool, and the center of each, `[n, tokens, tokens]` bool.

        Args:
            tokens: `[n, tokens, width]`, float32.
        """
        distance = _distances(tokens)
        count = tokens.shape[1]
        squares, near = distance * distance, torch.zeros_like(distance[:, :, :1])
        _, near = repeated(_nearest, self.clusters, [squares, near])
        density = (-near / self.clusters).exp()
        index = torch.arange(count, device=tokens.device)
        other = density.transpose(1, 2)
        denser = (other > density) | ((other == density) & (index < index.unsqueeze(-1)))
        apart = torch.where(denser, distance, distance.amax((1, 2), keepdim=True)).amin(-1)
        center = descending_rank(apart * density.squeeze(-1)) < self.clusters
        likeness = torch.where(center.unsqueeze(1), -distance, -torch.inf)
        own = identity(count, count, tokens.device) > 0
        # Of two centers that are equal each is its own.
        _, nearest = first_largest(torch.where(own & center.unsqueeze(1), 1.0, likeness))
        return center, nearest


def _nearest(number: Tensor, squares: Tensor, near: Tensor) -> tuple[Tensor, Tensor]:
    """Add the smallest of each row, and take it out."""
    least, found = first_largest(-squares)
    return torch.where(found, torch.inf, squares), near - least


def _distances(tokens: Tensor) -> Tensor:
    """Of every pair, `[n, tokens, tokens]`, over the root of the width."""
    count, width = tokens.shape[1:]
    norm = (tokens * tokens).sum(-1, keepdim=True)
    square = (norm + norm.transpose(1, 2) - 2 * tokens @ tokens.transpose(1, 2)).clamp(min=0)
    apart: Tensor = (square / width).sqrt() * (1 - identity(count, count, tokens.device))
    return apart
