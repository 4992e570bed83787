"""Inputs of exported programs: those a `torch.export` archive takes, carries, and has written into its graph."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves, tree_unflatten

from ..errors import CaptureError, UsageError
from .inputs import check_names, describe


def exported_inputs(exported: ExportedProgram) -> dict[str, Tensor]:
    """The inputs of an exported program by argument name, as fake tensors (a symbolic size is a `SymInt`).

    Those that the trace has written into the graph (`fixed_inputs`) are real tensors.

    Raises CaptureError where they are not a flat list of tensors or a size other than the batch is symbolic.
    """
    nodes = {node.name: node for node in exported.graph.nodes if node.op == "placeholder"}
    users = exported.graph_signature.user_inputs
    leaves = [nodes[name].meta["val"] if name in nodes else name for name in users]
    args, kwargs = tree_unflatten(leaves, exported.call_spec.in_spec)
    signature = exported.module_call_graph[0].signature
    names = list((signature.forward_arg_names if signature else None) or users)
    tensors = [_as_fixed(value) for value in (*args, *kwargs.values())]
    if len(names) != len(tensors) or not all(isinstance(tensor, Tensor) for tensor in tensors):
        raise CaptureError(
            "The torch.export archive does not take plain tensors: its inputs are nested, constant or None "
            f"({', '.join(str(name) for name in names)}). Export the model again with one tensor for each "
            "argument."
        )
    for name, tensor in zip(names, tensors, strict=True):
        symbolic = [i for i, size in enumerate(tensor.shape) if i > 0 and not isinstance(size, int)]
        if symbolic:
            raise CaptureError(
                f"The input {name} of the torch.export archive has a symbolic size in dimension "
                f"{symbolic[0]}, but only the batch (dimension 0) may be symbolic: token counts are fixed. "
                "Export it again with fixed sizes."
            )
    return dict(zip(names, tensors, strict=True))


def _as_fixed(value: Any) -> Any:
    """A tensor of nested lists of numbers; anything else as it is."""
    numbers = tree_leaves(value)
    if isinstance(value, list | tuple) and numbers and all(isinstance(number, int | float) for number in numbers):
        return torch.tensor(value)
    return value


def fixed_inputs(exported: ExportedProgram) -> dict[str, Tensor]:
    """Inputs whose numbers the model looked at while it was traced (the sizes of LLaVA-NeXT's images), by name."""
    return {name: t for name, t in exported_inputs(exported).items() if not isinstance(t, FakeTensor)}


def example_inputs(exported: ExportedProgram) -> dict[str, Tensor]:
    """The example inputs that an exported program carries, by argument name.

    Raises UsageError where it carries none.
    """
    names = list(exported_inputs(exported))
    args, kwargs = exported.example_inputs or ((), {})
    values = {**dict(zip(names, args, strict=False)), **kwargs}
    if list(values) != names:
        raise UsageError(
            "The torch.export archive holds no example inputs, so sample inputs must be given: an .npz file "
            f"with the arrays {', '.join(names)}."
        )
    return values


def check_exported_inputs(exported: ExportedProgram, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """`inputs` in the order of the exported program's arguments.

    Raises UsageError where a name, dtype or fixed size differs.
    """
    expected = exported_inputs(exported)
    wanted = inspect.Parameter.empty
    parameters = {name: inspect.Parameter("_", inspect.Parameter.KEYWORD_ONLY, default=wanted) for name in expected}
    check_names("The torch.export archive", parameters, inputs, open_ended=False)
    for name, value in expected.items():
        given = inputs[name]
        sizes = [size if isinstance(size, int) else given.shape[0] for size in value.shape] if given.ndim else []
        if given.dtype != value.dtype or list(given.shape) != sizes:
            raise UsageError(
                f"The torch.export archive was exported with {name} {describe(value)}; found "
                f"{describe(given)}. An archive runs with the shapes it was exported with."
            )
        if not isinstance(value, FakeTensor) and not torch.equal(given.cpu(), value):
            raise UsageError(
                f"{name} was {value.tolist()} when the model was traced, and the graph is for that alone; found "
                f"{given.tolist()}. Export it again with these."
            )
    batches = {
        name: inputs[name].shape[0] for name, t in expected.items() if t.ndim and not isinstance(t.shape[0], int)
    }
    if len(set(batches.values())) > 1:
        raise UsageError(
            "The inputs of the torch.export archive differ in their batch size (dimension 0): "
            f"{', '.join(f'{name} has {size}' for name, size in batches.items())}."
        )
    return {name: inputs[name] for name in expected}
