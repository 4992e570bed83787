"""A schedule for a model that nobody has chosen one for: what it was trained with, or the first that it can take."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from ..errors import OutputsError, PumerError, UsageError
from ..methods import METHODS
from ..methods.base import Method
from ..methods.proposing import Outline, Usual
from ..reduce import Analysed, Reduced, configs_of
from ..schedule import trained_with
from .reasons import why_not


@dataclass(frozen=True)
class Suggestion:
    """A schedule and why.

    Attributes:
        schedule: that compiles.
        reduced: what it makes of the model.
        why: in words.
    """

    schedule: Method
    reduced: Reduced
    why: str


def suggest(analysed: Analysed, outline: Outline) -> Suggestion:
    """The schedule that a model's configuration names (`pumer_schedule`), or else the first that its graph takes of the
    methods that are suggested at all; `safe` or `stable` where a method has these.

    Raises:
        UsageError: none does, in the user's words.
        ScheduleError: the configuration's is not valid.
    """
    trained = trained_with(configs_of(analysed.program.model))
    if trained is not None:
        return Suggestion(trained, analysed.reduce(trained), "the model was trained with it (pumer_schedule)")
    refused: dict[str, PumerError] = {}
    for kind in sorted(METHODS.values(), key=lambda kind: -kind.suggested):
        proposals = tuple(kind.proposals(outline, Usual())) if kind.suggested else ()
        schedule, error = first_that_fits(analysed, proposals)
        if schedule is not None:
            return Suggestion(schedule, analysed.reduce(schedule), f"for {kind.about.use}")
        if error is not None and proposals:
            refused[proposals[0].method] = error
    raise UsageError(why_not(analysed.program, outline, refused))


def first_that_fits(analysed: Analysed, schedules: Iterable[Method]) -> tuple[Method | None, PumerError | None]:
    """The first of some schedules that a graph takes, and else what it says of the first. Outputs with an entry for
    each token are given for those that are left, where the schedule alone would be refused for them."""
    first: PumerError | None = None
    for schedule in schedules:
        for tried in (schedule, schedule.giving("reduced")):
            try:
                analysed.check(tried)
            except OutputsError as error:
                first = first or error
                continue
            except PumerError as error:
                first = first or error
                break
            return tried, None
    return None, first
