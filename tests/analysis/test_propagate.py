"""Multiply-adds by the shapes that are noted in a graph, against PyTorch's own counter over a run of all of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn

import pumer_compile as pumer
from pumer_compile import Schedule
from pumer_compile.analysis import propagate
from pumer_compile.analysis.propagate import ModuleRuns, count_multiply_adds
from pumer_compile.reducers import Reducer
from tests.support.models import Config, program, schedule

Counts = dict[fx.Node, int]


@pytest.fixture
def by_run(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Counts, Counts]]:
    """Each count of a graph that is made by noted shapes, beside that of a run."""
    found: list[tuple[Counts, Counts]] = []
    noted = propagate._from_noted_values

    def both(module: fx.GraphModule, inputs: dict[str, Tensor], runs: ModuleRuns) -> Counts | None:
        counts = noted(module, inputs, runs)
        if counts is not None:
            found.append((counts, propagate._run(module, inputs, counting=True).multiply_adds))
        return counts

    monkeypatch.setattr(propagate, "_from_noted_values", both)
    return found


CONFIGS = [
    Config(layers=2),
    Config(form="sdpa", norm="post", mask="bool", layers=2, patch_mask=True),
    Config(form="sdpa", layers=2, dynamic=True),
    Config(layers=2, dynamic=True),
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize("wanted", [schedule("safe"), Schedule(method="lossless")], ids=["reduced", "lossless"])
def test_every_node_as_in_a_run(config: Config, wanted: Schedule, by_run: list[tuple[Counts, Counts]]) -> None:
    captured = program(config)
    result = pumer.reduce(captured, wanted)
    assert by_run
    for counts, ran in by_run:
        assert counts.keys() <= ran.keys()
        assert {node: count for node, count in ran.items() if count} == {n: c for n, c in counts.items() if c}
    called = [n for n in result.module.graph.find_nodes(op="call_module")]
    reducers = [n for n in called if isinstance(result.module.get_submodule(n.target), Reducer)]
    assert bool(reducers) == (wanted.method != "lossless")
    if reducers:  # and they have work of their own
        assert by_run[-1][0][reducers[0]] > 0


class Products(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 2, 2)
        self.linear = nn.Linear(4, 6)
        self.bilinear = nn.Bilinear(6, 6, 5)

    def forward(self, pixels: Tensor) -> Tensor:
        x = self.conv(pixels).flatten(2).transpose(1, 2)  # [batch, 9, 4]
        x = self.linear(x)
        x = x + torch.einsum("bnd,bmd,bme->bne", x, x, x)
        x = torch.baddbmm(x, x @ x.mT, x) + x @ x[0].mT @ x[0]
        x = x + torch.addmm(x[0], x[0] @ x[0].mT, x[0]) + torch.mm(x[0], x[0].mT @ x[0])
        vector = x[:, 0] @ x[0, 0] + (x[0, 0] @ x[0, 1]) + self.linear.weight @ x[0, 0, :4] @ x[0, 0]
        heads = x.view(-1, 9, 2, 3).transpose(1, 2)
        wide = torch.cat([x, x], 2).view(-1, 9, 2, 6).transpose(1, 2)[:, :, :5]
        attended = nn.functional.scaled_dot_product_attention(heads, heads[:, :, :5], wide)
        return self.bilinear(x, x).sum((1, 2)) + vector + attended.sum((1, 2, 3))


@pytest.mark.parametrize("open_batch", [False, True])
def test_other_ways_to_multiply(open_batch: bool, by_run: list[tuple[Counts, Counts]]) -> None:
    captured = pumer.capture(Products().eval(), {"pixels": torch.randn(2, 3, 6, 6)}, dynamic_batch=open_batch)
    counts = count_multiply_adds(captured.module, captured.inputs)
    ((noted, ran),) = by_run
    assert noted == counts and {n: c for n, c in ran.items() if c} == {n: c for n, c in counts.items() if c}
    by_hand = {
        "conv2d": 2 * 9 * 4 * 12,
        "linear": 2 * 9 * 4 * 6,
        "scaled_dot_product_attention": 2 * 2 * 9 * 5 * (3 + 6),
    }
    assert by_hand.items() <= {node.name: count for node, count in counts.items()}.items()


def test_inputs_of_another_size_are_run() -> None:
    captured = program(CONFIGS[2])
    wider = {name: torch.cat([tensor, tensor]) for name, tensor in captured.inputs.items()}
    once, twice = (sum(count_multiply_adds(captured.module, x).values()) for x in (captured.inputs, wider))
    assert 0 < once < twice == 2 * once


class Counted(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, x: Tensor, scale: int = 1) -> Tensor:
        self.calls += 1
        return x @ x.mT * scale


@pytest.mark.parametrize("change", ["shape", "stride", "dtype", "argument", "module"])
def test_a_module_runs_again_for_what_it_has_not_seen(change: str) -> None:
    module, runs = Counted(), ModuleRuns()
    mode = torch._subclasses.fake_tensor.FakeTensorMode()
    values: dict[str, tuple[Any, ...]] = {
        "shape": (torch.randn(5, 4),),
        "stride": (torch.randn(3, 4).mT.contiguous().mT,),
        "dtype": (torch.randn(3, 4).half(),),
        "argument": (torch.randn(3, 4), 2),
        "module": (torch.randn(3, 4),),
    }
    like = (torch.randn(3, 4),)
    fake = [
        [mode.from_tensor(x) if isinstance(x, Tensor) else x for x in given] for given in (like, like, values[change])
    ]
    first, again, other = fake
    runs.add(module, tuple(first), {}, "result", 36)
    assert runs.find(module, tuple(again), {}) == ("result", 36)
    asked = Counted() if change == "module" else module
    assert runs.find(asked, tuple(other), {}) is None
