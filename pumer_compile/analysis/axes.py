"""Token axes: what each dimension of each value indexes, found by provenance and never by a matching integer.

Every dimension is an `Axis`. Rules say which axes are the same, which are joined, split, cut or flattened;
axes are merged as in union-find. When an axis of 185 meets one joined from 40 and 145, it is cut at 40 as
well. Streams start at seeds (integer ids into an embedding, a patch convolution) and spread over everything
proved to be the same axis, so that text length may equal head size, number of heads or batch without
confusing anything.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple

import torch
from torch import fx

from ..errors import AxisError

Size = int | torch.SymInt


class Dim(NamedTuple):
    """One dimension of one value: of `node`, or of output `output` of a node that gives several."""

    node: fx.Node
    index: int  # type: ignore[assignment]  # hides `tuple.index`, which nobody needs of a dimension
    output: int = 0


# --- what rules say -----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Same:
    """Two dimensions index the same tokens. `aligns`: a reducer's map may bring the older to the newer."""

    a: Dim
    b: Dim
    aligns: bool = True


@dataclass(frozen=True)
class Concat:
    """`result` is the `parts` side by side."""

    result: Dim
    parts: tuple[Dim, ...]


@dataclass(frozen=True)
class Reshape:
    """Flattening `sources` gives the same sequence as flattening `results` (row-major)."""

    sources: tuple[Dim, ...]
    results: tuple[Dim, ...]


@dataclass(frozen=True)
class Repeat:
    """`result` has every position of `source` several times: each `in_place` (side by side), or all in a row, and then
    all of them again."""

    source: Dim
    result: Dim
    times: int
    in_place: bool


@dataclass(frozen=True)
class Causal:
    """Every position of `result` is computed of the one of `source` with its number and those before it; `behind` so
    many more follow. Right for any number of tokens, as long as they are in their old order."""

    source: Dim
    result: Dim
    behind: int


@dataclass(frozen=True)
class Slice:
    """`result` is `source[start:stop]`, step 1; the literals are arguments `start_arg` and `stop_arg`."""

    source: Dim
    result: Dim
    start: int
    stop: int
    start_arg: int
    stop_arg: int


@dataclass(frozen=True)
class Select:
    """One position of `source` is taken and the axis goes; `index_arg` is the position of the literal."""

    source: Dim
    index: int
    index_arg: int


@dataclass(frozen=True)
class Reduce:
    """`source` is summed, averaged or maximised away: valid for any number of tokens."""

    source: Dim


@dataclass(frozen=True)
class Summed:
    """`source` is summed away: the sum of fewer tokens is smaller, so what divides it matters."""

    source: Dim


@dataclass(frozen=True)
class ByPosition:
    """The operator works along `source` position by position: valid only while no reducer has touched it."""

    source: Dim


@dataclass(frozen=True)
class Literal:
    """Argument `arg` (or its element `item`) is the size of `result` as an integer."""

    result: Dim
    arg: int
    item: int | None = None


@dataclass(frozen=True)
class Seed:
    """`dims` index the tokens of a modality: one dimension, or the rows and columns of a grid."""

    dims: tuple[Dim, ...]
    stream: str


Constraint = Same | Concat | Reshape | Repeat | Causal | Slice | Select | Reduce | Summed | ByPosition | Literal | Seed


def constraint_dims(constraint: Constraint) -> tuple[Dim, ...]:
    """Every dimension a constraint speaks of."""
    match constraint:
        case Same(a, b):
            return (a, b)
        case Concat(result, parts):
            return (result, *parts)
        case Reshape(sources, results):
            return (*sources, *results)
        case Slice(source, result) | Repeat(source, result) | Causal(source, result):
            return (source, result)
        case Select(source) | Reduce(source) | Summed(source) | ByPosition(source):
            return (source,)
        case Literal(result):
            return (result,)
        case Seed(dims):
            return dims


# --- what annotation finds ----------------------------------------------------------------------------------


class Segment(NamedTuple):
    """`length` tokens of `stream` side by side (None: learned tokens of no stream, never reduced). `whole` is
    False for a part of a stream cut out by the model."""

    stream: str | None
    length: int
    whole: bool = True


@dataclass(frozen=True)
class Fixed:
    """A dimension that indexes no tokens."""

    size: Size

    def __str__(self) -> str:
        return str(self.size)


@dataclass(frozen=True)
class Tokens:
    """A dimension that indexes the tokens of one or more streams, as they were before any reducer."""

    segments: tuple[Segment, ...]

    @property
    def size(self) -> int:
        return sum(s.length for s in self.segments)

    @property
    def streams(self) -> tuple[str, ...]:
        return tuple(s.stream for s in self.segments if s.stream is not None)

    def offset(self, stream: str) -> int:
        """Position of the stream's first token."""
        start = 0
        for segment in self.segments:
            if segment.stream == stream:
                return start
            start += segment.length
        raise KeyError(stream)

    def __str__(self) -> str:
        return "[" + " | ".join(f"{s.stream or 'learned'}:{s.length}" for s in self.segments) + "]"


@dataclass(frozen=True)
class Product:
    """A flattened dimension, some factor of which indexes tokens."""

    factors: tuple[Fixed | Tokens | Product, ...]

    @property
    def size(self) -> Size:
        return prod((f.size for f in self.factors), start=1)

    @property
    def streams(self) -> tuple[str, ...]:
        return tuple(s for f in self.factors if not isinstance(f, Fixed) for s in f.streams)

    def __str__(self) -> str:
        return "(" + " x ".join(str(f) for f in self.factors) + ")"


