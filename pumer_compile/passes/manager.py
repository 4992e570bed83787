"""The pass manager: passes in order, what each requires and ensures checked, and a history of what each did."""

from __future__ import annotations

import logging
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, TypeVar

from torch import Tensor, fx

from ..analysis.annotate import Annotation
from ..analysis.attention import Attention
from ..analysis.nodes import describe, values
from ..errors import PumerError, VerifyError
from ..methods.base import Method
from ..plan import Plan
from ..rewrite.rewriter import Rewriter
from ..rewrite.sites import Insertions, LocatedGraph

log = logging.getLogger("pumer_compile")

T = TypeVar("T")


@dataclass(frozen=True)
class ReducedGraph:
    """The graph that the passes make of the captured one."""

    module: fx.GraphModule


class State:
    """What the passes work on: the captured graph, and what each pass adds, by its type.

    Args:
        captured: is not changed; a pass may put a copy in its place.
        method: what is asked for.
        inputs: the sample.
        streams: inputs whose modality the user named.
    """

    def __init__(
        self, captured: fx.GraphModule, method: Method, inputs: dict[str, Tensor], streams: dict[str, str]
    ) -> None:
        self.captured, self.method, self.inputs, self.streams = captured, method, inputs, streams
        self._added: dict[type, object] = {}

    def under(self, method: Method) -> State:
        """What was found so far, for another method; what passes add to it stays apart."""
        state = State(self.captured, method, self.inputs, self.streams)
        state._added = dict(self._added)
        return state

    def add(self, value: object) -> None:
        """What a pass gives; an earlier one of the same type is replaced."""
        self._added[type(value)] = value

    def find(self, kind: type[T]) -> T | None:
        """What some pass gave; None where none did."""
        found = self._added.get(kind)
        return found if isinstance(found, kind) else None

    def get(self, kind: type[T]) -> T:
        """What some pass gave.

        Raises:
            PumerError: none did.
        """
        found = self.find(kind)
        if found is None:
            raise PumerError(f"No pass gave {kind.__name__} before it was asked for.")
        return found

    @property
    def annotation(self) -> Annotation:
        """The axes of every value."""
        return self.get(Annotation)

    @property
    def attentions(self) -> list[Attention]:
        """Every attention, in execution order."""
        return self.get(LocatedGraph).attentions

    @property
    def insertions(self) -> Insertions:
        """What is inserted where."""
        return self.get(Insertions)

    @property
    def rewriter(self) -> Rewriter:
        """Which made the reduced graph."""
        return self.get(Rewriter)

    @property
    def reduced(self) -> fx.GraphModule:
        """The reduced graph."""
        return self.get(ReducedGraph).module

    @property
    def plan(self) -> Plan:
        """Token counts and multiply-adds."""
        return self.get(Plan)


class Pass(ABC):
    """A step.

    Attributes:
        name: in the history and in the names of dumped graphs.
        requires: types of what earlier passes must have given.
        ensures: types of what it gives.
        optional: nothing to do is no error, and is not recorded.
    """

    name: ClassVar[str]
    requires: ClassVar[tuple[type, ...]] = ()
    ensures: ClassVar[tuple[type, ...]] = ()
    optional: ClassVar[bool] = False

    @abstractmethod
    def run(self, state: State) -> int:
        """Do it; gives the number of matches."""


@dataclass(frozen=True)
class Record:
    """What a pass did: matches, graph nodes before and after, seconds."""

    name: str
    matches: int
    nodes_before: int
    nodes_after: int
    seconds: float


@dataclass
class History:
    """Records in order."""

    records: list[Record] = field(default_factory=list)

    def __str__(self) -> str:
        lines = [f"{'pass':<20}{'matches':>9}{'nodes':>14}{'seconds':>9}"]
        for r in self.records:
            lines.append(f"{r.name:<20}{r.matches:>9}{f'{r.nodes_before} -> {r.nodes_after}':>14}{r.seconds:>9.2f}")
        return "\n".join(lines)


def _unforeseen(step: Pass, error: Exception) -> PumerError:
    """What a pass has met that it does not know, with the node it was looking at."""
    said = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    node, trace = None, error.__traceback__
    while trace is not None:  # the innermost frame that has one
        found = trace.tb_frame.f_locals.get("node")
        node = found if isinstance(found, fx.Node) else node
        trace = trace.tb_next
    at = f" at {describe(node)}" if node is not None else ""
    return PumerError(
        f"Pass {step.name} met something it does not know{at}: {type(error).__name__}: {said.rstrip('.')}. Compile a "
        "part of the model without it (--component, --outputs), or report it with this message and its traceback (-v)."
    )


def run_passes(
    state: State, passes: Sequence[Pass], dump: Path | None = None, earlier: History | None = None
) -> History:
    """Run passes in order, check what each promises, and record what it did.

    Args:
        state: changed in place.
        passes: which, in order.
        dump: folder to which the graph is written as Python after each pass.
        earlier: what passes did that made the graph which the state begins with; the history goes on from there.

    Raises:
        PumerError: from a pass; VerifyError where a pass breaks its own promise or matches nothing.
    """
    history = History(list(earlier.records) if earlier is not None else [])
    if dump is not None and history.records:
        _dump(state, dump / _dumped(history))
    for step in passes:
        missing = [kind.__name__ for kind in step.requires if state.find(kind) is None]
        if missing:
            raise PumerError(f"Pass {step.name} requires {', '.join(missing)}, which no earlier pass gave.")
        before, start = len(_graph(state).nodes), time.perf_counter()
        try:
            matches = step.run(state)
        except PumerError:
            raise
        except Exception as error:
            raise _unforeseen(step, error) from error
        seconds = time.perf_counter() - start
        if matches == 0 and step.optional:
            continue
        broken = [kind.__name__ for kind in step.ensures if state.find(kind) is None]
        if broken or matches == 0:
            why = f"did not give {', '.join(broken)}" if broken else "matched nothing"
            raise VerifyError(f"Pass {step.name} {why}; the graph has {before} nodes.")
        _graph(state).lint()
        history.records.append(Record(step.name, matches, before, len(_graph(state).nodes), seconds))
        log.info("pass %s: %d matches in %.2f s", step.name, matches, seconds)
        if dump is not None:
            _dump(state, dump / _dumped(history))
    return history


def _dumped(history: History) -> str:
    """Name of the file for the graph as it is now."""
    return f"{len(history.records)}_{history.records[-1].name}.py"


def _module(state: State) -> fx.GraphModule:
    reduced = state.find(ReducedGraph)
    return reduced.module if reduced is not None else state.captured


def _graph(state: State) -> fx.Graph:
    return _module(state).graph


def _dump(state: State, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [_module(state).print_readable(print_output=False)]
    annotation = state.find(Annotation)
    if annotation is not None and state.find(ReducedGraph) is None:
        for node in state.captured.graph.nodes:
            if node.op == "call_function" and values(node):
                axes = ", ".join(map(str, annotation.axes(node)))
                lines.append(f"# {node.name}: ({axes})")
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
