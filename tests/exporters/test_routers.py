"""Routers of mixtures of experts, without TopK: the same numbers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from pumer_compile.analysis.operators import aten
from pumer_compile.capture.plain_graph import plain_graph_module
from pumer_compile.exporters.routers import lower_routers

pytestmark = pytest.mark.fast
Body = Callable[[Tensor], Tensor]


class _Module(nn.Module):
    def __init__(self, body: Body) -> None:
        super().__init__()
        self.body = body

    def forward(self, scores: Tensor) -> dict[str, Tensor]:
        return {"out": self.body(scores)}


def scores(seed: int) -> Tensor:
    """Of three tokens for six experts, some equal."""
    return torch.randint(0, 4, (3, 6), generator=torch.Generator().manual_seed(seed)).float()


def lowered(body: Body, given: Callable[[int], Tensor] = scores) -> fx.GraphModule:
    module = plain_graph_module(torch.export.export(_Module(body), (given(0),), strict=False))
    lower_routers(module)
    for seed in (0, 1, 2):
        torch.testing.assert_close(module(given(seed))["out"], body(given(seed)), atol=0.0, rtol=0.0)
    return module


def targets(module: fx.GraphModule) -> set[object]:
    return {node.target for node in module.graph.nodes}


@pytest.mark.parametrize("dim", [-1, 0, 1])
def test_the_largest_in_order(dim: int) -> None:
    found = lowered(lambda x: x.topk(2, dim).values)
    assert aten.topk.default not in targets(found)


def test_places() -> None:
    """Of numbers that are all different: which of equal ones comes first is not said."""

    def apart(seed: int) -> Tensor:
        return torch.rand(3, 6, generator=torch.Generator().manual_seed(seed))

    lowered(lambda x: x.topk(4, -1).indices, apart)
    lowered(lambda x: x.masked_fill(x < x.mean(), -torch.inf).topk(3, -1).values.softmax(-1), apart)


def test_weights_at_the_places_of_experts() -> None:
    """As Llama 4's router writes them, and as DeepSeek's masks groups."""

    def apart(seed: int) -> Tensor:
        return torch.rand(3, 6, generator=torch.Generator().manual_seed(seed))

    def weights(x: Tensor) -> Tensor:
        most, places = torch.topk(x, 2, dim=1)
        return torch.full_like(x, float("-inf")).scatter_(1, places, most).sigmoid()

    def groups(x: Tensor) -> Tensor:
        places = torch.topk(x.view(3, 3, 2).sum(-1), 2, dim=-1, sorted=False)[1]
        mask = torch.zeros(3, 3)
        mask.scatter_(1, places, 1)
        return x * mask.unsqueeze(-1).expand(3, 3, 2).reshape(3, 6)

    for body in (weights, groups):
        assert not any("scatter" in str(target) or "topk" in str(target) for target in targets(lowered(body, apart)))


def test_what_stays() -> None:
    """Many, the smallest, and a write to other places than those of a few largest."""
    assert aten.topk.default in targets(lowered(lambda x: x.topk(2, largest=False).values))

    def many(seed: int) -> Tensor:
        return torch.rand(2, 20, generator=torch.Generator().manual_seed(seed))

    assert aten.topk.default in targets(lowered(lambda x: x.topk(17).values, many))
    written = lowered(lambda x: torch.zeros_like(x).scatter(1, x.long(), x))
    assert aten.scatter.src in targets(written)
