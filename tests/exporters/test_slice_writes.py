"""Writes into slices, as joins: the numbers of PyTorch, and no write left but where another name sees it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

from pumer_compile.analysis.operators import aten
from pumer_compile.capture.plain_graph import plain_graph_module
from pumer_compile.exporters.slice_writes import lower_slice_writes

Body = Callable[[Tensor, Tensor], Tensor]


class Writes(nn.Module):
    def __init__(self, body: Body) -> None:
        super().__init__()
        self.body = body

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.body(x, y)


def sample(seed: int) -> tuple[Tensor, Tensor]:
    """Sizes collide: 3 axes, 6 and 2."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(3, 2, 6, generator=generator), torch.randn(3, 2, 6, generator=generator)


def lowered(body: Body, inputs: tuple[Tensor, Tensor]) -> fx.GraphModule:
    module = plain_graph_module(torch.export.export(Writes(body), inputs, strict=False))
    lower_slice_writes(module)
    return module


def writes(module: fx.GraphModule) -> int:
    return len(module.graph.find_nodes(op="call_function", target=aten.copy_.default))


def agree(body: Body, module: fx.GraphModule) -> None:
    for seed in (0, 1):
        wanted = body(*(t.clone() for t in sample(seed)))
        assert torch.equal(module(*(t.clone() for t in sample(seed))), wanted)


def interleaved(x: Tensor, y: Tensor) -> Tensor:
    """As Qwen3-VL interleaves the angles of three axes."""
    time = x[0].clone()
    for axis in (1, 2):
        time[..., axis:6:3] = y[axis, ..., axis:6:3]
    return time * 2


def in_a_row(x: Tensor, y: Tensor) -> Tensor:
    """Into a row of what is read by other rows alone."""
    angles = x * 1
    time = angles[0]
    time[..., 1:5:2] = angles[1, ..., 1:5:2]
    return time + angles[2]


def of_another_type(x: Tensor, y: Tensor) -> Tensor:
    whole = x.clone()
    whole[:, :, 2:4] = y[:, :, :2].double()
    return whole


def along_another(x: Tensor, y: Tensor) -> Tensor:
    whole = x + 1
    whole[1:] = y[:2]
    return whole.sum(0)


def broadcast(x: Tensor, y: Tensor) -> Tensor:
    whole = x * 1
    whole[..., 1:3] = y[..., :1]
    return whole


def at_one_place(x: Tensor, y: Tensor) -> Tensor:
    """As Gemma 4 says that the first token begins no image."""
    whole = (x * 1).roll(1, -1)
    whole[..., 0] = 0.0
    whole[:, -1] = y[:, 0]
    return whole * 2


LOWERED = {
    "one place": at_one_place,
    "interleaved": interleaved,
    "a row": in_a_row,
    "another type": of_another_type,
    "along": along_another,
    "broadcast": broadcast,
}


@pytest.mark.parametrize("name", LOWERED)
def test_written_as_joins(name: str) -> None:
    module = lowered(LOWERED[name], sample(0))
    assert writes(module) == 0 and not any("fill_" in str(node.target) for node in module.graph.nodes)
    agree(LOWERED[name], module)


def seen_by_a_view(x: Tensor, y: Tensor) -> Tensor:
    whole = x * 1
    flat = whole.view(-1, 6)
    flat[:, 1:3] = y.view(-1, 6)[:, :2]
    return whole


def read_by_the_row_again(x: Tensor, y: Tensor) -> Tensor:
    whole = x * 1
    row = whole[0]
    row[:, 1:3] = y[0, :, :2]
    return whole[0] + 1


def read_whole(x: Tensor, y: Tensor) -> Tensor:
    whole = x * 1
    row = whole[0]
    row[:, 1:3] = y[0, :, :2]
    return whole.sum()


LEFT = {"a view": seen_by_a_view, "the row again": read_by_the_row_again, "whole": read_whole}


@pytest.mark.parametrize("name", LEFT)
def test_left_as_they_are(name: str) -> None:
    module = lowered(LEFT[name], sample(0))
    assert writes(module) == 1
    agree(LEFT[name], module)


def test_an_input_of_the_caller() -> None:
    """What a caller gave is written into, as PyTorch does."""

    def body(x: Tensor, y: Tensor) -> Tensor:
        x[..., 1:3] = y[..., :2]
        return x * 2

    module = lowered(body, sample(0))
    assert writes(module) == 1


@settings(max_examples=25)
@given(
    dim=st.integers(-3, 2),
    start=st.integers(-7, 7),
    stop=st.integers(-7, 9),
    step=st.integers(1, 4),
    open_=st.booleans(),
)
def test_any_slice(dim: int, start: int, stop: int, step: int, open_: bool) -> None:
    index = [slice(None)] * 3
    index[dim] = slice(start, None if open_ else stop, step)

    def body(x: Tensor, y: Tensor) -> Tensor:
        whole = x + 1
        whole[tuple(index)] = y[tuple(index)]
        return whole

    module = lowered(body, sample(0))
    agree(body, module)
