"""The search: schedules as they are proposed, each number alone, combinations that follow, then optuna."""

from __future__ import annotations

import contextlib
import hashlib
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from ..capture.capture import Program
from ..errors import PumerError, UsageError
from ..inspection.outline import look
from ..methods.base import Method
from ..reduce import Analysed
from .choosing import best_of, choose
from .limits import Limits
from .measuring import Measured
from .objective import Objective, Result
from .quality import Judge, Metric, outputs_of
from .samples import Samples
from .sensitivity import Sensitivity, alone, combined, sensitivity
from .space import Space, space_of
from .storage import check_same, open_study

if TYPE_CHECKING:
    import optuna

DEFAULT_DROP = 0.01
Progress = Callable[[Result, Result | None, int], None]
"""Told of each result, the best so far, and how many were judged."""


@dataclass(frozen=True)
class Settings:
    """How long and where a search goes on.

    Attributes:
        trials: at most so many schedules, those that are not judged included.
        timeout: seconds, or None.
        seed: of what is drawn.
        storage, resume: see `open_study`.
        sampler: `tpe`; or `random`, for comparison: without what comes before optuna, too.
        methods: that are searched; none: all that apply.
        output, metric: see `Judge`.
        suffix: of the artifacts that are measured, `.onnx`, `.xml` or `.engine`.
        finalists: how many are measured at most.
        measured: whether finalists are, without a limit that asks for it too.
    """

    trials: int = 100
    timeout: float | None = None
    seed: int = 0
    storage: str | None = None
    resume: bool = False
    sampler: Literal["tpe", "random"] = "tpe"
    methods: Sequence[str] = ()
    output: str | None = None
    metric: Metric | None = None
    suffix: str = ".onnx"
    finalists: int = 5
    measured: bool = False


@dataclass
class Found:
    """What a search found.

    Attributes:
        limits: that it was for.
        measure: `accuracy`, `metric` or `agreement`.
        baseline: of the unreduced model.
        samples: how many were judged on.
        results: of all trials, in order.
        sensitivities: of single numbers.
        measured: finalists under a runtime.
        best: what is chosen; None where nothing meets the limits.
        why_not: then.
        interrupted: whether the user stopped it.
        seconds: that it took.
    """

    limits: Limits
    measure: str
    baseline: float
    samples: int
    results: list[Result] = field(default_factory=list)
    sensitivities: list[Sensitivity] = field(default_factory=list)
    measured: list[Measured] = field(default_factory=list)
    best: Result | None = None
    why_not: str = ""
    interrupted: bool = False
    seconds: float = 0.0

    @property
    def schedule(self) -> Method | None:
        """Of the best result."""
        return None if self.best is None else Method(**self.best.schedule)

    @property
    def judged(self) -> int:
        """Schedules that ran on samples."""
        return len({r.sha256 for r in self.results if r.state in ("done", "hopeless")})


def search(
    program: Program,
    samples: Samples,
    limits: Limits,
    settings: Settings | None = None,
    progress: Progress = lambda result, best, judged: None,
    stage: Callable[[str], None] = lambda text: None,
) -> Found:
    """Search for the cheapest schedule within the limits; where no drop is given, for the one that loses least.

    The model is captured once; each schedule reduces that graph, and runs in eager PyTorch on the samples.

    Args:
        program: captured with `samples.first`.
        samples: to judge on.
        limits: without any, a drop of a point is allowed.
        settings: see `Settings`.
        progress: see `Progress`.
        stage: told what is going on.

    Returns:
        What was found; `best` is None, with `why_not`, where no limit can be met.

    Raises:
        UsageError: no image; a storage that holds another search; see `Judge` and `space_of`.
    """
    settings = settings or Settings()
    limits = Limits(max_drop=DEFAULT_DROP) if limits == Limits() else limits
    start = time.perf_counter()
    stage("looking for tokens and attention")
    analysed = Analysed(program)
    outline = look(analysed).outline
    if not any("image" in name.split("_") for name in outline.streams):
        raise UsageError("The inputs have no picture that the model makes tokens of, so there is nothing to reduce.")
    space = space_of(analysed, outline, settings.methods)
    stage("running the unreduced model")
    judge = Judge(samples, outputs_of(program.module), output=settings.output, metric=settings.metric)
    found = Found(limits, judge.measure, judge.baseline.value, samples.count)
    run = _Run(space, Objective(analysed, judge, limits.multiply_adds), settings, found, progress)
    run.open(_fingerprint(program, samples, judge, space))
    stage("searching")
    try:
        run.all(start)
    except KeyboardInterrupt:
        found.interrupted = True
    how: dict[str, Any] = {"finalists": settings.finalists, "measured": settings.measured, "suffix": settings.suffix}
    try:
        found.best, found.measured = choose(found.results, limits, analysed, **how, stage=stage)
    except PumerError as error:  # a runtime that gives up is no reason to lose the trials
        found.why_not = str(error)
    found.seconds = time.perf_counter() - start
    return found


class _Over(Exception):
    """Enough trials, or no time left."""


