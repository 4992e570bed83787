"""The outputs of a captured graph by name: which there are, and keeping only some; and inputs that it does not read."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._pytree import tree_leaves, tree_structure, tree_unflatten
from transformers.exporters.utils import get_leaf_tensors
from transformers.utils.generic import ModelOutput

from ..errors import UsageError

# From 5.24 on transformers gives the cache as `cache`, and what a tower gives beside its features. Artifacts keep the
# names from before, whichever version they are made with: servers, manifests and decoding steps know these.
_TOWER = re.compile(r"(image|video|audio)_outputs\.(pooler_output\b)?")


def _lasting(name: str) -> str:
    """The name of an output of transformers in artifacts."""
    name = re.sub(r"^cache\b", "past_key_values", name)
    return _TOWER.sub(lambda found: f"{found[1]}_hidden_states" if found[2] else found[0], name)


def lasting_names(named: Iterable[str]) -> dict[str, str]:
    """By the name of each output of transformers, the one that artifacts have for it."""
    found = {name: _lasting(name) for name in named}
    alone = {n for n in found.values() if n.endswith("_hidden_states.0") and f"{n[:-1]}1" not in found.values()}
    return {name: new.removesuffix(".0") if new in alone and new != name else new for name, new in found.items()}


def join_features(module: fx.GraphModule) -> None:
    """Let a model that gives its images' features one by one, and then joins them for itself, give them joined; in
    place."""
    named = output_nodes(module)
    for kind in ("image", "video", "audio"):
        parts = [named[n] for n in named if re.fullmatch(rf"{kind}_hidden_states(\.\d+)?", n)]
        users = parts[0].users if parts else ()
        joined = next((user for user in users if _joins(user, parts)), None)
        if joined is not None:
            while len(joined.users) == 1 and _same(user := next(iter(joined.users)), joined):
                joined = user  # what the text takes, as models before 5.24 gave
            _give_instead(module, {**dict.fromkeys(parts), parts[0]: joined})


def _joins(node: fx.Node, parts: list[fx.Node]) -> bool:
    along = node.args[1] if len(node.args) > 1 else node.kwargs.get("dim", 0)
    return bool(node.target is torch.ops.aten.cat.default and node.args[0] == parts and along == 0)


def _give_instead(module: fx.GraphModule, instead: Mapping[fx.Node, fx.Node | None]) -> None:
    """Return other nodes, or nothing, in place of some."""
    output = module.graph.output_node()
    output.args = fx.map_arg(output.args, lambda node: instead.get(node, node))
    module.recompile()


def _same(node: fx.Node, source: fx.Node) -> bool:
    """Whether a node is a cast of another that changes nothing."""
    given, made = source.meta.get("val"), node.meta.get("val")
    casts = getattr(node.target, "overloadpacket", None) is torch.ops.aten.to
    return casts and isinstance(given, Tensor) and isinstance(made, Tensor) and given.dtype == made.dtype


def drop_unasked(module: fx.GraphModule) -> None:
    """Let a model's own output be without what a tower gives beside its features, and without the work for it; in
    place. Who wants it names it (`outputs=["image_outputs.last_hidden_state"]`)."""
    named = output_nodes(module)
    unasked = {node for name, node in named.items() if _TOWER.match(name)}
    unasked -= {node for name, node in named.items() if not _TOWER.match(name)}
    if unasked:
        _give_instead(module, dict.fromkeys(unasked))
        module.graph.eliminate_dead_code()
        module.recompile()


def _of_transformers(given: Any) -> bool:
    """Whether an output is a model's of transformers. Its exporter for ONNX makes a dictionary of it, with the names of
    leaves."""
    flat = isinstance(given, Mapping) and any(name.startswith("cache.") or _TOWER.match(name) for name in given)
    return isinstance(given, ModelOutput) or flat


def output_nodes(module: fx.GraphModule) -> dict[str, fx.Node]:
    """The nodes whose tensors a graph module returns, by name: the key or field of the model's output that holds each
    (`logits`, `hidden_states.0`), or `output_<i>` where it has none."""
    leaves = tree_leaves(module.graph.output_node().args[0])
    markers = [torch.empty(0) if isinstance(leaf, fx.Node) else leaf for leaf in leaves]
    nodes = {id(m): leaf for m, leaf in zip(markers, leaves, strict=True) if isinstance(leaf, fx.Node)}
    info = getattr(module.graph._codegen, "pytree_info", None)
    spec = None if info is None else info.out_spec
    given = markers if spec is None else tree_unflatten(markers, spec)
    named = get_leaf_tensors(given)
    if _of_transformers(given):
        lasting = lasting_names(named)
        named = {lasting[name]: marker for name, marker in named.items()}
    return {name or f"output_{i}": nodes[id(marker)] for i, (name, marker) in enumerate(named.items())}


def model_outputs(given: Any) -> dict[str, Tensor]:
    """The tensors of what a model itself returns, by the names that artifacts have for them; features that it gives
    image by image are joined."""
    named: dict[str, Tensor] = get_leaf_tensors(given)
    if _of_transformers(given):
        lasting = lasting_names(named)
        named = {lasting[name]: tensor for name, tensor in named.items()}
    found = {name or f"output_{i}": tensor for i, (name, tensor) in enumerate(named.items())}
    for kind in ("image", "video", "audio"):
        parts = [t for n, t in found.items() if re.fullmatch(rf"{kind}_hidden_states\.\d+", n)]
        if parts and f"{kind}_hidden_states" not in found and len({tuple(t.shape[1:]) for t in parts}) == 1:
            found[f"{kind}_hidden_states"] = torch.cat(parts)
    return found


def artifact_outputs(module: fx.GraphModule, inputs: Collection[str]) -> list[str]:
    """The names that an artifact gives the outputs of a graph module: a graph may not name an output like an input."""
    return [f"output.{name}" if name in inputs else name for name in output_nodes(module)]


def set_outputs(module: fx.GraphModule, outputs: Mapping[str, Any]) -> None:
    """Make a graph module return a dictionary of given nodes."""
    module.graph.output_node().args = (tuple(outputs.values()),)
    set_output_names(module.graph, list(outputs))
    module.graph.eliminate_dead_code()
    module.recompile()


# What gives the value it takes, perhaps in other memory: converters leave these out.
_AS_IT_IS = ("clone", "detach", "alias", "contiguous", "lift_fresh", "lift_fresh_copy", "positive", "dropout")


def outputs_apart(module: fx.GraphModule) -> None:
    """Let every output of a graph module be a value of its own; in place. In an artifact a value has one name, so one
    that is an input, or is returned twice, is copied."""
    output = module.graph.output_node()
    taken = set(module.graph.find_nodes(op="placeholder"))

    def apart(node: fx.Node) -> fx.Node:
        value = _value_of(node)
        if value not in taken:
            taken.add(value)
            return node
        with module.graph.inserting_before(output):
            return _copied(node)

    output.args = fx.map_arg(output.args, apart)
    module.recompile()


def _value_of(node: fx.Node) -> fx.Node:
    """The node whose value a node gives on."""
    while node.op == "call_function" and node.all_input_nodes:
        source, packet = node.all_input_nodes[0], getattr(node.target, "overloadpacket", None)
        if not (getattr(packet, "__name__", "") in _AS_IT_IS or _same(node, source)):
            break
        node = source
    return node


def _copied(node: fx.Node) -> fx.Node:
    """A copy in a form that no converter takes for the value itself: a join of one part."""
    graph, value = node.graph, node.meta.get("val")
    whole = not (isinstance(value, Tensor) and value.ndim == 0)
    part = node if whole else graph.call_function(torch.ops.aten.unsqueeze.default, (node, 0))
    joined = graph.call_function(torch.ops.aten.cat.default, ([part],))
    return joined if whole else graph.call_function(torch.ops.aten.squeeze.dim, (joined, 0))


def set_output_names(graph: fx.Graph, names: list[str]) -> None:
    """Say that the values a graph returns are those of a dictionary with these keys, in order."""
    codegen = graph._codegen
    if hasattr(codegen, "pytree_info"):
        spec = tree_structure(dict.fromkeys(names, 0))
        codegen.pytree_info = codegen.pytree_info._replace(out_spec=spec)


def without_inputs(module: fx.GraphModule, names: Collection[str]) -> None:
    """Let a graph module no longer take given inputs (by keyword), which it does not read; in place."""
    if not names:
        return
    info = vars(module.graph._codegen)["pytree_info"]
    placeholders = module.graph.find_nodes(op="placeholder")
    args, kwargs = tree_unflatten(list(placeholders), info.in_spec)
    for name in names:
        module.graph.erase_node(kwargs.pop(name))
    spec = tree_structure((args, kwargs))
    vars(module.graph._codegen)["pytree_info"] = info._replace(
        in_spec=spec, orig_args=[name for name in info.orig_args if name not in names]
    )
    module.recompile()


def with_inputs(module: fx.GraphModule, added: Mapping[str, Tensor]) -> None:
    """Let a graph module take further inputs (by keyword), which it does not read; in place.

    Args:
        module: whose inputs are given by keyword.
        added: what stands for each of them while shapes are propagated, by name.
    """
    info = vars(module.graph._codegen)["pytree_info"]
    placeholders = module.graph.find_nodes(op="placeholder")
    args, kwargs = tree_unflatten(list(placeholders), info.in_spec)
    for name, value in added.items():
        with module.graph.inserting_after([*placeholders, *kwargs.values()][-1]):
            kwargs[name] = module.graph.placeholder(name)
        kwargs[name].meta["val"] = value
    vars(module.graph._codegen)["pytree_info"] = info._replace(
        in_spec=tree_structure((args, kwargs)), orig_args=[*info.orig_args, *added]
    )
    module.recompile()


def select_outputs(module: fx.GraphModule, wanted: Iterable[str]) -> None:
    """Keep only some outputs; the module then returns a dictionary of them.

    Args:
        module: changed in place.
        wanted: names of outputs; `hidden_states` keeps all of `hidden_states.0`, `hidden_states.1`, ...

    Raises:
        UsageError: the model has no such output; the message lists those it has.
    """
    there, kept = output_nodes(module), {}
    for want in wanted:
        named = (want, _lasting(want))
        found = {n: node for n, node in there.items() if n in named or n.startswith(tuple(f"{w}." for w in named))}
        if not found:
            raise UsageError(f"The model has no output {want!r}; it gives {', '.join(there)}.")
        kept.update(found)
    set_outputs(module, {name: node for name, node in there.items() if name in kept})
