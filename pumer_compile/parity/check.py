"""The comparison that a parity check is: decisions first, then outputs.

A reducer's choice flips when two scores are nearly equal, and a flipped choice changes the outputs far more than
rounding does. So the choices are compared first (a differing one is allowed only where the eager scores are nearly
tied), then the outputs with the eager model made to follow the artifact's choices, then end to end on the samples
whose choices agree.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor, fx, nn
from transformers.exporters.utils import get_leaf_tensors

from ..analysis.outputs import artifact_outputs, model_outputs, output_nodes
from ..artifacts.session import Session
from ..capture.capture import batch_inputs
from ..capture.inputs import describe_inputs
from ..capture.loading import first_line
from ..capture.model_state import restoring_model_state, set_for_inference
from ..errors import PumerError, UsageError
from ..frontends import in_fixed_order
from ..reducers import Reducer, forced_decisions, noted_decisions, reducers_of
from ..reducers.base import Comparison, Decisions
from .noise import Batches, Coarse, failed
from .report import TOLERANCES, OutputReport, ParityReport, ReducerReport, Tolerance

Arrays = dict[str, np.ndarray[Any, Any]]
_T = TypeVar("_T")

# Samples drawn for choices that no sample has made so far, at most, and how many may bring no new one in a row.
MORE_SAMPLES = 16
IN_VAIN = 3
# Samples drawn for one whose choices all agree, where none has so far.
END_TO_END_SAMPLES = 16
# Results of eager PyTorch that are kept while the artifact runs; beyond it no more samples are drawn.
HELD_BYTES = 2**29
# The captured graph is compared with the model's own forward on so many batches.
MODEL_BATCHES = 2
# A gap of two scores, relative to them, below which they are equal but for rounding: no choice between them is wrong,
# and there may be many, where all the padding of an image is alike.
EQUAL = TOLERANCES["float32"].tie


def check(
    session: Session,
    eager: fx.GraphModule,
    unreduced: fx.GraphModule,
    batches: Sequence[Mapping[str, Tensor]],
    dtype: str,
    decisions: Sequence[str],
    *,
    open_with_decisions: Callable[[], Session] | None = None,
    reopen: Callable[[], Session] | None = None,
    more: Iterable[Mapping[str, Tensor]] = (),
    model: nn.Module | None = None,
    added: Sequence[str] = (),
    atol: float | Mapping[str, float] | None = None,
    rtol: float | Mapping[str, float] | None = None,
    coarse: Coarse | None = None,
) -> ParityReport:
    """Compare an open session with a module in eager PyTorch.

    Args:
        session: whose outputs are judged; closed where another gives the decisions, so that one is in memory at a time.
        eager: the reduced module, in float32.
        unreduced: the captured module; the same object as `eager` where nothing is reduced.
        batches: inputs by name, `[batch, ...]`; all are compared.
        dtype: of the artifact, or what it is quantized to; picks the tolerances.
        decisions: names of decision outputs.
        open_with_decisions: opens the decision session; None where `session` gives the decisions itself.
        reopen: opens `session` again, where it was closed for a decision session.
        more: further batches, which are compared while they bring choices that no sample has made, and while no sample
            was judged end to end.
        model: what `unreduced` was captured from, in float32; its own forward is compared with it.
        added: inputs that the model does not take.
        atol, rtol: as in `parity`.
        coarse: gives `eager` in the artifact's precision; asked where an error is larger than its tolerance.

    Raises:
        UsageError: a tolerance for an output that there is not.
    """
    default = TOLERANCES[dtype]
    report = ParityReport(
        str(session.path),
        dtype,
        session.provider,
        decisions_compared=bool(decisions),
        end_to_end_required=default.end_to_end and bool(decisions),
    )
    if reducers_of(eager) and not decisions:
        report.notes.append("the artifact does not give its decisions: judged end to end alone")
    check_tolerances([name for name in session.outputs if name not in decisions], atol, rtol)
    comparison = _Comparison(report, eager, unreduced, model, default, atol, rtol, set(decisions), tuple(added))
    drawn = iter(more)
    with torch.no_grad():
        runs = list(_covering(comparison, batches, drawn))
        comparison.judge(session, open_with_decisions, runs, decisions)
        noise = _Noise(comparison, coarse if atol is None and rtol is None else None)
        noise.measure()
        closed = open_with_decisions is not None and bool(decisions)
        _until_end_to_end(comparison, reopen if closed else lambda: session, open_with_decisions, drawn, decisions)
        noise.measure()
    return report


def _until_end_to_end(
    comparison: _Comparison,
    opened: Callable[[], Session] | None,
    open_with_decisions: Callable[[], Session] | None,
    more: Iterator[Mapping[str, Tensor]],
    decisions: Sequence[str],
) -> None:
    """Judge further samples, a few, while none so far was judged end to end and none is refused."""
    report, searched = comparison.report, 0
    while report.sound and not report.end_to_end and searched < END_TO_END_SAMPLES:
        batch = None if opened is None else next(more, None)
        if opened is None or batch is None:
            break
        searched += _rows(batch)
        comparison.judge(opened(), open_with_decisions, [comparison.run(batch)], decisions)
    if report.sound and not report.end_to_end:
        report.notes.append(
            f"end to end nothing was compared: in each of {report.samples} samples a choice differs. The outputs were "
            "compared with the artifact's choices forced on eager PyTorch"
        )


def check_tolerances(
    outputs: Sequence[str], atol: float | Mapping[str, float] | None, rtol: float | Mapping[str, float] | None
) -> None:
    """Refuse a tolerance for an output that an artifact with these outputs does not have.

    Raises:
        UsageError: naming the option, the output and those there are.
    """
    for option, tolerance in (("atol", atol), ("rtol", rtol)):
        unknown = [name for name in tolerance if name not in outputs] if isinstance(tolerance, Mapping) else []
        if unknown:
            raise UsageError(f"--{option} names the output {unknown[0]!r}; there are {', '.join(outputs)}.")


# --- Eager PyTorch ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _EagerRun:
    """What eager PyTorch gives for a batch left alone: outputs by the artifact's names, and its decisions."""

    batch: Mapping[str, Tensor]
    outputs: Arrays
    decisions: dict[str, Decisions]


