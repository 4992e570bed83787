"""Annotate: find the token axes of every value in a captured graph, which is not changed."""

from __future__ import annotations

import operator
from collections.abc import Iterator
from dataclasses import dataclass, field
from math import prod

import torch
from torch import Tensor, fx

from ..errors import AxisError, NoRuleError
from . import rules_positional as _positional  # noqa: F401  (importing it registers its rules)
from .axes import (
    Axis,
    AxisConflict,
    AxisKind,
    ByPosition,
    Causal,
    Concat,
    Constraint,
    Dim,
    Fixed,
    Literal,
    Product,
    Reduce,
    Repeat,
    Reshape,
    Same,
    Seed,
    Segment,
    Select,
    Size,
    Slice,
    Summed,
    Tokens,
    constraint_dims,
    cut_axis,
    same_size,
    unify,
)
from .nodes import after_attention, ancestors, depends_on_input, describe, operator_name, values
from .rules import node_arg, rule_for, straight_from_input

_LOOKUP = torch.ops.aten.embedding.default


@dataclass
class Annotation:
    """The axes of every value of a graph.

    Attributes:
        constraints: what the rules said of each node.
        streams: tokens of each stream, learned tokens joined to it included, by name.
        learned: how many learned tokens lead each stream.
        modality: `text` or `image` (or a name the user gave) of each stream; the second image is stream `image_1`, and
            the image in a prompt `prompt_image`.
    """

    constraints: dict[fx.Node, list[Constraint]] = field(default_factory=dict)
    streams: dict[str, int] = field(default_factory=dict)
    learned: dict[str, int] = field(default_factory=dict)
    modality: dict[str, str] = field(default_factory=dict)
    _axes: dict[Dim, Axis] = field(default_factory=dict)
    _names: dict[Axis, str] = field(default_factory=dict)

    def axis(self, dim: Dim) -> AxisKind:
        """What a dimension indexes.

        Raises:
            AxisError: tokens whose number depends on data are among it.
        """
        if dim not in self._axes:
            return Fixed(_sizes(dim.node, dim.output)[dim.index])
        axis = self._axes[dim]
        leaves = axis.leaves()
        open_ones = [leaf.size for leaf in leaves if not isinstance(leaf.size, int)]
        if open_ones and any(leaf in self._names for leaf in leaves):
            raise AxisError(
                f"Dimension {dim.index} of {describe(dim.node)} indexes tokens, {open_ones[0]} of them, a number that "
                "depends on data or on the batch; the number of tokens must be fixed."
            )
        return self._kind(axis)

    def axes(self, node: fx.Node, output: int = 0) -> list[AxisKind]:
        """What each dimension of a value indexes."""
        return [self.axis(Dim(node, i, output)) for i in range(len(_sizes(node, output)))]

    def same(self, a: Dim, b: Dim) -> bool:
        """Whether two dimensions are proved to be the same axis."""
        if a not in self._axes or b not in self._axes:
            return a == b
        return self._axes[a].leaves() == self._axes[b].leaves()

    def folded(self, whole: Dim, outer: Dim) -> int | None:
        """How many positions of a flattened dimension go to each of its `outer` factor; None where that does not lead
        its factors."""
        leaves = self._axes[whole].leaves()
        factors = leaves[0].factors if len(leaves) == 1 else None
        if not factors or factors[0].leaves() != self._axes[outer].leaves():
            return None
        sizes = [factor.find().size for factor in factors[1:]]
        return prod(size for size in sizes if isinstance(size, int)) if all(isinstance(s, int) for s in sizes) else None

    def _kind(self, axis: Axis) -> AxisKind:
        leaves = axis.leaves()
        if any(leaf in self._names for leaf in leaves):
            return Tokens(tuple(self._segments(leaves)))
        if len(leaves) == 1 and leaves[0].factors:
            factors = tuple(self._kind(factor) for factor in leaves[0].factors)
            if any(not isinstance(factor, Fixed) for factor in factors):
                return Product(factors)
        return Fixed(axis.find().size)

    def _segments(self, leaves: list[Axis]) -> Iterator[Segment]:
        position = 0
        while position < len(leaves):
            name, length = self._names.get(leaves[position]), 0
            while position < len(leaves) and self._names.get(leaves[position]) == name:
                size = leaves[position].size
                assert isinstance(size, int)
                length, position = length + size, position + 1
            yield Segment(name, length, name is None or length == self.streams[name])


