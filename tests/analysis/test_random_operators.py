"""Graphs of random operators, some of whose sizes depend on data: what the passes cannot follow is an error of ours."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from operator import getitem
from typing import Any

import pytest
import torch
from torch import Tensor, fx
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv

from pumer_compile import Schedule
from pumer_compile.analysis.annotate import annotate
from pumer_compile.analysis.attention import locate
from pumer_compile.errors import AxisError, LocateError, PumerError
from pumer_compile.passes.pipeline import Pass, State, run_passes

aten = torch.ops.aten
NO_SHAPE = (AssertionError, IndexError, RuntimeError, TypeError, ValueError)


class Random:
    """A graph that grows by operators on values it has; those that do not fit are left out."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.mode = FakeTensorMode(shape_env=ShapeEnv(allow_dynamic_output_shape_ops=True))
        self.graph = fx.Graph()
        self.values: list[fx.Node] = []
        for name, value in {
            "input_ids": torch.zeros(2, 5, dtype=torch.int64),
            "pixel_values": torch.zeros(2, 3, 8, 8),
            "words": torch.zeros(20, 4),
            "kernel": torch.zeros(4, 3, 2, 2),
            "table": torch.zeros(5, 4),
        }.items():
            node = self.graph.placeholder(name)
            node.meta["val"] = self.mode.from_tensor(value, static_shapes=True)
            self.values.append(node)
        ids, pixels, words, kernel, _ = self.values
        self.call(aten.embedding.default, words, ids)
        grid = self.call(aten.conv2d.default, pixels, kernel, None, [2, 2])
        self.call(aten.transpose.int, self.call(aten.flatten.using_ints, grid, 2), 1, 2)

    def call(self, target: Any, *args: Any) -> fx.Node | None:
        try:
            with self.mode, torch.no_grad():
                value = target(*fx.map_arg(args, lambda n: n.meta["val"]))
        except NO_SHAPE:
            return None
        node = self.graph.call_function(target, args)
        node.meta["val"] = value
        if isinstance(value, list | tuple):
            for index in range(len(value)):
                part = self.graph.call_function(getitem, (node, index))
                part.meta["val"] = value[index]
                self.values.append(part)
        elif isinstance(value, Tensor):
            self.values.append(node)
        return node

    def some(self) -> fx.Node:
        return self.random.choice(self.values[5:] if self.random.random() < 0.9 else self.values)

    def mask(self) -> fx.Node:
        """A comparison."""
        return self.call(aten.gt.Scalar, self.some(), 0) or self.some()

    def number(self) -> int:
        return self.random.choice((-2, -1, 0, 1, 2, 3, 5))

    def grow(self) -> None:
        target, arguments = self.random.choice(OPERATORS)
        self.call(target, *arguments(self))

    def module(self) -> fx.GraphModule:
        self.graph.output(tuple(self.values[-3:]))
        return fx.GraphModule(torch.nn.Module(), self.graph)


def _reshaped(r: Random) -> tuple[Any, ...]:
    x = r.some()
    sizes = list(x.meta["val"].shape)
    r.random.shuffle(sizes)
    return x, [*sizes[: r.random.randint(0, len(sizes))], -1]