def _covering(
    comparison: _Comparison, batches: Sequence[Mapping[str, Tensor]], more: Iterator[Mapping[str, Tensor]]
) -> Iterator[_EagerRun]:
    """The batches, and more while these choose what none before has chosen."""
    seen: set[tuple[str, int, int]] = set()
    held = 0
    for batch in batches:
        run = comparison.run(batch)
        seen |= _choices(run, comparison.eager)
        held += sum(array.nbytes for array in run.outputs.values())
        yield run
    extra = vain = 0
    while seen and extra < MORE_SAMPLES and vain < IN_VAIN and held < HELD_BYTES:
        drawn = next(more, None)
        if drawn is None:
            return
        run = comparison.run(drawn)
        new = _choices(run, comparison.eager) - seen
        seen |= new
        vain = 0 if new else vain + 1
        extra += _rows(drawn)
        held += sum(array.nbytes for array in run.outputs.values())
        yield run


def _choices(run: _EagerRun, module: nn.Module) -> set[tuple[str, int, int]]:
    """Every choice in a run: of which reducer, of which kind, which token."""
    reducers = reducers_of(module)
    found = set()
    for name, made in run.decisions.items():
        chosen = made if reducers[name].prunes else made[1:]
        for kind, indices in enumerate(reversed(chosen)):
            found |= {(name, kind, int(index)) for index in indices.unique()}
    return found


def _rows(batch: Mapping[str, Tensor]) -> int:
    batched = batch_inputs(batch)
    return next((int(batch[name].shape[0]) for name in batched), 1)


def _samples(run: _EagerRun) -> int:
    """Of how many samples the choices of a run can be told apart: a video has several images that are reduced, and an
    image may be asked for by several texts."""
    return math.gcd(_rows(run.batch), *(len(made.kept) for made in run.decisions.values()))


def _eager_leaves(module: nn.Module, batch: Mapping[str, Tensor]) -> list[np.ndarray[Any, Any]]:
    """Output tensors of a graph module, in order; in the dtypes that it gives, but bfloat16 as float32."""
    leaves = get_leaf_tensors(module(**_in_its_dtype(module, batch))).values()
    return [(leaf.float() if leaf.dtype == torch.bfloat16 else leaf).numpy() for leaf in leaves]


