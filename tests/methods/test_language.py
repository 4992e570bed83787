"""Methods compute no more attention than they read, and leave the others fused."""

from __future__ import annotations

import functools
from collections import Counter
from typing import Any

import pytest
import torch
from torch import fx

import pumer_compile as pumer
from pumer_compile import Schedule
from pumer_compile.analysis.nodes import values
from pumer_compile.errors import SiteError
from pumer_compile.methods import METHODS as ALL
from tests.support import llava
from tests.support.models import Config, program
from tests.support.prompt_families import captured

aten = torch.ops.aten
SDPA = aten.scaled_dot_product_attention.default
PROMPT, LEFT = 158, 44  # 14 words, and 144 or 30 tokens
METHODS: dict[str, dict[str, Any]] = {
    "fastv": {"layer": 1, "budget": 30},
    "pyramiddrop": {"stages": {1: 30.5 / 144}},
    "dart": {"layer": 1, "budget": 30},
    "sparsevlm": {"stages": {1: 30}},
}
# Queries whose rows of attention are computed beside the fused one: the last word, or the words behind the image.
ROWS = {"fastv": 1, "pyramiddrop": 1, "sparsevlm": 9}
# Before the language model: `LEFT` is what all its layers see.
BEFORE: dict[str, dict[str, Any]] = {
    "vispruner": {"budget": 30},
    "visionzip": {"dominant": 25, "contextual": 5},
    "fastervlm": {"budget": 30},
    "holov": {"budget": 30, "crops": 4},
    "divprune": {"budget": 30},
    "cdpruner": {"budget": 30},
    "random": {"budget": 30},
    "uniform": {"budget": 30},
    "downsample": {"budget": 30},
}
# Of these one row of the tower's last attention is read, that of the class token.
VOTED = {"vispruner", "visionzip", "fastervlm", "holov"}
FILMS: dict[str, dict[str, Any]] = {"evs": {"keep": 12}, "vidcom2": {"keep": 6}}


@functools.cache
def reduced(method: str) -> fx.GraphModule:
    keys = METHODS.get(method) or BEFORE[method]
    return pumer.reduce(llava.program(), Schedule(method=method, **keys)).module


def shapes(module: fx.GraphModule, target: Any) -> Counter[tuple[int, ...]]:
    """Of what the calls of an operator give."""
    found = module.graph.find_nodes(op="call_function", target=target)
    return Counter(tuple(int(size) for size in values(node)[0].shape) for node in found)


@pytest.mark.parametrize("method", METHODS)
def test_fused_attention_stays_fused(method: str) -> None:
    """One for each layer of the tower that is read and of the language model; no softmax but of what is read."""
    module = reduced(method)
    assert shapes(module, SDPA) == {(2, 4, 145, 8): 3, (2, 4, PROMPT, 12): 1, (2, 4, LEFT, 12): 2}
    assert not shapes(module, aten.softmax.int) and not shapes(module, aten._softmax.default)
    assert rows_beside(module) == [(2, 4, n, PROMPT) for n in [ROWS.get(method, 0)] if n]


def rows_beside(module: fx.GraphModule) -> list[tuple[int, ...]]:
    """Shapes of the rows of attention that are computed beside fused ones, `[batch, heads, rows, keys]`."""
    rows = [node for node in module.graph.nodes if ".attention" in str(node.target) and node.op == "call_module"]
    return [tuple(values(node)[0].shape) for node in rows]


@pytest.mark.parametrize("method", BEFORE)
def test_before_the_language_model_at_most_the_row_of_the_class_token_is_read(method: str) -> None:
    module = reduced(method)
    assert shapes(module, SDPA) == {(2, 4, 145, 8): 3, (2, 4, LEFT, 12): 3}
    assert not shapes(module, aten.softmax.int) and not shapes(module, aten._softmax.default)
    assert rows_beside(module) == [(2, 4, 1, 145)] * (method in VOTED)


@pytest.mark.parametrize("method", FILMS)
def test_films_are_reduced_without_attention(method: str) -> None:
    *_, film = captured("llava_next_video")
    module = pumer.reduce(film, Schedule(method=method, positions="original", **FILMS[method])).module
    assert shapes(module, SDPA) == {(4, 4, 37, 8): 1, (2, 4, 7 + FILMS[method]["keep"], 8): 2}  # 7 words
    assert not shapes(module, aten.softmax.int) and rows_beside(module) == []


@pytest.mark.parametrize("method", ["pumer", "tome"])
def test_fusion_models_read_the_rows_of_the_text(method: str) -> None:
    """One site of three layers: 7 words and 25 image tokens. Merging alone reads keys."""
    fused = program(Config(form="sdpa"))
    keys = {"prune": 5, "semantics": "safe"} if method == "pumer" else {}
    module = pumer.reduce(fused, Schedule(method=method, layers=[1], merge={"image": 4}, **keys)).module
    assert shapes(module, SDPA).total() == shapes(fused.module, SDPA).total() == 3
    assert not shapes(module, aten.softmax.int)
    assert rows_beside(module) == [(2, 4, 7, 32)] * (method == "pumer")


def test_no_method_is_left_out() -> None:
    others = {"lossless", "stages", "pumer", "tome", "dynamicvit"}  # the last one reads no attention
    assert {*METHODS, *BEFORE, *FILMS} == {*ALL} - others


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
