"""Linear attention by the gated delta rule (Qwen3.5, Qwen3-Next), as one operator of the graph.

A state is carried from token to token. transformers computes it in chunks of 64 tokens, whose padding, triangles and
loops are right for one number of tokens alone. As one operator it follows any number of tokens that stay in their
order: each sees those before it. What traces the graph again traces the chunks of the tokens that are left.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any
from unittest import mock

import torch
from torch import Tensor, fx

from ..analysis.axes import Causal, Constraint, Dim, Reduce, Same, same_size
from ..analysis.rules import node_arg, rule, shape

FUNCTION = "torch_chunk_gated_delta_rule"


def gated_delta_rule(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, rate: Tensor, normalises: bool, module: str
) -> tuple[Tensor, Tensor]:
    """What every token reads of the state of the tokens before it, and the state behind the last one.

    Args:
        query, key: `[batch, tokens, key heads, key width]`.
        value: `[batch, tokens, value heads, value width]`.
        decay, rate: `[batch, tokens, value heads]`: of the state (its logarithm), and how much of it is written anew.
        normalises: queries and keys to a length of 1.
        module: of transformers, whose function this is.

    Returns:
        `[batch, tokens, value heads, value width]` and `[batch, value heads, key width, value width]`.
    """
    compute = getattr(vars(sys.modules[module])[FUNCTION], "original", None) or vars(sys.modules[module])[FUNCTION]
    read, state = compute(
        query, key, value, g=decay, beta=rate, output_final_state=True, use_qk_l2norm_in_kernel=normalises
    )
    return read, state


_traced = torch.library.custom_op("pumer_compile::gated_delta_rule", gated_delta_rule, mutates_args=())


@_traced.register_fake
def _shapes(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, rate: Tensor, normalises: bool, module: str
) -> tuple[Tensor, Tensor]:
    batch, _, heads, width = value.shape
    return torch.empty_like(value), value.new_empty(batch, heads, key.shape[3], width, dtype=torch.float32)


@contextmanager
def kept_whole() -> Iterator[None]:
    """Within the block models are traced with one operator in place of the chunks. `plainly` is for the graph then."""
    with ExitStack() as stack:
        for name, module in list(sys.modules.items()):
            if name.startswith("transformers.models.") and FUNCTION in vars(module):
                function = _keeping_whole(vars(module)[FUNCTION], name)
                stack.enter_context(mock.patch.object(module, FUNCTION, function))
        yield


def _keeping_whole(original: Callable[..., Any], module: str) -> Callable[..., Any]:
    def rewritten(
        query: Tensor, key: Tensor, value: Tensor, g: Tensor, beta: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor | None]:
        # A state to begin with is of a decoding step, which has one token.
        if args or kwargs.get("initial_state") is not None or kwargs.get("cu_seqlens") is not None:
            return original(query, key, value, g, beta, *args, **kwargs)  # type: ignore[no-any-return]
        read, state = _traced(query, key, value, g, beta, bool(kwargs.get("use_qk_l2norm_in_kernel")), module)
        return read, state if kwargs.get("output_final_state") else None

    rewritten.original = original  # type: ignore[attr-defined]
    return rewritten


def plainly(module: fx.GraphModule) -> None:
    """The traced operator as the function that it is: what traces the graph again sees what that computes."""
    for node in module.graph.nodes:
        if node.target is torch.ops.pumer_compile.gated_delta_rule.default:
            node.target = gated_delta_rule


@rule(gated_delta_rule)
def _delta_rule(node: fx.Node) -> Iterator[Constraint]:
    tokens = 1
    for position in range(5):
        given = node_arg(node, position)
        yield Causal(Dim(given, tokens), Dim(node, tokens), 0)
        yield Same(Dim(given, 0), Dim(node, 0))
        yield Same(Dim(given, 0), Dim(node, 0, 1))
        heads = same_size(shape(given)[2], shape(node)[2])
        yield Same(Dim(given, 2), Dim(node, 2)) if heads else Reduce(Dim(given, 2))
        if position < 3:
            yield Reduce(Dim(given, 3))
