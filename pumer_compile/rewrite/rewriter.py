"""Rewrite: copy the captured graph, letting every size follow the reducers.

The rewriter copies node after node. At the sites the inserted reducers replace the carrier, so whatever comes
later sees the reduced stream and whatever came earlier saw the old one: each value is at an epoch of each
stream (`epochs.py`). Literals that bake a token count get the new one; an input left at an older epoch than the
others is aligned (`align.py`), and where an operator goes by the old places, merged tokens are brought back to them
(`unmerge.py`). What no rule aligns is an error.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn

from ..analysis.annotate import Annotation
from ..analysis.axes import (
    ByPosition,
    Causal,
    Concat,
    Constraint,
    Dim,
    Literal,
    Repeat,
    Reshape,
    Same,
    Select,
    Slice,
    Summed,
    Tokens,
)
from ..analysis.dead_code import drop_dead
from ..analysis.nodes import ancestors, attribute, content_inputs, depends_on_parameter, describe, module_path, values
from ..analysis.operators import VIEWS, aten, is_mutable, overloads
from ..analysis.outputs import set_output_names
from ..analysis.rules import shape
from ..errors import AxisError, SiteError
from ..reducers.align import MaskKind
from .align import Aligner
from .epochs import Epochs, EpochTable
from .unmerge import Unmerger, why_not

_PADS = {aten.pad.default, aten.constant_pad_nd.default}


def _in_blocks(node: fx.Node) -> str:
    """A sentence for the error where a sequence is filled up and cut into blocks; '' elsewhere."""
    if node.target not in _PADS or not any(user.target in VIEWS for user in node.users):
        return ""
    return (
        " Here the sequence is filled up and cut into blocks by place (attention that chooses blocks of keys, say). "
        "Fewer tokens would make other blocks: nothing in front of it can be reduced."
    )


@dataclass
class Rewriter:
    """The rewriter and its state.

    Attributes:
        source: captured graph module; it is not changed.
        annotation: its axes.
        masks: its attention masks and the values they are shaped from, which align by their kind.
        sums: values that hold masks and biases in one; they are computed anew from aligned ones.
        env: newest new node of each captured node.
        epochs: the reducers so far, and which of them each value has seen.
        aligner: brings values from before a reducer to the tokens after it.
        unmerger: brings values from after it back to the places before it.
        used: new node that a captured node read for an input (aligned where needed).
        layers: paths of the modules in whose uses a promised value is reduced (`reduce_later_uses`).
        probabilities: of fused attentions that were written out.
        literals: how many were changed.
        batch: the batch dimension of the first reduced value, which alignment maps follow.
        output_names: names of the outputs where they are not those of the captured graph.
    """

    source: fx.GraphModule
    annotation: Annotation
    masks: dict[fx.Node, MaskKind]
    sums: frozenset[fx.Node] = frozenset()
    env: dict[fx.Node, fx.Node] = field(default_factory=dict)
    epochs: EpochTable = field(init=False)
    aligner: Aligner = field(default_factory=Aligner)
    unmerger: Unmerger = field(default_factory=Unmerger)
    used: dict[tuple[fx.Node, fx.Node], fx.Node] = field(default_factory=dict)
    layers: frozenset[str] = frozenset()
    probabilities: dict[fx.Node, fx.Node] = field(default_factory=dict)
    literals: int = 0
    batch: Dim | None = None
    output_names: list[str] = field(default_factory=list)
    graph: fx.Graph = field(default_factory=fx.Graph)
    _modules: dict[str, nn.Module] = field(default_factory=dict)
    _totals: dict[fx.Node, Epochs] = field(default_factory=dict)
    _pending: dict[fx.Node, dict[int, Epochs]] = field(default_factory=dict)
    _features: set[fx.Node] = field(default_factory=set)
    _origin: fx.Node | None = None
    _after: dict[fx.Node, Callable[[Rewriter], fx.Node | None]] = field(default_factory=dict)
    _instead: dict[fx.Node, Callable[[Rewriter], fx.Node | None]] = field(default_factory=dict)
    _early: set[fx.Node] = field(default_factory=set)

    def __post_init__(self) -> None:
        self.epochs = EpochTable(self.annotation)

    def run(
        self,
        after: dict[fx.Node, Callable[[Rewriter], fx.Node | None]],
        instead: dict[fx.Node, Callable[[Rewriter], fx.Node | None]],
    ) -> fx.GraphModule:
        """Copy the graph, with something else `instead` of some nodes (None: the node itself after all), and with what
        follows `after` some (None: nothing), which is read in their place from there on."""
        self._after, self._instead = after, instead
        for node in self.source.graph.nodes:
            if node not in self._early:
                self._enter(node)
        self._check_totals()
        return self._finish()

    def _enter(self, node: fx.Node) -> None:
        """Copy one node, or what stands in its place, and what follows it."""
        self._origin = node
        new = self._instead[node](self) if node in self._instead else None
        if new is not None:
            self.env[node] = new
        else:
            self.visit(node)
        if _is_feature(node, self._features):
            self._features.add(node)
        follows = self._after[node](self) if node in self._after else None
        if follows is not None:
            self.env[node] = follows

    @contextmanager
    def ahead(self, wanted: fx.Node, since: fx.Node, value: fx.Node) -> Iterator[None]:
        """Within the block, a value that comes later is there already, computed from what is known now; behind it, the
        rewriter goes on as if it had not been, and computes it again when it comes to it.

        Args:
            wanted: captured, that comes later.
            since: the captured value from which on everything is computed ahead.
            value: the captured one whose newest value takes its place, with its tokens (`since` itself, say).

        Raises:
            SiteError: something on the way changes a value in place, which would be done twice.
        """
        origin, later = self._origin, self._on_the_way(wanted, since)
        found = {since} if since is not value else set()
        for index in range(len(shape(value)) if found else 0):
            self.epochs.record(Dim(since, index), self.epochs.at(Dim(value, index)))
        self.env[since] = self.env[value]
        try:
            for node in later:
                if since not in node.all_input_nodes and found.isdisjoint(node.all_input_nodes):
                    self._enter(node)  # what does not depend on it is only early
                    self._early.add(node)
                    continue
                if is_mutable(node.target):
                    raise SiteError(
                        f"{describe(node)} changes its input in place, and would be computed twice: once ahead, for a "
                        "reducer to read, and once behind it. Use another operator there in the model, or another "
                        "method."
                    )
                found.add(node)
                self._origin = node
                self.visit(node)
            yield
        finally:
            self._origin = origin
            self._forget(found)

    def _on_the_way(self, wanted: fx.Node, since: fx.Node) -> list[fx.Node]:
        """What a value is computed from and is not there yet, itself among it, in order; none before `since`."""
        found: set[fx.Node] = set()
        pending = [wanted]
        while pending:
            node = pending.pop()
            if node is not since and node not in self.env and node not in found:
                found.add(node)
                pending.extend(node.all_input_nodes)
        return sorted(found)

    def _forget(self, nodes: set[fx.Node]) -> None:
        for node in nodes:
            self.env.pop(node, None)
        self._totals = {n: epochs for n, epochs in self._totals.items() if n not in nodes}
        self.used = {pair: new for pair, new in self.used.items() if pair[0] not in nodes}
        self.epochs.newest = {dim: epochs for dim, epochs in self.epochs.newest.items() if dim.node not in nodes}

    # --- emitting -------------------------------------------------------------------------------------------

    def call(self, target: Any, *arguments: Any) -> fx.Node:
        """Emit an operator."""
        return self._mark(self.graph.call_function(target, arguments))

    def field(self, node: fx.Node, of: type[Any], name: str) -> fx.Node:
        """Emit a field of the named tuple that a node gives."""
        return self.call(operator.getitem, node, of._fields.index(name))

    def follow_batch(self, dim: Dim) -> None:
        """The batch dimension of a reduced value; alignment maps follow that of the first one."""
        self.batch = self.batch or dim

    def name_outputs(self, names: list[str]) -> None:
        """The outputs have other names than those of the captured graph."""
        self.output_names = names

    def note_probabilities(self, context: fx.Node, probabilities: fx.Node) -> None:
        """A fused attention was written out: its probabilities, before they are rounded to the model's dtype."""
        self.probabilities[context] = probabilities

    def free_name(self, name: str) -> str:
        """A name under which no module is kept yet: the towers of two kinds of input may number their layers alike."""
        taken = {".".join(known.split(".")[: name.count(".") + 1]) for known in self._modules}
        return next(n for n in (name, *(f"{name}_{i}" for i in range(2, len(taken) + 3))) if n not in taken)

    def call_module(self, name: str, module: nn.Module, *arguments: fx.Node | None) -> fx.Node:
        """Emit a call of an inserted module, kept under `name`."""
        if self._modules.setdefault(name, module) is not module:
            raise ValueError(f"two modules named {name}")
        return self._mark(self.graph.call_module(name, tuple(arguments)))

    def _mark(self, node: fx.Node) -> fx.Node:
        if self._origin is not None:
            node.meta["stack_trace"] = self._origin.meta.get("stack_trace")
        return node

    def recomputed(self, captured: fx.Node, inputs: dict[fx.Node, fx.Node], targets: dict[int, Epochs]) -> fx.Node:
        """A captured node once more, of other inputs, with some of its dimensions at given epochs."""
        before = {Dim(captured, index): self.epochs.at(Dim(captured, index)) for index in targets}
        for dim, epochs in zip(before, targets.values(), strict=True):
            self.epochs.record(dim, epochs)
        new = self._mark(self.graph.node_copy(captured, lambda n: inputs.get(n, self.env[n])))
        for constraint in self.annotation.constraints.get(captured, []):
            self._literals(captured, new, constraint)
        for dim, epochs in before.items():
            self.epochs.restore(dim, epochs)
        return new

    def pieces(self, captured: fx.Node, dim: int, value: fx.Node) -> list[tuple[str, fx.Node]]:
        """The segments of a value with a captured one's dimension, in order, each with its stream (`learned.<i>` for
        tokens of no stream)."""
        axis, epochs = self.annotation.axis(Dim(captured, dim)), self.epochs.at(Dim(captured, dim))
        assert isinstance(axis, Tokens)
        if len(axis.segments) == 1:
            return [(axis.segments[0].stream or "learned.0", value)]
        result, start = [], 0
        for index, segment in enumerate(axis.segments):
            stop = start + self.epochs.length(segment, epochs)
            part = self.call(aten.slice.Tensor, value, dim, start, stop)
            result.append((segment.stream or f"learned.{index}", part))
            start = stop
        return result

    def reduce_later_uses(self, site: fx.Node, stream: str, old: int, new: int) -> None:
        """Every later use, in a cross-modal layer, of a feature that the site depends on sees the reduced stream.

        So the image layer of a co-attention pair gets the image its text layer reduced. Uses elsewhere (a tower that
        runs on beside the pairs) keep their tokens and are aligned where they meet reduced ones.
        """
        for node in ancestors(site) & self._features:
            if all(user in self.env for user in node.users):
                continue
            for index in range(len(shape(node))):
                dim = Dim(node, index)
                have = self._pending.get(node, {}).get(index) or self.epochs.at(dim)
                if stream in self.epochs.streams(dim) and have.get(stream, 0) == old:
                    self._pending.setdefault(node, {})[index] = {**have, stream: new}

    # --- the rewriter -------------------------------------------------------------------------------------------

    def visit(self, node: fx.Node) -> None:
        """Copy one node."""
        promised = [n for n in node.all_input_nodes if n in self._pending] if self._pending else []
        if not promised or not self._in_layers(node):
            self._visit(node)
            return
        with self._for_one_use({n: self._pending[n] for n in promised}):
            for source in promised:
                self.env[source] = self.aligner.value(self, node, source, self._pending[source])
                for index, epochs in self._pending[source].items():
                    self.epochs.record(Dim(source, index), epochs)
            self._visit(node)

    @contextmanager
    def _for_one_use(self, dims: Mapping[fx.Node, Iterable[int]]) -> Iterator[None]:
        """Within the block, values may be at other epochs of some dimensions; behind it, they are as they were."""
        before = {n: (self.env[n], {d: self.epochs.at(d) for d in (Dim(n, i) for i in dims[n])}) for n in dims}
        yield
        for source, (value, epochs_of) in before.items():
            self.env[source] = value
            for dim, epochs in epochs_of.items():
                self.epochs.restore(dim, epochs)

    def _in_layers(self, node: fx.Node) -> bool:
        return any(inside(module_path(node), layer) for layer in self.layers)

    def _visit(self, node: fx.Node) -> None:
        constraints = self.annotation.constraints.get(node, [])
        if node.op != "call_function" or not any(map(self._reduced, node.all_input_nodes)):
            self.env[node] = self.graph.node_copy(node, lambda n: self.env[n])
            return
        places = self.unmerger.wanted(self, constraints)
        with self._for_one_use(places):
            for source, dims in places.items():
                self.env[source] = self.unmerger.value(self, node, source, dims)
                for index in dims:
                    self.epochs.restore(Dim(source, index), {})
            self._copy(node, constraints)

    def _copy(self, node: fx.Node, constraints: list[Constraint]) -> None:
        """Copy a node that reads values from after a reducer."""
        inputs = self._spread(node, [c for c in constraints if isinstance(c, Same)])
        for constraint in constraints:
            self._follow(node, constraint)
        new = self.graph.node_copy(node, lambda n: inputs[n])
        self.used.update({(node, n): inputs[n] for n in inputs})
        for constraint in constraints:
            self._literals(node, new, constraint)
        self.env[node] = new

    def _reduced(self, captured: fx.Node) -> bool:
        """Whether any axis of a captured value is past a reducer."""
        outputs = enumerate(values(captured))
        return any(self.epochs.at(Dim(captured, i, o)) for o, value in outputs for i in range(value.dim()))

    def _spread(self, node: fx.Node, same: list[Same]) -> dict[fx.Node, fx.Node]:
        """Bring the inputs to common epochs, pass these on to the outputs, and return the inputs to use."""
        wanted: dict[fx.Node, dict[int, Epochs]] = {}
        for dims in _classes(same):
            target: Epochs = {}
            for dim in dims:
                for stream, epoch in self.epochs.at(dim).items():
                    target[stream] = self.epochs.newer(node, stream, epoch, target.get(stream, 0))
            for dim in dims:
                if dim.node is node:
                    self.epochs.record(dim, target)
                elif self.epochs.behind(dim, target):
                    self._check_alignable(node, dim, same)
                    self._check_not_mutated(node, dim)
                    wanted.setdefault(dim.node, {})[dim.index] = target
        return {
            source: self.aligner.value(self, node, source, wanted[source]) if source in wanted else self.env[source]
            for source in node.all_input_nodes
        }

    def _check_alignable(self, node: fx.Node, dim: Dim, same: list[Same]) -> None:
        if any(dim in (c.a, c.b) and not c.aligns for c in same):
            raise SiteError(
                f"{describe(node)} sums over the token axis {self.annotation.axis(dim)} of {dim.node.name}, "
                "which was computed before a reducer of that stream, together with values computed after it. "
                "Nothing aligns a sum over tokens; move the site behind this operator or leave it out of the "
                "schedule."
            )

    def _check_not_mutated(self, node: fx.Node, dim: Dim) -> None:
        if isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable:
            raise SiteError(
                f"{describe(node)} changes its input in place, and {dim.node.name} would have to be aligned to the "
                "tokens after a reducer first: later uses would not see the change. Move the site."
            )

    def _follow(self, node: fx.Node, constraint: Constraint) -> None:
        match constraint:
            case Concat(result, parts):
                self._concat(node, result, parts)
            case Reshape(sources, results):
                self._reshape(node, sources, results)
            case Repeat(source, result):
                self.epochs.record(result, self.epochs.at(source))
            case Causal(source, result):
                self._check_in_order(node, source)
                self.epochs.record(result, self.epochs.at(source))
            case Slice(source, result, start, stop):
                if self.epochs.at(source) and not self.first_token(source, start, stop):
                    for stream, epoch in self.epochs.at(source).items():
                        if epoch:
                            self._check_whole(node, result, stream, source)
                    streams = self.epochs.streams(result)
                    self.epochs.record(result, {s: e for s, e in self.epochs.at(source).items() if s in streams})
            case Summed(source):
                self._totals[node] = dict(self.epochs.at(source))
            case ByPosition(source) if self.epochs.at(source):
                raise SiteError(
                    f"{describe(node)} works position by position along the token axis "
                    f"{self.annotation.axis(source)} of {source.node.name}, which a reducer has changed. "
                    f"Move the site behind this operator or leave it out of the schedule.{why_not(self, source)}"
                    f"{_in_blocks(node)}"
                )
            case _:
                pass

    def _check_in_order(self, node: fx.Node, source: Dim) -> None:
        """What looks back takes fewer tokens as they come, if they are some of the old ones, in their order."""
        for stream in self.epochs.at(source):
            if not self.in_order(source, stream):
                raise SiteError(
                    f"{describe(node)} mixes each token with those before it, and a reducer has merged the {stream} "
                    "tokens, or brought them into another order. Use a method that keeps some of them in their order, "
                    "or move the site behind it."
                )

    def in_order(self, dim: Dim, stream: str) -> bool:
        """Whether the tokens of a stream that are left are some of the old ones, in their order."""
        return all(step.in_order for step in self.epochs.lineage(stream, self.epochs.at(dim).get(stream, 0)))

    def _check_totals(self) -> None:
        """A sum over fewer tokens is smaller. That is right for a sum divided by another one over the same tokens (a
        weighted mean), for one that the summed values themselves are divided by (weights that come to 1), and for a
        count of mask entries; a literal divisor would be the old number of tokens."""
        for node, epochs in self._totals.items():
            source = node.all_input_nodes[0]
            if not any(epochs.values()) or not depends_on_parameter(source) or _only_divides(node, source):
                continue
            divisors = [_summed(u.args[1]) if u.args[:1] == (node,) else None for u in node.users]
            if not all(d is not None and self._totals.get(d) == epochs for d in divisors):
                raise SiteError(
                    f"{describe(node)} sums over the token axis of {source.name}, which a reducer has made shorter, "
                    "and the sum is not divided by a sum over the same reduced tokens. A mean over tokens follows the "
                    "reduction; a sum does not. Move the site behind it or leave it out."
                )

    def _concat(self, node: fx.Node, result: Dim, parts: tuple[Dim, ...]) -> None:
        joined: Epochs = {}
        for part in parts:
            for stream in self.epochs.streams(part):
                epoch = self.epochs.at(part).get(stream, 0)
                if joined.setdefault(stream, epoch) != epoch:
                    raise AxisError(
                        f"{describe(node)} joins parts of the {stream} tokens from before and after a "
                        "reducer; nothing aligns a part of a stream."
                    )
        self.epochs.record(result, joined)

    def _reshape(self, node: fx.Node, sources: tuple[Dim, ...], results: tuple[Dim, ...]) -> None:
        epochs: Epochs = {}
        for source in sources:
            for stream, epoch in self.epochs.at(source).items():
                epochs[stream] = self.epochs.newer(node, stream, epoch, epochs.get(stream, 0))
        for stream, epoch in ((s, e) for s, e in epochs.items() if e):
            holder = self.holder(results, stream)
            if holder is None:
                raise SiteError(
                    f"{describe(node)} reshapes the {stream} tokens, which a reducer has changed, into "
                    f"{[str(self.annotation.axis(r)) for r in results]}; their grid is gone. Move the site "
                    f"behind it.{why_not(self, *sources)}"
                )
            self.epochs.record(holder, {**self.epochs.at(holder), stream: epoch})

    def holder(self, results: tuple[Dim, ...], stream: str) -> Dim | None:
        """The one dimension of a reshaped value that has all tokens of a stream; None where none has, or several do."""
        holders = [r for r in results if stream in self.epochs.streams(r)]
        return holders[0] if len(holders) == 1 and not self.cut(holders[0], stream) else None

    def cut(self, dim: Dim, stream: str) -> int:
        """How many tokens of a stream a dimension has that has only a part of them, cut out by position; else 0."""
        kind = self.annotation.axis(dim)
        return (
            sum(s.length for s in kind.segments if s.stream == stream and not s.whole)
            if isinstance(kind, Tokens)
            else 0
        )

    def _check_whole(self, node: fx.Node, dim: Dim, stream: str, source: Dim) -> None:
        part = self.cut(dim, stream)
        if part:
            raise SiteError(
                f"{describe(node)} takes {part} of the {self.annotation.streams[stream]} {stream} tokens by position, "
                f"after a reducer has changed them. Move the site behind it.{why_not(self, source)}"
            )

    # --- literals -------------------------------------------------------------------------------------------

    def _literals(self, node: fx.Node, new: fx.Node, constraint: Constraint) -> None:
        match constraint:
            case Literal(result, arg, item) if self.epochs.at(result):
                size = self.epochs.size(self.annotation.axis(result), self.epochs.at(result))
                if item is None:
                    self._set_arg(new, arg, size)
                    return
                sizes = list(new.args[arg])  # type: ignore[arg-type]  # a list of sizes
                # A size with a symbolic factor is left to inference.
                sizes[item] = size if isinstance(size, int) else -1
                self._set_arg(new, arg, sizes)
            case Slice(source, _, start, stop, start_arg, stop_arg) if self.epochs.at(source):
                first = self.first_token(source, start, stop)
                moved = self._moved(node, source, start, first_token=first)
                self._set_arg(new, start_arg, moved)
                self._set_arg(new, stop_arg, moved + 1 if first else self._moved(node, source, stop))
            case Select(source, index, arg) if self.epochs.at(source):
                self._set_arg(new, arg, self._moved(node, source, index, first_token=True))
            case _:
                pass

    def _set_arg(self, new: fx.Node, position: int, value: Any) -> None:
        arguments = list(new.args)
        while len(arguments) <= position:
            arguments.append(None)
        if arguments[position] != value:
            self.literals += 1
        arguments[position] = value
        new.args = tuple(arguments)

    def _moved(self, node: fx.Node, source: Dim, position: int, first_token: bool = False) -> int:
        found = self.moved_to(source, position, first_token)
        if found is None:
            raise SiteError(
                f"{describe(node)} takes position {position} of the token axis {self.annotation.axis(source)}, which a "
                "reducer has changed; only the first token of a stream keeps its place, and where pruning sorts the "
                "tokens (`paper`) not even that one. Move the site behind it, or leave this output out."
                f"{why_not(self, source)}"
            )
        return found

    def moved_to(self, source: Dim, position: int, first_token: bool = False) -> int | None:
        """Where a captured position is now: a border between segments, or the first token of one; None where nobody
        can tell."""
        kind, epochs = self.annotation.axis(source), self.epochs.at(source)
        assert isinstance(kind, Tokens)
        before = now = 0
        for segment in kind.segments:
            reduced = self.epochs.lineage(segment.stream or "", epochs.get(segment.stream or "", 0))
            inside = before < position < before + segment.length
            border = position == before and not first_token
            kept = position == before and all(step.first_stays for step in reduced)
            if border or kept or (inside and not reduced):
                return now + position - before
            if inside or position == before:
                break
            before, now = before + segment.length, now + self.epochs.length(segment, epochs)
        return now if position == kind.size and not first_token else None

    def first_token(self, source: Dim, start: int, stop: int) -> bool:
        """Whether a slice is the first token alone of a stream that a reducer has changed."""
        kind, position = self.annotation.axis(source), 0
        assert isinstance(kind, Tokens)
        for segment in kind.segments:
            if position == start and segment.stream and self.epochs.at(source).get(segment.stream, 0):
                return stop == start + 1 < start + segment.length
            position += segment.length
        return False

    # --- finishing ------------------------------------------------------------------------------------------

    def _finish(self) -> fx.GraphModule:
        self.graph.set_codegen(copy.copy(self.source.graph._codegen))
        if self.output_names:
            set_output_names(self.graph, self.output_names)
        targets = {str(n.target): attribute(n) for n in self.source.graph.nodes if n.op == "get_attr"}
        module = fx.GraphModule({**targets, **self._modules}, self.graph, class_name="ReducedModule")
        drop_dead(module.graph)
        called = {str(n.target) for n in module.graph.nodes if n.op == "call_module"}
        for name in self._modules.keys() - called:
            module.delete_submodule(name)
        module.recompile()
        keep_buffers_transient(module, self.source)
        return module


