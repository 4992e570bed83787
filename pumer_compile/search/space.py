"""The schedules that a search chooses among: those that a model's methods propose, with other numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, TypeVar

from ..errors import UsageError
from ..inspection.suggest import first_that_fits
from ..methods import METHODS
from ..methods.base import Method, TokenOutputs
from ..methods.proposing import Outline, Usual
from ..reduce import Analysed, configs_of
from ..schedule import as_trained

if TYPE_CHECKING:
    from optuna import Trial

T = TypeVar("T", bound=str | int)
STEP = 0.05
MOST_PLACES = 12
"""Of places with budgets of their own; of more, so many at equal distances."""


@dataclass(frozen=True)
class Number:
    """One that is chosen.

    Attributes:
        name: for the study, such as `pumer/cross_modal.2.prune`.
        least, most: of it.
        usual: what the method proposes.
        share: whether it is a share, of which 0 reduces nothing.
    """

    name: str
    least: float
    most: float
    usual: float
    share: bool


class Listing(Usual):
    """Lists what is asked for."""

    def __init__(self, prefix: str) -> None:
        self.prefix, self.numbers = prefix, list[Number]()

    def share(self, name: str, most: float, usual: float) -> float:
        """See `Ask`."""
        self.numbers.append(Number(f"{self.prefix}/{name}", 0.0, most, usual, True))
        return usual

    def count(self, name: str, least: int, most: int, usual: int) -> int:
        """See `Ask`."""
        usual = super().count(name, least, most, usual)
        self.numbers.append(Number(f"{self.prefix}/{name}", least, most, usual, False))
        return usual


class OfTrial:
    """A trial of a study chooses."""

    def __init__(self, trial: Trial, prefix: str) -> None:
        self.trial, self.prefix = trial, prefix

    def share(self, name: str, most: float, usual: float) -> float:
        """See `Ask`."""
        return round(self.trial.suggest_float(f"{self.prefix}/{name}", 0.0, most, step=STEP), 4)

    def count(self, name: str, least: int, most: int, usual: int) -> int:
        """See `Ask`."""
        return self.trial.suggest_int(f"{self.prefix}/{name}", least, most)

    def one_of(self, name: str, values: Sequence[T], usual: T) -> T:
        """See `Ask`."""
        chosen: T = self.trial.suggest_categorical(f"{self.prefix}/{name}", list(values))  # type: ignore[assignment]
        return chosen


@dataclass(frozen=True)
class Form:
    """How a method's schedules look on a model.

    Attributes:
        kind: the method.
        variant: which of its proposals the graph takes.
        outputs: what becomes of outputs with an entry for each token.
        numbers: that are chosen.
    """

    kind: type[Method]
    variant: int
    outputs: TokenOutputs
    numbers: tuple[Number, ...]


@dataclass(frozen=True)
class Space:
    """Schedules of a model.

    Attributes:
        outline: of the model.
        forms: by method.
        configs: of the model: a method whose semantics it was trained with takes those.
    """

    outline: Outline
    forms: Mapping[str, Form]
    configs: tuple[Any, ...] = ()

    def schedule(self, trial: Trial) -> Method | None:
        """The schedule of a trial; None where its numbers reduce nothing."""
        names = list(self.forms)
        name = trial.suggest_categorical("method", names) if len(names) > 1 else names[0]
        form = self.forms[str(name)]
        found = list(form.kind.proposals(self.outline, OfTrial(trial, str(name))))
        if not found:
            return None
        chosen = found[min(form.variant, len(found) - 1)]
        return as_trained(chosen.giving(form.outputs), self.configs)

    def parameters(self, name: str, numbers: Mapping[str, float] | None = None) -> dict[str, Any]:
        """What a trial of a method is told: its usual numbers; or, given some, these, and no other shares."""
        form = self.forms[name]
        found: dict[str, Any] = {"method": name} if len(self.forms) > 1 else {}
        for number in form.numbers:
            value = number.usual if numbers is None or not number.share else 0.0
            value = (numbers or {}).get(number.name, value)
            found[number.name] = round(round(value / STEP) * STEP, 4) if number.share else int(value)
        return found


def space_of(analysed: Analysed, outline: Outline, names: Sequence[str] = ()) -> Space:
    """The schedules that a graph takes.

    Args:
        analysed: captured.
        outline: of it.
        names: methods; none: all that apply, but controls and exact ones.

    Raises:
        UsageError: an unknown method, or none applies.
    """
    unknown = [name for name in names if name not in METHODS]
    if unknown:
        raise UsageError(f"There is no method {unknown[0]!r}: choose among {', '.join(METHODS)}.")
    outline = replace(outline, informed=_spread(outline.informed), tower=_spread(outline.tower))
    forms, reasons = {}, []
    for name, kind in METHODS.items():
        if name in names or (not names and not kind.control and not kind.exact):
            listing = Listing(name)
            proposals = list(kind.proposals(outline, listing))
            fitting, error = first_that_fits(analysed, proposals)
            if fitting is not None:
                variant = [p.giving(fitting.outputs) for p in proposals].index(fitting)
                forms[name] = Form(kind, variant, fitting.outputs, tuple(listing.numbers))
            else:
                reasons.append(f"`{name}`: {error or f'it wants {kind.wants}'}")
    if not forms:
        said = " ".join(reasons[:3])
        raise UsageError(f"No method applies to this model, so there is nothing to search (see inspect). {said}")
    return Space(outline, forms, tuple(configs_of(analysed.program.model)))


def _spread(places: Sequence[str]) -> tuple[str, ...]:
    if len(places) <= MOST_PLACES:
        return tuple(places)
    return tuple(places[i * len(places) // MOST_PLACES] for i in range(MOST_PLACES))
