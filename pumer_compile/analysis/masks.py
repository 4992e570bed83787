"""Masks: what is added to the scores of an attention, told apart: masks, which hide keys, and biases, which do not.

A mask is proved to be one by its values: each is 0 or so low that its exponential is 0, whatever the inputs are. What
depends on learned parameters, or is a constant of other values (ALiBi), is a bias. A sum is taken apart. What is
neither is unknown, and nothing is guessed about it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.node import map_aggregate

from ..reducers.align import MaskKind
from .axes import same_size
from .dead_code import draws_nothing
from .nodes import (
    ancestors,
    attribute,
    constant_value,
    content_inputs,
    depends_on_input,
    depends_on_parameter,
    values,
)
from .operators import (
    JOINS,
    KEEPS_VALUES,
    MASKED_FILL,
    MATMULS,
    STRETCHES,
    TAKES_NUMBERS,
    WHERE,
    aten,
)
from .rules import argument, is_pointwise, shape

HIDES = -104.0
"""What is added to a score to hide it is this or lower: its exponential is 0 in float32."""
LOW = -50.0
"""A score that is replaced by this or lower is hidden; so is one to which a constant adds it (models with windows write
-100), for no padding is read from a constant."""
_MANY = 16  # a value that may be one of more numbers than this is no mask
_GRID = 4096

_FILLED = {"zeros": 0, "ones": 1, "zeros_like": 0, "ones_like": 1, "new_zeros": 0, "new_ones": 1}
_FILLED_WITH = {"full": 1, "full_like": 1, "new_full": 2}


@dataclass(frozen=True)
class Mask:
    """A mask and how it reads: `additive` to the scores, or boolean: true means `keep` or `drop`."""

    node: fx.Node
    kind: MaskKind

    @property
    def by_query(self) -> bool:
        """Whether it may differ from query to query, as a causal mask does."""
        return not broadcast_over_queries(self.node)

    @property
    def of_input(self) -> bool:
        """Whether it depends on what an input holds; padding does."""
        return depends_on_input(self.node)


def hidden(mask: Mask, inputs: Mapping[str, Tensor]) -> Tensor | None:
    """Where a mask hides keys of the sample, bool, in its shape; None where its numbers are not known (a model on the
    meta device, a mask made of features).

    Args:
        mask: whose numbers come from integers (of padding, of places).
        inputs: the sample.
    """
    read = [n for n in ancestors(mask.node) | {mask.node} if n.op == "placeholder"]
    known = all(not inputs[str(n.target)].is_floating_point() for n in read if str(n.target) in inputs)
    if not known or depends_on_parameter(mask.node) or values(mask.node)[0].is_meta:
        return None
    value = constant_value(mask.node, inputs)
    if value is None:
        return None
    if value.dtype == torch.bool:
        return ~value if mask.kind == "keep" else value
    return value <= HIDES


@dataclass(frozen=True)
class Addends:
    """What is added to scores, taken apart.

    Attributes:
        masks: which hide keys.
        biases: which do not.
        sums: values that hold both, to be computed anew from aligned parts where they have to follow a reducer.
        unknown: the name of what is neither proved a mask nor known for a bias, or ''.
    """

    masks: tuple[Mask, ...] = ()
    biases: tuple[fx.Node, ...] = ()
    sums: tuple[fx.Node, ...] = ()
    unknown: str = ""

    def __add__(self, other: Addends) -> Addends:
        return Addends(
            (*self.masks, *other.masks),
            (*self.biases, *other.biases),
            (*self.sums, *other.sums),
            self.unknown or other.unknown,
        )


class MaskReader:
    """Tells masks from biases in one graph.

    Args:
        inputs: the sample, whose numbers say what a floating-point or integer input holds. Without it (or with fake
            tensors) integers are taken to be 0 or 1, and floating-point inputs for masks where they are called so.
    """

    def __init__(self, inputs: Mapping[str, Tensor] | None = None) -> None:
        self.inputs = inputs or {}
        self._possible: dict[fx.Node, Tensor | None] = {}
        self._found: dict[fx.Node, dict[fx.Node, Tensor] | None] = {}

    # --- what is added ------------------------------------------------------------------------------------------

    def addends(self, node: fx.Node) -> Addends:
        """A value that is added to scores (or a boolean mask that a fused attention takes), taken apart."""
        if values(node)[0].dtype == torch.bool:
            return Addends((Mask(node, "keep"),))
        if self._is_mask(node):
            return Addends((Mask(node, "additive"),))
        parts = self._split(node)
        if parts is not None and parts.masks and not parts.unknown:
            return Addends(parts.masks, parts.biases, (node, *parts.sums))
        if parts is not None and parts.unknown:
            return Addends(unknown=parts.unknown)
        learned = depends_on_parameter(node)
        hides = self._holds_mask(node) if learned else depends_on_input(node) or self._hides_somewhere(node)
        return Addends(unknown=node.name) if hides else Addends(biases=(node,))

    def hides(self, fill: object) -> bool:
        """Whether a number, or every number that a value may hold, hides a score that it is put in the place of."""
        if isinstance(fill, int | float):
            return fill <= LOW
        found = self.possible(fill) if isinstance(fill, fx.Node) and values(fill) else None
        return found is not None and bool((found <= LOW).all())

    def _split(self, node: fx.Node) -> Addends | None:
        """The addends of a sum, of a bias with some entries filled, or of what one of them is reshaped from; None of
        anything else."""
        target, args = node.target, node.args
        if target is aten.add.Tensor and argument(node, 2, "alpha", 1) == 1:
            parts = [x for x in args[:2] if isinstance(x, fx.Node)]
            if len(parts) == 2 and all(shape(x) for x in parts):
                return self.addends(parts[0]) + self.addends(parts[1])
        elif target in MASKED_FILL and not target._schema.is_mutable and self.hides(args[2]):  # type: ignore[union-attr]
            return self.addends(args[0]) + Addends((Mask(args[1], "drop"),))  # type: ignore[arg-type]  # nodes
        elif target in WHERE:
            chosen = [(i, kind) for i, kind in ((1, "keep"), (2, "drop")) if self.hides(args[3 - i])]
            if chosen and isinstance(kept := args[chosen[0][0]], fx.Node) and shape(kept):
                return self.addends(kept) + Addends((Mask(args[0], chosen[0][1]),))  # type: ignore[arg-type]
        elif target in KEEPS_VALUES | {aten.expand.default, aten.unsqueeze.default}:
            source = node.all_input_nodes[0]
            if values(source)[0].is_floating_point():
                return self.addends(source)
        return None

    def _is_mask(self, node: fx.Node) -> bool:
        if self._called_mask(node):
            return True
        found = self.possible(node)
        if found is None:
            return _without_numbers(node)
        hides = HIDES if depends_on_input(node) else LOW
        return bool(((found == 0) | (found <= hides)).all())

    def _called_mask(self, node: fx.Node) -> bool:
        """Whether a value is a floating-point input without known numbers that is called a mask, moved at most."""
        while node.target in KEEPS_VALUES | STRETCHES | TAKES_NUMBERS:
            node = node.all_input_nodes[0]
        named = node.op == "placeholder" and values(node)[0].is_floating_point() and "mask" in str(node.target)
        return named and self._sample(node) is None

    def _hides_somewhere(self, node: fx.Node) -> bool:
        """Whether a constant holds numbers that hide, among others that do not: a bias and a mask in one."""
        constant = constant_value(node)
        return constant is None or constant.is_meta or bool((constant <= -1e4).any())

    def _holds_mask(self, node: fx.Node) -> bool:
        """Whether a learned bias is mixed with a mask in another way than a sum: scaled with it, say."""
        pending, seen = [node], {node}
        while pending:
            current = pending.pop()
            if current.target in MASKED_FILL | WHERE and any(map(self.hides, current.args[1:])):
                return True
            follows = is_pointwise(current) or current.target in STRETCHES | TAKES_NUMBERS
            for x in current.all_input_nodes if follows else ():
                if depends_on_parameter(x):
                    pending.extend([] if x in seen else [x])
                    seen.add(x)
                elif depends_on_input(x) and (found := self.possible(x)) is not None:
                    if bool((found.abs() >= -HIDES).any()):
                        return True
        return False

    # --- the numbers that a value may hold ----------------------------------------------------------------------

    def possible(self, node: fx.Node) -> Tensor | None:
        """Every number that any entry of a value may be, `[numbers]` in its dtype, for every input; None where that is
        not known, or they are many."""
        if node not in self._possible:
            self._possible[node] = self._evaluated(node)
        return self._possible[node]

    def _evaluated(self, node: fx.Node) -> Tensor | None:
        leaves = self._leaves(node)
        if leaves is None or prod(map(len, leaves.values())) > _GRID:
            return None
        grid = torch.meshgrid(*(torch.arange(len(held)) for held in leaves.values()), indexing="ij")
        known: dict[fx.Node, Any] = {x: leaves[x][i.flatten()] for x, i in zip(leaves, grid, strict=True)}

        def run(current: fx.Node) -> Tensor:
            if current not in known:
                args, kwargs = fx.map_arg((current.args, current.kwargs), run)
                args, kwargs = map_aggregate((args, kwargs), _on_cpu)
                compute: Any = torch.mul if _pairs(current) else current.target  # a pointwise operator
                known[current] = compute(*args, **kwargs)
            found: Tensor = known[current]
            return found.clone()  # some operators work in place

        return _few(run(node))

    def _leaves(self, node: fx.Node) -> dict[fx.Node, Tensor] | None:
        """What the entries of a value are computed from, each from the entries at its own place: values with the
        numbers that they may hold. None where one of them may hold anything."""
        if node not in self._found:
            self._found[node] = self._find_leaves(node)
        return self._found[node]

    def _find_leaves(self, node: fx.Node) -> dict[fx.Node, Tensor] | None:
        if not values(node):
            return None
        pointwise = (is_pointwise(node) and bool(node.all_input_nodes) and _draws_nothing(node)) or _pairs(node)
        held = None if pointwise and depends_on_input(node) else self._numbers(node)
        if held is not None:
            return {node: held}
        below = [self._leaves(source) for source in node.all_input_nodes] if pointwise else [None]
        found: dict[fx.Node, Tensor] = {}
        for leaves in below:
            if leaves is None:
                return {node: torch.tensor([False, True])} if values(node)[0].dtype == torch.bool else None
            found |= leaves
        return found

    def _numbers(self, node: fx.Node) -> Tensor | None:
        """The numbers of an input, a constant, or a value whose entries are those of others."""
        dtype = values(node)[0].dtype
        if node.op == "placeholder":
            return self._given(node)
        if node.op == "get_attr":
            constant = attribute(node)
            return _few(constant) if isinstance(constant, Tensor) and not constant.is_meta else None
        filled = _filled(node)
        if filled is not None:
            return torch.tensor([filled]).to(dtype)
        if not depends_on_input(node) and not depends_on_parameter(node):
            constant = constant_value(node)
            if constant is not None and not constant.is_meta:
                return _few(constant)
        if node.target in JOINS:
            parts = [self.possible(x) for x in node.all_input_nodes]
            return (
                None
                if any(x is None for x in parts)
                else _few(torch.cat([x.to(dtype) for x in parts if x is not None]))
            )
        if node.target in TAKES_NUMBERS:
            found = self.possible(node.all_input_nodes[0])
            return None if found is None else _few(found.to(dtype))
        edge = _padded_with(node)
        if edge is not None:
            found = self.possible(node.all_input_nodes[0])
            return None if found is None else _few(torch.cat([found, torch.tensor([edge]).to(dtype)]))
        return None

    def _sample(self, node: fx.Node) -> Tensor | None:
        given = self.inputs.get(str(node.target))
        fake = given is None or given.is_meta or isinstance(given, torch._subclasses.FakeTensor)
        return None if fake else given

    def _given(self, node: fx.Node) -> Tensor | None:
        """What an input may hold: the numbers of the sample, where they are few; 0 and 1 of a mask."""
        sample, dtype = self._sample(node), values(node)[0].dtype
        flags = torch.tensor([0, 1]).to(dtype)
        if sample is None:
            return flags if not dtype.is_floating_point or "mask" in str(node.target) else None
        found = _few(sample)
        if found is None:
            return None
        if dtype.is_floating_point:
            # One number says nothing of what others the input may hold: a bias may be zeros in a sample.
            return found if len(found) > 1 or "mask" in str(node.target) else None
        return flags if bool(((found == 0) | (found == 1)).all()) else None


def _few(value: Tensor) -> Tensor | None:
    """The different numbers of a value; None of many. What is no number is neither 0 nor low, and no mask."""
    found = value.detach().cpu().unique()
    return None if len(found) > _MANY else found


def _filled(node: fx.Node) -> float | None:
    if not isinstance(node.target, torch._ops.OpOverload):
        return None
    name = node.target.overloadpacket.__name__
    if name in _FILLED_WITH:
        value = argument(node, _FILLED_WITH[name], "fill_value")
        return value if isinstance(value, int | float) else None
    return _FILLED.get(name)


def _padded_with(node: fx.Node) -> float | None:
    """What a value is padded with at its edges; None where it is not padded with a number."""
    if node.target is aten.constant_pad_nd.default:
        value = argument(node, 2, "value", 0)
    elif node.target is aten.pad.default and argument(node, 2, "mode", "constant") == "constant":
        value = argument(node, 3, "value") or 0
    else:
        return None
    return value if isinstance(value, int | float) else None


def _draws_nothing(node: fx.Node) -> bool:
    random = isinstance(node.target, torch._ops.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags
    return not random or draws_nothing(node)


def _pairs(node: fx.Node) -> bool:
    """Whether a product of matrices adds nothing up: `[..., n, 1] @ [..., 1, m]` multiplies number by number."""
    return node.target in MATMULS and same_size(shape(node.args[0])[-1], 1)  # type: ignore[arg-type]  # nodes


def _on_cpu(value: Any) -> Any:
    return torch.device("cpu") if isinstance(value, torch.device) else value


def _without_numbers(node: fx.Node) -> bool:
    """Whether a value is computed from buffers that have no numbers, and from no parameter: a model that is planned on
    the meta device."""
    if depends_on_parameter(node):
        return False
    pending, seen = [node], {node}
    while pending:
        current = pending.pop()
        constant = attribute(current) if current.op == "get_attr" else None
        if isinstance(constant, Tensor) and constant.is_meta:
            return True
        fresh = [x for x in content_inputs(current) if x not in seen]
        seen.update(fresh)
        pending.extend(fresh)
    return False


def broadcast_over_queries(node: fx.Node) -> bool:
    """Whether a value is the same along its last dimension but one: of size 1, or stretched from that."""
    while values(node):
        sizes = shape(node)
        if len(sizes) < 2 or same_size(sizes[-2], 1):
            return True
        if node.target in (aten.expand.default, *KEEPS_VALUES):
            node = node.all_input_nodes[0]
        elif not depends_on_input(node):
            constant = constant_value(node)
            if constant is None or constant.is_meta:  # a model planned without its numbers
                return False
            return bool((constant == constant[..., :1, :]).all())
        else:
            pointwise = node.op == "call_function" and is_pointwise(node)
            return pointwise and all(broadcast_over_queries(n) for n in content_inputs(node) if values(n))
    return False
