"""The rule table: the axes that come out of each operator (`rule_cases.py`), and what a rule says of literals."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
from torch import Tensor, fx

import pumer_compile.analysis.marks  # registers the rules of marks
import pumer_compile.frontends.gated_delta_rule  # noqa: F401  # and that of linear attention
from pumer_compile.analysis.annotate import Annotation, annotate
from pumer_compile.analysis.axes import ByPosition, Dim, Literal, Reduce, Same, Seed, Select, Slice
from pumer_compile.analysis.operators import overloads
from pumer_compile.analysis.rules import _RULES, argument, rule, rule_for, wrap
from pumer_compile.errors import NoRuleError
from tests.support.rule_cases import CASES, Builder, P, T, X, build, finish

pytestmark = pytest.mark.fast

aten = torch.ops.aten


@pytest.mark.parametrize("name", CASES)
def test_axes(name: str) -> None:
    target, specs, arguments, expected, said = CASES[name]
    result = build(target, specs, arguments)
    assert [" ".join(axes) for axes in result.axes()] == expected
    assert result.said_of_tokens() - {"Reshape", "Literal"} == said


def test_every_rule_has_a_case() -> None:
    """Rules by name; some have tests of their own, below and (the marks of a prompt) in test_prompt.py,
    test_arrangement.py, architectures/test_prompt_rows.py (deepstack; an image in several blocks) and
    frontends/test_gated_delta_rule.py."""
    own = {"filled", "arange", "getitem", "sym_size", "conv2d", "_visual_tokens", "_with_separators", "rearranged"}
    own |= {"_same_tokens", "_held_places", "_heard_tokens", "_with_text", "_delta_rule"}
    covered = {rule_for(build(*case[:3]).node).__name__ for case in CASES.values()}
    assert covered | own == {function.__name__ for function in _RULES.values()}


@pytest.mark.parametrize("name", ["sdpa with a mask", "masked_fill", "where", "add", "baddbmm", "cross_entropy"])
def test_axes_spread_backwards(name: str) -> None:
    """What meets tokens is tokens: a mask or a table whose axis was unknown before."""
    target, specs, arguments, *_ = CASES[name]
    result = build(target, specs, arguments)
    backwards = {
        "sdpa with a mask": (3, ["2", "1", T, P]),
        "masked_fill": (1, ["2", "1", "1", P]),
        "where": (1, ["2", T, "8"]),
        "add": (1, ["2", T, "8"]),
        "baddbmm": (0, ["2", "1", P]),
        "cross_entropy": (1, ["2", T]),
    }[name]
    node = result.inputs[backwards[0]]
    assert [str(a) for a in result.annotation.axes(node)] == backwards[1]


def test_values_of_sdpa_and_keys_are_the_same_tokens() -> None:
    target, specs, arguments, *_ = CASES["sdpa"]
    result = build(target, specs, arguments)
    assert str(result.annotation.axis(Dim(result.inputs[2], 2))) == P


# --- literals -----------------------------------------------------------------------------------------------

LITERALS = {
    "view": (aten.view.default, [X], lambda x: (x, [2, 7, 4, 2]), {(1, 0), (1, 1), (1, 2), (1, 3)}),
    "view with -1": (aten.view.default, [X], lambda x: (x, [2, -1, 8]), {(1, 0), (1, 2)}),
    "reshape": (aten.reshape.default, [X], lambda x: (x, [14, 8]), {(1, 0), (1, 1)}),
    "unflatten": (aten.unflatten.int, [X], lambda x: (x, 1, [1, 7]), {(2, 0), (2, 1)}),
    "unflatten with -1": (aten.unflatten.int, [X], lambda x: (x, 2, [-1, 4]), {(2, 1)}),
    "narrow all": (aten.narrow.default, [X], lambda x: (x, 1, 0, 7), {(3, None)}),
    "expand": (aten.expand.default, ["1 text:7 1"], lambda x: (x, [2, 7, -1]), {(1, 0), (1, 1)}),
    "new_ones": (aten.new_ones.default, [X], lambda x: (x, [2, 7]), {(1, 0), (1, 1)}),
}


@pytest.mark.parametrize("name", LITERALS)
def test_literals(name: str) -> None:
    target, specs, arguments, expected = LITERALS[name]
    result = build(target, specs, arguments)
    literals = [c for c in result.annotation.constraints[result.node] if isinstance(c, Literal)]
    assert {(c.arg, c.item) for c in literals} == expected
    for c in literals:
        given = result.node.args[c.arg]
        assert (given if c.item is None else given[c.item]) in (result.node.meta["val"].shape[c.result.index], -1)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (lambda x: (x, 1, 2, 5), (2, 5)),
        (lambda x: (x, 1, -3), (4, 7)),
        (lambda x: (x, 1, None, -2), (0, 5)),
        (lambda x: (x, 1, 5, 100), (5, 7)),
        (lambda x: (x, 1, -100, 3), (0, 3)),
    ],
)
def test_slices_know_their_positions(arguments, expected: tuple[int, int]) -> None:
    result = build(aten.slice.Tensor, [X], arguments)
    (found,) = [c for c in result.annotation.constraints[result.node] if isinstance(c, Slice)]
    assert (found.start, found.stop) == expected


@pytest.mark.parametrize(("index", "expected"), [(0, 0), (3, 3), (-1, 6), (-7, 0)])
def test_selects_know_their_position(index: int, expected: int) -> None:
    result = build(aten.select.int, [X], lambda x: (x, 1, index))
    (found,) = [c for c in result.annotation.constraints[result.node] if isinstance(c, Select)]
    assert found.index == expected


# --- constants ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("target", "args"),
    [
        (aten.zeros.default, ([2, 7, 8],)),
        (aten.ones.default, ([2, 7, 8],)),
        (aten.full.default, ([2, 7, 8], 0.5)),
        (aten.empty.memory_format, ([2, 7, 8],)),
    ],
)
def test_constants_of_a_literal_shape(target: Any, args: tuple) -> None:
    builder = Builder()
    x = builder.seeded(X, 0)
    constant = builder.call(target, *args)
    result = finish(builder, builder.call(aten.mul.Tensor, constant, x), [x])
    assert [str(a) for a in result.annotation.axes(constant)] == ["2", T, "8"]
    said = result.annotation.constraints[constant]
    assert {(c.arg, c.item) for c in said if isinstance(c, Literal)} == {(0, 0), (0, 1), (0, 2)}


@pytest.mark.parametrize(
    ("target", "args", "literal"),
    [
        (aten.arange.default, (7,), True),
        (aten.arange.start, (0, 7), False),
        (aten.arange.start_step, (0, 14, 2), False),
    ],
)
def test_ranges(target: Any, args: tuple, literal: bool) -> None:
    builder = Builder()
    x = builder.seeded("2 text:7", 0)
    positions = builder.call(target, *args)
    result = finish(builder, builder.call(aten.add.Tensor, x, positions), [x])
    assert [str(a) for a in result.annotation.axes(positions)] == [T]
    assert result.annotation.constraints[positions] == ([Literal(Dim(positions, 0), 0)] if literal else [])


@pytest.mark.parametrize("adds_zero", [False, True])
def test_counting_over_a_whole_dimension_keeps_its_axis(adds_zero: bool) -> None:
    """`mask[batch[:, None, None, None], positions[None, None, None, :]]`, as transformers writes its masks."""
    builder = Builder()
    mask = builder.seeded("bool 2 text:7", 0)
    rows, columns = builder.call(aten.arange.default, 2), builder.call(aten.arange.default, 7)
    if adds_zero:
        columns = builder.call(aten.add.Tensor, columns, 0)
    for dim in (1, 2, 3):
        rows = builder.call(aten.unsqueeze.default, rows, dim)
        columns = builder.call(aten.unsqueeze.default, columns, 0)
    node = builder.call(aten.index.Tensor, mask, [rows, columns])
    result = finish(builder, node, [mask])
    assert result.axes() == [["2", "1", "1", T]]
    assert result.said_of_tokens() == set()


def test_counting_over_a_part_does_not() -> None:
    builder = Builder()
    x = builder.seeded("2 text:7", 0)
    some = builder.call(aten.arange.default, 6)
    rows = builder.call(aten.unsqueeze.default, builder.call(aten.arange.default, 2), 1)
    result = finish(builder, builder.call(aten.index.Tensor, x, [rows, some]), [x])
    assert result.axes() == [["2", "6"]]
    assert result.said_of_tokens() == {"ByPosition"}


def index_by(builder: Builder, x: fx.Node, index: fx.Node) -> Any:
    return finish(builder, builder.call(aten.index.Tensor, x, [None, index]), [x])


def test_counting_from_another_number_does_not() -> None:
    builder = Builder()
    x = builder.seeded("2 text:7", 0)
    shifted = builder.call(aten.add.Tensor, builder.call(aten.arange.default, 7), -1)
    result = index_by(builder, x, shifted)
    assert result.axes() == [["2", "7"]]
    assert result.said_of_tokens() == {"ByPosition"}


def test_counting_in_rows_does_not() -> None:
    builder = Builder()
    x = builder.seeded("2 text:14", 0)
    result = index_by(builder, x, builder.call(aten.view.default, builder.call(aten.arange.default, 14), [2, 7]))
    assert result.axes() == [["2", "2", "7"]]
    assert result.said_of_tokens() == {"ByPosition"}


@pytest.mark.parametrize("goes", ["stretched", "squeezed"])
def test_one_token_may_go(goes: str) -> None:
    """The first token beside all others, or alone: its axis is followed no further, and that is no error."""
    builder = Builder()
    x = builder.seeded(X, 0)
    first = builder.call(aten.slice.Tensor, x, 1, 0, 1)
    others = builder.seeded("2 5 8", 1)
    if goes == "stretched":
        node = builder.call(aten.add.Tensor, first, others)
    else:
        node = builder.call(aten.squeeze.dim, first, 1)
    result = finish(builder, node, [first, others])
    assert [str(a) for a in result.annotation.axes(first)] == ["2", "[text:1]", "8"]
    assert result.axes() == [["2", "5", "8"] if goes == "stretched" else ["2", "8"]]
    assert result.said_of_tokens() == {"Reduce"}


# --- what is summed over together -----------------------------------------------------------------------------------

SUMMED = {
    "linear": {((0, 2), (1, 1))},
    "matmul over tokens": {((0, 3), (1, 2))},
    "addmm": {((1, 1), (2, 0))},
    "einsum over tokens": {((0, 3), (1, 1))},
    "sdpa": {((0, 3), (1, 3)), ((1, 2), (2, 2))},
    "cross_entropy": {((0, 0), (1, 0)), ((0, 2), (1, 1))},
}


@pytest.mark.parametrize("name", SUMMED)
def test_what_is_summed_over_together_is_not_aligned(name: str) -> None:
    """A value from before a reducer beside one from behind it: the map of neither makes the sum right."""
    target, specs, arguments, *_ = CASES[name]
    result = build(target, specs, arguments)
    ends = [(c.a, c.b) for c in result.annotation.constraints[result.node] if isinstance(c, Same) and not c.aligns]
    named = {tuple(sorted((result.inputs.index(d.node), d.index) for d in pair)) for pair in ends}
    assert named == SUMMED[name]


# --- several outputs ----------------------------------------------------------------------------------------


def test_getitem_takes_the_axes_of_its_output() -> None:
    builder = Builder()
    x = builder.seeded("3 text:7 image:5", 0)
    both = builder.call(aten.unbind.int, x)
    result = finish(builder, builder.call(operator.getitem, both, 2), [x])
    assert result.axes() == [[T, P]]


def test_getitem_of_a_positions_output() -> None:
    builder = Builder()
    x = builder.seeded("2 text:7 8", 0)
    both = builder.call(aten.max.dim, x, 2)
    result = finish(builder, builder.call(operator.getitem, both, 1), [x])
    assert result.axes() == [["2", T]]


# --- seeds --------------------------------------------------------------------------------------------------


def annotated(builder: Builder, node: fx.Node) -> Annotation:
    return finish(builder, node, []).annotation


def test_ids_from_an_input_are_text() -> None:
    builder = Builder()
    table = builder.placeholder(torch.randn(9, 4), "table")
    ids = builder.placeholder(torch.zeros(2, 7, dtype=torch.int32), "ids")
    ids = builder.call(aten.to.dtype, ids, torch.int64)
    node = builder.call(aten.embedding.default, table, ids)
    annotation = annotated(builder, node)
    assert [str(a) for a in annotation.axes(node)] == ["2", T, "4"]
    assert annotation.streams == {"text": 7}


def test_computed_ids_are_no_text() -> None:
    """Positions and kinds are looked up too; only what the user gives is text."""
    builder = Builder()
    table = builder.placeholder(torch.randn(9, 4), "table")
    node = builder.call(aten.embedding.default, table, builder.call(aten.arange.default, 7))
    assert annotated(builder, node).streams == {}


CONVOLUTIONS = {
    "patches": ([2, 2], [0, 0], (4, 6)),
    "overlapping": ([1, 1], [0, 0], (7, 11)),
    "gaps": ([3, 3], [0, 0], (3, 4)),
    "padded": ([2, 2], [1, 1], (5, 7)),
}


@pytest.mark.parametrize("name", CONVOLUTIONS)
def test_convolutions_seed_a_grid(name: str) -> None:
    stride, padding, (height, width) = CONVOLUTIONS[name]
    builder = Builder()
    pixels = builder.placeholder(torch.randn(2, 3, 8, 12), "pixels")
    weight = builder.placeholder(torch.randn(5, 3, 2, 2), "weight")
    grid = builder.call(aten.conv2d.default, pixels, weight, None, stride, padding)
    node = builder.call(aten.flatten.using_ints, grid, 2)
    annotation = annotated(builder, node)
    assert any(isinstance(c, Seed) for c in annotation.constraints[grid])
    assert annotation.streams == {"image": height * width}
    assert [str(a) for a in annotation.axes(node)] == ["2", "5", f"[image:{height * width}]"]
    # A grid is not yet a sequence of tokens.
    assert [str(a) for a in annotation.axes(grid)] == ["2", "5", str(height), str(width)]


def test_half_a_grid_is_no_stream() -> None:
    builder = Builder()
    pixels = builder.placeholder(torch.randn(2, 3, 8, 12), "pixels")
    weight = builder.placeholder(torch.randn(5, 3, 2, 2), "weight")
    grid = builder.call(aten.conv2d.default, pixels, weight, None, [2, 2])
    node = builder.call(aten.sum.dim_IntList, grid, [3])
    assert annotated(builder, node).streams == {}


def test_a_projection_of_a_grid_is_the_next_grid() -> None:
    """A convolution of one by one after the patches: its cells are the tokens, in one stream."""
    builder = Builder()
    pixels = builder.placeholder(torch.randn(2, 3, 8, 8), "pixels")
    weights = [builder.placeholder(torch.randn(5, c, k, k), f"weight_{k}") for c, k in ((3, 2), (5, 1))]
    patches = builder.call(aten.conv2d.default, pixels, weights[0], None, [2, 2])
    grid = builder.call(aten.conv2d.default, patches, weights[1], None, [1, 1])
    assert annotated(builder, builder.call(aten.flatten.using_ints, grid, 2)).streams == {"image": 16}


# --- symbolic sizes -----------------------------------------------------------------------------------------


class Symbolic(torch.nn.Module):
    """Reads the batch size as a number and reshapes with it."""

    def __init__(self) -> None:
        super().__init__()
        self.words = torch.nn.Embedding(9, 8)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.words(ids)
        batch = x.size(0)
        flat = x.reshape(batch * 7, 8)
        return flat.view(batch, 7, 2, 4).transpose(1, 2)


def test_a_symbolic_batch_is_followed_through_products() -> None:
    shapes = {"ids": {0: torch.export.Dim("batch")}}
    ids = torch.zeros(3, 7, dtype=torch.int64)
    module = torch.export.export(Symbolic(), (), {"ids": ids}, dynamic_shapes=shapes).module(check_guards=False)
    annotation = annotate(module)
    reshape = next(n for n in module.graph.nodes if n.target is aten.reshape.default)
    assert str(annotation.axes(reshape)[0]).endswith(f" x {T})")
    transpose = next(n for n in module.graph.nodes if n.target is aten.transpose.int)
    assert [str(a) for a in annotation.axes(transpose)[1:]] == ["2", T, "4"]
    sizes = [n for n in module.graph.nodes if n.target is aten.sym_size.int]
    assert sizes
    for node in sizes:
        said = annotation.constraints[node]
        assert {type(c) for c in said} == {ByPosition, Reduce}
        assert [c.source.index for c in said if isinstance(c, ByPosition)] == [node.args[1]]


# --- the table itself ---------------------------------------------------------------------------------------


def test_an_operator_has_one_rule() -> None:
    with pytest.raises(ValueError, match="has a rule already"):
        rule(aten.linear.default)(lambda node: [])
    assert _RULES[aten.linear.default].__name__ == "linear"


def test_operators_that_pytorch_tags_as_pointwise_need_no_entry() -> None:
    builder = Builder()
    x = builder.seeded(X, 0)
    node = builder.call(aten.tanh.default, x)
    assert aten.tanh.default not in _RULES
    assert rule_for(node).__name__ == "pointwise"
    assert rule_for(next(iter(x.graph.nodes))) is None


def test_overloads_are_spelled_right() -> None:
    assert aten.sum.dim_IntList in overloads("sum mean")
    with pytest.raises(AttributeError):
        overloads("sum no_such_operator")


def test_wrap_and_argument() -> None:
    assert (wrap(-1, 4), wrap(2, 4), wrap(0, 0)) == (3, 2, 0)
    graph = fx.Graph()
    x = graph.placeholder("x")
    node = graph.call_function(aten.softmax.int, (x,), {"dim": 1})
    assert argument(node, 1, "dim") == 1
    assert argument(node, 0, "self") is x
    assert argument(node, 2, "dtype", "none") == "none"


def test_a_rule_that_forgets_a_token_axis_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(_RULES, aten.tanh.default, lambda node: [Same(Dim(node.args[0], 0), Dim(node, 0))])
    with pytest.raises(NoRuleError, match=r"aten\.tanh\.default.*\[text:7\]"):
        build(aten.tanh.default, [X], lambda x: (x,))


@pytest.mark.parametrize("rank", [2, 3, 4])
def test_a_matrix_of_features_is_an_image(rank: int) -> None:
    """One row for each region; a vector of features is none, and neither is what was computed."""
    builder = Builder()
    features = builder.placeholder(torch.randn([2, 5, 7, 8][4 - rank :]), "features")
    weight = builder.placeholder(torch.randn(4, 8), "weight")
    node = builder.call(aten.linear.default, builder.call(aten.to.dtype, features, torch.float32), weight)
    tokens = {2: {}, 3: {"image": 7}, 4: {}}[rank]
    assert annotated(builder, node).streams == tokens
    computed = Builder()
    features = computed.placeholder(torch.randn(2, 7, 8), "features")
    weight = computed.placeholder(torch.randn(4, 8), "weight")
    node = computed.call(aten.linear.default, computed.call(aten.tanh.default, features), weight)
    assert annotated(computed, node).streams == {}


def test_ids_cut_from_an_input_are_text() -> None:
    """The words without the last one, as a decoder takes them."""
    builder = Builder()
    table = builder.placeholder(torch.randn(9, 4), "table")
    ids = builder.placeholder(torch.zeros(2, 7, dtype=torch.int64), "ids")
    node = builder.call(aten.embedding.default, table, builder.call(aten.slice.Tensor, ids, 1, 0, 6))
    assert annotated(builder, node).streams == {"text": 6}


def test_an_index_of_one_place_keeps_the_axis_of_size_one() -> None:
    """A mask of prompts with one token each, looked up for all pairs of queries and keys."""
    builder = Builder()
    x = builder.placeholder(torch.zeros(4, 1), "x")
    rows = builder.call(aten.view.default, builder.call(aten.arange.default, 4), [4, 1, 1, 1])
    places = builder.call(aten.view.default, builder.call(aten.arange.default, 1), [1, 1, 1, 1])
    node = builder.call(aten.index.Tensor, x, [rows, places])
    index = rule_for(node)
    assert index is not None
    of_x = [(c.a.index, c.b.index) for c in index(node) if isinstance(c, Same) and c.a.node is x]
    assert of_x == [(0, 0), (1, 3)]
