"""The union-find of axes: what is the same, what is joined, cut and flattened."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import fx

from pumer_compile.analysis.axes import (
    Axis,
    AxisConflict,
    ByPosition,
    Concat,
    Dim,
    Fixed,
    Literal,
    Product,
    Reduce,
    Reshape,
    Same,
    Seed,
    Segment,
    Select,
    Slice,
    Summed,
    Tokens,
    constraint_dims,
    cut,
    cut_axis,
    expression,
    reshape_groups,
    same_size,
    unify,
)
from pumer_compile.errors import AxisError

pytestmark = pytest.mark.fast


def joined(*parts: Axis) -> Axis:
    axis = Axis(sum(part.size for part in parts))
    axis.parts = parts
    return axis


def symbol(size: int = 5) -> torch.SymInt:
    """A symbolic size, as torch.export makes them."""

    class Module(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + 1

    shapes = {"x": {0: torch.export.Dim("batch")}}
    program = torch.export.export(Module(), (torch.zeros(size, 2),), dynamic_shapes=shapes)
    return next(n for n in program.graph.nodes if n.op == "placeholder").meta["val"].shape[0]


# --- unify --------------------------------------------------------------------------------------------------


def test_unified_axes_have_one_representative() -> None:
    a, b, c = Axis(4), Axis(4), Axis(4)
    unify(a, b)
    assert a.leaves() == b.leaves() != c.leaves()
    unify(c, b)
    assert a.find() is b.find() is c.find()
    unify(a, c)


def test_equal_sizes_are_not_the_same_axis() -> None:
    a, b = Axis(8), Axis(8)
    assert a.leaves() != b.leaves()


def test_streams_spread_over_what_is_the_same() -> None:
    a, b = Axis(4), Axis(4)
    b.stream = "text"
    unify(a, b)
    assert a.find().stream == "text"


def test_tokens_of_different_streams_are_never_the_same() -> None:
    a, b = Axis(4), Axis(4)
    a.stream, b.stream = "text", "image"
    with pytest.raises(AxisConflict, match="tokens of text meet tokens of image"):
        unify(a, b)
    assert issubclass(AxisConflict, AxisError)


def test_an_axis_is_cut_where_a_joined_one_has_its_border() -> None:
    text, image, whole = Axis(40), Axis(145), Axis(185)
    text.stream, image.stream = "text", "image"
    unify(joined(text, image), whole)
    assert [leaf.size for leaf in whole.leaves()] == [40, 145]
    assert [leaf.stream for leaf in whole.leaves()] == ["text", "image"]
    assert whole.leaves() == [*text.leaves(), *image.leaves()]


def test_borders_from_both_sides_cut_both() -> None:
    a = [Axis(3), Axis(5)]
    b = [Axis(4), Axis(4)]
    unify(joined(*a), joined(*b))
    assert [leaf.size for leaf in a[0].leaves()] == [3]
    assert [leaf.size for leaf in a[1].leaves()] == [1, 4]
    assert [leaf.size for leaf in b[0].leaves()] == [3, 1]
    assert b[1].leaves() == a[1].leaves()[1:]


@given(st.integers(0, 2**32 - 1))
def test_unified_cuts_are_the_same_leaves(seed: int) -> None:
    rng = np.random.default_rng(seed)
    total = int(rng.integers(2, 40))

    def pieces() -> list[Axis]:
        borders = sorted(set(rng.integers(1, total, rng.integers(0, 5)).tolist()))
        return [Axis(b - a) for a, b in zip([0, *borders], [*borders, total], strict=True)]

    sides = [joined(*pieces()) for _ in range(3)]
    unify(sides[0], sides[1])
    unify(sides[2], sides[1])
    leaves = [side.leaves() for side in sides]
    assert leaves[0] == leaves[1] == leaves[2]
    assert sum(leaf.size for leaf in leaves[0]) == total


@pytest.mark.parametrize("sizes", [(4, 5), (5, 4)])
def test_different_sizes_contradict(sizes: tuple[int, int]) -> None:
    with pytest.raises(AxisConflict, match="meets one of"):
        unify(Axis(sizes[0]), Axis(sizes[1]))


def test_a_symbolic_size_is_not_cut() -> None:
    s = symbol()
    unify(Axis(s), Axis(s))
    with pytest.raises(AxisConflict):
        unify(Axis(s), Axis(5))


def test_factors_unify_one_by_one() -> None:
    a, b = Axis(12), Axis(12)
    parts = [Axis(3), Axis(4), Axis(3), Axis(4)]
    a.factors, b.factors = (parts[0], parts[1]), (parts[2], parts[3])
    parts[3].stream = "image"
    unify(a, b)
    assert parts[1].find().stream == "image"
    assert parts[0].find() is parts[2].find()


def test_factors_of_different_sizes_stay_apart() -> None:
    a, b = Axis(12), Axis(12)
    parts = [Axis(3), Axis(4), Axis(4), Axis(3)]
    a.factors, b.factors = (parts[0], parts[1]), (parts[2], parts[3])
    unify(a, b)
    assert parts[0].find() is not parts[3].find()
    assert parts[1].find() is not parts[2].find()


# --- cut ----------------------------------------------------------------------------------------------------


def test_cut_keeps_the_stream() -> None:
    axis = Axis(7)
    axis.stream = "text"
    first, rest = cut(axis, 3)
    assert (first.size, rest.size) == (3, 4)
    assert first.stream == rest.stream == "text"
    assert axis.leaves() == [first, rest]


@pytest.mark.parametrize("at", [0, 7, 9])
def test_cut_is_inside(at: int) -> None:
    with pytest.raises(AxisConflict):
        cut(Axis(7), at)


@given(st.integers(1, 20), st.data())
def test_cut_axis_gives_the_positions_asked_for(size: int, data: st.DataObject) -> None:
    axis = Axis(size)
    for _ in range(3):
        start = data.draw(st.integers(0, size - 1))
        stop = data.draw(st.integers(start + 1, size))
        chosen = cut_axis(axis, start, stop)
        assert sum(leaf.size for leaf in chosen) == stop - start
        position = 0
        for leaf in axis.leaves():
            assert (leaf in chosen) == (start <= position < stop)
            position += leaf.size
        assert position == size


# --- sizes --------------------------------------------------------------------------------------------------


def test_same_size_of_symbols_adds_no_guard() -> None:
    s, t = symbol(5), symbol(5)
    assert same_size(s, s)
    assert not same_size(s, 5)
    assert same_size(s * 4, 4 * s)
    assert not same_size(s * 4, s * 3)
    assert expression(s) == s.node.expr
    assert expression(7) == 7
    assert t is not s


# --- reshape ------------------------------------------------------------------------------------------------

GROUPS = {
    "split heads": ([2, 185, 32], [2, 185, 4, 8], [([0], [0]), ([1], [1]), ([2], [2, 3])]),
    "join heads": ([2, 185, 4, 8], [2, 185, 32], [([0], [0]), ([1], [1]), ([2, 3], [2])]),
    "flatten batch": ([2, 185, 32], [370, 32], [([0, 1], [0]), ([2], [1])]),
    "a flat grid": ([2, 32, 12, 12], [2, 32, 144], [([0], [0]), ([1], [1]), ([2, 3], [2])]),
    "collisions": ([4, 4, 16], [4, 4, 4, 4], [([0], [0]), ([1], [1]), ([2], [2, 3])]),
    "batch times heads": ([2, 4, 8, 8], [8, 8, 8], [([0, 1], [0]), ([2], [1]), ([3], [2])]),
    "regrouping": ([6, 4], [8, 3], [([0, 1], [0, 1])]),
    "everything": ([2, 3, 4], [24], [([0, 1, 2], [0])]),
    "a scalar": ([1, 1], [], [([0], []), ([1], [])]),
}


@pytest.mark.parametrize(("sources", "results", "expected"), GROUPS.values(), ids=GROUPS.keys())
def test_reshape_groups(sources: list[int], results: list[int], expected: list) -> None:
    found = [(list(a), list(b)) for a, b in reshape_groups(sources, results)]
    assert found == expected


def test_reshape_groups_with_a_symbolic_batch() -> None:
    s = symbol()
    assert [(list(a), list(b)) for a, b in reshape_groups([s, 7, 32], [s * 7, 4, 8])] == [
        ([0, 1], [0]),
        ([2], [1, 2]),
    ]
    assert [(list(a), list(b)) for a, b in reshape_groups([s * 4, 7, 8], [s, 4, 7, 8])] == [
        ([0], [0, 1]),
        ([1], [2]),
        ([2], [3]),
    ]


@given(st.lists(st.integers(1, 6), min_size=1, max_size=4), st.integers(0, 2**32 - 1))
def test_reshape_groups_are_whole_and_in_order(factors: list[int], seed: int) -> None:
    rng = np.random.default_rng(seed)

    def split(numbers: list[int]) -> list[int]:
        sizes: list[int] = []
        for number in numbers:
            if sizes and rng.random() < 0.4:
                sizes[-1] *= number
            else:
                sizes.append(number)
        return sizes

    sources, results = split(factors), split(factors)
    groups = [(list(a), list(b)) for a, b in reshape_groups(sources, results)]
    assert [i for a, _ in groups for i in a] == list(range(len(sources)))
    assert [j for _, b in groups for j in b] == list(range(len(results)))
    for a, b in groups:
        assert np.prod([sources[i] for i in a], dtype=int) == np.prod([results[j] for j in b], dtype=int)


def test_impossible_reshape() -> None:
    with pytest.raises(AxisConflict, match="cannot reshape"):
        list(reshape_groups([2, 3], [7]))


# --- kinds --------------------------------------------------------------------------------------------------


def test_tokens() -> None:
    axis = Tokens((Segment("text", 40), Segment(None, 1), Segment("image", 144)))
    assert axis.size == 185
    assert axis.streams == ("text", "image")
    assert [axis.offset(s) for s in axis.streams] == [0, 41]
    assert str(axis) == "[text:40 | learned:1 | image:144]"
    with pytest.raises(KeyError):
        axis.offset("audio")


def test_product() -> None:
    axis = Product((Fixed(2), Tokens((Segment("text", 7),))))
    assert axis.size == 14
    assert axis.streams == ("text",)
    assert str(axis) == "(2 x [text:7])"


def test_every_constraint_says_which_dimensions_it_speaks_of() -> None:
    graph = fx.Graph()
    a, b, c = (Dim(graph.placeholder(name), 0) for name in "abc")
    assert constraint_dims(Same(a, b)) == (a, b)
    assert constraint_dims(Concat(a, (b, c))) == (a, b, c)
    assert constraint_dims(Reshape((a,), (b, c))) == (a, b, c)
    assert constraint_dims(Slice(a, b, 0, 1, 2, 3)) == (a, b)
    assert constraint_dims(Select(a, 0, 2)) == (a,)
    assert constraint_dims(Reduce(a)) == constraint_dims(Summed(a)) == constraint_dims(ByPosition(a)) == (a,)
    assert constraint_dims(Literal(a, 1)) == (a,)
    assert constraint_dims(Seed((a, b), "image")) == (a, b)
