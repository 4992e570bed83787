"""Scratch."""

from __future__ import annotations
import torch
from torch import Tensor
from .merger import ModalityAwareMerger
from .ranking import one_hot
from .reducer import Decisions, Reduction, StreamReducer


class P:
    def __init__(self, keep): self.keep, self.protected = keep, 0


class VisualReducer(StreamReducer):
    def __init__(self, tokens, budget, important, *, order="reference"):
        super().__init__(tokens, None, ModalityAwareMerger(0))
        self.pruner = P(budget)
        self.budget, self.n_important = budget, int(budget * important)

    def forward(self, features, attention):
        kept = self.select(features, attention.float().mean((1, 2)))
        assigned = one_hot(kept, self.tokens).float()
        ones = torch.ones_like(features[:, :, 0])
        return self._combine(features, ones, assigned, Decisions(kept, kept[:, :0], kept[:, :0]))

    def select(self, f, a):
        out = []
        fn = f.float() / f.float().norm(dim=-1, keepdim=True)
        for b in range(f.shape[0]):
            order = a[b].argsort(descending=True)
            imp, res = order[: self.n_important], order[self.n_important :]
            want = self.budget - self.n_important
            while True:
                R = len(res); r = min(8, R - want)
                if r <= 0: break
                x, y = fn[b][res[::2]], fn[b][res[1::2]]
                s = (x @ y.T).max(-1).values
                d = s.argsort(descending=True)[r:]
                res = torch.cat([res[::2][d], res[1::2]])
            out.append(torch.cat([imp, res]).sort().values)
        return torch.stack(out)
