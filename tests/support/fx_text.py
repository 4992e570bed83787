"""An fx graph as text, one node a line, as the documentation of a pass shows it: `%name: op(arguments) -> shape`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx
from torch.utils._pytree import tree_leaves


def fx_text(module: fx.GraphModule) -> str:
    """The nodes of a graph, in order; of parameters and other attributes, only where they are read.

    Values are numbered by operator (`%linear`, `%linear_1`), an argument is a value, a parameter by its name, or as
    Python writes it. A symbolic size is written as it is.
    """
    names: dict[fx.Node, str] = {}
    lines = []
    for node in module.graph.nodes:
        if node.op == "get_attr":
            names[node] = str(node.target)
            continue
        names[node] = f"%{_unused(_operator(module, node), names)}"
        if node.op == "placeholder":
            lines.append(f"{names[node]} -> {_shape(node)}")
        elif node.op == "output":
            lines.append(f"return {', '.join(_argument(leaf, names) for leaf in tree_leaves(node.args))}")
        else:
            given = [_argument(a, names) for a in node.args]
            given += [f"{name}={_argument(a, names)}" for name, a in node.kwargs.items()]
            lines.append(f"{names[node]}: {_operator(module, node)}({', '.join(given)}) -> {_shape(node)}")
    return "\n".join(lines)


def _operator(module: fx.GraphModule, node: fx.Node) -> str:
    """`linear` of aten's operators, `ApplyMap` of a module; the name of an input."""
    if node.op == "call_function":
        packet = getattr(node.target, "overloadpacket", node.target)
        return str(packet.__name__)
    if node.op == "call_module":
        return type(module.get_submodule(str(node.target))).__name__
    return str(node.target)


def _unused(name: str, names: dict[fx.Node, str]) -> str:
    taken = set(names.values())
    numbered = (name if count == 0 else f"{name}_{count}" for count in range(len(taken) + 1))
    return next(candidate for candidate in numbered if f"%{candidate}" not in taken)


def _argument(value: Any, names: dict[fx.Node, str]) -> str:
    if isinstance(value, fx.Node):
        return names[value]
    if isinstance(value, list | tuple):
        return f"[{', '.join(_argument(x, names) for x in value)}]"
    return str(value)


def _shape(node: fx.Node) -> str:
    value = node.meta.get("val")
    if isinstance(value, Tensor):
        return f"[{', '.join(map(str, value.shape))}]"
    if isinstance(value, list | tuple):
        return ", ".join(f"[{', '.join(map(str, x.shape))}]" for x in value)
    return "?" if value is None else type(value).__name__
