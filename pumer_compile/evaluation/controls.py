"""Controls that cost what a schedule costs: of each, the most tokens for no more multiply-adds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from ..errors import PumerError
from ..inspection.suggest import first_that_fits
from ..methods import METHODS
from ..methods.base import Method
from ..methods.proposing import Outline, Usual
from ..reduce import Analysed, Reduced

T = TypeVar("T", bound=str | int)


class Chosen(Usual):
    """Chooses one budget, at one place where there are several."""

    def __init__(self, budget: int, at: str | None) -> None:
        self.budget, self.at = budget, at

    def count(self, name: str, least: int, most: int, usual: int) -> int:
        """See `Ask`."""
        return min(max(self.budget, least), most)

    def one_of(self, name: str, values: Sequence[T], usual: T) -> T:
        """See `Ask`."""
        return next((value for value in values if value == self.at), usual)


@dataclass(frozen=True)
class ControlRun:
    """A control at the cost of a schedule.

    Attributes:
        name: its method.
        reduced: None where none fits.
        note: why not.
    """

    name: str
    reduced: Reduced | None
    note: str = ""


def controls_of(analysed: Analysed, outline: Outline, multiply_adds: int, at: str | None) -> list[ControlRun]:
    """Every control of the registry, with the largest budget that costs no more.

    Args:
        analysed: the captured model.
        outline: of it.
        multiply_adds: of the schedule that they are compared with.
        at: the first site of it; an image that stands in no prompt is reduced there too.
    """
    return [
        _largest(name, kind, analysed, outline, multiply_adds, at) for name, kind in METHODS.items() if kind.control
    ]


def _largest(
    name: str, kind: type[Method], analysed: Analysed, outline: Outline, most: int, at: str | None
) -> ControlRun:
    """Multiply-adds grow with the budget: halve the range."""
    tokens = outline.crops or max(outline.streams.values(), default=0)
    low, high, found, note = 1, max(1, tokens - 1), None, ""
    while low <= high:
        budget = (low + high) // 2
        schedule, error = first_that_fits(analysed, kind.proposals(outline, Chosen(budget, at)))
        if schedule is None:
            return ControlRun(name, None, str(error or f"it wants {kind.wants}"))
        try:
            reduced = analysed.reduce(schedule)
        except PumerError as refused:
            return ControlRun(name, None, str(refused))
        if reduced.plan.multiply_adds_after <= most:
            found, low = reduced, budget + 1
        else:
            note = f"its smallest budget costs {reduced.plan.multiply_adds_after} multiply-adds, and {most} are allowed"
            high = budget - 1
    return ControlRun(name, found, "" if found is not None else note)