def _running(run: Callable[[], _T], what: str, batch: Mapping[str, Tensor]) -> _T:
    """What `run` gives.

    Raises:
        UsageError: a sample that the model does not take, which a made-up one may be.
    """
    try:
        return run()
    except (RuntimeError, IndexError, ValueError) as error:
        raise UsageError(
            f"{what} cannot run on a sample ({describe_inputs(batch)}): {first_line(error)}. Give samples that the "
            "model takes: --inputs FILE.npz, samples= in Python."
        ) from error


def _in_its_dtype(module: nn.Module, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    dtype = next((p.dtype for p in module.parameters() if p.is_floating_point()), torch.float32)
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in batch.items()}


# --- Comparing --------------------------------------------------------------------------------------------------------


def _answers(
    session: Session,
    open_with_decisions: Callable[[], Session] | None,
    runs: Sequence[_EagerRun],
    decisions: Sequence[str],
) -> Iterator[tuple[_EagerRun, Arrays, Arrays]]:
    """Each run, the artifact's outputs for its batch, and its decisions."""
    if open_with_decisions is None:
        for run in runs:
            given = session.run(run.batch)
            yield run, given, given
        return
    outputs = [session.run(run.batch) for run in runs]
    session.close()
    chosen: list[Arrays] = [{} for _ in runs]
    if any(_numbers(given) for given in outputs):  # a decision session can take minutes to make
        other = open_with_decisions()
        chosen = [{n: value for n, value in other.run(run.batch).items() if n in decisions} for run in runs]
        other.close()
    yield from zip(runs, outputs, chosen, strict=True)


def _numbers(arrays: Arrays) -> bool:
    return not any(np.isnan(array).any() for array in arrays.values())


