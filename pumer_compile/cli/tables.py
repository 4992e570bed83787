"""Plans and reports on a terminal of 80 columns: a line or two where all went well, tables for who wants them."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Mapping, Sequence
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

console = Console()
status = Console(stderr=True)


def say(text: str) -> None:
    """A paragraph, wrapped at spaces; a path longer than the screen stays whole, to be copied."""
    lines = textwrap.wrap(text, console.width, break_long_words=False, break_on_hyphens=False)
    console.print("\n".join(lines), markup=False, highlight=False, soft_wrap=True)


# --- names ------------------------------------------------------------------------------------------------------------


def without_common_prefix(names: Sequence[str], separator: str = ".") -> tuple[str, list[str]]:
    """What all names begin with, up to a separator, and the names without it; each keeps its last part."""
    parts = [name.split(separator) for name in names]
    common = 0
    while len(names) > 1 and all(len(p) > common + 1 and p[common] == parts[0][common] for p in parts):
        common += 1
    return separator.join(parts[0][:common]) if names else "", [separator.join(p[common:]) for p in parts]


def wrapped(name: str, width: int) -> str:
    """A name in lines of at most `width` letters, broken behind dots and slashes, or else behind underscores."""
    lines = [""]
    for piece in re.findall(r"[^./]+[./]?|[./]", name):
        for part in [piece] if len(piece) <= width else re.findall(r"[^_]+_?|_", piece):
            if lines[-1] and len(lines[-1]) + len(part) > width:
                lines.append("")
            lines[-1] += part
    return "\n".join(lines)


def make_table(title: str, names: Sequence[str], columns: Sequence[str], gap: int = 2) -> Table:
    """A table on the screen: numbers are never cut, and `names` go on in the next line where there is no room."""
    look: dict[str, Any] = {"title_justify": "left", "box": SIMPLE_HEAD, "show_edge": False, "pad_edge": False}
    table = Table(title=title, padding=(0, gap - 1, 0, 0), **look)
    for column in names:
        table.add_column(column, overflow="fold")
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def column_of(names: Sequence[str], width: int) -> tuple[str, list[str]]:
    """Names for a table's title and the cells of a column: what all begin with is said once, in the title; each is
    broken at dots, and left out below an equal one."""
    prefix, short = without_common_prefix(names)
    above = ["", *short]
    cells = ["" if name == above[i] else wrapped(name, width) for i, name in enumerate(short)]
    return f"\n(in {prefix})" if prefix else "", cells


# --- plans ------------------------------------------------------------------------------------------------------------


def print_plan(plan: Any, schedule: Any) -> None:
    """Token counts and multiply-adds of every site (there may be none); multiply-adds in total, by what schedule."""
    if plan.sites:
        _print_sites(plan)
    say(f"{schedule.described}; multiply-adds: {gained(plan)}.")


def gained(plan: Any) -> str:
    """The multiply-adds of one sample, and how many times fewer they are."""
    before, after = plan.multiply_adds_before / 1e9, plan.multiply_adds_after / 1e9
    return f"{before:.4g} G before, {after:.4g} G after, {plan.ratio:.2f}x fewer"


def _print_sites(plan: Any) -> None:
    where, modules = column_of([site.module for site in plan.sites], 22)
    title = f"Plan (one sample; multiply-adds from each site to the next){where}"
    table = make_table(title, ("site", "module"), ("tokens", "G multiply-adds"))
    for site, module in zip(plan.sites, modules, strict=True):
        tokens = "\n".join(f"{stream} {count} → {site.after[stream]}" for stream, count in site.before.items())
        before, after = (f"{count / 1e9:.3g}" for count in site.multiply_adds)
        table.add_row(site.name, module, tokens, f"{before} → {after}")
    console.print(table)


# --- shapes and sizes -------------------------------------------------------------------------------------------------


def shapes(inputs: Mapping[str, Sequence[int]], *, open_batch: bool = False) -> str:
    """Shapes by input name; an open batch is a word."""
    sizes = {name: ["batch", *shape[1:]] if open_batch else shape for name, shape in inputs.items()}
    return ", ".join(f"{name} [{', '.join(map(str, shape))}]" for name, shape in sizes.items())


def size(count: int) -> str:
    """Bytes in the unit that fits."""
    if count >= 1e9:
        return f"{count / 1e9:.2f} GB"
    return f"{count / 1e6:.1f} MB" if count >= 1e6 else f"{count / 1e3:.1f} kB"


# --- bench ------------------------------------------------------------------------------------------------------------


def print_bench(report: Any) -> None:
    """Latency, throughput and memory of every artifact at every batch size; which is faster than which."""
    columns = ("batch", "p50 ms", "p90", "p99", "mean", "samples/s", "MiB")
    settings = report.settings
    title = f"Latency of {settings['iterations']} calls, after {settings['warmup']}"
    paths = list(report.artifacts)
    short = dict(zip(paths, without_common_prefix(paths, "/")[1], strict=True))
    table = make_table(title, ["artifact"], columns)
    for row in report.measurements:
        times = (row.percentile(50), row.percentile(90), row.percentile(99), row.mean)
        memory = "" if row.peak_memory is None else f"{row.peak_memory / 2**20:.0f}"
        figures = [f"{time:.3g}" if time < 100 else f"{time:.0f}" for time in times]
        table.add_row(wrapped(short[row.artifact], 28), str(row.batch), *figures, f"{row.throughput:.4g}", memory)
    console.print(table)
    for found in report.comparisons():
        batch = f"batch {found.batch}: " if len({m.batch for m in report.measurements}) > 1 else ""
        verb = "is" if found.proved else "seems"
        end = f"95%: {found.low:.2f}x to {found.high:.2f}x"
        what = f"{found.factor:.2f}x faster than {short[found.slower]} (medians)"
        say(f"{batch}{short[found.faster]} {verb} {what}; {end}.")
    for warning in report.warnings():
        say(f"warning: {warning}")
    for one in report.generation:
        say(
            f"{short[one.artifact]}: {one.first_token_ms:.3g} ms to the first token, then {one.tokens_per_second:.3g} "
            f"tokens a second ({one.tokens} made); reducers take {one.reducers_share:.1%} of the prefill's operators."
        )
    for path, about in report.artifacts.items():
        gain = f", {about['fewer_multiply_adds']:.2f}x fewer multiply-adds" if about.get("fewer_multiply_adds") else ""
        say(f"{short[path]}: {about['reduced_by']}{gain}; {about['dtype']}, {size(about['bytes'])}.")
    providers = sorted({about["provider"] for about in report.artifacts.values()})
    machine = report.environment
    gpus = ", ".join(gpu["name"] for gpu in machine["gpus"].values())
    where = gpus or f"{machine['usable_cores']} cores, {machine['cpu']}"
    say(f"{', '.join(providers)}; {where}.")


# --- parity -----------------------------------------------------------------------------------------------------------


def summary(report: Any) -> str:
    """A passed report in a few words: how many samples, the decisions, the largest error of an output that counts."""
    parts = [f"{report.samples} samples"]
    if report.reducers:
        parts[0] += f", {report.end_to_end} of them end to end"
        differ = sum(row.differ for row in report.reducers)
        ties = sum(row.near_ties for row in report.reducers)
        alike = "all alike" if not differ else f"{differ} differ, {ties} of them near-ties"
        parts.append(f"decisions of {len(report.reducers)} reducers: {alike}")
    errors = [row.max_abs for row in report.outputs if row.judged and row.samples]
    if errors:
        parts.append(f"largest error {max(errors):.1e}")
    return "; ".join(parts)


def print_report(report: Any, *, whole: bool = True) -> None:
    """Decisions, outputs and notes of a parity report; the notes alone where it is not to be `whole`."""
    if whole:
        _print_decisions(report)
        _print_outputs(report)
    for note in report.notes:
        say(f"note: {note}")


def _print_decisions(report: Any) -> None:
    if not report.reducers:
        return
    columns = ("differ", "near-ties", "indices\nflipped", "largest\nmargin", "verdict")
    where, names = column_of([row.name for row in report.reducers], 30)
    table = make_table(f"Decisions ({report.samples} samples){where}", ["reducer"], columns)
    for name, row in zip(names, report.reducers, strict=True):
        figures = (str(row.differ), str(row.near_ties), f"{row.flip_rate:.2%}", f"{row.worst_margin:.1e}")
        table.add_row(name, *figures, row.verdict.replace(" ", "\n"))
    console.print(table)
    console.print()


def _print_outputs(report: Any) -> None:
    columns = ("against", "samples", "absolute\nmax, mean", "relative\nmax, norm", "cosine", "top-1", "verdict")
    where, names = column_of([row.name for row in report.outputs], 15)
    title = f"Outputs against eager PyTorch ({report.dtype}, {report.provider}){where}"
    table = make_table(title, ["output"], columns, gap=1)
    for name, row in zip(names, report.outputs, strict=True):
        if row.samples == 0 and row.finite:
            table.add_row(name, row.against.replace("_", " "), "0", "", "", "", "", "not\ncompared")
            continue
        errors = (f"{row.max_abs:.2e}\n{row.mean_abs:.2e}", f"{row.max_rel:.2e}\n{row.max_norm:.2e}")
        against = row.against.replace("_", " ")
        table.add_row(name, against, str(row.samples), *errors, f"{row.cosine:.6f}", f"{row.top1:.1%}", row.verdict)
    console.print(table)