def annotate(module: fx.GraphModule, streams: dict[str, str] | None = None) -> Annotation:
    """Find the token axes of every value.

    Args:
        module: pre-decomposition ATen graph whose nodes carry `meta["val"]`.
        streams: names of streams by input, where seeds do not find them (`{"visual_feats": "image"}`): the
            last dimension but one of a floating-point input, the last one of an integer input.

    Raises:
        NoRuleError: an operator without a rule touches a token axis.
        AxisError: axes that cannot be followed.
    """
    annotation = Annotation()
    kinds = _kinds(module.graph)
    for node in module.graph.nodes:
        _constrain(annotation, node, streams or {}, seeds=node not in kinds)
    _seed_others(annotation, kinds)
    _check_separate_texts(annotation)
    _name_streams(annotation)
    for node in module.graph.nodes:
        _check_covered(annotation, node)
    return annotation


def _sizes(node: fx.Node, output: int = 0) -> tuple[Size, ...]:
    return tuple(values(node)[output].shape)


def _kinds(graph: fx.Graph) -> list[fx.Node]:
    """The lookups in smaller tables than that of the text tokens: of kinds and positions, or of another text."""
    found = [node for node in graph.nodes if node.target is _LOOKUP and straight_from_input(node_arg(node, 1))]
    lookups = {node: _sizes(node_arg(node, 0))[0] for node in found}
    most = max((size for size in lookups.values() if isinstance(size, int)), default=0)
    return [node for node, size in lookups.items() if size != most]


def _seed_others(annotation: Annotation, lookups: list[fx.Node]) -> None:
    """Ids that are looked up in a smaller table are text, but for those of tokens that are known to be others'."""
    for node in lookups:
        for seed in (c for c in annotation.constraints[node] if isinstance(c, Seed)):
            leaves = [leaf for dim in seed.dims for leaf in annotation._axes[dim].leaves()]
            if all(leaf.stream in (None, seed.stream) for leaf in leaves):
                _apply(annotation._axes, seed)


def _constrain(annotation: Annotation, node: fx.Node, streams: dict[str, str], *, seeds: bool) -> None:
    """Give every dimension of `node` an axis and apply what its rule says; its seeds only where `seeds`."""
    for output, value in enumerate(values(node)):
        for index, size in enumerate(value.shape):
            annotation._axes[Dim(node, index, output)] = Axis(size)
    constraints = _said(annotation, node)
    if node.op == "placeholder" and node.target in streams:
        rank = len(_sizes(node))
        index = rank - 2 if values(node)[0].is_floating_point() else rank - 1
        constraints.append(Seed((Dim(node, index),), streams[str(node.target)]))
    annotation.constraints[node] = constraints
    for constraint in constraints:
        if isinstance(constraint, Seed) and not seeds:
            continue
        try:
            _apply(annotation._axes, constraint)
        except AxisConflict as error:
            raise AxisError(
                f"The axes of {describe(node)} contradict each other: {error}. If two inputs carry tokens of "
                "the same modality, name their streams (`streams={input: name}`); otherwise the rule of this "
                "operator in analysis/rules.py does not describe it."
            ) from error


def _said(annotation: Annotation, node: fx.Node) -> list[Constraint]:
    """What the rule of a node says of dimensions that there are."""
    rule = rule_for(node)
    try:
        said = list(rule(node)) if rule else []
    except AxisConflict as error:
        raise AxisError(f"The axes of {describe(node)} cannot be followed: {error}.") from error
    except (AssertionError, IndexError, KeyError, TypeError, ValueError) as error:
        raise AxisError(
            f"The rule of {describe(node)} in analysis/rules.py does not know this form of it "
            f"(of {', '.join(map(_shapes, node.all_input_nodes))}): "
            f"{type(error).__name__}: {error}."
        ) from error
    unknown = next((d for c in said for d in constraint_dims(c) if d not in annotation._axes), None)
    if unknown is not None:
        raise AxisError(
            f"The rule of {describe(node)} in analysis/rules.py does not know this form of it: it speaks of dimension "
            f"{unknown.index} of {unknown.node.name}, whose shape is {_shapes(unknown.node)}."
        )
    return said


def _shapes(node: fx.Node) -> str:
    return ", ".join(str(tuple(value.shape)) for value in values(node)) or "unknown"


