"""Loops in the form that OpenVINO's front end takes."""

from __future__ import annotations

from torch import fx
from torch.export import ExportedProgram

from ..analysis.operators import aten

_WHILE = "while_loop"


def carry_everything(program: ExportedProgram) -> ExportedProgram:
    """Let every loop carry the tensors that its steps only read, in place; gives the program.

    OpenVINO's front end counts them among what a step gives anew. A clone gives them back, which OpenVINO sees through:
    nothing is copied.
    """
    module = program.graph_module
    for node in module.graph.nodes:
        if getattr(node.target, "__name__", "") == _WHILE and node.args[3]:
            _carry(module, node)
    module.graph.lint()
    module.recompile()
    return program


def _carry(module: fx.GraphModule, node: fx.Node) -> None:
    more, body, state, fixed = node.args
    assert isinstance(body, fx.Node) and isinstance(state, tuple | list) and isinstance(fixed, tuple | list)
    step = module.get_submodule(str(body.target))
    assert isinstance(step, fx.GraphModule)
    output = step.graph.output_node()
    (after,) = output.args
    assert isinstance(after, tuple | list)
    given = list(step.graph.find_nodes(op="placeholder"))[len(state) :]
    with step.graph.inserting_before(output):
        same = [step.graph.call_function(aten.clone.default, (value,)) for value in given]
    for copy, value in zip(same, given, strict=True):
        copy.meta = dict(value.meta)
    output.args = ((*after, *same),)
    step.recompile()
    node.args = (more, body, (*state, *fixed), ())
    node.meta["val"] = (*node.meta["val"], *(value.meta["val"] for value in fixed if isinstance(value, fx.Node)))
