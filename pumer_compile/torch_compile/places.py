"""Where the padding of texts stands along a dimension, and what it holds; used by `follow_padding.py`."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..analysis.axes import Concat, Constraint, Dim, Reshape, Same, Size
from ..analysis.masks import HIDES
from ..analysis.nodes import values
from ..analysis.operators import aten, overloads

CONVERSIONS = {*overloads("to _to_copy clone contiguous")}


@dataclass(frozen=True)
class Content:
    """What every entry of padding holds: `value`, or (not `exact`) that or less."""

    value: float
    exact: bool = True

    @property
    def hides(self) -> bool:
        """Whether a softmax gives it no weight."""
        return self.value <= HIDES


@dataclass(frozen=True)
class Places:
    """A dimension that follows the text's length.

    Attributes:
        numbers: of each entry, its number in the dimension of the unpadded text; -1 of padding.
        content: what padding holds, where that is known.
        alike: whether all entries along the dimension are the same, so that any may count as padding.
    """

    numbers: tuple[int, ...]
    content: Content | None = None
    alike: bool = False

    @property
    def at_end(self) -> bool:
        """Whether padding follows behind everything else."""
        kept = self.kept
        return self.numbers[:kept] == tuple(range(kept))

    @property
    def kept(self) -> int:
        return sum(n >= 0 for n in self.numbers)


def dims_of(node: fx.Node) -> list[Dim]:
    """Every dimension of a node's values."""
    return [Dim(node, i, o) for o, v in enumerate(values(node)) for i in range(v.dim())]


def in_graph(dim: Dim, node: fx.Node) -> Dim:
    """The same dimension of the node's counterpart in another graph."""
    return Dim(node, dim.index, dim.output)


def entries(dim: Dim) -> int:
    """Entries of a dimension; of an open batch, as if it were 3."""
    return _number(values(dim.node)[dim.output].shape[dim.index])


def _number(size: Size) -> int:
    if isinstance(size, int):
        return size
    expression = size.node.expr
    return int(expression.subs({s: 3 for s in expression.free_symbols}))


def first_ones(kept: int, size: int) -> tuple[int, ...]:
    """Numbers of a dimension whose first `kept` entries are no padding."""
    return (*range(kept), *[-1] * (size - kept))


def codes(numbers: Sequence[Sequence[int]], sizes: Sequence[int]) -> Tensor:
    """Row-major numbers of the entries of several dimensions; -1 where one is padding."""
    found = torch.zeros(1, dtype=torch.int64)
    for own, size in zip(numbers, sizes, strict=True):
        inner = torch.tensor(own, dtype=torch.int64)
        both = (found[:, None] < 0) | (inner[None] < 0)
        found = torch.where(both, -1, found[:, None] * size + inner[None]).reshape(-1)
    return found


def pieces_of(node: fx.Node, dim: int, late: bool, numbers: Iterable[int]) -> list[list[int]]:
    """The numbers that an operator takes of a dimension, for each of its outputs."""
    taken = torch.tensor(list(numbers), dtype=torch.int64)
    if node.target is aten.alias.default:
        return [taken.tolist()]
    arguments = list(node.args[1:])
    options = dict(node.kwargs)
    place = 1 if late else 0
    if len(arguments) > place:
        arguments[place] = 0
    elif "dim" in options:
        options["dim"] = 0
    found = node.target(taken, *arguments, **options)  # type: ignore[operator]  # an operator
    pieces = found if isinstance(found, list | tuple) else [found]
    return [piece.reshape(-1).tolist() for piece in pieces]


def cuts_nothing(long: fx.Node, short: fx.Node) -> bool:
    """Whether a slice takes everything in the longer graph, where it becomes an alias."""
    return long.target is aten.alias.default and short.target is aten.slice.Tensor


def was_one(node: fx.Node, dim: Dim) -> bool:
    """Whether a stretched dimension repeats one entry."""
    (x,) = (x for x in node.all_input_nodes[:1])
    index = dim.index - (values(node)[0].dim() - values(x)[0].dim())
    return index < 0 or entries(Dim(x, index)) == 1


def same_pairs(constraints: Iterable[Constraint]) -> list[tuple[Dim, Dim]]:
    """The dimensions that rules say are the same."""
    return [(c.a, c.b) for c in constraints if isinstance(c, Same)]


def carries(constraint: Constraint, node: fx.Node) -> bool:
    """Whether a constraint brings a dimension of an input to the node."""
    if isinstance(constraint, Same):
        return (constraint.a.node is node) != (constraint.b.node is node)
    return isinstance(constraint, Concat | Reshape)


def common_content(contents: Sequence[Content | None]) -> Content | None:
    """What padding holds where values meet that hold these; None where that differs."""
    found = set(contents)
    if None in found or not found:
        return None
    if len(found) == 1:
        return contents[0]
    known = [c for c in contents if c is not None]
    return Content(max(c.value for c in known), exact=False) if all(c.hides for c in known) else None


def content_of(value: Tensor) -> Content | None:
    """What every number of a value is, or is no more than; None where neither is of use."""
    if value.numel() == 0 or value.is_complex():
        return None
    highest = float(value.max())
    if bool((value == value.flatten()[0]).all()):
        return Content(highest)
    return Content(highest, exact=False) if highest <= HIDES else None


def computed(node: fx.Node, known: dict[fx.Node, float]) -> Content | None:
    """What an operator on each element makes of known numbers."""
    if torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
        return Content(0.0) if set(known.values()) == {0.0} else None

    def number(x: fx.Node) -> Tensor:
        return torch.tensor(known[x]).to(values(x)[0].dtype)

    if any(x not in known for x in node.all_input_nodes):
        return None
    args, kwargs = fx.map_arg((node.args, node.kwargs), number)
    cpu = torch.device("cpu")
    args, kwargs = torch.utils._pytree.tree_map(lambda a: cpu if isinstance(a, torch.device) else a, (args, kwargs))
    found = node.target(*args, **kwargs)  # type: ignore[operator]  # an operator
    return content_of(found) if isinstance(found, Tensor) else None


def are_flags(node: fx.Node) -> bool:
    """Whether a value is true or false, or 1 or 0."""
    while node.target in CONVERSIONS and values(node)[0].dtype != torch.bool:
        node = node.all_input_nodes[0]
    return values(node)[0].dtype == torch.bool


def counts_tokens(node: fx.Node) -> bool:
    """Whether a number that is computed counts from 0, or is such a number less a literal."""
    name = getattr(getattr(node.target, "overloadpacket", None), "__name__", "")
    inputs = [x for x in node.all_input_nodes if values(x)]
    if name in ("argmax", "arange"):
        return True
    if node.op == "placeholder" or not inputs:
        return False
    if name in ("sub", "to", "_to_copy", "view", "unsqueeze", "squeeze", "expand", "clamp", "clamp_min", "reshape"):
        return len(inputs) == 1 and counts_tokens(inputs[0])
    return name == "sum" and _are_flags_or_mask(inputs[0])


def _are_flags_or_mask(node: fx.Node) -> bool:
    """Whether a value is true or false, or an integer input as it is: a mask."""
    while node.target in CONVERSIONS and values(node)[0].dtype != torch.bool:
        node = node.all_input_nodes[0]
    return values(node)[0].dtype == torch.bool or (node.op == "placeholder" and not values(node)[0].is_floating_point())


def is_fake(value: Tensor) -> bool:
    """Whether a tensor has no numbers."""
    return isinstance(value, torch._subclasses.FakeTensor)


def flat_leaves(value: Any) -> list[Any]:
    """The leaves of nested lists, in order."""
    return list(torch.utils._pytree.tree_leaves(value))
