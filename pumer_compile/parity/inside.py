"""Where an artifact begins to differ from eager PyTorch: its inner values beside those of the reduced graph.

Converters rename values, fuse some and write others differently, so values are told by what they hold: an inner value
of eager PyTorch agrees where some inner value of the artifact has as many numbers and the same ones, up to rounding.
Behind a fault nothing agrees any more; what was merely fused away has values behind it that do. The first value that
does not agree, and none behind it, is where they part.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from ..analysis.nodes import describe
from ..reducers import forced_decisions
from ..reducers.base import Decisions

Array = np.ndarray[Any, Any]

# Difference of two values relative to their norm, by the artifact's dtype, up to which they agree: well above what
# rounding makes of the values of small models.
AGREE = {"float32": 1e-4, "float16": 2e-2, "bfloat16": 1.6e-1, "int8": 2e-1}
# Inner values of an artifact that are asked for at once.
AT_ONCE = 256


@dataclass(frozen=True)
class FirstDifference:
    """What was found.

    Attributes:
        node: the first value of eager PyTorch that the artifact does not have, with module path and source line; empty
            where there is none.
        last: the last value before it that the artifact does have; empty where there is none.
        difference: of the nearest value of the artifact, relative to the norm; infinite where none has as many numbers.
        compared: values of eager PyTorch that were looked for.
        agree: how many of them were found.
        tolerance: see `AGREE`.
    """

    node: str = ""
    last: str = ""
    difference: float = 0.0
    compared: int = 0
    agree: int = 0
    tolerance: float = 0.0

    def __str__(self) -> str:
        if not self.compared:
            return "no inner value could be compared"
        shares = f"{self.agree} of {self.compared} inner values"
        found = f"{shares} were found in the artifact, up to {self.tolerance:g} of their norm"
        if not self.node:
            return f"no value inside differs: {found}; what follows the others agrees"
        near = "none has its size"
        if np.isfinite(self.difference):
            near = f"the nearest is off by {self.difference:.2e} of its norm"
        before = f"the last that agrees is {self.last}" if self.last else "none before it agrees"
        return f"the first value that differs is that of {self.node}: {near}; {before} ({found})"


def first_difference(
    module: fx.GraphModule,
    batch: Mapping[str, Tensor],
    decisions: Mapping[str, Decisions],
    inner: Iterable[Array],
    dtype: str,
) -> FirstDifference:
    """Find where an artifact parts from eager PyTorch on one batch.

    Args:
        module: the reduced module, in float32.
        batch: by input name.
        decisions: those of the artifact, which eager PyTorch follows.
        inner: inner values of the artifact for this batch, outputs among them.
        dtype: of the artifact, or what it is quantized to.
    """
    eager = _values(module, batch, decisions)
    nearest = {node: np.inf for node in eager}
    by_size: dict[int, list[fx.Node]] = {}
    for node, value in eager.items():
        by_size.setdefault(value.size, []).append(node)
    for given in inner:
        flat = given.reshape(-1).astype(np.float32)
        for node in by_size.get(flat.size, ()):
            nearest[node] = min(nearest[node], _difference(flat, eager[node]))
    return _parted(module.graph, nearest, AGREE[dtype])


def _parted(graph: fx.Graph, nearest: Mapping[fx.Node, float], tolerance: float) -> FirstDifference:
    """Of nodes and how far the artifact's nearest value is from theirs."""
    agree = {node for node, difference in nearest.items() if difference <= tolerance}
    # Whether something behind a node agrees, the node included.
    later: set[fx.Node] = set()
    for node in reversed(graph.nodes):
        if node in agree or any(user in later for user in node.users):
            later.add(node)
    counts = (len(nearest), len(agree))
    first = next((node for node in graph.nodes if node in nearest and node not in later), None)
    if first is None:
        return FirstDifference("", "", 0.0, *counts, tolerance)
    before = [node for node in graph.nodes if node in agree and node in _ancestors(first)]
    last = describe(before[-1]) if before else ""
    return FirstDifference(describe(first), last, nearest[first], *counts, tolerance)


def _ancestors(node: fx.Node) -> set[fx.Node]:
    found: set[fx.Node] = set()
    open_ = [node]
    while open_:
        for given in open_.pop().all_input_nodes:
            if given not in found:
                found.add(given)
                open_.append(given)
    return found


def _difference(given: Array, eager: Array) -> float:
    given, eager = given.astype(np.float64), eager.astype(np.float64)  # masks are as low as float32 goes
    # Infinities are scores of padding, where both have them.
    alike = np.isinf(eager) & (given == eager)
    gap = np.where(alike, 0, given) - np.where(alike, 0, eager)
    size = float(np.linalg.norm(np.where(alike, 0, eager)))
    found = float(np.linalg.norm(gap)) / max(size, 1e-30)
    return found if np.isfinite(found) else np.inf


def _values(
    module: fx.GraphModule, batch: Mapping[str, Tensor], decisions: Mapping[str, Decisions]
) -> dict[fx.Node, Array]:
    """Every inner value of a module that depends on its inputs, flat, in the order of the graph; none whose numbers are
    all alike, which says nothing."""
    watch = _Values(module)
    order = [str(node.target) for node in module.graph.find_nodes(op="placeholder")]
    with torch.no_grad(), forced_decisions(module, dict(decisions)):
        watch.run(*(batch[name] for name in order), enable_io_processing=False)
    return watch.found


class _Values(fx.Interpreter):
    """Runs a graph and keeps what its nodes give."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: dict[fx.Node, Array] = {}
        self.fed: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        """See `fx.Interpreter`."""
        result = super().run_node(n)
        if n.op == "placeholder" or any(given in self.fed for given in n.all_input_nodes):
            self.fed.add(n)
        worth = n.op in ("call_function", "call_method", "call_module") and isinstance(result, Tensor)
        if worth and n in self.fed and result.is_floating_point() and result.numel() > 1:
            flat = result.detach().float().reshape(-1).numpy()
            finite = flat[np.isfinite(flat)]
            if finite.size and finite.min() < finite.max():
                self.found[n] = flat.copy()
        return result


def inner_values(session: Any, names: Sequence[str], batch: Mapping[str, Tensor]) -> Iterator[Array]:
    """Inner values of an open artifact, some at a time.

    Args:
        session: that shows them (`artifacts.session.Exposing`).
        names: of the values.
        batch: by input name.
    """
    for start in range(0, len(names), AT_ONCE):
        opened = session.exposing(names[start : start + AT_ONCE])
        given = opened.run(batch)
        opened.close()
        yield from (value for value in given.values() if value.dtype.kind == "f")
