"""The routers of mixtures of experts, without TopK and scatters, which differ between runtimes.

A router takes the few largest scores of each token, and writes something to their places. The largest are found one
after the other here: the largest, the largest of the others, and so on. What is written to a few places is compared
with the numbers of all places. Both have the numbers of the model; of equal scores the first comes first.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ..analysis.nodes import ancestors, values
from ..analysis.operators import aten
from ..analysis.rules import argument, wrap

FEW = 16
"""So many are found one after the other; of more, the model's own TopK stays."""
_TOPK = aten.topk.default
_WRITES = {aten.scatter.src, aten.scatter_.src, aten.scatter.value, aten.scatter_.value}


def lower_routers(module: fx.GraphModule) -> None:
    """Replace the choice of a few largest numbers, and what is written to their places, in place; the module computes
    the same numbers."""
    chosen = set(module.graph.find_nodes(op="call_function", target=_TOPK))
    for node in list(module.graph.nodes):
        if node.target in _WRITES and isinstance(node.args[2], fx.Node) and ancestors(node.args[2]) & chosen:
            _lower_write(node)
    for node in chosen:
        few = argument(node, 1, "k")
        if isinstance(few, int) and few <= FEW and argument(node, 3, "largest", True):
            dim = argument(node, 2, "dim", -1)
            node.args, node.kwargs, node.target = (node.args[0], few, dim), {}, largest
    module.graph.lint()
    module.recompile()


def _lower_write(node: fx.Node) -> None:
    whole, dim, places, written = node.args[:4]
    assert isinstance(whole, fx.Node) and isinstance(places, fx.Node) and isinstance(dim, int)
    shape, given = values(whole)[0].shape, values(places)[0].shape
    dim = wrap(dim, len(shape))
    ranks = [d for d in range(len(shape)) if d != dim]
    others_fit = len(given) == len(shape) and all(given[d] == shape[d] for d in ranks)
    fits = others_fit and isinstance(shape[dim], int) and isinstance(given[dim], int) and given[dim] <= FEW
    if not fits or (isinstance(written, fx.Node) and values(written)[0].shape != given):
        return
    order = {other: number for number, other in enumerate(node.graph.nodes)}
    in_place = node.target in (aten.scatter_.src, aten.scatter_.value)
    if in_place and (whole.op != "call_function" or _views(whole) or any(map(_views, whole.users))):
        return  # others may see it under another name
    with node.graph.inserting_before(node):
        new = node.graph.call_function(written_to, (whole, dim, places, written))
        new.meta = dict(node.meta)
    if in_place:
        for user in [user for user in whole.users if order.get(user, 0) > order[node]]:
            user.replace_input_with(whole, new)
    node.replace_all_uses_with(new)
    node.graph.erase_node(node)


def _views(node: fx.Node) -> bool:
    """Whether a value is another one under a second name."""
    schema = node.target._schema if isinstance(node.target, torch._ops.OpOverload) else None
    return schema is not None and not schema.is_mutable and any(value.alias_info for value in schema.returns)


def largest(scores: Tensor, count: int, dim: int = -1) -> tuple[Tensor, Tensor]:
    """`scores.topk(count, dim)`: the largest numbers in order, and their places.

    Args:
        scores: floating-point, any shape; where fewer than `count` are above minus infinity, the places of the others
            are not said.
        count: how many.
        dim: along which.
    """
    dim = dim % scores.dim()
    size = [-1 if d == dim else 1 for d in range(scores.dim())]
    number = torch.arange(scores.shape[dim], device=scores.device).view(size)
    found, places = [], []
    for _ in range(count):
        place = scores.argmax(dim, keepdim=True)
        found.append(scores.amax(dim, keepdim=True))
        places.append(place)
        scores = torch.where(number == place, -torch.inf, scores)
    return torch.cat(found, dim), torch.cat(places, dim)


def written_to(whole: Tensor, dim: int, places: Tensor, written: Tensor | float) -> Tensor:
    """`whole.scatter(dim, places, written)`, of places along a dimension that are all different.

    Args:
        whole: any shape.
        dim: not negative.
        places: of the same shape, but for fewer along `dim`.
        written: as `places`, or one number.
    """
    for place in range(places.shape[dim]):
        number = torch.arange(whole.shape[dim], device=whole.device)
        there = number.view([-1 if d == dim else 1 for d in range(whole.dim())]) == places.narrow(dim, place, 1)
        new = written.narrow(dim, place, 1) if isinstance(written, Tensor) else written
        whole = torch.where(there, new, whole).to(whole.dtype)
    return whole
