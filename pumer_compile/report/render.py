"""The page: `page.html.j2` filled with what was gathered."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..shown.tables import giga
from .data import Picture, ReportData, Sample, Step
from .svg import data_uri, heat, hue, overlay

TEMPLATE = Path(__file__).with_name("page.html.j2")


@dataclass(frozen=True)
class Drawing:
    """A picture with tokens over it.

    Attributes:
        picture: the id of its pixels on the page.
        size: width and height.
        described: in words, for who does not see it.
        paths: class, path and style.
    """

    picture: str
    size: tuple[int, int]
    described: str
    paths: Sequence[tuple[str, str, str]]


@dataclass(frozen=True)
class Chip:
    """A token that stands on no picture.

    Attributes:
        text: a word, or its number.
        fate: see `Step`.
        title: what became of it, in words.
        style: its colour, where it was merged.
    """

    text: str
    fate: str
    title: str
    style: str = ""


def render(data: ReportData) -> str:
    """The page as HTML; everything that it shows is in it."""
    from jinja2 import Environment, StrictUndefined

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(giga=giga, percent=lambda x: f"{x:.1%}")
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    tabs = max((len(sample.sites) for sample in data.samples), default=0)
    return template.render(
        data=data,
        samples=[_sample(sample) for sample in data.samples],
        tabs=range(tabs),
        most_tokens=max((row.before for row in data.tokens), default=1) or 1,
        most_work=max((max(row.before, row.after) for row in data.layers), default=1) or 1,
        parity=None if data.parity is None else data.parity.tables(),
        bench=_bench(data.bench),
    )


def _sample(sample: Sample) -> dict[str, Any]:
    pictures = [
        {"id": f"s{sample.number}p{i}", "uri": data_uri(picture.pixels), "size": picture.size, "name": picture.name}
        for i, picture in enumerate(sample.pictures)
    ]
    sites = [_site(sample, site, steps) for site, steps in sample.sites.items()]
    return {"sample": sample, "pictures": pictures, "sites": sites}


def _site(sample: Sample, site: str, steps: Sequence[Step]) -> dict[str, Any]:
    drawn, scored, chips = [], [], []
    for step in steps:
        for number, picture in enumerate(sample.pictures):
            paths = overlay(step, number, max(picture.size) / 400)
            if not paths:
                continue
            drawn.append(Drawing(f"s{sample.number}p{number}", picture.size, _described(step, picture), paths))
            shades = [("heat", path, f"fill-opacity:{opacity}") for opacity, path in heat(step, number)]
            if shades:
                scored.append(Drawing(f"s{sample.number}p{number}", picture.size, _ranked(step, picture), shades))
        chips.append((step, _chips(step)))
    return {"site": site, "steps": steps, "drawn": drawn, "scored": scored, "chips": [c for c in chips if c[1]]}


def _described(step: Step, picture: Picture) -> str:
    gone = f", {step.count('gone')} were gone before" if step.count("gone") else ""
    return (
        f"{picture.name} at {step.site}: of {step.before} tokens of {step.stream} {step.after} are left. Of the first "
        f"{len(step.fates)} tokens {step.count('kept')} are as they were, {step.count('merged')} are merged into "
        f"{len(step.groups)}, {step.count('pruned')} are pruned here{gone}."
    )


def _ranked(step: Step, picture: Picture) -> str:
    return f"{picture.name} at {step.site}: what the tokens of {step.stream} were ranked by; the darker, the higher."


def _chips(step: Step) -> list[Chip]:
    """Tokens without a place on a picture: words, or class tokens."""
    found = []
    groups = step.groups
    for token, fate in enumerate(step.fates):
        if step.places[token] is not None:
            continue
        said = {"gone": "gone before", "pruned": "pruned here", "kept": "kept", "merged": "merged"}[fate]
        others = [i for i in groups.get(step.group[token], ()) if i != token] if fate == "merged" else []
        text = step.words[token] if step.words else str(token)
        if others:
            said += " with " + ", ".join(step.words[i] if step.words else str(i) for i in others)
        style = f"--h:{hue(step.group[token])}" if fate == "merged" else ""
        found.append(Chip(text, fate, f"token {token}: {said}", style))
    return found


def _bench(said: Mapping[str, Any] | None) -> list[dict[str, str]] | None:
    if said is None:
        return None
    rows = []
    for row in said["measurements"]:
        memory = row.get("peak_memory_bytes")
        rows.append(
            {
                "artifact": Path(str(row["artifact"])).name,
                "batch": str(row["batch"]),
                "median": f"{float(row['p50_ms']):.3g} ms",
                "p90": f"{float(row['p90_ms']):.3g} ms" if "p90_ms" in row else "",
                "memory": "" if memory is None else f"{memory / 2**20:.0f} MiB",
            }
        )
    return rows
