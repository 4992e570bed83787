"""What a rewritten graph must not be: shapes that are not the plan's, operators that export to wrong values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, fx

from pumer_compile.errors import PumerError, VerifyError
from pumer_compile.passes.manager import State, run_passes
from pumer_compile.passes.pipeline import ANALYSE, REDUCE
from pumer_compile.passes.verify import FORBIDDEN, verify
from pumer_compile.reduce import reduce_graph
from tests.support.helpers import data_dependent
from tests.support.models import Config, inputs_for, program, schedule

aten = torch.ops.aten
CONFIG = Config(mask="none", layers=2)


def rewritten(config: Config = CONFIG) -> State:
    """Everything up to the pass under test."""
    captured = program(config)
    state = State(captured.module, schedule("paper", (0,)), dict(captured.inputs), {})
    run_passes(
        state,
        tuple(step for step in ANALYSE + REDUCE if step.name != "verify"),
    )
    return state


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "symbolic"])
def test_a_good_graph_passes_and_gets_its_new_values(dynamic: bool) -> None:
    state = rewritten(Config(mask="none", layers=2, dynamic=dynamic))
    assert verify(state.reduced, state.rewriter) > 10
    sizes = {
        n.meta["val"].shape[1] for n in state.reduced.graph.nodes if n.target is aten.linear.default and "val" in n.meta
    }
    assert {32, 19} <= sizes  # before and after
    output = next(n for n in state.reduced.graph.nodes if n.op == "output")
    (value,) = output.all_input_nodes
    assert tuple(value.meta["val"].shape)[1:] == (5,)


# --- shapes ---------------------------------------------------------------------------------------------------------


def change(state: State, target: Any, position: int, value: Any, which: int = -1) -> fx.Node:
    """Spoil an argument of a node of the rewritten graph."""
    node = [n for n in state.reduced.graph.nodes if n.target is target][which]
    arguments = list(node.args)
    arguments[position] = value
    node.args = tuple(arguments)
    state.reduced.recompile()
    return node


def test_a_slice_that_now_clamps_is_found() -> None:
    """Reading one token less than the plan says raises nothing in PyTorch."""

    def head(x: Tensor, text: int) -> Tensor:
        return x[:, text:].amax(1)

    state = rewritten(Config(mask="none", layers=2, head=head))
    verify(state.reduced, state.rewriter)
    change(state, aten.slice.Tensor, 3, 18)
    with pytest.raises(VerifyError) as caught:
        verify(state.reduced, state.rewriter)
    message = str(caught.value)
    assert "[2, 13, 32]" in message
    assert "[2, 14, 32]" in message
    assert "aten.slice.Tensor" in message


def test_a_literal_left_behind_is_an_error_in_words() -> None:
    """A `view` to the old size does not run; the error says which node and which plan."""
    state = rewritten()
    node = change(state, aten.view.default, 1, [2, 32, 4, 8])
    with pytest.raises(PumerError) as caught:
        verify(state.reduced, state.rewriter)
    assert node.name in str(caught.value) or "aten.view.default" in str(caught.value)


@pytest.mark.parametrize(
    "operator",
    [
        lambda x: aten.nonzero.default(x).sum(),
        lambda x: aten.masked_select.default(x, x > 0).sum(),
        lambda x: aten.scatter_reduce.two(x, 0, torch.zeros_like(x, dtype=torch.int64), x, "mean").sum(),
        lambda x: aten.scatter_add.default(x, 0, torch.zeros_like(x, dtype=torch.int64), x).sum(),
        lambda x: aten.unique_consecutive.default(x)[0].sum(),
    ],
    ids=["nonzero", "masked_select", "scatter_reduce", "scatter_add", "unique_consecutive"],
)
def test_forbidden_operators(operator: Callable[[Tensor], Tensor]) -> None:
    state = rewritten()
    output = next(n for n in state.reduced.graph.nodes if n.op == "output")
    (logits,) = output.all_input_nodes
    traced = fx.symbolic_trace(operator)
    with state.reduced.graph.inserting_before(output):
        result = state.reduced.graph.graph_copy(traced.graph, {next(iter(traced.graph.nodes)): logits})
        output.args = (state.reduced.graph.call_function(aten.add.Tensor, (logits, result)),)
    state.reduced.recompile()
    with pytest.raises(VerifyError, match="data-dependent shape or exports to wrong values"):
        verify(state.reduced, state.rewriter)


def test_forbidden_operators_are_packets() -> None:
    assert all(isinstance(packet, torch._ops.OpOverloadPacket) for packet in FORBIDDEN)


# --- after torch.export ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("semantics", "form", "dynamic"),
    [
        ("reference", "unfused", True),
        ("paper", "unfused", False),
        ("safe", "sdpa", False),
    ],
)
def test_nothing_data_dependent_after_export(semantics: str, form: str, dynamic: bool) -> None:
    """Reducers inline themselves; what they bring picks by comparing and multiplying alone."""
    config = Config(form=form, layers=2, dynamic=dynamic, mask="additive")
    module = reduce_graph(program(config), schedule(semantics, (0,)))
    inputs = inputs_for(config)
    shapes = {name: {0: torch.export.Dim("batch")} for name in inputs} if dynamic else None
    exported = torch.export.export(module, (), inputs, dynamic_shapes=shapes)
    assert not data_dependent(exported.graph_module)
    assert not any(n.op == "call_module" for n in exported.graph.nodes)
    with torch.no_grad():
        again = inputs_for(config, seed=9, batch=3 if dynamic else 2)
        torch.testing.assert_close(exported.module()(**again), module(**again), atol=1e-6, rtol=0)