@dataclass
class _Comparison:
    report: ParityReport
    eager: fx.GraphModule
    unreduced: fx.GraphModule
    model: nn.Module | None
    default: Tolerance
    atol: float | Mapping[str, float] | None
    rtol: float | Mapping[str, float] | None
    decisions: set[str]
    added: tuple[str, ...] = ()
    taken: int = 0  # batches
    followed: Batches = field(default_factory=list)  # those compared, and the decisions made on them

    def run(self, batch: Mapping[str, Tensor]) -> _EagerRun:
        """Eager PyTorch, left alone."""
        with noted_decisions(self.eager) as own:
            leaves = _running(lambda: _eager_leaves(self.eager, batch), "The captured graph", batch)
        return _EagerRun(batch, dict(zip(artifact_outputs(self.eager, batch), leaves, strict=True)), own)

    def judge(
        self,
        session: Session,
        open_with_decisions: Callable[[], Session] | None,
        runs: Sequence[_EagerRun],
        decisions: Sequence[str],
    ) -> None:
        """Run the artifact on the batches of these runs, and take in what it gives."""
        for run, outputs, chosen in _answers(session, open_with_decisions if decisions else None, runs, decisions):
            own = {name: value for name, value in outputs.items() if name not in self.decisions}
            self.add(run, own, chosen)

    def add(self, run: _EagerRun, artifact: Arrays, chosen: Arrays) -> None:
        """Take in one batch, what the artifact gives for it, and its decisions."""
        size = _samples(run)
        agree = np.ones(size, dtype=bool)
        artifact = self._fitting(artifact, run.outputs)
        wanted: dict[str, Decisions] = {}
        # Choices among NaN scores mean nothing; the outputs fail in any case.
        if self.decisions and _numbers(artifact) and _numbers(run.outputs):
            wanted = self._wanted({name: chosen[name] for name in self.decisions}, run)
            if not any(row.fault for row in self.report.reducers):
                forced, compared = self._followed(run, wanted)
                agree = self._decisions(compared, size)
                self._outputs("forced", True, artifact, forced)
        self._outputs("end_to_end", True, artifact, run.outputs, agree)
        self.followed.append((run.batch, wanted or run.decisions))
        if self.taken < MODEL_BATCHES:
            self._unreduced(run.batch, artifact)
        self.taken += 1
        self.report.samples += size
        self.report.end_to_end += int(agree.sum())

    def _fitting(self, artifact: Arrays, eager: Arrays) -> Arrays:
        """The artifact's outputs that can be compared; the others are faults."""
        fitting = {}
        for name in [*eager, *(n for n in artifact if n not in eager)]:
            fault = self._misfit(name, artifact.get(name), eager.get(name)) or _unknown(name, eager)
            if fault and fault not in self.report.faults:
                self.report.faults.append(fault)
            if not fault:
                fitting[name] = artifact[name]
        return fitting

    def _misfit(self, name: str, given: Any, wanted: Any) -> str:
        if given is None:
            return f"the artifact gives no output {name}, which the model gives"
        if wanted is None:
            return ""
        if given.shape != wanted.shape:
            return f"output {name} has shape {list(given.shape)}, and {list(wanted.shape)} in eager PyTorch"
        floating = np.issubdtype(wanted.dtype, np.floating)
        allowed = {str(wanted.dtype), *(("float32", self.default.output_dtype) if floating else ())}
        if str(given.dtype) not in allowed:
            return f"output {name} is {given.dtype}, and {wanted.dtype} in eager PyTorch"
        return ""

    def _followed(self, run: _EagerRun, wanted: dict[str, Decisions]) -> tuple[Arrays, dict[str, Comparison]]:
        """Eager outputs with these decisions, and its own beside them."""
        if all(map(_same, run.decisions.values(), (wanted[name] for name in run.decisions))):
            # Left alone it chooses the same; made to, it would compute the same once more.
            return run.outputs, {name: _no_difference(choice) for name, choice in run.decisions.items()}
        with forced_decisions(self.eager, wanted) as forcings:
            leaves = _eager_leaves(self.eager, run.batch)
        compared = {name: f.comparison for name, f in forcings.items() if f.comparison is not None}
        return dict(zip(run.outputs, leaves, strict=True)), compared

    def _wanted(self, chosen: Arrays, run: _EagerRun) -> dict[str, Decisions]:
        """The artifact's decisions by reducer; a row's `fault` says where they cannot be."""
        wanted = {}
        for name, reducer in reducers_of(self.eager).items():
            wanted[name] = _decisions_of(name, reducer, chosen, len(run.decisions[name].kept))
            row = self._row(name)
            row.fault = row.fault or _fault(reducer, wanted[name])
        return wanted

    def _row(self, name: str) -> ReducerReport:
        known = next((row for row in self.report.reducers if row.name == name), None)
        if known is None:
            judged = self.default.decisions and reducers_of(self.eager)[name].judged
            known = ReducerReport(name, judged=judged, share=self.default.share)
            self.report.reducers.append(known)
        return known

    def _decisions(self, compared: dict[str, Comparison], size: int) -> np.ndarray[Any, Any]:
        agree = np.ones(size, dtype=bool)
        for name, result in compared.items():
            row, prunes = self._row(name), reducers_of(self.eager)[name].prunes
            differs, margin = result.differs.numpy(), result.margin.numpy()
            apart = differs & ~(margin <= self.default.tie)  # also where no margin was measured
            one, far = (rows.reshape(size, -1).any(1) for rows in (differs, apart))
            row.samples += size
            row.differ += int(one.sum())
            row.near_ties += int((one & ~far).sum())
            measured = margin[differs & ~np.isnan(margin)]
            row.worst_margin = max(row.worst_margin, float(measured.max(initial=0.0)))
            for index in range(len(differs)):
                chosen, flipped = _flips(result.own, result.forced, index, prunes)
                row.chosen += chosen
                row.flipped += 0 if margin[index] <= EQUAL else flipped
            agree &= ~one
        return agree

    def _unreduced(self, batch: Mapping[str, Tensor], artifact: Arrays) -> None:
        """Against the unreduced graph, for information; and that graph against the model it was captured from."""
        same = self.unreduced is self.eager
        if same and self.model is None:
            return
        leaves = _eager_leaves(self.unreduced, batch)
        before = dict(zip(artifact_outputs(self.unreduced, batch), leaves, strict=True))
        if not same:
            alike = {n: v for n, v in artifact.items() if n in before and before[n].shape == v.shape}
            self._outputs("unreduced", False, alike, before)
        if self.model is not None:
            self._model(self.model, batch, before)

    def _model(self, model: nn.Module, batch: Mapping[str, Tensor], captured: Arrays) -> None:
        """The captured graph against the model's own forward."""
        batch = {name: tensor for name, tensor in batch.items() if name not in self.added}
        with restoring_model_state(model), in_fixed_order():
            set_for_inference(model)
            given = _running(lambda: model(**_in_its_dtype(model, batch)), "The model", batch)
        own = model_outputs(given)
        graph = dict(zip(output_nodes(self.unreduced), captured.values(), strict=True))
        # Features of several images may be side by side in one and below one another in the other.
        missing = [name for name in graph if name not in own or own[name].numel() != graph[name].size]
        if missing:
            self._note_fault(
                f"the captured graph gives an output {missing[0]} {list(graph[missing[0]].shape)}, and the model's own "
                f"forward gives {', '.join(f'{n} {list(t.shape)}' for n, t in own.items())}"
            )
        compared = {name: value for name, value in graph.items() if name not in missing}
        wanted = {name: own[name].float().reshape(compared[name].shape).numpy() for name in compared}
        self._outputs("model", True, compared, wanted, tolerance=TOLERANCES["float32"])

    def _note_fault(self, fault: str) -> None:
        if fault not in self.report.faults:
            self.report.faults.append(fault)

    def _outputs(
        self,
        against: str,
        judged: bool,
        artifact: Arrays,
        eager: Arrays,
        rows: np.ndarray[Any, Any] | None = None,
        tolerance: Tolerance | None = None,
    ) -> None:
        for name, value in artifact.items():
            known = [o for o in self.report.outputs if (o.name, o.against) == (name, against)]
            if not known:
                known = [self._output(name, against, judged, tolerance)]
                if not np.issubdtype(eager[name].dtype, np.floating) and self.atol is None and self.rtol is None:
                    known[0].atol = known[0].rtol = 0.0  # whole numbers are right or wrong
                self.report.outputs.append(known[0])
            wanted = eager[name].astype(np.float32)
            found = _of_rows(value, rows)
            if found is not None:
                known[0].add(found, _of_rows(wanted, rows))

    def _output(self, name: str, against: str, judged: bool, tolerance: Tolerance | None) -> OutputReport:
        if tolerance is not None:
            return OutputReport(name, against, judged, tolerance.atol, tolerance.rtol, norm=tolerance.norm)
        atol, rtol = (_of(t, name, d) for t, d in ((self.atol, self.default.atol), (self.rtol, self.default.rtol)))
        # Tolerances of the user's own are the whole of the judgement.
        norm = self.default.norm if self.atol is None and self.rtol is None else math.inf
        return OutputReport(name, against, judged, atol, rtol, norm=norm)


