"""Cost: when less arithmetic is worth what it takes to get there. The one model of it, for all passes."""

from __future__ import annotations

from math import prod

from torch import fx

from .axes import Size
from .operators import ATTENTION, PRODUCTS
from .rules import node_arg, shape

MULTIPLY_ADDS_PER_COPY = 64
"""What copying one number costs: about the arithmetic a processor does meanwhile."""
SMALL_PRODUCTS = 2
"""How many times as long a multiply-add takes in small products as in large ones."""


def pays(saved: float, added: float = 0, copied: int = 0) -> bool:
    """Whether it is less work, by multiply-adds that are saved and added and numbers that are copied."""
    return saved > added + MULTIPLY_ADDS_PER_COPY * copied


def multiply_adds(node: fx.Node) -> int:
    """Of a matrix product or fused attention, for one sample of an open batch; 0 of any other operator."""
    if node.target is ATTENTION:
        query, key = node_arg(node, 0), node_arg(node, 1)
        return number(shape(key)[-2]) * (numbers(query) + numbers(node))
    if node.target not in PRODUCTS:
        return 0
    left = node_arg(node, PRODUCTS[node.target])
    return numbers(node) * number(shape(left)[-1])


def numbers(node: fx.Node) -> int:
    """Size of a value; an open batch counts as 1, here and in products alike."""
    return prod(map(number, shape(node)))


def number(size: Size) -> int:
    """A size; 1 for an open one."""
    return size if isinstance(size, int) else 1
