"""Choosing: the next token of every prompt, and which of them have ended."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class Choosing:
    """What follows, greedy.

    Args:
        stop: ids of which any ends a text.
    """

    def __init__(self, stop: int | Sequence[int] | None = None) -> None:
        stops = [] if stop is None else [stop] if isinstance(stop, int) else list(stop)
        self._stops = torch.tensor(stops, dtype=torch.int64)
        self._done: Tensor | None = None

    def next(self, logits: Tensor) -> Tensor:
        """The next token of each prompt, `[batch]`, int64.

        Args:
            logits: `[batch, vocabulary]`.
        """
        chosen = logits.argmax(-1)
        ends = torch.isin(chosen, self._stops)
        self._done = ends if self._done is None else self._done | ends
        return chosen

    @property
    def ended(self) -> bool:
        """Whether every text has."""
        return self._done is not None and bool(self._done.all())
