"""Writes into places that a mask chooses, in a form that every converter gets right.

A language model's prompt is often filled by such a write: `tokens.masked_scatter(ids == image, features)` or
`tokens[ids == image] = features`. torch.onnx makes a ScatterND over NonZero of it, or a Where, and neither counts the
features where the mask is narrower than the tokens. Counted are they here: the n-th place chosen takes row n of the
source. The places themselves stay open, as in the model; too few rows for them are an error of the runtime's Gather.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from ..analysis.nodes import describe
from ..errors import ExportError

aten = torch.ops.aten


def lower_masked_writes(module: fx.GraphModule) -> None:
    """Replace masked writes by what they count, in place; the module computes the same numbers.

    Raises:
        ExportError: a mask chooses the places together with other indices, or adds to what is there.
    """
    for node in list(module.graph.nodes):
        replacement = _REPLACEMENTS.get(node.target) if node.op == "call_function" else None
        if replacement is not None:
            node.args, node.kwargs = (describe(node), *node.args), dict(node.kwargs)
            node.target = replacement
    module.recompile()


def masked_scatter(described: str, x: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    """`x.masked_scatter(mask, source)`.

    Args:
        described: of the node, for errors.
        x, mask: of shapes that broadcast.
        source: with as many elements as `mask`, broadcast, has places, or more.
    """
    x, mask = torch.broadcast_tensors(x, mask)
    if x.dim() < 2 or mask.stride(-1) != 0 or source.dim() < 2 or source.shape[-1] != x.shape[-1]:
        return torch.where(mask, source.reshape(-1)[_numbers(mask)], x)
    # Rows are chosen whole.
    rows = source.reshape(-1, source.shape[-1])
    return torch.where(mask, rows[_numbers(mask[..., 0])], x)


def _masked_scatter_(described: str, x: Tensor, mask: Tensor, source: Tensor) -> Tensor:
    return x.copy_(masked_scatter(described, x, mask, source))


def index_put(
    described: str, x: Tensor, indices: Sequence[Tensor | None], values: Tensor, accumulate: bool = False
) -> Tensor:
    """`x[indices] = values`, out of place. Masks may be `uint8`, which a runtime would take for numbers of places."""
    indices = [_truth(index) for index in indices]
    if not any(index is not None and index.dtype == torch.bool for index in indices):
        put: Tensor = aten.index_put.default(x, indices, values, accumulate)
        return put
    if len(indices) > 1 or accumulate:
        raise ExportError(
            f"{described} writes where a mask is true, and "
            f"{'adds to what is there' if accumulate else 'where other indices say'}. A mask alone is supported: "
            "let the model write it with torch.where."
        )
    mask = indices[0]
    assert mask is not None
    rest = x.dim() - mask.dim()
    wide = mask.reshape(*mask.shape, *[1] * rest)
    each = values.dim() > rest and not _one(values.shape[0])
    if each:
        return torch.where(wide, values[_numbers(mask)], x)
    return torch.where(wide, values[0] if values.dim() > rest else values, x)


def _index_put_(described: str, x: Tensor, *arguments: Any, **options: Any) -> Tensor:
    return x.copy_(index_put(described, x, *arguments, **options))


def _truth(index: Tensor | None) -> Tensor | None:
    return index.to(torch.bool) if index is not None and index.dtype == torch.uint8 else index


def _one(size: Any) -> bool:
    return isinstance(size, int) and size == 1


def _numbers(mask: Tensor) -> Tensor:
    """How many places are chosen before each one, of the mask's shape; int64."""
    return (mask.reshape(-1).to(torch.int64).cumsum(0) - 1).clamp(min=0).reshape(mask.shape)


_REPLACEMENTS: dict[Any, Any] = {
    aten.masked_scatter.default: masked_scatter,
    aten.masked_scatter_.default: _masked_scatter_,
    aten.index_put.default: index_put,
    aten.index_put_.default: _index_put_,
}
