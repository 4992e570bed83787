"""Where features leave the vision tower of a model for the projector, which looks at each token by itself."""

from __future__ import annotations

import torch
from torch import fx

from ..errors import AxisError
from .nodes import ancestors, attribute, depends_on_input, describe, module_path, values
from .operators import ATTENTION, JOINS, SOFTMAX, aten, overloads
from .rules import argument, shape

_ATTENTION = SOFTMAX | {ATTENTION}
# What may stand between tower and prompt where tokens of several rows become one stream: each token by itself.
_BY_TOKEN = {
    *overloads(
        "linear gelu relu silu sigmoid tanh mul add div layer_norm rms_norm dropout contiguous clone to _to_copy"
    ),
    *overloads("pow rsqrt alias"),
}


def tower_output(scatter: fx.Node, projected: fx.Node) -> tuple[fx.Node, fx.Node]:
    """The features that leave the tower, and the first learned operator outside of it, which takes them."""
    behind = ancestors(projected) | {projected}
    order = [n for n in projected.graph.nodes if n in behind]
    last = [n for n in order if n.target in _ATTENTION][-1]
    tower = _common([module_path(n) for n in ancestors(last) if _learned(n)])
    after = {last}
    for node in order:
        if node is last or not after & set(node.all_input_nodes):
            continue
        after.add(node)
        path = module_path(node)
        if _learned(node) and not (path == tower or path.startswith(f"{tower}.")):
            features = next(n for n in node.all_input_nodes if n in after)
            if values(features)[0].dim() != 3:
                raise AxisError(
                    f"{describe(node)} takes the features of the vision tower {tower} as "
                    f"{tuple(values(features)[0].shape)}; [images, tokens, width] is expected. "
                    "`method: fastv` reads the language model's own attention."
                )
            return features, node
    raise AxisError(
        f"{describe(scatter)} scatters the output of the vision tower {tower or '(the whole model)'} with no projector "
        "between; where its features leave is not found."
    )


def check_published(features: fx.Node) -> None:
    """What leaves the tower must be tokens of its last attention, without a class token.

    Raises:
        AxisError: several layers side by side, say.
    """
    behind = ancestors(features) | {features}
    last = [n for n in features.graph.nodes if n in behind and n.target in _ATTENTION][-1]
    tokens, node = values(last)[0].shape[-2], features
    while values(node)[0].shape[1] != tokens:
        if node.target is not aten.slice.Tensor or node.args[1] != 1 or not isinstance(node.args[0], fx.Node):
            raise AxisError(
                f"{describe(features)} gives features in which the tokens of {describe(last)} are not found."
            )
        node = node.args[0]
    if node is features and any(_leads_with_learned(n) for n in behind if n.target in JOINS):
        raise AxisError(f"{describe(features)} gives the class token of the vision tower to the prompt.")


def _leads_with_learned(join: fx.Node) -> bool:
    """Whether a class token is joined to tokens."""
    parts = join.args[0]
    if not isinstance(parts, list | tuple) or argument(join, 1, "dim", 0) != 1 or len(parts) < 2:
        return False
    first, *rest = (part for part in parts if isinstance(part, fx.Node))
    return len(shape(first)) == 3 and not depends_on_input(first) and any(map(depends_on_input, rest))


def projector_nodes(scatter: fx.Node, features: fx.Node, projected: fx.Node) -> list[fx.Node]:
    """The projector: what makes `projected` of `features`, in order, each token by itself."""
    behind = ancestors(projected) | {projected}
    after, chain = {features}, []
    for node in projected.graph.nodes:
        if node in behind and after & set(node.all_input_nodes):
            if not _by_token(node, after) or values(node)[0].shape[:2] != values(features)[0].shape[:2]:
                raise not_by_token(scatter, node)
            after.add(node)
            chain.append(node)
    return chain


def _by_token(node: fx.Node, features: set[fx.Node]) -> bool:
    """Whether an operator does the same to every token and mixes none."""
    if node.target not in _BY_TOKEN:
        return False
    if node.target in overloads("layer_norm rms_norm"):
        return len(node.args[1]) == 1  # type: ignore[arg-type]  # the normalized shape
    tables = [values(n)[0].shape for n in node.all_input_nodes if n not in features]
    return node.target in overloads("linear") or all(len(shape) < 2 or shape[-2] == 1 for shape in tables)


def not_by_token(scatter: fx.Node, node: fx.Node) -> AxisError:
    """The error of an operator that is not known to do the same to every token."""
    return AxisError(
        f"{describe(node)} stands between the vision tower and {describe(scatter)}, where the tokens of several images "
        "or crops meet; it is not known to look at each token by itself. `method: fastv` reduces the tokens behind it."
    )


def _learned(node: fx.Node) -> bool:
    """Whether an operator reads a parameter itself."""
    return node.op == "call_function" and any(
        n.op == "get_attr" and isinstance(attribute(n), torch.nn.Parameter) for n in node.all_input_nodes
    )


def _common(paths: list[str]) -> str:
    """The longest module path that all paths lie in."""
    split = [path.split(".") for path in paths]
    shared = []
    for names in zip(*split, strict=False):
        if len(set(names)) > 1:
            break
        shared.append(names[0])
    return ".".join(shared)
