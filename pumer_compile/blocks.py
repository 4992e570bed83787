"""Blocks of a forward under `torch.autocast`, `torch.no_grad` or `torch.enable_grad`, put into the graph around them.

`torch.export` keeps such a block as a submodule that a higher-order operator calls, without what the block does to its
operators. The passes read one graph of plain operators, so `inline_blocks` puts them there and writes down the rest:
the casts of autocast as `aten.to.dtype`, and the end of gradients as `aten.detach`.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from operator import getitem
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, fx
from torch._dispatch.python import enable_python_dispatcher
from torch._guards import detect_fake_mode
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.amp import autocast_mode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from .analysis.nodes import attribute, describe, values
from .errors import CaptureError

aten = torch.ops.aten
_AUTOCAST, _GRAD = torch.ops.higher_order.wrap_with_autocast, torch.ops.higher_order.wrap_with_set_grad_enabled
_ENTER, _EXIT = autocast_mode._enter_autocast, autocast_mode._exit_autocast
_SET_GRAD = torch._C._set_grad_enabled
_MARKS = {_AUTOCAST, _GRAD, _ENTER, _EXIT, _SET_GRAD}


def inline_blocks(module: fx.GraphModule) -> None:
    """Put the operators of autocast and gradient blocks into the graph, at any depth, in place of the blocks.

    Every value and every gradient stays as it was. What is inlined no longer looks at the block's setting: an autocast
    around a *call* of the graph reaches operators that the model runs with autocast off.

    Args:
        module: an unlifted graph of `torch.export`, or one of `make_fx`, whose nodes carry `meta["val"]`; changed in
            place.

    Raises:
        CaptureError: autocast does to an operator what casts of its inputs do not describe.
    """
    if not any(node.target in _MARKS for node in module.graph.nodes):
        return
    made = _Inliner()
    made.copy(module.graph, {}, _State())
    made.graph.set_codegen(copy.copy(module.graph._codegen))
    module.graph = made.graph
    # What the model itself does not use stays, as in a graph without blocks.
    read = [str(node.target) for node in module.graph.find_nodes(op="get_attr")]
    for block in made.blocks:
        if not any(name.startswith(f"{block}.") for name in read):  # constants of a block stay where they are
            module.delete_submodule(block)
    module.graph.lint()
    module.recompile()


@dataclass(frozen=True)
class _State:
    """What is switched on: the arguments of each `torch.autocast` entered, outermost first, and gradients."""

    autocast: tuple[tuple[Any, ...], ...] = ()
    gradients: bool = True
    outermost: fx.Node | None = None
    """What entered the first autocast."""

    def under(self, entry: fx.Node, setting: tuple[Any, ...]) -> _State:
        """Within one more autocast."""
        return replace(self, autocast=(*self.autocast, setting), outermost=self.outermost or entry)

    @property
    def casts(self) -> bool:
        """Whether autocast is on for any device."""
        last = {device: enabled for device, _, enabled, *_ in self.autocast}
        return any(last.values())


class _Inliner:
    """Copies a graph, its blocks inlined, into a new one."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.blocks: list[str] = []  # submodules that are no longer called
        self._frozen: set[fx.Node] = set()  # made while gradients were off
        self._learned: set[fx.Node] = set()  # computed from a parameter or a floating-point input
        self._made: dict[tuple[Any, ...], fx.Node] = {}  # casts and detached values that are made once

    def copy(self, graph: fx.Graph, env: dict[fx.Node, Any], state: _State, path: str = "") -> Any:
        """Copy the nodes of a graph.

        Args:
            graph: whose placeholders `env` maps, but for the outermost one.
            env: what stands for its nodes in the new graph.
            state: what is switched on around it.
            path: of the submodule it belongs to.

        Returns:
            What it gives.
        """
        entered: dict[fx.Node, _State] = {}
        for node in graph.nodes:
            if node in env:
                continue
            if node.target in (_AUTOCAST, _GRAD):
                env[node] = self._block(node, env, state, path)
            elif node.target is _ENTER:
                entered[node], state = state, state.under(node, node.args)
            elif node.target is _EXIT:
                state = replace(entered[node.args[0]], gradients=state.gradients)
            elif node.target is _SET_GRAD:
                state = replace(state, gradients=bool(node.args[0]))
            elif node.target is getitem and isinstance(env[node.args[0]], list | tuple):
                env[node] = env[node.args[0]][node.args[1]]
            elif node.op == "output" and path:
                return fx.map_arg(node.args[0], env.__getitem__)
            elif not _is_block(node):
                made = self._node(node, env, state, path)
                changed = None if state.gradients else _changed(node)
                # What is changed in place without gradients keeps those it had.
                env[node] = env[changed] if changed and env[changed] not in self._frozen else made
        return None

    def _block(self, call: fx.Node, env: dict[fx.Node, Any], state: _State, path: str) -> Any:
        if call.target is _AUTOCAST:
            setting, block, given = call.args[:4], call.args[4], call.args[5:]
            state = state.under(call, setting)
        else:
            enabled, block, given = call.args[0], call.args[1], call.args[2:]
            state = replace(state, gradients=bool(enabled))
        assert isinstance(block, fx.Node)
        body = attribute(block)
        assert isinstance(body, fx.GraphModule)
        if not path:
            self.blocks.append(str(block.target))
        inner = dict(zip(body.graph.find_nodes(op="placeholder"), fx.map_arg(given, env.__getitem__), strict=True))
        return self.copy(body.graph, inner, state, f"{path}{block.target}.")

    def _node(self, node: fx.Node, env: dict[fx.Node, Any], state: _State, path: str) -> fx.Node:
        args, kwargs = node.args, dict(node.kwargs)
        casts: Mapping[fx.Node, torch.dtype] = {}
        if state.casts and isinstance(node.target, OpOverload):
            casts, added = autocast_of(node, state.autocast)
            kwargs |= added

        changed = node.args[0] if node.args and _is_changed(node) else _changed(node)

        def given(old: fx.Node) -> Any:
            new = env[old]
            ends = new in self._frozen if state.gradients else old is changed and new not in self._frozen
            if ends and new in self._learned and _differentiable(new):
                new = self._once((new,), new, aten.detach.default)
            return self._cast(new, casts[old], state) if old in casts else new

        made = self.graph.create_node(
            node.op,
            f"{path}{node.target}" if node.op == "get_attr" else node.target,
            fx.map_arg(args, given),
            fx.map_arg(kwargs, given),
            node.name,
            node.type,
        )
        made.meta = copy.copy(node.meta)
        if self._is_learned(node, made):
            self._learned.add(made)
        part = node.target is getitem and made.args[0] in self._frozen
        if part or (not state.gradients and node.op == "call_function"):
            self._frozen.add(made)
        return made

    def _is_learned(self, node: fx.Node, made: fx.Node) -> bool:
        """Whether a value can have a gradient, where nothing is frozen: of the tables of a rotary embedding, which are
        made without gradients in every language model, nothing is learned."""
        if node.op == "get_attr":
            return isinstance(attribute(node), torch.nn.Parameter)
        alone = isinstance(made.meta.get("val"), Tensor)
        able = _differentiable(made) if alone else True
        return able and (node.op == "placeholder" or any(given in self._learned for given in made.all_input_nodes))

    def _cast(self, node: fx.Node, dtype: torch.dtype, state: _State) -> fx.Node:
        """Every use of a value is cast by itself, and so are its gradients; a parameter is cast once, as PyTorch keeps
        its casts until the outermost autocast ends."""
        if node.op != "get_attr":
            return self._derived(node, aten.to.dtype, dtype)
        return self._once((node, dtype, state.outermost), node, aten.to.dtype, dtype)

    def _once(self, key: tuple[Any, ...], node: fx.Node, target: OpOverload, *more: Any) -> fx.Node:
        if key not in self._made:
            self._made[key] = self._derived(node, target, *more)
        return self._made[key]

    def _derived(self, node: fx.Node, target: OpOverload, *more: Any) -> fx.Node:
        new = self.graph.call_function(target, (node, *more))
        new.meta = {k: v for k, v in node.meta.items() if k in ("nn_module_stack", "stack_trace")}
        with torch.no_grad():
            new.meta["val"] = target(values(node)[0], *more)
        if target is not aten.detach.default and node in self._learned and _differentiable(new):
            self._learned.add(new)
        return new


