"""Fold: what depends on fixed inputs and on constants of the trace alone is computed once, and nothing else is."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, fx, nn

from pumer_compile.capture.fold import fold, fold_written
from pumer_compile.capture.plain_graph import plain_graph_module

Tensors = dict[str, Tensor]


def graph_of(model: nn.Module, inputs: Tensors) -> fx.GraphModule:
    return plain_graph_module(torch.export.export(model.eval(), (), inputs, strict=False))


def operators(module: fx.GraphModule) -> list[str]:
    return [node.target.overloadpacket.__name__ for node in module.graph.nodes if node.op == "call_function"]


class Angles(nn.Module):
    """Angles of positions: those that a grid gives, and those that are counted."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("frequencies", torch.tensor([1.0, 0.1]))
        self.gain = nn.Parameter(torch.tensor([2.0, 3.0]))

    def forward(self, grid: Tensor, pixels: Tensor) -> Tensor:
        given = (grid.repeat_interleave(2, dim=1)[0, :, None] * self.frequencies).cos()
        counted = (torch.arange(4)[:, None] * self.frequencies).sin()
        return pixels * given * self.gain + counted


def inputs(seed: int) -> Tensors:
    pixels = torch.randn(3, 4, 2, generator=torch.Generator().manual_seed(seed))
    return {"grid": torch.tensor([[2, 3]]), "pixels": pixels}


def test_what_a_fixed_input_gives() -> None:
    module = graph_of(Angles(), inputs(0))
    wanted = module(**inputs(1))
    assert fold(module, {"grid": inputs(0)["grid"]}, []) == 1
    assert torch.equal(module(**inputs(1)), wanted)
    names = operators(module)
    assert "cos" not in names and "repeat_interleave" not in names
    # Counted positions are counted over what a reducer leaves; a buffer alone is no reason to fold.
    assert "arange" in names and "sin" in names
    assert {n.target for n in module.graph.find_nodes(op="placeholder")} == {"grid", "pixels"}


def test_nothing_is_fixed() -> None:
    module = graph_of(Angles(), inputs(0))
    before = operators(module)
    assert fold(module, {}, []) == 0 and operators(module) == before


def test_a_parameter_is_no_constant() -> None:
    class Learned(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.table = nn.Parameter(torch.randn(5, 2))

        def forward(self, grid: Tensor, pixels: Tensor) -> Tensor:
            return pixels + self.table[grid.flatten() + 1].sum(0)

    model = Learned()
    module = graph_of(model, inputs(0))
    fold(module, {"grid": inputs(0)["grid"]}, [])
    with torch.no_grad():
        model.table += 1  # trained after it was captured
    torch.testing.assert_close(module(**inputs(1)), model(**inputs(1)))


@pytest.mark.parametrize("through_a_view", [False, True])
def test_data_written_into_a_constant(through_a_view: bool) -> None:
    class Writes(nn.Module):
        def forward(self, grid: Tensor, pixels: Tensor) -> Tensor:
            places = grid.float().repeat(2, 1)
            target = places[0] if through_a_view else places
            target.copy_(pixels[0, 0] if through_a_view else pixels[0, :2])
            return pixels + places.sum(0)

    module = graph_of(Writes(), inputs(0))
    fold(module, {"grid": inputs(0)["grid"]}, [])
    for seed in (0, 1):
        assert torch.equal(module(**inputs(seed)), Writes()(**inputs(seed)))


def test_a_constant_written_into_a_constant() -> None:
    class Writes(nn.Module):
        def forward(self, grid: Tensor, pixels: Tensor) -> Tensor:
            places = torch.zeros(4)
            places[1:3] = grid[0].float()
            return pixels * places[:, None]

    module = graph_of(Writes(), inputs(0))
    fold(module, {"grid": inputs(0)["grid"]}, [])
    assert torch.equal(module(**inputs(1)), Writes()(**inputs(1)))
    assert "copy_" not in operators(module) and "zeros" not in operators(module)


def wrote_before(a: Tensor, pixels: Tensor) -> Tensor:
    """The part of a constant that is known, then the part that is not."""
    a[0].copy_(torch.tensor([5.0, 6.0]))
    a[1].copy_(pixels[0, 0])
    return pixels + a.sum(0)


def read_before(a: Tensor, pixels: Tensor) -> Tensor:
    """What is read before a constant changes has its numbers from before."""
    sum_of_both = pixels + a[0]
    a.add_(1)
    return sum_of_both * a[0]


def read_between(a: Tensor, pixels: Tensor) -> Tensor:
    before = a * 2
    a[0].copy_(pixels[0, 0])
    return pixels + before[0] + (a * 2)[0]


def wrote_constants(a: Tensor, pixels: Tensor) -> Tensor:
    """Nothing fixed is in this mask; what is written into it is known."""
    mask = torch.zeros(4)
    mask[1:3] = 1
    mask[0].fill_(2)
    return pixels * mask[:, None] + a[0]


@pytest.mark.parametrize("body", [wrote_before, read_before, read_between, wrote_constants])
def test_writes_in_their_order(body: Callable[[Tensor, Tensor], Tensor]) -> None:
    class Writes(nn.Module):
        def forward(self, grid: Tensor, pixels: Tensor) -> Tensor:
            return body(grid.float().repeat(2, 1), pixels)

    module = graph_of(Writes(), inputs(0))
    fold(module, {"grid": inputs(0)["grid"]}, [])
    for seed in (0, 1):
        assert torch.equal(module(**inputs(seed)), Writes()(**inputs(seed)))


def test_constants_into_which_something_is_written() -> None:
    class Blocks(nn.Module):
        def forward(self, grid: Tensor, pixels: Tensor) -> Tensor:
            hidden = torch.full((4, 4), -1.0)
            hidden[:2, :2] = 0
            hidden[2:, 2:].fill_(0)
            open_ = torch.zeros(4, 2)
            open_[0].copy_(pixels[0, 0])
            return (hidden @ pixels) + torch.arange(4)[:, None] + open_

    module = graph_of(Blocks(), inputs(0))
    assert fold_written(module) == 1
    names = operators(module)
    assert "full" not in names and "arange" in names and "zeros" in names
    for seed in (0, 1):
        assert torch.equal(module(**inputs(seed)), Blocks()(**inputs(seed)))
    assert fold_written(graph_of(Angles(), inputs(0))) == 0


def test_random_numbers_stay_random() -> None:
    class Noise(nn.Module):
        def forward(self, grid: Tensor, pixels: Tensor) -> Tensor:
            return pixels + torch.rand_like(grid.float()).mean()

    module = graph_of(Noise(), inputs(0))
    fold(module, {"grid": inputs(0)["grid"]}, [])
    assert not torch.equal(module(**inputs(0)), module(**inputs(0)))


def test_constants_of_the_trace() -> None:
    class Ordered(nn.Module):
        def __init__(self, order: Tensor) -> None:
            super().__init__()
            self.order = order

        def forward(self, grid: Tensor, pixels: Tensor) -> Tensor:
            return pixels[:, self.order.flip(0).argsort()]

    order = torch.tensor([2, 0, 3, 1])
    kept, folded = (graph_of(Ordered(order), inputs(0)) for _ in range(2))
    assert fold(kept, {}, []) == 0 and "argsort" in operators(kept)
    lifted = [t for t in [*vars(folded).values(), *dict(folded.named_buffers()).values()] if isinstance(t, Tensor)]
    assert fold(folded, {}, lifted) == 1 and "argsort" not in operators(folded)
    assert torch.equal(folded(**inputs(1)), kept(**inputs(1)))