OPERATORS: list[tuple[Any, Callable[[Random], tuple[Any, ...]]]] = [
    (aten.add.Tensor, lambda r: (r.some(), r.some())),
    (aten.mul.Tensor, lambda r: (r.some(), r.some())),
    (aten.matmul.default, lambda r: (r.some(), r.some())),
    (aten.softmax.int, lambda r: (r.some(), r.number())),
    (aten.transpose.int, lambda r: (r.some(), r.number(), r.number())),
    (aten.permute.default, lambda r: (r.some(), r.random.sample(range(3), 3))),
    (aten.reshape.default, _reshaped),
    (aten.reshape_as.default, lambda r: (r.some(), r.some())),
    (aten.cat.default, lambda r: ([r.some(), r.some()], r.number())),
    (aten.stack.default, lambda r: ([r.some(), r.some()], r.number())),
    (aten.slice.Tensor, lambda r: (r.some(), r.number(), r.number(), r.number())),
    (aten.select.int, lambda r: (r.some(), r.number(), r.number())),
    (aten.unsqueeze.default, lambda r: (r.some(), r.number())),
    (aten.squeeze.default, lambda r: (r.some(),)),
    (aten.expand.default, lambda r: (r.some(), [-1, r.number(), -1])),
    (aten.mean.dim, lambda r: (r.some(), [r.number()])),
    (aten.sum.default, lambda r: (r.some(),)),
    (aten.max.dim, lambda r: (r.some(), r.number())),
    (aten.chunk.default, lambda r: (r.some(), 2, r.number())),
    (aten.where.self, lambda r: (r.mask(), r.some(), r.some())),
    (aten.masked_fill.Scalar, lambda r: (r.some(), r.mask(), 1.0)),
    (aten.masked_scatter.default, lambda r: (r.some(), r.mask(), r.some())),
    (aten.masked_select.default, lambda r: (r.some(), r.mask())),
    (aten.nonzero.default, lambda r: (r.some(),)),
    (aten.index.Tensor, lambda r: (r.some(), [r.mask()])),
    (aten.index.Tensor, lambda r: (r.some(), [None, r.mask()])),
    (aten.index.Tensor, lambda r: (r.some(), [r.values[0], r.mask()])),
    (aten.index.Tensor, lambda r: (r.some(), [r.some()])),
    (aten.index_select.default, lambda r: (r.some(), r.number(), r.some())),
    (aten.index_put.default, lambda r: (r.some(), [r.mask()], r.some())),
    (aten.gather.default, lambda r: (r.some(), r.number(), r.some())),
    (aten.embedding.default, lambda r: (r.some(), r.some())),
    (aten.cumsum.default, lambda r: (r.some(), r.number())),
    (aten.repeat.default, lambda r: (r.some(), [r.number(), 1, 2])),
    (aten.repeat_interleave.Tensor, lambda r: (r.some(),)),
    (aten.linear.default, lambda r: (r.some(), r.some())),
    (aten.layer_norm.default, lambda r: (r.some(), [4])),
    (aten.scaled_dot_product_attention.default, lambda r: (r.some(), r.some(), r.some())),
    (aten.split_with_sizes.default, lambda r: (r.some(), [2, 3], r.number())),
    (aten.flip.default, lambda r: (r.some(), [r.number()])),
    (aten.linalg_vector_norm.default, lambda r: (r.some(),)),
    (aten.einsum.default, lambda r: ("bij,bkj->bik", [r.some(), r.some()])),
]


def grown(seed: int) -> fx.GraphModule:
    log = logging.getLogger("torch._subclasses.fake_tensor")
    level, made = log.level, Random(seed)
    log.setLevel(logging.CRITICAL)  # it prints every operator that does not fit
    try:
        for _ in range(40):
            made.grow()
    finally:
        log.setLevel(level)
    return made.module()


def test_what_is_not_followed_is_an_error_of_ours() -> None:
    errors = []
    for seed in range(40):
        module = grown(seed)
        try:
            locate(module, annotate(module))
        except AxisError as error:
            assert "(node " in str(error)
            errors.append(error)
        except LocateError as error:
            assert "No attention" in str(error)
    assert len(errors) > 4


def test_what_a_pass_does_not_foresee_names_its_node() -> None:
    module = grown(0)
    wanted = next(n for n in module.graph.nodes if n.target is aten.embedding.default)

    def broken(state: State) -> int:
        for node in state.captured.graph.nodes:
            if node is wanted:
                raise RuntimeError("nobody knows\nlines of a graph")
        return 1

    step = Pass("broken", ("captured",), (), broken)
    state = State(module, Schedule(method="lossless"), {}, {})
    words = rf"^Pass broken met something it does not know at aten.embedding.default \(node {wanted.name}\): "
    with pytest.raises(PumerError, match=words + "RuntimeError: nobody knows. Compile") as error:
        run_passes(state, (step,))
    assert isinstance(error.value.__cause__, RuntimeError) and "lines of a graph" not in str(error.value)
