"""The tables of docs/accuracy.md, from committed results.

    python -m examples.scenes.tables              # writes the page
    python -m examples.scenes.tables --table 5    # prints one

A figure that has no result file is said to be missing; nothing is made up for it.
"""

from __future__ import annotations

import json
import math
import re
import statistics
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from .rows import RATIOS, Row, shelf_rows, tuned_rows

HERE = Path(__file__).parent
RESULTS = HERE / "results"
PAGE = HERE.parents[1] / "docs" / "accuracy.md"

Result = dict[str, Any]


def load_results(folder: Path) -> dict[str, Result]:
    """Every result of a folder by the name of its row, with `milliseconds` where the row was timed."""
    found = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted(folder.glob("*.json"))}
    timed = found.pop("latency", {"samples": {}})["samples"]
    return {name: {**result, "milliseconds": timed.get(name)} for name, result in found.items()}


# --- figures ----------------------------------------------------------------------------------------------------------


def by_picture(result: Result) -> list[float]:
    """The share of right answers about each picture."""
    right = [int(mark) for mark in result["right"]]
    each = len(right) // result["pictures"]
    return [sum(right[i : i + each]) / each for i in range(0, len(right), each)]


def mean_and_half_width(values: list[float]) -> tuple[float, float]:
    """A mean and half its 95% confidence interval; questions about one picture hang together, so pictures are what is
    counted."""
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / max(1, len(values) - 1)
    return mean, 1.96 * math.sqrt(variance / len(values))


def pooled(results: list[Result]) -> list[float]:
    """By picture, the mean of several seeds."""
    return [sum(each) / len(each) for each in zip(*map(by_picture, results), strict=True)]


def lost(results: list[Result], unreduced: Result) -> tuple[float, float]:
    """Points of accuracy lost to the unreduced model, picture by picture, and half the 95% interval."""
    pairs = zip(by_picture(unreduced), pooled(results), strict=True)
    mean, half = mean_and_half_width([before - after for before, after in pairs])
    return 100 * mean, 100 * half


# --- tables -----------------------------------------------------------------------------------------------------------


def rows_table(rows: list[Row], found: Mapping[str, Result]) -> str:
    """Rows in Markdown, those of several seeds as one; losses are to the unreduced model off the shelf."""
    lines = [
        "| reduction | fewer multiply-adds | ms a batch | image tokens | accuracy | lost, points | of seeds |",
        "| --- | ---: | ---: | --- | ---: | ---: | --- |",
    ]
    unreduced = found.get("unreduced")
    if unreduced is None:
        return "Not measured yet: the unreduced model."
    groups: dict[tuple[str, float, int | None], list[Result | None]] = {}
    for row in rows:
        groups.setdefault(row.group, []).append(found.get(row.name))
    for (label, ratio, _), results in groups.items():
        there = [result for result in results if result is not None]
        if len(there) < len(results):
            of = f", {len(there)} of {len(results)} seeds" if there else ""
            lines.append(f"| {label} | {ratio:.1f}x asked | | | not measured yet{of} | | |")
            continue
        mean, half = mean_and_half_width(pooled(there))
        fewer = unreduced["multiply_adds"] / there[0]["multiply_adds"]
        tokens = " → ".join(str(site["image"]) for site in there[0]["tokens"])
        points, width = lost(there, unreduced)
        loss = "" if there[0] is unreduced else f"{points:+.1f} ± {width:.1f}"
        each = [100 * sum(by_picture(result)) / result["pictures"] for result in there]
        spread = f"{len(there)}: {min(each):.1f} to {max(each):.1f}" if len(there) > 1 else ""
        timed = there[0].get("milliseconds")
        took = f"{statistics.median(timed):.1f}" if timed else ""
        cells = [label, f"{fewer:.2f}x", took, tokens, f"{100 * mean:.1f} ± {100 * half:.1f}", loss, spread]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


TITLES = {
    1: "What is lost with the paper's recipe, three seeds",
    2: "Smaller pictures, reduction, and both",
    3: "Without each part of the recipe",
    4: "Layers, ratios, places",
    5: "Accuracy by multiply-adds, each retrained by the same recipe (the paper's Figure 5)",
}


def table(number: int, found: Mapping[str, Result]) -> str:
    """One table in Markdown; 0 is off the shelf, 5 the data of the figure.

    Raises:
        typer.BadParameter: there is no such table.
    """
    tables = {0: shelf_rows(), **tuned_rows()}
    if number not in tables:
        raise typer.BadParameter(f"there is no table {number}: choose one of {', '.join(map(str, tables))}")
    return rows_table(tables[number], found)


def compared(found: Mapping[str, Result]) -> str:
    """Whether text-informed pruning beats the controls by more than the interval, in words."""
    said = []
    for ratio in RATIOS:
        ours = found.get(f"text-informed-once-{ratio}")
        for control in ("random-once", "uniform-once"):
            pattern = re.compile(rf"{control}-{re.escape(str(ratio))}(-\d+)?")
            theirs = [result for name, result in found.items() if pattern.fullmatch(name)]
            if ours is None or not theirs:
                said.append(f"- {ratio}x, against {control.partition('-')[0]}: not measured yet.")
                continue
            pairs = zip(by_picture(ours), pooled(theirs), strict=True)
            mean, half = (100 * x for x in mean_and_half_width([a - b for a, b in pairs]))
            verdict = "by more than the interval" if abs(mean) > half else "which is within the interval"
            against = control.partition("-")[0]
            side = "above" if mean > 0 else "below"
            said.append(f"- {ratio}x, against {against}: {abs(mean):.1f} ± {half:.1f} points {side}, {verdict}.")
    return "\n".join(said)


def page(found: Mapping[str, Result]) -> str:
    """The whole page: `page.md` with its figures."""
    anyone = next(iter(found.values()), None)
    how = "Nothing has been measured yet."
    if anyone is not None:
        versions = ", ".join(f"{name} {number}" for name, number in anyone["versions"].items())
        how = (
            f"Model `{anyone['model']}`; {anyone['pictures']} pictures of the test split with "
            f"{len(anyone['right']) // anyone['pictures']} questions each; commit {anyone['commit']}; {versions}. "
            "Intervals are 95%, over pictures; losses are paired, question by question."
        )
    tuned = {number: rows for number, rows in tuned_rows().items() if any(row.name in found for row in rows)}
    shown = "\n\n".join(f"### Table {n}. {TITLES[n]}\n\n{rows_table(rows, found)}" for n, rows in tuned.items())
    missing = "\n".join(f"- Table {number}. {title}." for number, title in TITLES.items() if number not in tuned)
    parts = {"how": how, "shelf": table(0, found), "compared": compared(found), "tuned": shown, "missing": missing}
    return (HERE / "page.md").read_text(encoding="utf-8").format(**parts)


def main(
    number: Annotated[int | None, typer.Option("--table", help="Print one table: 1 to 5, 0 off the shelf.")] = None,
    results: Annotated[Path, typer.Option(help="Folder of one model's results.")] = RESULTS / "vilt-0",
) -> None:
    """Write docs/accuracy.md, or print one table."""
    found = load_results(results)
    if number is not None:
        print(table(number, found))
        return
    PAGE.write_text(page(found), encoding="utf-8")
    print(f"wrote {PAGE}")


if __name__ == "__main__":
    typer.run(main)