def _classes(same: list[Same]) -> list[set[Dim]]:
    """Dimensions of one operator that are the same axis."""
    classes: list[set[Dim]] = []
    for constraint in same:
        pair = {constraint.a, constraint.b}
        touching = [c for c in classes if c & pair]
        for c in touching:
            classes.remove(c)
        classes.append(pair.union(*touching))
    return classes


_KEEPS_A_DIVISOR = frozenset(overloads("clamp clamp_min unsqueeze expand view reshape to add"))


def _summed(node: object) -> fx.Node | None:
    """The sum that a divisor comes from, through operators that keep its meaning."""
    while isinstance(node, fx.Node) and node.op == "call_function":
        if node.target in overloads("sum"):
            return node
        if node.target not in _KEEPS_A_DIVISOR:
            return None
        node = node.args[0]
    return None


def _only_divides(divisor: fx.Node, value: fx.Node) -> bool:
    """Whether all that becomes of a sum is that the values it sums are divided by it."""
    return bool(divisor.users) and all(
        user.args[0] is value
        if user.target is aten.div.Tensor and user.args[1] is divisor
        else user.target in _KEEPS_A_DIVISOR and user.args[0] is divisor and _only_divides(user, value)
        for user in divisor.users
    )


def inside(path: str, module: str) -> bool:
    """Whether a module path is that of a module or of one inside it; everything is inside the whole model ''."""
    return not module or path == module or path.startswith(f"{module}.")


def _is_feature(node: fx.Node, features: set[fx.Node]) -> bool:
    """Whether a value is a feature: floating point, and computed with learned parameters."""
    floats = bool(values(node)) and values(node)[0].is_floating_point()
    if node.op == "get_attr":
        return floats and isinstance(attribute(node), nn.Parameter)
    return floats and any(n in features for n in content_inputs(node))


def keep_buffers_transient(module: fx.GraphModule, source: fx.GraphModule) -> None:
    """Buffers that the model does not save are not saved by the reduced module either."""
    saved = set(source.state_dict())
    for name, _ in list(module.named_buffers()):
        if name not in saved:
            owner, _, leaf = name.rpartition(".")
            module.get_submodule(owner)._non_persistent_buffers_set.add(leaf)
