"""`pumer-compile list`: the methods, presets and formats that there are."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import UsageError
from ..inspection.architectures import architectures
from ..methods import METHODS, PRESETS
from .tables import console, make_table, say


def print_list(what: str) -> None:
    """Print one of the lists.

    Raises:
        UsageError: there is no such list.
    """
    if what not in LISTS:
        raise UsageError(f"There is no list {what!r}: choose one of {', '.join(LISTS)}.")
    LISTS[what]()


def _methods() -> None:
    table = make_table("Methods: `method:` of a schedule", ["method", "what it does", "when to use it"], [])
    table.columns[0].no_wrap = True
    for name, found in METHODS.items():
        table.add_row(name, found.about.does, found.about.use)
    console.print(table)
    say("What each reads, its keys, papers and licences: docs/methods.md.")


def _presets() -> None:
    table = make_table("Presets: schedules by name", ["preset", "method", "keys"], [])
    table.columns[0].no_wrap = True
    for name, schedule in PRESETS.items():
        keys = {k: v for k, v in schedule.model_dump(exclude_none=True, exclude_unset=True).items() if k != "method"}
        table.add_row(name, schedule.method, ", ".join(f"{key}: {value}" for key, value in keys.items()) or "none")
    console.print(table)


def _formats() -> None:
    from ..artifacts.formats import FORMATS

    table = make_table("Formats: the suffix of `-o` chooses one", ["suffix", "what it is"], [])
    table.columns[0].no_wrap = True
    for form in FORMATS:
        table.add_row(", ".join(form.suffixes), form.name)
    console.print(table)


def _models() -> None:
    table = make_table("Models: what was tried (docs/architectures.md)", ["model", "reduced"], ["fewer"])
    for row in architectures():
        fewer = f"{row['ratio']:.2f}x" if row["ratio"] else "no"
        table.add_row(row["name"], row["reduced"] or f"not reduced: {row['refused']}", fewer)
    console.print(table)
    say(
        "Fewer multiply-adds, of the whole model, by a schedule that nobody tuned. No list is complete: what is not in "
        "it may fit all the same (pumer-compile inspect MODEL)."
    )


LISTS: dict[str, Callable[[], None]] = {
    "methods": _methods,
    "models": _models,
    "formats": _formats,
    "presets": _presets,
}
