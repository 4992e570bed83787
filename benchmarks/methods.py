"""Which method reduces which prompt family, and the tables of docs/methods.md.

    python -m benchmarks.methods              # reduce every family by every method (about half an hour), write the page
    python -m benchmarks.methods random dart  # by these methods anew
    python -m benchmarks.methods --families gemma3,internvl      # these alone
    python -m benchmarks.methods --render     # write the page from the results there are

The families are the small models of `tests/support/prompt_families.py`: whether the numbers are right is for the tests.
Results are kept in benchmarks/results/methods.json.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/methods.json"
COSTS = ROOT / "benchmarks/results/selection_cost.json"
PAGE = ROOT / "docs/methods.md"
# What a schedule needs beside its method, for prompts with a few image tokens.
KEYS: dict[str, dict[str, Any]] = {
    "fastv": {"layer": 1, "budget": 3},
    "dart": {"layer": 1, "budget": 3, "pivots": {"image": 1, "text": 1}},
    "pyramiddrop": {"stages": {1: 0.5}},
    "sparsevlm": {"stages": {1: 3}},
    "visionzip": {"dominant": 2, "contextual": 1},
    "holov": {"budget": 3, "crops": 2, "semantics": "stable"},
    "cdpruner": {"budget": 3, "variant": "openvino"},
    "evs": {"keep": 3},
    "vidcom2": {"keep": 3},
}
# They act on no prompt, or on what their stages act on.
OTHERS = ("pumer", "tome", "dynamicvit", "lossless", "stages")


def methods() -> list[str]:
    """The methods that reduce the image of a prompt."""
    from pumer_compile.methods import METHODS

    return [name for name in METHODS if name not in OTHERS]


def reduced_by(name: str, program: Any) -> str:
    """What comes of a method and a family: `yes`, or why not."""
    from pumer_compile import Schedule, reduce
    from pumer_compile.errors import PumerError
    from pumer_compile.methods import METHODS

    keys = KEYS.get(name, {"budget": 3})
    # Positions that are counted anew are refused where they are constants of the graph.
    if "positions" in METHODS[name].model_fields:
        keys = {**keys, "positions": "original"}
    try:
        plan = reduce(program, Schedule(method=name, **keys)).plan
    except PumerError as error:
        return f"{type(error).__name__}: {error}"
    return "yes" if plan.sites else "nothing was reduced"


def run(names: list[str], families: list[str]) -> None:
    """Reduce some families (none named: every one) by some methods, and keep what came of it."""
    from pumer_compile.errors import PumerError
    from tests.support.prompt_families import FAMILIES, captured

    found: dict[str, dict[str, str]] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    found["versions"] = {package: version(package).partition("+")[0] for package in ("transformers", "torch")}
    for family in families or FAMILIES:
        try:
            *_, program = captured(family)
        except PumerError as error:
            found[family] = dict.fromkeys(methods(), f"not captured: {error}")
            continue
        own = found.setdefault(family, {})
        own.update({name: reduced_by(name, program) for name in names})
        captured.cache_clear()
        print(family, *(f"{name}={said[:3]}" for name, said in own.items()), flush=True)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")


# --- the page ---------------------------------------------------------------------------------------------------------


def table(head: list[str], rows: list[list[str]]) -> str:
    """In Markdown."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def methods_table() -> str:
    """What each method does, reads, and is held against."""
    from pumer_compile.methods import METHODS

    where = {"tower": "where features leave the tower", "rows": "rows of the prompt", "layers": "language layers"}
    rows = []
    for name, method in METHODS.items():
        about = method.about
        acts = where[method.acts_on] if method.needs_prompt else "attention layers" if name != "lossless" else "-"
        keys = [f"`{key}`" for key in method.model_fields if key not in ("method", "semantics", "outputs")]
        rows.append([f"`{name}`", about.does, acts, about.reads, ", ".join(keys) or "-", about.use, about.held])
    return table(["`method:`", "what it does", "acts on", "reads", "keys", "when to use it", "held against"], rows)


def papers_table() -> str:
    """Papers and licences."""
    from pumer_compile.methods import METHODS

    rows = [[f"`{n}`", m.about.paper, m.about.code or "-"] for n, m in METHODS.items() if m.about.paper]
    return table(["`method:`", "paper", "published code and its licence"], rows)


def families_table(found: Mapping[str, Mapping[str, str]]) -> str:
    """Which family which method reduces; the reasons below."""
    names = methods()
    reasons: dict[str, str] = {}
    rows = []
    for family, own in found.items():
        if family == "versions":
            continue
        cells = []
        for name in names:
            said = own.get(name, "not run")
            if said == "yes":
                cells.append("yes")
                continue
            text = re.sub(r"`method: [a-z0-9]+`", "the method", said).partition(". ")[0][:200].replace("|", "/")
            cells.append(f"[{reasons.setdefault(text, str(len(reasons) + 1))}]")
        rows.append([family, *cells])
    notes = "\n".join(f"- [{number}] {text}" for text, number in reasons.items())
    return f"{table(['family', *(f'`{n}`' for n in names)], rows)}\n\n{notes}"


def costs_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """What the selection of each method costs beside the model, in each setting (`benchmarks/selection_cost.py`)."""
    head = ["selection"]
    for setting in found:
        head += [setting, "of the tower", "of the prefill", "nodes"]
    names = [name for name, row in next(iter(found.values())).items() if isinstance(row, Mapping) and "of_tower" in row]
    lines = []
    for name in names:
        cells = [f"`{name}`"]
        for rows in found.values():
            row = rows[name]
            cells += [f"{row['ms']:.1f} ms", f"{row['of_tower']:.2%}", f"{row['of_prefill']:.2%}", f"{row['nodes']:,}"]
        lines.append(cells)
    whole = [
        f"{setting}: the tower {rows['tower_ms'] / 1e3:.1f} s, the prefill with it {rows['prefill_ms'] / 1e3:.1f} s"
        for setting, rows in found.items()
    ]
    return f"{table(head, lines)}\n\n{'; '.join(whole)}."


def render() -> None:
    """Write the generated parts of the page."""
    costs = json.loads(COSTS.read_text())
    found = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    text = PAGE.read_text(encoding="utf-8")
    parts = {"methods": methods_table(), "papers": papers_table(), "families": families_table(found)}
    parts["costs"] = costs_table(costs)
    for name, made in parts.items():
        pattern = re.compile(rf"(<!-- {name} -->\n).*?(<!-- end -->)", re.DOTALL)
        text, count = pattern.subn(lambda match, made=made: f"{match[1]}\n{made}\n\n{match[2]}", text)
        if count != 1:
            sys.exit(f"{PAGE} has no place for {name}")
    PAGE.write_text(text, encoding="utf-8")


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help="these alone")
    parser.add_argument("--families", default="", help="these alone, such as gemma3,internvl")
    parser.add_argument("--render", action="store_true", help="reduce nothing")
    asked = parser.parse_args()
    if not asked.render:
        run(asked.methods or methods(), [name for name in asked.families.split(",") if name])
    render()


if __name__ == "__main__":
    main()
