"""Einsum: products of queries and keys, and of probabilities and values, written as `matmul`. Exact, on any graph.

`einsum("bqhd,bkhd->bhqk", queries, keys)` is a matrix product whatever the order of its letters. Written as one, it is
attention that every pass knows, and a node that every runtime has.
"""

from __future__ import annotations

import string
from dataclasses import dataclass

from torch import fx

from ..analysis.axes import same_size
from ..analysis.nodes import Emitter, copied, depends_on_input
from ..analysis.operators import aten
from ..analysis.rules import argument, list_arg, shape
from .manager import Pass, State


@dataclass(frozen=True)
class _Product:
    """Two operands with the letters of their dimensions, and those of the product in the order of `matmul`."""

    left: fx.Node
    right: fx.Node
    left_letters: str
    right_letters: str
    lead: str
    row: str
    column: str
    summed: str
    result: str


def lower_einsum(captured: fx.GraphModule) -> tuple[fx.GraphModule, int]:
    """A copy of a captured graph with `matmul` in place of each einsum of two values that is one, and how many there
    were; the graph itself where there is none. Einsums with parameters (projections) stay."""
    if not any(map(_product, captured.graph.nodes)):
        return captured, 0
    graph, count = copied(captured.graph), 0
    module = fx.GraphModule(captured, graph)
    for node in list(graph.nodes):
        product = _product(node)
        if product is None:
            continue
        with graph.inserting_before(node):
            node.replace_all_uses_with(_emit(Emitter(node), product))
        graph.erase_node(node)
        count += 1
    graph.lint()
    module.recompile()
    return module, count


def _product(node: fx.Node) -> _Product | None:
    """How an einsum is a batch of matrix products; None where it is none."""
    if node.target is not aten.einsum.default:
        return None
    operands: list[fx.Node] = list_arg(node, 1)
    letters = _letters(str(argument(node, 0)), operands)
    if letters is None or not all(map(depends_on_input, operands)):
        return None
    (a, b), result = letters
    summed = [x for x in a if x in b and x not in result]
    own = [[x for x in result if x in mine and x not in other] for mine, other in ((a, b), (b, a))]
    plain = all(len(set(x)) == len(x) for x in (a, b)) and set(a + b) - set(result) == set(summed)
    if not plain or len(summed) != 1 or not all(own) or not any(x in b for x in a if x in result):
        return None
    if not same_size(shape(operands[0])[a.index(summed[0])], shape(operands[1])[b.index(summed[0])]):
        return None
    if result.index(own[0][-1]) > result.index(own[1][-1]):
        operands, (a, b), own = operands[::-1], (b, a), own[::-1]
    row, column = own[0][-1], own[1][-1]
    lead = "".join(x for x in dict.fromkeys(a + b) if x in result and x not in (row, column))
    left, right = operands
    return _Product(left, right, a, b, lead, row, column, summed[0], result)


def _letters(equation: str, operands: list[fx.Node]) -> tuple[list[str], str] | None:
    """Letters of two operands and of the result, with some for an ellipsis and those that are implied."""
    left, arrow, result = equation.replace(" ", "").partition("->")
    given = left.split(",")
    if len(operands) != 2 or len(given) != 2:
        return None
    if not arrow:
        both = left.replace(",", "").replace("...", "")
        result = ("..." if "..." in left else "") + "".join(sorted(x for x in both if both.count(x) == 1))
    open_ranks = [len(shape(x)) - len(g.replace("...", "")) for x, g in zip(operands, given, strict=True)]
    free = [x for x in string.ascii_letters if x not in equation][: max(open_ranks)]
    filled = [
        g.replace("...", "".join(free[len(free) - n :] if n else [])) for g, n in zip(given, open_ranks, strict=True)
    ]
    return filled, result.replace("...", "".join(free))


def _emit(emit: Emitter, product: _Product) -> fx.Node:
    p = product
    left = _arranged(emit, p.left, p.left_letters, p.lead + p.row + p.summed)
    right = _arranged(emit, p.right, p.right_letters, p.lead + p.summed + p.column)
    return _arranged(emit, emit(aten.matmul.default, left, right), p.lead + p.row + p.column, p.result)


def _arranged(emit: Emitter, value: fx.Node, letters: str, wanted: str) -> fx.Node:
    """A value with its dimensions in the order of `wanted`, and new ones of size 1 for letters that it has not."""
    order = [letters.index(x) for x in wanted if x in letters]
    if order != list(range(len(letters))):
        value = emit(aten.permute.default, value, order)
    for index, letter in enumerate(wanted):
        if letter not in letters:
            value = emit(aten.unsqueeze.default, value, index)
    return value


class LowerEinsum(Pass):
    """Writes einsums that are matrix products as `matmul`."""

    name = "einsum"
    optional = True

    def run(self, state: State) -> int:
        """See `Pass`; counts einsums."""
        state.captured, matches = lower_einsum(state.captured)
        return matches