class _Run:
    """One search in progress."""

    def __init__(
        self, space: Space, objective: Objective, settings: Settings, found: Found, progress: Progress
    ) -> None:
        self.space, self.objective, self.settings = space, objective, settings
        self.found, self.limits, self.progress = found, found.limits, progress
        self.tried: dict[tuple[Any, ...], Result] = {}
        self.start = time.perf_counter()

    def open(self, fingerprint: dict[str, Any]) -> None:
        """Make the study, or take up the one that is stored."""
        told = self.settings
        self.study = open_study(told.storage, resume=told.resume, sampler=told.sampler, seed=told.seed)
        stored = self.study.user_attrs.get("search")
        if stored is None:
            self.study.set_user_attr("search", fingerprint)
        else:
            check_same(stored, fingerprint, told.storage)
        for trial in self.study.trials:
            if "result" in trial.user_attrs:
                self._keep(Result.from_dict(trial.user_attrs["result"]), trial.params)

    def all(self, start: float) -> None:
        """The stages in order, until there are enough trials or no time is left."""
        self.start = start
        with contextlib.suppress(_Over):
            if self.settings.sampler == "tpe":
                self._prepared()
            while True:
                self._next("search")

    def _prepared(self) -> None:
        for name in self.space.forms:
            self._next("proposed", self.space.parameters(name))
        for name, number, value in alone(self.space):
            result = self._next("sensitivity", self.space.parameters(name, {number.name: value}))
            told = None if result is None else sensitivity(name, number, value, result)
            if told is not None:
                self.found.sensitivities.append(told)
        allowed = DEFAULT_DROP if self.limits.max_drop is None else self.limits.max_drop
        for name, form in self.space.forms.items():
            own = [s for s in self.found.sensitivities if s.form == name]
            for numbers in combined(form, own, allowed):
                self._next("combined", self.space.parameters(name, numbers))

    def _next(self, stage: str, parameters: dict[str, Any] | None = None) -> Result | None:
        """One trial; of these parameters, where given. One that was tried before a search was resumed is not again.
        None where another process, which shares the storage, has taken it."""
        import optuna

        if parameters is not None and _key(parameters) in self.tried:
            return self.tried[_key(parameters)]
        late = self.settings.timeout is not None and time.perf_counter() - self.start > self.settings.timeout
        if late or len(self.found.results) >= self.settings.trials:
            raise _Over
        if parameters is not None:
            self.study.enqueue_trial(parameters)
        trial = self.study.ask()
        try:
            schedule = self.space.schedule(trial)
            # Sensitivities are wanted of all, whatever the limits.
            hopeless = self._hopeless if stage != "sensitivity" else _never
            result = self.objective(trial.number, stage, schedule, hopeless)
        except BaseException:  # an interrupt, too: what is half done is no result
            self.study.tell(trial, state=optuna.trial.TrialState.FAIL)
            raise
        self._tell(trial, result)
        self._keep(result, trial.params)
        self.progress(result, best_of(self.found.results, self.limits), self.found.judged)
        return result if parameters is None else self.tried.get(_key(parameters))

    def _tell(self, trial: optuna.Trial, result: Result) -> None:
        from optuna.trial import TrialState

        trial.set_user_attr("result", result.to_dict())
        limits = {"drop": self.limits.max_drop, "multiply_adds": self.limits.multiply_adds}
        for name, limit in limits.items():
            value = getattr(result, name)
            if limit is not None and not math.isnan(value):
                trial.set_constraint(name, value - limit)
        if result.state != "done":
            self.study.tell(trial, state=TrialState.FAIL if result.state == "refused" else TrialState.PRUNED)
            return
        # Whether answers agree changes one by one, and their divergence little by little.
        loss = result.divergence if self.found.measure == "agreement" else result.drop
        self.study.tell(trial, (result.multiply_adds, loss))

    def _hopeless(self, cost: float, drop: float) -> bool:
        """Whether a drop, at its smallest, is over the limit, or beaten by a cheaper schedule."""
        if self.limits.max_drop is not None and drop > self.limits.max_drop:
            return True
        return any(r.state == "done" and r.multiply_adds <= cost and r.drop < drop for r in self.found.results)

    def _keep(self, result: Result, parameters: dict[str, Any]) -> None:
        self.found.results.append(result)
        self.tried.setdefault(_key(parameters), result)
        if result.sha256:
            self.objective.known.setdefault(result.sha256, result)


def _never(cost: float, drop: float) -> bool:
    return False


def _key(parameters: dict[str, Any]) -> tuple[Any, ...]:
    return tuple(sorted((name, round(v, 4) if isinstance(v, float) else v) for name, v in parameters.items()))


def _fingerprint(program: Program, samples: Samples, judge: Judge, space: Space) -> dict[str, Any]:
    """What a search is of, as a stored one is compared with."""
    digest = hashlib.sha256()
    state = program.module.state_dict()
    for name in sorted(state):
        tensor = state[name]
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {float(tensor.double().sum()):.9e}\n".encode())
    return {
        "model": digest.hexdigest()[:16],
        "samples": samples.sha256[:16],
        "measure": judge.measure,
        "space": sorted(space.forms),
    }
