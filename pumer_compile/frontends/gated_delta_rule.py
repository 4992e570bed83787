"""Linear attention by the gated delta rule (Qwen3.5, Qwen3-Next), as one operator of the graph.

A state is carried from token to token. transformers computes it in chunks of 64 tokens, whose padding, triangles and
loops are right for one number of tokens alone. As one operator it follows any number of tokens that stay in their
order: each sees those before it. What traces the graph again traces the chunks of the tokens that are left.

Within a chunk a triangular system is solved. transformers substitutes its rows one after the other where it is traced,
63 for each layer, which takes an exporter minutes; `in_chunks` inverts by doubling blocks, in 6 steps.
"""

from __future__ import annotations

import math
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
CHUNK = 64


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
    if torch.compiler.is_exporting():
        return in_chunks(query, key, value, decay, rate, normalises)
    compute = getattr(vars(sys.modules[module])[FUNCTION], "original", None) or vars(sys.modules[module])[FUNCTION]
    read, state = compute(
        query, key, value, g=decay, beta=rate, output_final_state=True, use_qk_l2norm_in_kernel=normalises
    )
    return read, state


def in_chunks(
    query: Tensor, key: Tensor, value: Tensor, decay: Tensor, rate: Tensor, normalises: bool
) -> tuple[Tensor, Tensor]:
    """The same as `gated_delta_rule`, in few operators (Yang et al., "Gated Delta Networks", section 3.3).

    The tokens are cut into chunks of one length, at most `CHUNK`. With `A_ij = rate_i (k_i . k_j) decay_ij` for j < i
    in a chunk, what a chunk writes is `(I + A)^-1 (rate v - rate k decay S)`, where S is the state before it.
    """
    dtype, tokens, times = query.dtype, key.shape[1], value.shape[2] // key.shape[2]
    count = math.ceil(tokens / CHUNK)
    size = math.ceil(tokens / count)

    def chunks(given: Tensor) -> Tensor:
        """`[batch, tokens, heads, width]` to `[batch, heads, chunks, size, width]`, float32."""
        padded: Tensor = torch.nn.functional.pad(given.float(), (0, 0, 0, 0, 0, count * size - tokens))
        apart: Tensor = padded.unflatten(1, (count, size))
        return apart.permute(0, 3, 1, 2, 4)

    query, key = (x.repeat_interleave(times, 2) if times > 1 else x for x in (query, key))
    queries, keys, written = chunks(query), chunks(key), chunks(value)
    decays, rates = chunks(decay[..., None]), chunks(rate[..., None])
    if normalises:
        queries, keys = (x * torch.rsqrt((x * x).sum(-1, keepdim=True) + 1e-6) for x in (queries, keys))
    queries = queries * query.shape[3] ** -0.5

    # The logarithm of what is left at a token of the state before its chunk; it is at most 0 and falls.
    left = decays.cumsum(3)
    later = torch.ones(size, size, dtype=torch.bool, device=query.device).triu(1)
    between = (left - left.transpose(-1, -2)).masked_fill(later, -torch.inf).exp()
    solved = unit_lower_inverse((rates * keys) @ keys.transpose(-1, -2) * between)
    fresh, stale = solved @ (rates * written), solved @ (rates * keys * left.exp())
    seen = queries @ keys.transpose(-1, -2) * between
    queries, ends = queries * left.exp(), left[..., -1:, :]
    keys = (keys * (ends - left).exp()).transpose(-1, -2)

    read, state = [], None
    for chunk in range(count):
        new = fresh[:, :, chunk] if state is None else fresh[:, :, chunk] - stale[:, :, chunk] @ state
        of_own, added = seen[:, :, chunk] @ new, keys[:, :, chunk] @ new
        read.append(of_own if state is None else of_own + queries[:, :, chunk] @ state)
        state = added if state is None else state * ends[:, :, chunk].exp() + added
    assert state is not None
    return torch.cat(read, 2)[:, :, :tokens].transpose(1, 2).to(dtype).contiguous(), state


def unit_lower_inverse(matrix: Tensor) -> Tensor:
    """The inverse of a lower triangular matrix, `[..., n, n]`, whose diagonal counts as 1; what is not below it is not
    read.

    Blocks on the diagonal are inverted, twice as large in every step: of `[[P, 0], [Q, R]]` the inverse has
    `-R^-1 Q P^-1` in its corner. The product of `I + (-A)^(2^k)` would do with as few operators, but the powers grow
    where tokens are alike (to 1e18 in a chunk of 64 equal keys, whose inverse holds nothing above 1).
    """
    size = matrix.shape[-1]
    number = torch.arange(size, device=matrix.device)
    found, block = torch.eye(size, dtype=matrix.dtype, device=matrix.device), 1
    while block < size:
        row, column = number[:, None] // block, number[None] // block
        corners = matrix * ((row % 2 == 1) & (column == row - 1)).to(matrix.dtype)
        found = found - (found @ corners @ found if block > 1 else corners)
        block *= 2
    return found


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
