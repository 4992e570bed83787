"""How nodes are called in messages."""

from __future__ import annotations

import operator

import torch
from torch import fx

from pumer_compile.analysis.marks import visual_tokens
from pumer_compile.analysis.nodes import describe, operator_name


def test_functions_are_called_by_their_names() -> None:
    """And never by their address in memory."""
    graph = fx.Graph()
    x = graph.placeholder("x")
    made = [graph.call_function(f, (x, 1)) for f in (visual_tokens, operator.getitem, torch.ops.aten.select.int)]
    assert [operator_name(node) for node in [x, *made]] == ["x", "visual_tokens", "getitem", "aten.select.int"]
    assert describe(made[0]) == "visual_tokens (node visual_tokens)"
