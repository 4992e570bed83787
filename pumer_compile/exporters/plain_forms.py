"""Operators in forms that every converter gets right."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ..analysis.axes import same_size
from ..analysis.nodes import Emitter, values
from ..analysis.operators import aten, overloads
from ..analysis.rules import int_arg, node_arg, shape, wrap

_RANGES = frozenset(overloads("arange linspace"))
_ZEROS = frozenset(overloads("zeros zeros_like new_zeros"))
_ONE_NUMBER = frozenset({aten.scatter.value, aten.scatter_.value})


def use_plain_forms(module: fx.GraphModule) -> None:
    """Replace what converters get wrong, in place; the module computes the same numbers.

    - `squeeze` of a dimension that is not 1 gives its input; ONNX's Squeeze refuses it.
    - a range of floating-point numbers is the constant that PyTorch makes, in double precision: counted in single
      precision it may have another length.
    - sequences that are padded to one length are padded each and stacked; ONNX would write them into an empty tensor.
    - one number that is written into zeros, at one place along a dimension (the one-hot rows of an argmax), is a
      comparison with the numbers of the places; scatters are slow in some runtimes and refused by others.
    """
    for node in list(module.graph.nodes):
        if node.target is aten.squeeze.dim:
            _squeeze(node)
        elif node.target in _RANGES and any(isinstance(x, float) for x in node.args):
            _range(module, node)
        elif node.target is aten.pad_sequence.default:
            node.target = _padded
        elif node.target in _ONE_NUMBER:
            _one_hot(module, node)
    module.graph.lint()
    module.recompile()


def _squeeze(node: fx.Node) -> None:
    source, dim = node.args
    assert isinstance(source, fx.Node) and isinstance(dim, int)
    found = values(source)
    if not found:
        return
    shape = found[0].shape
    if not shape or (isinstance(shape[dim], int) and shape[dim] != 1):
        node.replace_all_uses_with(source)
        node.graph.erase_node(node)


def _one_hot(module: fx.GraphModule, node: fx.Node) -> None:
    zeros, index, number = node_arg(node, 0), node_arg(node, 2), node.args[3]
    rank = len(shape(node))
    dim = wrap(int_arg(node, 1), rank)
    sizes, given = shape(node), shape(index)
    along = all(same_size(1 if i == dim else sizes[i], given[i]) for i in range(rank)) if len(given) == rank else False
    if zeros.target not in _ZEROS or len(zeros.users) > 1 or not along or not isinstance(sizes[dim], int):
        return
    name = f"_places_{node.name}"
    places = torch.arange(int(sizes[dim]), device=values(node)[0].device)
    module.register_buffer(name, places.view([-1 if i == dim else 1 for i in range(rank)]), persistent=False)
    with node.graph.inserting_before(node):
        constant = node.graph.get_attr(name)
        constant.meta = {
            **index.meta,
            "val": values(index)[0].new_empty([sizes[dim] if i == dim else 1 for i in range(rank)]),
        }
        emit = Emitter(node)
        found = emit(aten.to.dtype, emit(aten.eq.Tensor, index, constant), values(node)[0].dtype)
        found = found if number == 1 else emit(aten.mul.Scalar, found, number)
    node.replace_all_uses_with(found)
    node.graph.erase_node(node)
    node.graph.erase_node(zeros)


def _range(module: fx.GraphModule, node: fx.Node) -> None:
    numbers: torch.Tensor = node.target(*node.args, **node.kwargs)  # type: ignore[operator]  # an operator
    name = f"_{node.name}"
    module.register_buffer(name, numbers, persistent=False)
    with node.graph.inserting_before(node):
        constant = node.graph.get_attr(name)
    constant.meta = dict(node.meta)
    node.replace_all_uses_with(constant)
    node.graph.erase_node(node)


def _padded(
    sequences: list[Tensor], batch_first: bool = False, padding_value: float = 0.0, padding_side: str = "right"
) -> Tensor:
    """`pad_sequence`: `[length, ...]` each to `[sequences, longest, ...]`, or `[longest, sequences, ...]`."""
    longest = max(sequence.shape[0] for sequence in sequences)
    ends = [longest - sequence.shape[0] for sequence in sequences]
    rest = [0] * (2 * sequences[0].dim() - 2)
    sides = [[0, end] if padding_side == "right" else [end, 0] for end in ends]
    padded = [
        torch.nn.functional.pad(sequence, [*rest, *side], value=padding_value)
        for sequence, side in zip(sequences, sides, strict=True)
    ]
    return torch.stack(padded, 0 if batch_first else 1)
