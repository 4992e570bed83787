"""What one schedule costs and loses: reduced on the captured graph, run in eager PyTorch on the samples."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ..errors import PumerError
from ..methods.base import Method
from ..reduce import Analysed
from .quality import Hopeless, Judge, outputs_of

log = logging.getLogger("pumer_compile")

State = Literal["done", "refused", "dear", "hopeless"]
"""Judged on all samples; refused by the graph; over the limit of multiply-adds, so not judged; or given up on the way,
because no other samples could have saved it."""


@dataclass(frozen=True)
class Result:
    """Of one schedule.

    Attributes:
        number: of the trial, from 0.
        stage: which part of the search asked for it.
        state: how far it came.
        schedule: its keys; none where its numbers reduce nothing.
        sha256: of the schedule.
        multiply_adds: share of the unreduced model's; NaN where it was refused.
        value, drop, divergence: see `Quality`; of a hopeless one, the drop so far.
        seconds: that it took.
        note: why it was refused or given up.
    """

    number: int
    stage: str
    state: State
    schedule: dict[str, Any] = field(default_factory=dict)
    sha256: str = ""
    multiply_adds: float = math.nan
    value: float = math.nan
    drop: float = math.nan
    divergence: float = math.nan
    seconds: float = 0.0
    note: str = ""

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it: a number that is none is left out."""
        return {k: v for k, v in asdict(self).items() if not (isinstance(v, float) and math.isnan(v))}

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Result:
        """See `to_dict`."""
        return cls(**data)


class Objective:
    """Judges schedules; a schedule that was judged before is not run again.

    Args:
        analysed: the captured model.
        judge: of quality.
        most: share of the multiply-adds above which a schedule is not judged; None: any below 1.
    """

    def __init__(self, analysed: Analysed, judge: Judge, most: float | None = None) -> None:
        self.analysed, self.judge, self.most = analysed, judge, most
        self.known: dict[str, Result] = {}

    def __call__(
        self, number: int, stage: str, schedule: Method | None, hopeless: Callable[[float, float], bool]
    ) -> Result:
        """Judge one.

        Args:
            number, stage: for the result.
            schedule: None where the numbers reduce nothing.
            hopeless: whether a cost and a drop are ruled out.
        """
        if schedule is None:
            return Result(number, stage, "refused", note="its numbers reduce nothing")
        keys = schedule.model_dump(mode="json", exclude_none=True)
        same = self.known.get(schedule.sha256)
        if same is not None:
            return Result(**{**asdict(same), "number": number, "stage": stage, "seconds": 0.0})
        start = time.perf_counter()
        found = self._judged(schedule, hopeless)
        seconds = round(time.perf_counter() - start, 3)
        result = Result(number, stage, schedule=keys, sha256=schedule.sha256, seconds=seconds, **found)
        self.known[schedule.sha256] = result
        return result

    def _judged(self, schedule: Method, hopeless: Callable[[float, float], bool]) -> dict[str, Any]:
        try:
            with _quiet():  # what is said of a schedule is for who chose it
                reduced = self.analysed.reduce(schedule)
        except PumerError as error:
            return {"state": "refused", "note": str(error)[:300]}
        cost = reduced.plan.multiply_adds_after / reduced.plan.multiply_adds_before
        if cost > (self.most or 1.0):
            return {"state": "dear", "multiply_adds": cost}
        try:
            quality = self.judge.judge(outputs_of(reduced.module), lambda drop: hopeless(cost, drop))
        except Hopeless as given_up:
            return {"state": "hopeless", "multiply_adds": cost, "drop": given_up.drop, "note": str(given_up)}
        return {
            "state": "done",
            "multiply_adds": cost,
            "value": quality.value,
            "drop": quality.drop,
            "divergence": quality.divergence,
        }


@contextmanager
def _quiet() -> Iterator[None]:
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        yield
    finally:
        log.setLevel(level)


def front(results: list[Result]) -> list[Result]:
    """Those that no other beats in both cost and drop, the cheapest first."""
    found: list[Result] = []
    done = [result for result in results if result.state == "done"]
    for result in sorted(done, key=lambda r: (r.multiply_adds, r.drop, r.number)):
        if not found or result.drop < found[-1].drop:
            found.append(result)
    return found
