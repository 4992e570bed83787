"""Image tokens that a small network, trained with the model, keeps (DynamicViT, NeurIPS 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from ..errors import UsageError
from .base import Choice, Decisions, Reducer, Signal, kept_alone, set_margin
from .ranking import by_place, descending_rank, indices, leading, one_hot


class KeepPredictor(nn.Module):
    """The prediction module of the paper (section 3.2, `PredictorLG`): should this token stay?

    Each token's features, half of them its own and half the mean over the tokens that are still there.

    Args:
        width: of the tokens, a multiple of 4.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.entry = nn.Sequential(nn.LayerNorm(width), nn.Linear(width, width), nn.GELU())
        self.exit = nn.Sequential(
            nn.Linear(width, width // 2),
            nn.GELU(),
            nn.Linear(width // 2, width // 4),
            nn.GELU(),
            nn.Linear(width // 4, 2),
            nn.LogSoftmax(dim=-1),
        )
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)

    def forward(self, tokens: Tensor, there: Tensor) -> Tensor:
        """Logarithms of the probabilities that a token stays and goes, `[batch, tokens, 2]` float32.

        Args:
            tokens: `[batch, tokens, width]`; computed in float32.
            there: 1 where a token has not been pruned and is no padding, else 0, `[batch, tokens]`.
        """
        own, shared = self.entry(tokens.float()).chunk(2, dim=-1)
        weights = there.float().unsqueeze(-1)
        mean = (shared * weights).sum(1, keepdim=True) / weights.sum(1, keepdim=True).clamp(min=1e-6)
        found: Tensor = self.exit(torch.cat([own, mean.expand_as(shared)], dim=-1))
        return found


class LearnedReducer(Reducer):
    """Keeps the tokens that its `KeepPredictor` is surest of, in their order; ties go to the lowest index.

    Args:
        tokens: before.
        keep: of them to keep, learned ones included.
        width: of the tokens.
        learned: leading tokens that stay and are not rated (a class token).
    """

    reads = (Signal.WEIGHTS,)
    keeps_order = True

    def __init__(self, tokens: int, keep: int, width: int, learned: int = 0) -> None:
        super().__init__(tokens, keep, carried="mean")
        self.predictor, self.learned = KeepPredictor(width), learned
        self.first_stays = learned > 0

    def choose(self, tokens: Tensor, weights: Tensor | None = None) -> Choice:
        """See `Reducer` and `Signal`; tokens of weight 0 go first."""
        weights = torch.ones_like(tokens[:, :, 0], dtype=torch.float32) if weights is None else weights
        scores, rank = self._rated(tokens.detach(), (weights > 0).float())
        kept = indices(leading(by_place(rank, self.keep), self.keep))
        return Choice(kept_alone(kept), one_hot(kept, self.tokens).float(), weights, scores)

    def _rated(self, tokens: Tensor, there: Tensor) -> tuple[Tensor, Tensor]:
        """Logarithm of the probability that a token stays, 0 of a learned one, `[batch, tokens]`; and its rank."""
        scores = self.predictor(tokens[:, self.learned :], there[:, self.learned :])[:, :, 0]
        scores = functional.pad(scores, (self.learned, 0))
        # In three heights: no logarithm of a probability is above 0, or near -1e4.
        height = torch.where(there > 0, scores.clamp(min=-1e4), -2e4)
        if self.learned:
            learned = torch.arange(self.tokens, device=tokens.device) < self.learned
            height = torch.where(learned, 1.0, height)
        return scores, descending_rank(height)

    def margin(self, own: Choice, among: Choice, forced: Decisions) -> Tensor:
        """See `Reducer`."""
        has = one_hot(forced.kept, self.tokens).any(1)[:, : self.learned].all(1)
        return torch.where(has, set_margin(own.evidence, own.decisions.kept, forced.kept), 1.0)


class MaskingReducer(LearnedReducer):
    """The same while it is trained: every token stays, and carries whether it is kept, 1 or 0, into later attention.

    In training that is drawn, by the Gumbel-softmax of what the predictor says, with the gradient of the probability;
    a token that a stage before has dropped stays dropped. Otherwise it is what `LearnedReducer` keeps.

    Args:
        tokens, width, learned: see `LearnedReducer`.
        wanted: tokens that shall be kept, learned ones included.
        share: of the tokens that are not learned, before the first stage, for the ratio loss.
    """

    def __init__(self, tokens: int, wanted: int, width: int, learned: int = 0, *, share: float) -> None:
        super().__init__(tokens, tokens, width, learned)
        self.wanted, self.share = wanted, share
        self.carried = "sum"

    @property
    def prunes(self) -> bool:
        """See `Reducer`: nothing yet."""
        return False

    def choose(self, tokens: Tensor, weights: Tensor | None = None) -> Choice:
        """See `Reducer` and `Signal`."""
        if torch.compiler.is_exporting():
            raise UsageError(
                "This graph carries the masks of a `dynamicvit` that is being trained, and reduces no token: save its "
                "predictors (distill.save_predictors), and reduce the model again with `predictors: FILE`, without "
                "`training`."
            )
        there = torch.ones_like(tokens[:, :, 0], dtype=torch.float32) if weights is None else weights.float()
        if self.training:
            said = self.predictor(tokens[:, self.learned :], there[:, self.learned :])
            drawn = functional.gumbel_softmax(said, hard=True)[:, :, 0]
            mask = torch.cat([there[:, : self.learned], drawn * there[:, self.learned :]], dim=1)
        else:
            _, rank = self._rated(tokens, (there > 0).float())
            mask = (rank < self.wanted).float() * there
        every = torch.arange(self.tokens, device=tokens.device)
        kept = every.expand(tokens.shape[0], -1)
        return Choice(kept_alone(kept), one_hot(kept, self.tokens).float(), mask)
