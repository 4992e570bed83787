"""The graph of an exported program as a plain `fx.GraphModule`: without checks, for training too."""

from __future__ import annotations

import inspect
from collections.abc import Mapping

import torch
from torch import Tensor, fx
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves, tree_structure, tree_unflatten

from ..analysis.nodes import describe
from ..errors import CaptureError
from ..frontends import gated_delta_rule
from .blocks import inline_blocks

_CHECKS = frozenset(
    {
        torch.ops.aten._assert_tensor_metadata.default,
        torch.ops.aten._assert_scalar.default,
        torch.ops.aten._assert_async.default,
        torch.ops.aten._assert_async.msg,
        torch.ops.aten.sym_constrain_range.default,
        torch.ops.aten.sym_constrain_range_for_size.default,
    }
)


def plain_graph_module(exported: ExportedProgram) -> fx.GraphModule:
    """The unlifted graph of `exported` as a plain `fx.GraphModule`, without checks of shapes and dtypes.

    The checks would refuse the shapes that reduction gives. `exported.module()` itself cannot be trained (its
    `train` and `eval` raise); the copy shares its graph, parameters and buffers and can. Buffers that are in
    no state dict of the model stay out of the copy's.
    """
    with_parameter = "check_guards" in inspect.signature(exported.module).parameters
    unlifted = exported.module(check_guards=False) if with_parameter else exported.module()
    inline_blocks(unlifted)
    gated_delta_rule.plainly(unlifted)
    for node in list(unlifted.graph.nodes):
        if node.target is torch.ops.aten.arange.start and node.args[0] == 0:
            # The same numbers; with their count alone they follow the tokens that are left.
            node.target, node.args = torch.ops.aten.arange.default, node.args[1:]
        if node.target in _CHECKS or (node.op == "call_module" and node.target == "_guards_fn"):
            _erase(node)
    module = fx.GraphModule(unlifted, unlifted.graph)
    for name, _ in list(module.named_buffers()):
        if name not in exported.state_dict:
            owner, _, buffer = name.rpartition(".")
            module.get_submodule(owner)._non_persistent_buffers_set.add(buffer)
    return module.eval()


def without_numbers(
    module: fx.GraphModule, fixed: Mapping[str, Tensor], sample: Mapping[str, Tensor]
) -> tuple[str, ...]:
    """Let a graph take a tensor, which it does not read, for each input that was traced as numbers; their names."""
    if not fixed:
        return ()
    graph = module.graph
    placeholders = list(graph.find_nodes(op="placeholder"))
    mode = next(n.meta["val"].fake_mode for n in placeholders if isinstance(n.meta.get("val"), Tensor))
    info = vars(graph._codegen)["pytree_info"]
    args, kwargs = tree_unflatten(placeholders, info.in_spec)
    taken = dict(zip(info.orig_args, (*args, *kwargs.values()), strict=True))
    for name in fixed:
        numbers = tree_leaves(taken[name])
        with graph.inserting_before(numbers[0]):
            tensor = graph.placeholder(name)
        tensor.meta["val"] = mode.from_tensor(sample[name], static_shapes=True)
        for node in numbers:
            node.replace_all_uses_with(node.meta["val"])
            graph.erase_node(node)
        taken[name] = tensor
    ordered = list(taken.values())
    spec = tree_structure((tuple(ordered[: len(args)]), dict(zip(kwargs, ordered[len(args) :], strict=True))))
    vars(graph._codegen)["pytree_info"] = info._replace(in_spec=spec)
    module.recompile()
    return tuple(fixed)


def refuse_training(module: fx.GraphModule, remedy: str) -> None:
    """Raise CaptureError where a graph does what models do in training only: draw random numbers for dropout, or take
    the statistics of the batch where a norm has running ones."""
    for node in module.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload) and (fault := _training(node.target, node)):
            raise CaptureError(f"{describe(node)} {fault}, as in training; an artifact would too. {remedy}.")


def _training(target: torch._ops.OpOverload, node: fx.Node) -> str:
    """What an operator does that only training wants, or ''."""
    said = {a.name: a.default_value for a in target._schema.arguments}
    said |= dict(zip(said, node.args, strict=False)) | node.kwargs
    # `native_dropout` takes None for True.
    rate = (
        said.get("dropout_p", 0)
        if "train" not in said
        else said["train"] is not False and said.get("p", said.get("dropout"))
    )
    if rate:
        return f"drops at random (rate {rate:g})"
    if said.get("training", said.get("use_input_stats")) is True:
        if "running_mean" not in said:
            return "draws random slopes"
        return "takes the statistics of the batch" if said["running_mean"] is not None else ""
    return ""


def _erase(node: fx.Node) -> None:
    """Erase a node without users, and what only it used."""
    feeders = node.all_input_nodes
    node.graph.erase_node(node)
    for feeder in feeders:
        if not feeder.users and feeder.op == "call_function" and not feeder.is_impure():
            _erase(feeder)
