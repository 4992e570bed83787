"""Values that are filled by writing into parts of them, as joins."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import pumer_compile as pumer
from pumer_compile.analysis.dead_code import with_writes
from pumer_compile.analysis.nodes import ancestors
from pumer_compile.passes.join_writes import join_writes
from tests.support.helpers import count_op

pytestmark = pytest.mark.fast
aten = torch.ops.aten


def parts(x: Tensor, y: Tensor) -> Tensor:
    whole = x.new_empty(2, 3, 7)
    whole[..., :4].copy_(x)
    whole[..., 4:].copy_(y[..., :1].expand(-1, -1, 3))
    return whole * 2


def by_row(x: Tensor, y: Tensor) -> Tensor:
    whole = torch.empty(2, 3, 4)
    whole[1] = y[1]
    whole[0] = x[0]
    whole[0, 3:] = x[1, :1]  # nothing
    return whole + 1


def of_another_type(x: Tensor, y: Tensor) -> Tensor:
    whole = torch.zeros(2, 6, 4, dtype=torch.float64)
    whole[:, :3] = x
    whole[:, 3:] = y
    return whole.float()


def overlapping(x: Tensor, y: Tensor) -> Tensor:
    whole = x.new_zeros(2, 3, 7)
    whole[..., :4].copy_(x)
    whole[..., 3:].copy_(y)
    return whole * 2


def with_a_gap(x: Tensor, y: Tensor) -> Tensor:
    whole = x.new_zeros(2, 3, 9)
    whole[..., :4].copy_(x)
    whole[..., 5:].copy_(y)
    return whole * 2


def read_between(x: Tensor, y: Tensor) -> Tensor:
    whole = x.new_zeros(2, 3, 8)
    whole[..., :4].copy_(x)
    half = whole.sum()
    whole[..., 4:].copy_(y)
    return whole * half


def changed_between(x: Tensor, y: Tensor) -> Tensor:
    whole, own = x.new_zeros(2, 3, 8), x + 1
    whole[..., :4].copy_(own)
    own.mul_(3)
    whole[..., 4:].copy_(y)
    return whole + own.sum()


class Filling(nn.Module):
    def __init__(self, fill: Callable[[Tensor, Tensor], Tensor]) -> None:
        super().__init__()
        self.fill = fill

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return self.fill(x, y)


def filled(fill: Callable[[Tensor, Tensor], Tensor]) -> tuple[pumer.Program, dict[str, Tensor]]:
    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, 3, 4), "y": torch.randn(2, 3, 4)}
    return pumer.capture(Filling(fill), inputs), inputs


@pytest.mark.parametrize("fill", [parts, by_row, of_another_type])
def test_joined(fill: Callable[[Tensor, Tensor], Tensor]) -> None:
    program, inputs = filled(fill)
    module, count = join_writes(program.module)
    assert count == 1 and count_op(module, aten.copy_.default) == 0 and count_op(module, aten.cat.default) == 1
    torch.testing.assert_close(module(**inputs), fill(**inputs), atol=0, rtol=0)
    assert count_op(program.module, aten.copy_.default) > 0  # the captured graph is as it was


@pytest.mark.parametrize("fill", [overlapping, with_a_gap, read_between, changed_between])
def test_left_as_they_are(fill: Callable[[Tensor, Tensor], Tensor]) -> None:
    program, inputs = filled(fill)
    module, count = join_writes(program.module)
    assert count == 0 and module is program.module
    torch.testing.assert_close(module(**inputs), fill(**inputs), atol=0, rtol=0)


@pytest.mark.parametrize("fill", [overlapping, read_between, changed_between])
def test_what_is_moved_takes_its_writes_along(fill: Callable[[Tensor, Tensor], Tensor]) -> None:
    program, _ = filled(fill)
    graph = program.module.graph
    (last,) = (node for node in graph.nodes if node.op == "output")
    found = with_writes(graph, ancestors(last))
    writes = {node for node in graph.nodes if node.target in (aten.copy_.default, aten.mul_.Tensor)}
    assert writes and writes <= found and not writes <= ancestors(last)