def _apply(axes: dict[Dim, Axis], constraint: Constraint) -> None:
    match constraint:
        case Same(a, b):
            unify(axes[a], axes[b])
        case Concat(result, parts):
            joined = Axis(axes[result].size)
            # Learned tokens get an axis of their own wherever they are joined: one class token may lead two images.
            full = [p for p in parts if not same_size(axes[p].find().size, 0)]
            joined.parts = tuple(axes[p] if depends_on_input(p.node) else Axis(axes[p].size) for p in full)
            unify(joined, axes[result])
        case Slice(source, result, start, stop):
            chosen = cut_axis(axes[source], start, stop)
            part = Axis(axes[result].size)
            part.parts = tuple(chosen)
            unify(part, axes[result])
        case Repeat(source, result, times, in_place):
            factors = [axes[source], Axis(times)]
            _factor(axes[result], factors if in_place else factors[::-1])
        case Causal(source, result, behind):
            longer = Axis(axes[result].size)
            longer.parts = (axes[source], Axis(behind)) if behind else (axes[source],)
            unify(longer, axes[result])
        case Reshape(sources, results):
            _reshape([axes[s] for s in sources], [axes[r] for r in results])
        case Seed(dims, stream):
            _seed([axes[d].find() for d in dims], stream)
        case Select() | Reduce() | Summed() | ByPosition() | Literal():
            pass


def _reshape(sources: list[Axis], results: list[Axis]) -> None:
    sources = [a for a in sources if not same_size(a.find().size, 1)]
    results = [a for a in results if not same_size(a.find().size, 1)]
    if len(sources) == 1 and len(results) == 1:
        unify(sources[0], results[0])
    elif len(sources) == 1:
        _factor(sources[0], results)
    elif len(results) == 1:
        _factor(results[0], sources)
        grids = [a.find().grid for a in sources]
        first = grids[0]
        if first and all(g and g[:2] == (first[0], i) for i, g in enumerate(grids)) and len(grids) == first[2]:
            results[0].find().stream = first[3]


def _factor(whole: Axis, factors: list[Axis]) -> None:
    leaves = whole.leaves()
    if len(leaves) != 1:
        return
    other = Axis(leaves[0].size)
    other.factors = tuple(factors)
    unify(leaves[0], other)


def _seed(dims: list[Axis], stream: str) -> None:
    if len(dims) == 1:
        for leaf in dims[0].leaves():
            if leaf.stream not in (None, stream):
                raise AxisConflict(f"tokens of {leaf.stream} meet tokens of {stream}")
            leaf.stream = stream
        return
    if not all(isinstance(axis.size, int) for axis in dims):
        return  # a grid whose size depends on data
    wide = [axis for axis in dims if axis.size != 1]
    if len(wide) == 1:  # a strip is a sequence as it is
        _seed(wide, stream)
        return
    grid = object()
    for index, axis in enumerate(dims):
        axis.grid = (grid, index, len(dims), stream)


def _check_separate_texts(annotation: Annotation) -> None:
    """Two inputs that look their ids up in one table are two texts. A constant added to both (positions) proves their
    axes the same, and reducing one would then reduce the other by the wrong map."""
    seen: dict[object, tuple[fx.Node, set[Axis]]] = {}
    for node, constraints in annotation.constraints.items():
        for seed in constraints:
            if not isinstance(seed, Seed) or node.target is not _LOOKUP:
                continue
            table, ids = node.args[0], seed.dims[0]
            assert isinstance(table, fx.Node)
            leaves = set(annotation._axes[ids].leaves())
            other, taken = seen.setdefault(table.target, (ids.node, leaves))
            if other is not ids.node and taken & leaves:
                raise AxisError(
                    f"{describe(node)} looks up {ids.node.name} in the table that {other.name} is looked up in, "
                    "and something added to both makes their tokens one axis. Two texts of one length that share "
                    "positions cannot be told apart: capture with texts of different lengths."
                )


def _name_streams(annotation: Annotation) -> None:
    """Adopt learned tokens joined to one stream, and name the streams in order of appearance."""
    concats = [(n, c) for n, cs in annotation.constraints.items() for c in cs if isinstance(c, Concat)]
    # All are checked before any learned token is adopted: a mask may be joined before the tokens it belongs to.
    adopting = [concat for node, concat in concats if _joins_learned(annotation, node, concat)]
    for concat in adopting:
        _adopt_learned(annotation, concat)
    groups = _stream_groups(annotation, [c for _, c in concats])
    counts: dict[str, int] = {}
    for seeded, leaves in groups:
        # A seed says the modality, or `modality@place` where another stream of it has another place.
        modality, _, place = seeded.partition("@")
        base = f"{place}_{modality}" if place else modality
        number = counts.get(base, 0)
        counts[base] = number + 1
        name = f"{base}_{number}" if number else base
        annotation.streams[name] = sum(leaf.size for leaf in leaves if isinstance(leaf.size, int))
        annotation.learned[name] = _leading_learned(leaves)
        annotation.modality[name] = modality
        annotation._names.update(dict.fromkeys(leaves, name))


