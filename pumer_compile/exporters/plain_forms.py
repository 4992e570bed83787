"""Operators in forms that every converter gets right."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from ..analysis.nodes import values
from ..analysis.operators import aten, overloads

_RANGES = frozenset(overloads("arange linspace"))


def use_plain_forms(module: fx.GraphModule) -> None:
    """Replace what converters get wrong, in place; the module computes the same numbers.

    - `squeeze` of a dimension that is not 1 gives its input; ONNX's Squeeze refuses it.
    - a range of floating-point numbers is the constant that PyTorch makes, in double precision: counted in single
      precision it may have another length.
    - sequences that are padded to one length are padded each and stacked; ONNX would write them into an empty tensor.
    """
    for node in list(module.graph.nodes):
        if node.target is aten.squeeze.dim:
            _squeeze(node)
        elif node.target in _RANGES and any(isinstance(x, float) for x in node.args):
            _range(module, node)
        elif node.target is aten.pad_sequence.default:
            node.target = _padded
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
