"""What `results.json` holds, and how it reads as a table."""

from typing import TypedDict


class Row(TypedDict):
    """One measured model."""

    name: str
    strength: str | None
    correct: list[int]
    """Right answers, one entry per seed; a single one where nothing is random."""
    total: int
    text_tokens: list[int]
    """On entering the layers and after every site."""
    image_tokens: list[int]
    multiply_adds: int | None
    """Per sample; None for the baseline that is no network."""


class Results(TypedDict):
    """The whole of `results.json`."""

    versions: dict[str, str]
    random_seeds: list[int]
    schedules: dict[str, dict[str, object]]
    rows: list[Row]


def render_table(results: Results) -> str:
    """The rows as a Markdown table; the last but one column is how many times fewer than in the first row."""
    full_work = results["rows"][0]["multiply_adds"]
    lines = [
        "| Model | Strength | Image tokens | Text tokens | Fewer multiply-adds | Test accuracy |",
        "| --- | --- | --- | --- | ---: | ---: |",
    ]
    for row in results["rows"]:
        work = row["multiply_adds"]
        accuracy = sum(row["correct"]) / (len(row["correct"]) * row["total"])
        cells = [
            row["name"],
            row["strength"] or "",
            " → ".join(map(str, row["image_tokens"])),
            " → ".join(map(str, row["text_tokens"])),
            f"{full_work / work:.2f}x" if work and full_work else "",
            f"{accuracy:.1%}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"