def _unknown(name: str, eager: Arrays) -> str:
    return "" if name in eager else f"the artifact gives an output {name}, and the model gives {', '.join(eager)}"


def _of_rows(value: np.ndarray[Any, Any], rows: np.ndarray[Any, Any] | None) -> Any:
    """What an output says of some samples (None: of all), `[samples, ...]`; None where these cannot be told apart."""
    if rows is None or rows.all():
        return np.atleast_1d(value)
    if value.ndim == 0 or value.shape[0] != len(rows):
        return None  # without the batch in front: of samples that chose otherwise as well
    pairs = value.ndim > 1 and value.shape[1] == len(rows)  # of every sample with every other (`logits_per_text`)
    return value[rows][:, rows] if pairs else value[rows]


def _of(tolerance: float | Mapping[str, float] | None, name: str, default: float) -> float:
    if isinstance(tolerance, Mapping):
        return tolerance.get(name, default)
    return default if tolerance is None else tolerance


@dataclass
class _Noise:
    """What the artifact's precision itself makes of the outputs, where that is asked.

    Attributes:
        comparison: whose batches are run once more.
        coarse: see `check`; None: nothing is measured.
        seen: how many batches were.
    """

    comparison: _Comparison
    coarse: Coarse | None
    seen: int = 0
    rows: dict[str, OutputReport] = field(default_factory=dict)
    module: fx.GraphModule | None = None

    def measure(self) -> None:
        """Measure on the batches since the last time, where an error is too large and nothing else is wrong with it."""
        report = self.comparison.report
        judged = [row for row in report.outputs if row.against in ("forced", "end_to_end") and row.finite]
        if self.coarse is None or all(row.within_constants for row in judged):
            return
        try:
            self.module = self.coarse() if self.module is None else self.module
            for batch, decisions in self.comparison.followed[self.seen :]:
                self._add(self.module, batch, decisions)
        except (
            PumerError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:  # an operator that CPUs lack in half precision
            self.coarse = None
            report.notes.append(f"the error of {report.dtype} in eager PyTorch was not measured: {failed(error)}")
            return
        self.seen = len(self.comparison.followed)
        for row in judged:
            found = self.rows.get(row.name)
            if found is not None and found.finite:
                row.noise_atol, row.noise_norm = found.required_atol, found.max_norm
        self._say(judged)

    def _add(self, module: fx.GraphModule, batch: Mapping[str, Tensor], decisions: Mapping[str, Decisions]) -> None:
        outputs = []
        for each in (self.comparison.eager, module):
            with forced_decisions(each, dict(decisions)):
                outputs.append(_eager_leaves(each, batch))
        for name, exact, rough in zip(artifact_outputs(self.comparison.eager, batch), *outputs, strict=True):
            rtol = _of(None, name, self.comparison.default.rtol)
            row = self.rows.setdefault(name, OutputReport(name, "noise", False, 0.0, rtol))
            row.add(np.atleast_1d(rough), np.atleast_1d(exact).astype(np.float32))

    def _say(self, judged: Sequence[OutputReport]) -> None:
        report = self.comparison.report
        notes = [note for note in report.notes if not note.startswith(_MEASURED)]
        for row in judged:
            if row.noise_norm is not None and not row.within_constants:
                notes.append(
                    f"{_MEASURED} {row.name} ({row.against.replace('_', ' ')}) is off by {row.max_norm:.2e} of its "
                    "norm; "
                    f"the constant of {report.dtype} is {row.norm:g}, and {report.dtype} in eager PyTorch makes "
                    f"{row.noise_norm:.2e} on the same samples, of which twice is allowed"
                )
        report.notes[:] = notes


_MEASURED = "measured:"


# --- Decisions --------------------------------------------------------------------------------------------------------


def decisions_by_reducer(module: nn.Module, chosen: Arrays) -> dict[str, Decisions]:
    """The decisions of an artifact, which are arrays `[batch, count]` by name, for the reducers of a module."""
    rows = len(next(iter(chosen.values())))
    return {name: _decisions_of(name, reducer, chosen, rows) for name, reducer in reducers_of(module).items()}


def _decisions_of(name: str, reducer: Reducer, chosen: Arrays, rows: int) -> Decisions:
    def index(decision: str, default: Tensor) -> Tensor:
        found = chosen.get(f"{name}.{decision}")
        return default if found is None else torch.from_numpy(found).long()

    everything = torch.arange(reducer.tokens).expand(rows, -1)
    nothing = everything[:, :0]
    return Decisions(index("kept", everything), index("source", nothing), index("target", nothing))


def _same(one: Decisions, other: Decisions) -> bool:
    return all(a.equal(b) for a, b in zip(one, other, strict=True))


def _no_difference(decisions: Decisions) -> Comparison:
    rows = len(decisions.kept)
    return Comparison(decisions, decisions, torch.zeros(rows, dtype=torch.bool), torch.zeros(rows))


def _flips(own: Decisions, forced: Decisions, row: int, prunes: bool) -> tuple[int, int]:
    """How many tokens and pairs one sample chooses, and how many of the artifact's eager PyTorch does not: as sets."""
    chosen = flipped = 0
    if prunes:
        mine, theirs = set(own.kept[row].tolist()), set(forced.kept[row].tolist())
        chosen, flipped = len(mine), len(theirs - mine)
    mine, theirs = (set(zip(d.source[row].tolist(), d.target[row].tolist(), strict=True)) for d in (own, forced))
    return chosen + len(mine), flipped + len(theirs - mine)


def _fault(reducer: Reducer, decisions: Decisions) -> str:
    """Why these cannot be decisions of this reducer: another number of tokens, or one that is not there."""
    says = {"kept": "keeps", "source": "merges", "target": "merges into"}
    for decision in reducer.decisions:
        what, indices = says[decision.name], getattr(decisions, decision.name)
        if indices.shape[1] != decision.count:
            return f"{what} {indices.shape[1]} tokens, but the schedule asks for {decision.count}"
        least = -1 if decision.gaps else 0
        if decision.count and not (least <= int(indices.min()) and int(indices.max()) < decision.of):
            return f"{what} tokens {int(indices.min())} to {int(indices.max())}, but there are only {decision.of}"
        ordered = indices.sort(1).values
        if decision.name != "target" and ((ordered.diff() == 0) & (ordered[:, 1:] >= 0)).any():
            return f"{what} the same token twice"
    return ""
