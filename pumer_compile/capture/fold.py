"""Fold: compute once what depends on fixed inputs and constants of the trace alone.

The order of windows, rotary tables and positions of a prompt come from a grid that is fixed. What starts from buffers
of the model or from sizes alone stays as it is: positions that are counted (`arange`) follow the sizes that a reducer
leaves. But where numbers are written into parts of it (a mask of blocks, one for each image), it is a table of places,
and is computed as well.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_map_only

from ..analysis.nodes import attribute, give_numbers, values, with_numbers
from ..analysis.operators import aten, is_mutable, overloads

# What writes numbers into parts of a value.
_WRITES = {*overloads("fill_ masked_fill_"), aten.copy_.default, aten.index_put_.default}
_RANDOM = ("rand", "dropout", "bernoulli", "multinomial")


def fold(module: fx.GraphModule, fixed: Mapping[str, Tensor], lifted: Iterable[Tensor]) -> int:
    """Put constants in place of what a graph computes from fixed inputs; how many.

    Args:
        module: pre-decomposition ATen graph; it is changed.
        fixed: inputs with their one value each; the graph still takes them, and does not read them.
        lifted: constants that were computed from such inputs while the model was traced.
    """
    folding = _Folding(module, fixed, {_storage(t) for t in lifted})
    count = folding.replace()
    module.graph.eliminate_dead_code()
    module.graph.lint()
    module.recompile()
    return count


def fold_written(module: fx.GraphModule) -> int:
    """`fold` without fixed inputs: constants into which something is written; how many."""
    return fold(module, {}, ()) if any(node.target in _WRITES for node in module.graph.nodes) else 0


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr() if tensor.numel() else id(tensor)


class _Folding:
    """The graph, computed as far as it depends on constants.

    Storages stand for values that share memory: what is written into one is seen by all.
    """

    def __init__(self, module: fx.GraphModule, fixed: Mapping[str, Tensor], lifted: set[int]) -> None:
        self.module = module
        self.real: dict[fx.Node, Any] = {}
        self.seeded: set[int] = set()
        # Into which something was written that is not known, or after what is not folded has read it.
        self.barred: set[int] = set()
        self.read: set[int] = set()
        for node in module.graph.nodes:
            if node.op == "get_attr":
                self._constant(node, lifted)
            elif node.op == "placeholder" and node.target in fixed:
                self._seed(node, fixed[node.target].detach().cpu().clone())
            elif node.op == "call_function":
                self._call(node)

    def _seed(self, node: fx.Node, value: Tensor) -> None:
        self.real[node] = value
        self.seeded.add(_storage(value))

    def _constant(self, node: fx.Node, lifted: set[int]) -> None:
        value = with_numbers(attribute(node))
        if not isinstance(value, Tensor) or isinstance(value, torch.nn.Parameter) or value.is_meta:
            return
        self.real[node] = value.detach().cpu().clone()
        if _storage(value) in lifted:
            self.seeded.add(_storage(self.real[node]))

    def _call(self, node: fx.Node) -> None:
        given = [n for n in node.all_input_nodes if n in self.real]
        touched = set().union(*map(self._storages, given))
        known = len(given) == len(node.all_input_nodes) and not touched & self.barred
        mutable = is_mutable(node.target)
        plain = isinstance(node.target, torch._ops.OpOverload) or node.target is operator.getitem
        written = self._storages(node.args[0]) if mutable and node.args[0] in given else set()  # type: ignore[arg-type]
        if not known or not plain or any(name in str(node.target) for name in _RANDOM) or written & self.read:
            self.barred |= written
            self.read |= touched
            return
        args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), self.real.__getitem__)
        args, kwargs = tree_map_only(torch.device, lambda _: torch.device("cpu"), (args, kwargs))
        with torch.no_grad():
            self.real[node] = node.target(*args, **kwargs)  # type: ignore[operator]
        if any(self._storages(n) & self.seeded for n in node.all_input_nodes):
            self.seeded |= self._storages(node)
            self.seeded |= written
        if node.target in _WRITES:
            self.seeded |= written

    def _storages(self, node: fx.Node) -> set[int]:
        return {_storage(t) for t in tree_leaves(self.real[node]) if isinstance(t, Tensor)}

    def replace(self) -> int:
        """Put constants where what is not folded reads what is."""
        graph, count = self.module.graph, 0
        for node, value in list(self.real.items()):
            if node.op == "get_attr" or not isinstance(value, Tensor):
                continue
            if _storage(value) not in self.seeded or _storage(value) in self.barred:
                continue
            readers = [user for user in node.users if user not in self.real]
            if not readers:
                continue
            name = f"_folded_{count}"
            count += 1
            self.module.register_buffer(name, _on_device(value.clone(), node), persistent=False)
            with graph.inserting_before(node if node.op != "placeholder" else _first_call(graph)):
                constant = graph.get_attr(name)
            constant.meta = dict(node.meta)
            for reader in readers:
                reader.replace_input_with(node, constant)
        for node in reversed(list(graph.nodes)):
            # In-place writes are never dead code to fx.
            if node in self.real and node.op == "call_function" and not node.users and not self._is_needed(node):
                graph.erase_node(node)
        return count

    def _is_needed(self, node: fx.Node) -> bool:
        """Whether it writes into what stays in the graph."""
        return is_mutable(node.target) and not self._storages(node) <= self.seeded - self.barred


def _on_device(value: Tensor, node: fx.Node) -> Tensor:
    """A constant where its node is; on the meta device its numbers stay known."""
    device = values(node)[0].device
    moved = value.to(device)
    if device.type == "meta":
        give_numbers(moved, value)
    return moved


def _first_call(graph: fx.Graph) -> fx.Node:
    found: fx.Node = next(node for node in graph.nodes if node.op not in ("placeholder", "get_attr"))
    return found