def _joins_learned(annotation: Annotation, node: fx.Node, concat: Concat) -> bool:
    """Whether a `cat` joins learned tokens to one stream, before its first attention.

    Raises:
        AxisError: it joins tokens of unknown origin to a stream.
    """
    streams = {leaf.stream for leaf in annotation._axes[concat.result].leaves() if leaf.stream}
    if len(streams) != 1:
        return False
    (stream,) = streams
    for part in concat.parts:
        for leaf in annotation._axes[part].leaves():
            if leaf.stream is None and depends_on_input(part.node):
                if _derived(annotation, part.node, stream):
                    return False  # a summary of the stream, beside it: a segment of no stream
                raise AxisError(
                    f"{describe(node)} joins tokens of {stream} with {leaf.size} tokens of unknown origin "
                    f"(from {part.node.name}). Name the stream of the input they come from: "
                    f"`streams={{input: name}}`."
                )
    # Latents that join a finished tower are no part of it.
    return not any(after_attention(part.node) for part in concat.parts)


def _adopt_learned(annotation: Annotation, concat: Concat) -> None:
    """Learned tokens that lead a stream (class tokens, registers) belong to it; those behind it (group tokens, prompts)
    are a segment of no stream, and stay what they are."""
    leaves = annotation._axes[concat.result].leaves()
    first = next(i for i, leaf in enumerate(leaves) if leaf.stream)
    for leaf in leaves[:first]:
        leaf.stream, leaf.learned = leaves[first].stream, True


def _derived(annotation: Annotation, node: fx.Node, stream: str) -> bool:
    """Whether a value is computed from tokens of a stream."""
    for source in ancestors(node):
        dims = [Dim(source, i, o) for o, v in enumerate(values(source)) for i in range(v.dim())]
        if any(leaf.stream == stream for dim in dims for leaf in annotation._axes[dim].leaves()):
            return True
    return False


def _stream_groups(annotation: Annotation, concats: list[Concat]) -> list[tuple[str, list[Axis]]]:
    """Leaves of each stream, in token order: those that some `cat` puts side by side belong together."""
    groups: list[list[Axis]] = []
    for axis in list(annotation._axes.values()):
        run: list[Axis] = []
        for leaf in [*axis.leaves(), None]:
            if leaf is not None and leaf.stream and (not run or leaf.stream == run[0].stream):
                run.append(leaf)
                continue
            if run:
                _merge_run(groups, run)
            run = [leaf] if leaf is not None and leaf.stream else []
    return [(leaves[0].stream or "", leaves) for leaves in groups]


def _merge_run(groups: list[list[Axis]], run: list[Axis]) -> None:
    touching = [g for g in groups if set(g) & set(run)]
    if not touching:
        groups.append(run)
        return
    keep = max([*touching, run], key=len)
    # A run that holds the others in its own order is the fuller picture; any other is a cut of a known one.
    groups[groups.index(touching[0])] = keep
    for group in touching[1:]:
        groups.remove(group)


def _leading_learned(leaves: list[Axis]) -> int:
    count = 0
    for leaf in leaves:
        if not leaf.learned or not isinstance(leaf.size, int):
            break
        count += leaf.size
    return count


def _check_covered(annotation: Annotation, node: fx.Node) -> None:
    """Every token axis that enters an operator must be spoken of by its rule."""
    constraints = annotation.constraints[node]
    spoken = {d for c in constraints for d in constraint_dims(c)}
    for source in node.all_input_nodes:
        for output, value in enumerate(values(source)):
            if node.target is operator.getitem and output != node.args[1]:
                continue
            if not isinstance(value, Tensor | torch.Tensor):
                continue
            for index in range(value.dim()):
                dim = Dim(source, index, output)
                kind = annotation.axis(dim)
                if isinstance(kind, Fixed) or dim in spoken or node.op == "output":
                    continue
                raise NoRuleError(
                    f"No rule says how {describe(node)} carries the token axis {kind} of its input "
                    f"{source.name} (dimension {index}). Add a rule for {operator_name(node)}: one function and one "
                    "test (docs/adding-a-rule.md; the table is pumer_compile/analysis/rules.py)."
                )
