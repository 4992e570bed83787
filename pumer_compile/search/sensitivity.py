"""Sensitivities: what each number of a schedule costs and saves by itself; and combinations that follow from them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from .objective import Result
from .space import STEP, Form, Number, Space

ALONE = 0.5
"""Of the largest share: what is tried alone."""
STRENGTHS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Times the drop that is allowed, as a sum of sensitivities: for schedules to begin with."""
LEAST = 0.002
"""Of a drop, where none is measured: rounding of a few samples."""


@dataclass(frozen=True)
class Sensitivity:
    """Of one number, tried alone.

    Attributes:
        form: whose number.
        number: which.
        value: that was tried.
        saved: share of multiply-adds.
        lost: drop, or divergence where nothing dropped.
    """

    form: str
    number: Number
    value: float
    saved: float
    lost: float


def alone(space: Space) -> Iterable[tuple[str, Number, float]]:
    """What is tried one at a time: each share of each method, the others zero."""
    for name, form in space.forms.items():
        for number in form.numbers:
            if number.share and sum(other.share for other in form.numbers) > 1:
                yield name, number, round(round(number.most * ALONE / STEP) * STEP, 4)


def sensitivity(form: str, number: Number, value: float, result: Result) -> Sensitivity | None:
    """What a result says of a number; None where it was not judged."""
    if result.state not in ("done", "hopeless"):
        return None
    return Sensitivity(form, number, value, 1 - result.multiply_adds, max(result.drop, 0.0))


def combined(form: Form, found: Iterable[Sensitivity], allowed: float) -> list[Mapping[str, float]]:
    """Numbers of schedules to begin with: those that save most for what they lose are taken first, until what they lose
    together, taken as a sum, is some multiple of what is allowed; and half of each.

    Args:
        form: of the method that they are of.
        found: of its numbers.
        allowed: drop.
    """
    useful = [s for s in found if s.saved > 0]
    useful.sort(key=lambda s: s.saved / max(s.lost, LEAST), reverse=True)
    schedules: list[Mapping[str, float]] = []
    for strength in STRENGTHS:
        left, numbers = max(allowed, LEAST) * strength, dict[str, float]()
        for one in useful:
            if one.lost <= left:
                numbers[one.number.name] = one.value
                left -= one.lost
        for scaled in (numbers, {name: value / 2 for name, value in numbers.items()}):
            if numbers and scaled not in schedules:
                schedules.append(scaled)
    return schedules