AxisKind = Fixed | Tokens | Product


# --- union-find ---------------------------------------------------------------------------------------------


class Axis:
    """A node of the union-find; read it through `find` and `leaves`."""

    __slots__ = ("factors", "grid", "learned", "parent", "parts", "size", "stream")

    def __init__(self, size: Size) -> None:
        self.size = size
        self.parent: Axis | None = None
        self.parts: tuple[Axis, ...] | None = None  # side by side
        self.factors: tuple[Axis, ...] | None = None  # flattened
        self.stream: str | None = None
        self.learned = False
        self.grid: tuple[object, int, int, str] | None = None  # (grid, which of its dims, how many, stream)

    def find(self) -> Axis:
        """The representative of this axis."""
        axis = self
        while axis.parent is not None:
            axis = axis.parent
        return axis

    def leaves(self) -> list[Axis]:
        """The representatives of its parts in order; itself where it has none."""
        root = self.find()
        return [root] if root.parts is None else [leaf for part in root.parts for leaf in part.leaves()]


class AxisConflict(AxisError):
    """Two axes that cannot be the same."""


def same_size(a: Size, b: Size) -> bool:
    """Whether two sizes are provably equal, without adding a guard."""
    if isinstance(a, int) and isinstance(b, int):
        return a == b
    return bool(expression(a) == expression(b))


def expression(size: Size) -> Any:
    """A size as a sympy expression or an integer."""
    return size.node.expr if isinstance(size, torch.SymInt) else size


def unify(a: Axis, b: Axis) -> None:
    """Make two axes the same.

    Raises:
        AxisConflict: different sizes, or tokens of different streams.
    """
    left, right = a.leaves(), b.leaves()
    while left and right:
        x, y = left[0].find(), right[0].find()
        if x is y:
            left, right = left[1:], right[1:]
        elif same_size(x.size, y.size):
            _join(x, y)
            left, right = left[1:], right[1:]
        elif isinstance(x.size, int) and isinstance(y.size, int):
            if x.size < y.size:
                right = [*cut(y, x.size), *right[1:]]
            else:
                left = [*cut(x, y.size), *left[1:]]
        else:
            raise AxisConflict(f"an axis of {x.size} meets one of {y.size}")
    if left or right:
        raise AxisConflict(f"an axis of {a.find().size} meets one of {b.find().size}")


def _join(x: Axis, y: Axis) -> None:
    if x.stream and y.stream and x.stream != y.stream:
        raise AxisConflict(f"tokens of {x.stream} meet tokens of {y.stream}")
    factors_x, factors_y = x.factors, y.factors
    y.parent = x
    x.stream, x.factors, x.grid = x.stream or y.stream, factors_x or factors_y, x.grid or y.grid
    if factors_x and factors_y and len(factors_x) == len(factors_y):
        pairs = list(zip(factors_x, factors_y, strict=True))
        if all(same_size(f.find().size, g.find().size) for f, g in pairs):
            for f, g in pairs:
                unify(f, g)


def cut(leaf: Axis, at: int) -> tuple[Axis, Axis]:
    """Divide a leaf into its first `at` positions and the rest.

    Raises:
        AxisConflict: it has no number of positions, or not so many.
    """
    size = _number(leaf)
    if not 0 < at < size:
        raise AxisConflict(f"an axis of {size} is cut at {at}")
    first, rest = Axis(at), Axis(size - at)
    first.stream = rest.stream = leaf.stream
    leaf.parts = (first, rest)
    return first, rest


def cut_axis(axis: Axis, start: int, stop: int) -> list[Axis]:
    """The leaves of `axis[start:stop]`, cutting where needed."""
    for at in (start, stop):
        position = 0
        for leaf in axis.leaves():
            if position < at < position + _number(leaf):
                cut(leaf, at - position)
            position += _number(leaf)
    chosen, position = [], 0
    for leaf in axis.leaves():
        if start <= position and position + _number(leaf) <= stop:
            chosen.append(leaf)
        position += _number(leaf)
    return chosen


def _number(leaf: Axis) -> int:
    if isinstance(leaf.size, int):
        return leaf.size
    raise AxisConflict(f"an axis is cut whose size, {leaf.size}, depends on data or on the batch")


def reshape_groups(sources: Sequence[Size], results: Sequence[Size]) -> Iterable[tuple[range, range]]:
    """Smallest groups of dimensions with equal products, row-major: `(range of sources, range of results)`.

    `[2, 185, 32] -> [2, 185, 4, 8]` gives 0-0, 1-1, 2-2..3: by position, whatever equal integers there
    are elsewhere.
    """
    i = j = 0
    while i < len(sources) or j < len(results):
        i0, j0 = i, j
        a: Any = 1
        b: Any = 1
        if i < len(sources):
            a, i = expression(sources[i]), i + 1
        if j < len(results):
            b, j = expression(results[j]), j + 1
        while a != b:
            take_source = i < len(sources) and (j >= len(results) or _hint(a) <= _hint(b))
            if take_source:
                a, i = a * expression(sources[i]), i + 1
            elif j < len(results):
                b, j = b * expression(results[j]), j + 1
            else:
                raise AxisConflict(f"cannot reshape {list(sources)} to {list(results)}")
        yield range(i0, i), range(j0, j)


def _hint(value: Any) -> float:
    # Symbols are batch sizes of at least 2; any large stand-in orders products by integer factors first.
    return float(value) if isinstance(value, int) else float(value.subs({s: 7919 for s in value.free_symbols}))
