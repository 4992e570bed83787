"""A stream reduced by visual cues alone: `VisPruner` with the interface of every reducer."""

from __future__ import annotations

import torch
from torch import Tensor

from .merger import ModalityAwareMerger
from .ranking import one_hot
from .reducer import Comparison, Decisions, Reduction, StreamReducer
from .vispruner import Order, VisPruner


class VisualReducer(StreamReducer):
    """Keeps the tokens that `VisPruner` selects, in raster order.

    Args:
        tokens: of the image, before.
        budget: of them to keep, at most `tokens`.
        important, order: see `VisPruner`.
    """

    # A selection of hundreds of steps has no score by which a differing one could be called nearly tied.
    judged = False

    def __init__(self, tokens: int, budget: int, important: float, *, order: Order = "reference") -> None:
        pruner = VisPruner(budget, important, order=order)
        super().__init__(tokens, pruner, ModalityAwareMerger(0), carried="ones")

    def forward(self, tokens: Tensor, attention: Tensor) -> Reduction:  # type: ignore[override]  # other evidence
        """Reduce the stream.

        Args:
            tokens: features that leave the vision tower, `[batch, before, width]`.
            attention: to them, after softmax, `[batch, heads, queries, before]`: of the class token alone, or of every
                token where there is none.
        """
        assert isinstance(self.pruner, VisPruner)
        kept, assigned = self.pruner(tokens, attention.float().mean((1, 2)))
        if self.forcing is not None:
            forced = self.forcing.decisions.kept
            differs = (kept != forced).any(1)
            own = Decisions(kept, kept[:, :0], kept[:, :0])
            gap = torch.zeros(differs.shape, device=differs.device)
            self.forcing.comparison = Comparison(own, self.forcing.decisions, differs, gap)
            kept, assigned = forced, one_hot(forced, self.tokens).float()
        ones = torch.ones_like(tokens[:, :, 0])
        return self._combine(tokens, ones, assigned, Decisions(kept, kept[:, :0], kept[:, :0]))
