"""`reduce`: a captured program and a schedule to a module that runs, trains and exports with fewer tokens."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import fx, nn

from .analysis.nodes import copied
from .analysis.outputs import output_nodes, set_outputs
from .capture.added import with_added_inputs
from .capture.capture import Program
from .errors import PumerError
from .methods.lossless import Lossless
from .passes.manager import History, State, run_passes
from .passes.pipeline import ANALYSE, COUNT, EXACT, REDUCE, passes_of
from .plan import Plan
from .reducers import Reduction, reducers_of
from .schedule import Schedule, as_trained
from .shown.tables import Shown, Table

log = logging.getLogger("pumer_compile")


@dataclass(frozen=True, repr=False)
class Reduced(Shown):
    """A reduced program.

    Attributes:
        module: runs and trains in eager PyTorch; takes and returns what the model does, and shares its
            parameters.
        plan: token counts and multiply-adds.
        program: what was reduced.
        schedule: by what.
        history: what each pass did, from the capture on.
    """

    module: fx.GraphModule
    plan: Plan
    program: Program
    schedule: Schedule
    history: History

    def tables(self) -> list[Table]:
        """See `Shown`: the program, and its plan."""
        (program,), nodes = self.program.tables(), len(self.module.graph.nodes)
        heading = Table(f"Reduced by {self.schedule.described}, to {nodes} nodes")
        return [heading, Table(program.heading), *self.plan.tables()]


def reduce(program: Program, schedule: Schedule | str | os.PathLike[str], *, dump_graph: Path | None = None) -> Reduced:
    """Insert token reducers into a captured program, and leave out what nothing reads.

    Args:
        program: from `capture`.
        schedule: a `Schedule`, a YAML file, or the name of a preset. One that names no semantics takes those that the
            model was fine-tuned with, where its configuration says so (`pumer_schedule`), and is `safe` otherwise.
        dump_graph: folder for the graph after each pass.

    Returns:
        The reduced program. Its module *shares* parameters with the captured model: training one trains the
        other.

    Raises:
        PumerError: see the errors of the passes.
    """
    schedule = schedule_for(program.model, schedule)
    program = with_added_inputs(program, schedule.adds)
    state = State(program.module, schedule, dict(program.inputs), dict(program.streams))
    history = run_passes(state, passes_of(schedule) + COUNT, dump=dump_graph, earlier=program.history)
    return _reduced(state, program, history)


def _reduced(state: State, program: Program, history: History) -> Reduced:
    state.reduced.train(program.module.training)
    return Reduced(state.reduced, state.plan, program, state.method, history)


class Analysed:
    """A captured program that many schedules reduce: what is found in its graph is found once for all that ask for the
    same marks. The passes that reduce copy the graph, so that no schedule sees another."""

    def __init__(self, program: Program) -> None:
        self.program = program
        self._found: dict[Any, State | PumerError] = {}
        self._histories: dict[Any, History] = {}

    def state(self, schedule: Schedule) -> State:
        """What the analysis finds for a schedule: the graph as its passes would reduce it, attentions, marks.

        Raises:
            PumerError: see the errors of the passes.
        """
        key = schedule.marks
        if key not in self._found:
            program = self.program
            state = State(program.module, schedule, dict(program.inputs), dict(program.streams))
            try:
                self._histories[key] = run_passes(state, ANALYSE, earlier=program.history)
                self._found[key] = state
            except PumerError as error:
                self._found[key] = error
        found = self._found[key]
        if isinstance(found, PumerError):
            raise found
        return found.under(schedule)

    def check(self, schedule: Schedule) -> None:
        """Whether a schedule can be met: what `reduce` does but for the exact passes and the plan.

        Raises:
            PumerError: it cannot.
        """
        if schedule.exact or schedule.adds:
            reduce(self.program, schedule)
        else:
            run_passes(self.state(schedule), REDUCE)

    def reduce(self, schedule: Schedule) -> Reduced:
        """See `reduce`, whose result this is.

        Raises:
            PumerError: see the errors of the passes.
        """
        schedule = schedule_for(self.program.model, schedule)
        if schedule.exact or schedule.adds:  # another graph than the analysed one
            return reduce(self.program, schedule)
        state = self.state(schedule)
        history = run_passes(state, REDUCE + EXACT + COUNT, earlier=self._histories[schedule.marks])
        return _reduced(state, self.program, history)


def dump_captured(program: Program, folder: Path | None) -> History:
    """What passes did at capture (`--no-padding`), and the graph after the last of them in a folder, as `reduce` writes
    it; nothing is written where none ran."""
    state = State(program.module, Lossless(), dict(program.inputs), dict(program.streams))
    return run_passes(state, (), dump=folder, earlier=program.history)


def schedule_for(model: nn.Module | None, schedule: Schedule | str | os.PathLike[str] | Mapping[str, Any]) -> Schedule:
    """A schedule, under the semantics that the model was fine-tuned with where it names none (which is said).

    Args:
        model: None where it is not at hand.
        schedule: see `Schedule.load`.

    Raises:
        ScheduleError: it, or the `pumer_schedule` of the model's configuration, is not valid.
    """
    given = Schedule.load(schedule)
    resolved = as_trained(given, configs_of(model))
    if resolved is not given:
        log.warning(
            "The schedule names no semantics: taking %s, which the model was fine-tuned with (pumer_schedule in its "
            "configuration).",
            resolved.semantics,
        )
    return resolved


def configs_of(model: nn.Module | None) -> Iterator[Any]:
    """The `config` of every module of a model that has one, the outer ones first."""
    for module in model.modules() if model is not None else ():
        config = getattr(module, "config", None)
        if config is not None:
            yield config


def reduce_graph(program: Program, schedule: Schedule) -> fx.GraphModule:
    """The reduced module alone, without a plan."""
    program = with_added_inputs(program, schedule.adds)
    state = State(program.module, schedule, dict(program.inputs), dict(program.streams))
    run_passes(state, passes_of(schedule))
    return state.reduced


def with_decisions(module: fx.GraphModule, output_names: list[str] | None = None) -> tuple[fx.GraphModule, list[str]]:
    """A copy of a reduced module that also gives every reducer's decisions.

    Args:
        module: from `reduce`.
        output_names: names for the tensors that the module returns, in order; None takes the model's own.

    Returns:
        A module that returns one flat dictionary: the outputs by name, then `<reducer>.<decision>` (int64)
        for every decision that the schedule leaves to the data; and the names of these. Parameters are
        shared.
    """
    twin = fx.GraphModule(module, copied(module.graph), class_name="ReducedWithDecisions")
    output = twin.graph.output_node()
    own = output_nodes(twin)
    named: dict[str, Any] = dict(zip(output_names or own, own.values(), strict=True))
    reducers = reducers_of(twin)
    for node in list(twin.graph.nodes):
        reducer = reducers.get(str(node.target)) if node.op == "call_module" else None
        if reducer is None:
            continue
        for name in (decision.name for decision in reducer.decisions):
            with twin.graph.inserting_before(output):
                place = Reduction._fields.index(name)
                named[f"{node.target}.{name}"] = twin.graph.call_method("__getitem__", (node, place))
    set_outputs(twin, named)
    return twin, [name for name in named if name not in (output_names or own)]
