"""Writes into slices (`x[..., 1:60:3] = y`: rotary angles of three axes, interleaved; `x[-3:] = 0`) and single places
(`x[:, 0] = False`), as joins.

torch.onnx makes a scatter of such a write. Its places are constants, so the result is what was there and what is
written, side by side, in a constant order.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ..analysis.nodes import values
from ..analysis.operators import aten
from ..analysis.rules import argument, wrap


def lower_slice_writes(module: fx.GraphModule) -> None:
    """Replace writes into slices, in place; the module computes the same numbers. A write whose target others may see
    under another name stays as it is."""
    for node in list(module.graph.nodes):
        if node.target in _WRITES and not node.users:
            cut = node.args[0]
            if isinstance(cut, fx.Node) and cut.target in _CUTS and list(cut.users) == [node]:
                _lower(node, cut)
    module.graph.lint()
    module.recompile()


_CUTS = frozenset({aten.slice.Tensor, aten.select.int})
_WRITES = frozenset({aten.copy_.default, aten.fill_.Tensor, aten.fill_.Scalar})


def _lower(node: fx.Node, cut: fx.Node) -> None:
    whole, written = cut.args[0], node.args[1]
    if not isinstance(whole, fx.Node):
        return
    order = {other: number for number, other in enumerate(node.graph.nodes)}
    if not _seen_by_itself(whole, node, order):
        return
    shape, part = values(whole)[0].shape, values(cut)[0].shape
    dim = wrap(argument(cut, 1, "dim", 0), len(shape))
    if not all(isinstance(size, int) for size in (*shape, *part)):
        return
    single = cut.target is aten.select.int
    if single:
        places = [range(shape[dim])[argument(cut, 2, "index")]]
    else:
        start, stop, step = argument(cut, 2, "start"), argument(cut, 3, "end"), argument(cut, 4, "step", 1)
        places = [*range(shape[dim])[start:stop:step]]
    index = list(range(shape[dim]))
    for number, place in enumerate(places):
        index[place] = shape[dim] + number
    with node.graph.inserting_before(node):
        new = node.graph.call_function(_joined, (whole, written, dim, index, list(part), single))
        new.meta = {**node.meta, "val": values(whole)[0]}
    for user in [user for user in whole.users if order.get(user, 0) > order[node] and user is not new]:
        user.replace_input_with(whole, new)
    node.graph.erase_node(node)
    node.graph.erase_node(cut)


def _joined(
    whole: Tensor, written: Tensor | float, dim: int, index: list[int], part: list[int], single: bool
) -> Tensor:
    """`whole` with `written` (broadcast to the shape `part`, which for a `single` place lacks the dimension) where
    `index` says so."""
    order = torch.tensor(index).to(whole.device)
    values = written if isinstance(written, Tensor) else torch.full([1], written, device=whole.device)
    values = values.to(whole.dtype).expand(part)
    return torch.cat([whole, values.unsqueeze(dim) if single else values], dim).index_select(dim, order)


def _seen_by_itself(whole: fx.Node, node: fx.Node, order: dict[fx.Node, int]) -> bool:
    """Whether nothing after a write reads what is written under another name: of what `whole` is a view of, only other
    rows are read."""
    if whole.target is aten.select.int:
        base, dim, row = whole.args
        assert isinstance(base, fx.Node)
        others = [user for user in base.users if user is not whole and order[user] > order[whole]]
        return all(user.target is aten.select.int and user.args[1] == dim and user.args[2] != row for user in others)
    views = isinstance(whole.target, torch._ops.OpOverload) and any(a.alias_info for a in whole.target._schema.returns)
    return whole.op == "call_function" and not views
