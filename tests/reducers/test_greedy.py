"""Greedy steps: one loop in what is exported, and the same numbers as in Python."""

from __future__ import annotations

import io

import onnxruntime as ort
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.fx.experimental.proxy_tensor import make_fx

from pumer_compile.reducers.greedy import cosines, pick, repeated, row_at

pytestmark = pytest.mark.fast


class Greedy(nn.Module):
    """Picks `times` numbers of a row, each time halving what stands beside the pick in a table."""

    def __init__(self, times: int) -> None:
        super().__init__()
        self.times = times

    def forward(self, scores: Tensor, table: Tensor) -> Tensor:
        picks = torch.zeros_like(scores)
        return repeated(self.step, self.times, [scores, picks], table)[1]

    @staticmethod
    def step(number: Tensor, scores: Tensor, picks: Tensor, table: Tensor) -> tuple[Tensor, Tensor]:
        _, place, picked = pick(scores)
        return torch.where(picked, -9.0, scores * row_at(table, place)), torch.where(picked, number + 1.0, picks)


def by_hand(scores: Tensor, table: Tensor, times: int) -> list[list[float]]:
    found = []
    for row, rows in zip(scores.tolist(), table.tolist(), strict=True):
        left, picks = list(row), [0.0] * len(row)
        for number in range(times):
            place = left.index(max(left))
            picks[place] = number + 1.0
            left = [-9.0 if i == place else value * rows[place][i] for i, value in enumerate(left)]
        found.append(picks)
    return found


def sample(batch: int = 2, tokens: int = 7, seed: int = 0) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(batch, tokens, generator=generator), torch.rand(batch, tokens, tokens, generator=generator)


@given(batch=st.integers(1, 3), tokens=st.integers(1, 6), times=st.integers(0, 6), seed=st.integers(0, 99))
def test_against_lists(batch: int, tokens: int, times: int, seed: int) -> None:
    """Batch and tokens collide too."""
    scores, table = sample(batch, tokens, seed)
    times = min(times, tokens)
    assert Greedy(times)(scores, table).tolist() == by_hand(scores, table, times)


def test_an_exported_graph_has_one_loop_and_the_same_numbers() -> None:
    programs = [torch.export.export(Greedy(times), sample(), strict=False) for times in (2, 5)]
    for times, program in zip((2, 5), programs, strict=True):
        other = sample(seed=1)
        assert torch.equal(program.module()(*other), Greedy(times)(*other))
    few, many = (len(program.graph.nodes) for program in programs)
    assert few == many


def test_what_torch_compile_traces_has_none() -> None:
    """Inductor fails on a loop with open sizes."""
    graph = make_fx(Greedy(3), pre_dispatch=True)(*sample())
    assert not [node for node in graph.graph.nodes if node.target is torch.ops.higher_order.while_loop]
    other = sample(seed=1)
    assert torch.equal(graph(*other), Greedy(3)(*other))


def test_onnx_with_an_open_batch() -> None:
    batch = torch.export.Dim("batch")
    program = torch.export.export(Greedy(4).eval(), sample(3), dynamic_shapes=({0: batch}, {0: batch}), strict=False)
    converted = torch.onnx.export(program, dynamo=True, opset_version=20, verbose=False)
    assert converted is not None
    assert [node.op_type for node in converted.model.graph].count("Loop") == 1
    buffer = io.BytesIO(converted.model_proto.SerializeToString())
    session = ort.InferenceSession(buffer.getvalue(), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_inputs()]
    for size in (1, 2, 5):
        given_ = sample(size, seed=size)
        (found,) = session.run(None, dict(zip(names, (t.numpy() for t in given_), strict=True)))
        assert found.tolist() == by_hand(*given_, 4)


def test_ties_go_to_the_lowest_index() -> None:
    best, place, picked = pick(torch.tensor([[1.0, 3.0, 3.0], [2.0, 2.0, 2.0]]))
    assert best.tolist() == [[3.0], [2.0]] and place.tolist() == [1, 0]
    assert picked.tolist() == [[False, True, False], [True, False, False]]


@pytest.mark.parametrize("tokens", [1023, 1024, 2305])
def test_many_tokens(tokens: int) -> None:
    """Taken apart or not: the same cosines, the same on both sides of the diagonal."""
    features = torch.randn(2, tokens, 3, generator=torch.Generator().manual_seed(0))
    unit = torch.nn.functional.normalize(features, dim=-1)
    found = cosines(features)
    torch.testing.assert_close(found, unit @ unit.transpose(1, 2), atol=1e-6, rtol=0.0)
    assert tokens < 1024 or torch.equal(
        found[:, : tokens // 2, tokens // 2 :].transpose(1, 2), found[:, tokens // 2 :, : tokens // 2]
    )


def test_a_token_of_zeros_is_like_nothing() -> None:
    found = cosines(torch.tensor([[[0.0, 0.0], [3.0, 4.0], [4.0, 3.0]]]))
    torch.testing.assert_close(found[0], torch.tensor([[0.0, 0.0, 0.0], [0.0, 1.0, 0.96], [0.0, 0.96, 1.0]]))