def _differentiable(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _changed(node: fx.Node) -> fx.Node | None:
    """What an operator changes in place."""
    first = node.args[0] if node.args else None
    if not isinstance(node.target, OpOverload) or not isinstance(first, fx.Node):
        return None
    alias = node.target._schema.arguments[0].alias_info
    return first if alias is not None and alias.is_write else None


def _is_changed(view: fx.Node) -> bool:
    """Whether a node is a view of what an operator then changes in place through it."""
    if not isinstance(view.target, OpOverload) or not _is_view(view.target):
        return False
    return any(_changed(user) is view or _is_changed(user) for user in view.users)


def _is_block(node: fx.Node) -> bool:
    """Whether a node only reads the submodule of a block."""
    read = node.op == "get_attr" and isinstance(attribute(node), fx.GraphModule)
    return read and all(user.target in (_AUTOCAST, _GRAD) for user in node.users)


# --- autocast ---------------------------------------------------------------------------------------------------------


def autocast_of(
    node: fx.Node, settings: Sequence[tuple[Any, ...]]
) -> tuple[dict[fx.Node, torch.dtype], dict[str, Any]]:
    """What autocast does to an operator, found by watching it run on fake tensors.

    Args:
        node: calls an ATen operator.
        settings: arguments of each `torch.autocast` entered, outermost first.

    Returns:
        The dtypes that its inputs are cast to (an input that stays as it is has none), and arguments by keyword that
        it takes in addition.

    Raises:
        CaptureError: neither describes it.
    """
    target = node.target
    assert isinstance(target, OpOverload)
    fakes = _Fakes(node)
    if _is_view(target) or not any(t.is_floating_point() for t in fakes.tensors.values()):
        return {}, {}
    wanted = fakes.watch(settings=settings)
    direct = {n: wanted.casts[id(t)] for n, t in fakes.tensors.items() if id(t) in wanted.casts}
    low = {dtype for device, dtype, enabled, *_ in settings[-1:] if enabled}
    # Composite operators are cast inside: all of what they take comes to the same.
    every = {n: d for n, t in fakes.tensors.items() for d in low if t.is_floating_point() and t.dtype != d}
    attempts: list[tuple[dict[fx.Node, torch.dtype], dict[str, Any]]] = [(direct, {}), (every, {})]
    if len(direct) < len(wanted.casts):
        attempts.reverse()
    if any(a.name == "dtype" for a in target._schema.arguments) and "dtype" not in node.kwargs:
        attempts.append(({}, {"dtype": torch.float32}))  # CUDA's way with softmax and sums
    for casts, more in attempts:
        with suppress(RuntimeError):  # from an operator that takes inputs of one dtype alone
            if fakes.watch(casts, more).computed == wanted.computed:
                return casts, more
    raise CaptureError(
        f"{describe(node)} runs under torch.autocast, which does more to it than to cast what it takes; no plain graph "
        "says so. Let the model call it outside of the autocast block, or capture the model in one dtype without it."
    )


def _is_view(target: OpOverload) -> bool:
    """Whether an operator computes nothing and only looks at its input otherwise."""
    alias = [a.alias_info for a in target._schema.arguments if a.alias_info is not None]
    return bool(alias) and not any(a.is_write for a in alias)


class _Fakes:
    """An operator's inputs as fake tensors, by node."""

    def __init__(self, node: fx.Node) -> None:
        self.node = node
        found = {n: n.meta.get("val", values(n)[0] if values(n) else None) for n in node.all_input_nodes}
        self.mode = detect_fake_mode(list(found.values())) or FakeTensorMode()
        self.given = {n: self._fake(v) for n, v in found.items()}
        self.tensors = {n: v for n, v in self.given.items() if isinstance(v, Tensor)}

    def _fake(self, value: Any) -> Any:
        return self.mode.from_tensor(value, static_shapes=True) if _is_real(value) else value

    def watch(
        self,
        casts: Mapping[fx.Node, torch.dtype] = MappingProxyType({}),
        more: Mapping[str, Any] = MappingProxyType({}),
        settings: Sequence[tuple[Any, ...]] = (),
    ) -> _Watch:
        """Run it on cast inputs, under autocast."""
        with ExitStack() as stack:
            for context in (torch.no_grad(), self.mode, enable_python_dispatcher()):
                stack.enter_context(context)
            given = {n: v.to(casts[n]) if n in casts else v for n, v in self.given.items()}
            args, kwargs = fx.map_arg((self.node.args, dict(self.node.kwargs)), given.__getitem__)
            for device, dtype, enabled, *_ in settings:
                stack.enter_context(torch.autocast(device, dtype=dtype, enabled=enabled, cache_enabled=False))
            watch = _Watch()
            stack.enter_context(watch)
            self.node.target(*args, **kwargs, **more)  # type: ignore[operator]  # an operator, as it is watched
        return watch


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and not isinstance(value, FakeTensor)


class _Watch(TorchDispatchMode):
    """Notes the operators that run.

    Attributes:
        computed: those that do more than cast or view, each with the dtypes of what it takes and gives.
        casts: dtypes that tensors were cast to, by identity.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.computed: list[tuple[Any, ...]] = []
        self.casts: dict[int, torch.dtype] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if func is aten._to_copy.default:
            self.casts.setdefault(id(args[0]), result.dtype)
        elif not _is_view(func) and func.namespace != "prim":  # fake tensors ask for devices
            self.computed.append((func, *map(_dtypes, (args, kwargs, result))))
        return result


def _dtypes(tree: Any) -> list[torch.dtype]:
    return [leaf.dtype for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]
