"""How relevant image tokens are to a text: their cosines."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn


class MeanOfWords(nn.Module):
    """The mean of a prompt's words.

    Args:
        places: of the words in the prompt.
    """

    def __init__(self, places: Sequence[int]) -> None:
        super().__init__()
        self.places = list(places)

    def forward(self, embeddings: Tensor, mask: Tensor | None = None) -> Tensor:
        """`[batch, width]`, float32.

        Args:
            embeddings: `[batch, length, width]`.
            mask: 0 where a token is padding, `[batch, length]`.
        """
        places = torch.tensor(self.places).to(embeddings.device)
        words = embeddings.detach().index_select(1, places).float()
        if mask is None:
            return words.mean(1)
        real = mask.index_select(1, places).float().unsqueeze(-1)
        return (words * real).sum(1) / real.sum(1).clamp(min=1.0)


class RowsOfTower(nn.Module):
    """What the rows of a prompt were when they left the vision tower.

    Args:
        order: of each row, its number among the tokens of the tower for one prompt.
        count: of those.
    """

    def __init__(self, order: Sequence[int], count: int) -> None:
        super().__init__()
        self.order, self.count = list(order), count

    def forward(self, features: Tensor) -> Tensor:
        """`[images, tokens, width]` to `[batch, rows, width]`."""
        own = features.detach().reshape(-1, self.count, features.shape[-1])
        if self.order == list(range(self.count)):
            return own
        return own.index_select(1, torch.tensor(self.order).to(features.device))


def to_text(tokens: Tensor, text: Tensor, epsilon: float = 0.0) -> Tensor:
    """Cosine of every token to each text, `[batch, tokens, texts]`.

    Args:
        tokens, text: `[batch, tokens, width]` and `[batch, texts, width]`, float32.
        epsilon: what is added to the square of a norm.
    """
    units = [x / ((x * x).sum(-1, keepdim=True) + epsilon).sqrt().clamp(min=1e-30) for x in (tokens, text)]
    found: Tensor = units[0] @ units[1].transpose(-1, -2)
    return found


def spread(relevance: Tensor, above: float = 0.0, below: float = 0.0) -> Tensor:
    """Relevance from 0 to 1 over the last dimension.

    Args:
        relevance: any.
        above: added to the numerator, as the paper's code does (1e-6).
        below: added to the denominator, as OpenVINO does (1e-6).
    """
    low, high = relevance.amin(-1, keepdim=True), relevance.amax(-1, keepdim=True)
    span = high - low + below
    # Where all are alike, none is more relevant.
    return torch.where(span > 0, (relevance - low + above) / torch.where(span > 0, span, 1.0), 1.0)
