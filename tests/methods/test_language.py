"""Methods inside a language model compute no more attention than they read, and leave the others fused."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from torch import fx

import pumer_compile as pumer
from pumer_compile import Schedule
from pumer_compile.analysis.nodes import values
from pumer_compile.errors import SiteError
from tests.support import llava

aten = torch.ops.aten
PROMPT, LEFT = 158, 44  # 14 words, and 144 or 30 tokens
METHODS: dict[str, dict[str, Any]] = {
    "fastv": {"layer": 1, "budget": 30},
    "pyramiddrop": {"stages": {1: 30.5 / 144}},
    "dart": {"layer": 1, "budget": 30},
    "sparsevlm": {"stages": {1: 30}},
}
# Queries whose rows of attention are computed beside the fused one: the last word, or the words behind the image.
ROWS = {"fastv": 1, "pyramiddrop": 1, "sparsevlm": 9}


def reduced(method: str) -> fx.GraphModule:
    return pumer.reduce(llava.program(), Schedule(method=method, **METHODS[method])).module


def shapes(module: fx.GraphModule, target: Any) -> Counter[tuple[int, ...]]:
    """Of what the calls of an operator give."""
    found = module.graph.find_nodes(op="call_function", target=target)
    return Counter(tuple(int(size) for size in values(node)[0].shape) for node in found)


@pytest.mark.parametrize("method", METHODS)
def test_fused_attention_stays_fused(method: str) -> None:
    """One for each layer of the tower that is read and of the language model; no softmax but of what is read."""
    module = reduced(method)
    fused = shapes(module, aten.scaled_dot_product_attention.default)
    assert fused == {(2, 4, 145, 8): 3, (2, 4, PROMPT, 12): 1, (2, 4, LEFT, 12): 2}
    assert not shapes(module, aten.softmax.int) and not shapes(module, aten._softmax.default)
    rows = [node for node in module.graph.nodes if ".attention" in str(node.target) and node.op == "call_module"]
    assert [tuple(values(node)[0].shape) for node in rows] == [(2, 4, n, PROMPT) for n in [ROWS.get(method, 0)] if n]


@pytest.mark.parametrize("method", METHODS)
def test_a_row_of_attention_needs_one_query(method: str) -> None:
    """Projections of queries: of all tokens in the first layer, of what is left later, and of the last token alone."""
    queries: Counter[int] = Counter()
    for node in reduced(method).graph.find_nodes(op="call_function", target=aten.linear.default):
        if "language_model" in str(node.args[1]) and "q_proj" in str(node.args[1]):
            queries[int(values(node)[0].shape[1])] += 1
    assert queries == {PROMPT: 1, LEFT: 2, **({1: 1} if method == "pyramiddrop" else {})}


def test_what_changes_in_place_on_the_way_is_refused() -> None:
    """It would be computed twice."""
    program = llava.program()
    graph = program.module.graph
    norm = next(n for n in graph.nodes if "layers_1_input_layernorm" in str(n.args))
    before = norm.target
    norm.target = aten.mul_.Tensor
    try:
        with pytest.raises(SiteError, match="changes its input in place, and would be computed twice"):
            pumer.reduce(program, Schedule(method="pyramiddrop", stages={1: 0.5}))
    finally:
        norm.target = before
