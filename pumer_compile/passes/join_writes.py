"""Writes: a value that is put together by writing into parts of it, written as a join. Exact, on any graph.

Some models make room and fill it part by part (`keys = x.new_empty(...); keys[..., :8].copy_(a)`, then the rest of it;
`table[i] = row` for every row). Where the parts cover the whole, that is `cat`, and axes follow by the ordinary rules.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import fx

from ..analysis.axes import Size, same_size
from ..analysis.dead_code import memory
from ..analysis.nodes import Emitter, copied, values
from ..analysis.operators import aten, is_mutable, overloads
from ..analysis.rules import argument, int_arg, shape, wrap
from .manager import Pass, State

_ROOM = frozenset(overloads("empty zeros ones full new_empty new_zeros new_ones new_full empty_like zeros_like"))


@dataclass
class _Write:
    """A value that is written into positions `start` to `stop` of dimension `dim`; that dimension is gone where
    `selected`. `nodes` make the part and write it."""

    value: fx.Node
    dim: int
    start: int
    stop: int
    selected: bool
    nodes: list[fx.Node]


def join_writes(captured: fx.GraphModule) -> tuple[fx.GraphModule, int]:
    """A copy of a captured graph with a join in place of each value that is written part by part, and how many there
    were; the graph itself where there is none. Values that others see under another name stay as they are."""
    if not any(_writes(node) for node in _rooms(captured.graph)):
        return captured, 0
    graph, count = copied(captured.graph), 0
    module = fx.GraphModule(captured, graph)
    for room in _rooms(graph):
        writes = _writes(room)
        if writes:
            _join(room, writes)
            count += 1
    graph.lint()
    module.recompile()
    return module, count


def _rooms(graph: fx.Graph) -> list[fx.Node]:
    return [node for node in graph.nodes if node.target in _ROOM]


def _writes(room: fx.Node) -> list[_Write]:
    """Writes that cover a value, along one dimension, in order of its positions; [] where they do not, or where
    anything else happens to it before they are done."""
    found = [_write(room, user) for user in room.users]
    whole = [write for write in found if write is not None]
    order = {node: number for number, node in enumerate(room.graph.nodes)}
    readers = [user for user, write in zip(room.users, found, strict=True) if write is None]
    last = max((order[node] for write in whole for node in write.nodes), default=0)
    if not whole or any(order[reader] < last or is_mutable(reader.target) for reader in readers):
        return []
    filled = sorted((write for write in whole if write.start < write.stop), key=lambda write: write.start)
    borders = [0, *(write.stop for write in filled)]
    covers = [write.start for write in filled] == borders[:-1] and len({write.dim for write in filled}) == 1
    if not covers or not same_size(shape(room)[filled[0].dim], borders[-1]):
        return []
    changed = _changed(room.graph)
    if any(write.value in changed for write in filled):
        return []
    return [*filled, *(write for write in whole if write.start >= write.stop)]


def _write(room: fx.Node, part: fx.Node) -> _Write | None:
    """What a user of a value writes into it; None where it reads it."""
    dim, start, stop, selected = 0, 0, 0, False
    nodes, sizes = [part], shape(room)
    whole = part.target in overloads("select slice") and isinstance(sizes[dim := _dim(part, room)], int)
    if not whole:
        return None
    if part.target is aten.select.int:
        start, selected = int_arg(part, 2) % int(sizes[dim]), True
        stop = start + 1
    else:
        positions = _positions(part, sizes[dim])
        if positions is None:
            return None
        start, stop = positions.start, positions.stop
    while part.target in overloads("select slice") and len(part.users) == 1:
        (user,) = part.users
        nodes.append(user)
        if user.target is aten.copy_.default and user.args[0] is part and not user.users:
            value = user.args[1]
            assert isinstance(value, fx.Node)
            return _Write(value, dim, start, stop, selected, nodes)
        positions = _positions(user, shape(part)[_dim(user, part)]) if user.target is aten.slice.Tensor else None
        if positions is None:
            return None
        if len(positions) == 0:
            stop = start  # nothing is written
        elif not same_size(shape(user)[_dim(user, part)], shape(part)[_dim(user, part)]):
            return None
        part = user
    return None


def _dim(part: fx.Node, source: fx.Node) -> int:
    return wrap(argument(part, 1, "dim", 0), len(shape(source)))


def _positions(part: fx.Node, size: Size) -> range | None:
    """What a slice takes; None where that is open, or not one after the other."""
    start, stop, step = argument(part, 2, "start"), argument(part, 3, "end"), argument(part, 4, "step", 1)
    if step != 1 or not isinstance(size, int) or not all(isinstance(x, int | None) for x in (start, stop)):
        return None
    return range(size)[start:stop]


def _changed(graph: fx.Graph) -> set[fx.Node]:
    """Values that share memory with one that is written into."""
    return set().union(*(memory(node.all_input_nodes[0]) for node in graph.nodes if is_mutable(node.target)))


def _join(room: fx.Node, writes: list[_Write]) -> None:
    nodes = {node for write in writes for node in write.nodes}
    last = next(node for node in reversed(room.graph.nodes) if node in nodes)
    emit, dtype, sizes = Emitter(room), values(room)[0].dtype, shape(room)
    with room.graph.inserting_before(last):
        parts = []
        for write in (w for w in writes if w.start < w.stop):
            value, dim = write.value, write.dim
            if values(value)[0].dtype != dtype:
                value = emit(aten.to.dtype, value, dtype)
            room_for = [*sizes[:dim], *([] if write.selected else [write.stop - write.start]), *sizes[dim + 1 :]]
            if not _fits(value, room_for):
                value = emit(aten.expand.default, value, room_for)
            parts.append(emit(aten.unsqueeze.default, value, dim) if write.selected else value)
        joined = emit(aten.cat.default, parts, writes[0].dim)
    for node in reversed(list(room.graph.nodes)):
        if node in nodes:
            room.graph.erase_node(node)
    room.replace_all_uses_with(joined)
    room.graph.erase_node(room)


def _fits(value: fx.Node, sizes: list[Size]) -> bool:
    own = shape(value)
    return len(own) == len(sizes) and all(same_size(a, b) for a, b in zip(own, sizes, strict=True))


class JoinWrites(Pass):
    """Writes values that are put together part by part as joins."""

    name = "join writes"
    optional = True

    def run(self, state: State) -> int:
        """See `Pass`; counts values."""
        state.captured, matches = join_writes(state.captured)
        return matches
