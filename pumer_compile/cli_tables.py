"""Plans and reports as tables on a terminal."""

from __future__ import annotations

from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

console = Console()
status = Console(stderr=True)


def make_table(title: str, folding: list[str], *columns: str) -> Table:
    """A table whose numbers are never cut, also on 80 columns; the `folding` first columns wrap instead."""
    table = Table(title=title, title_justify="left", box=SIMPLE_HEAD, padding=(0, 1, 0, 0), pad_edge=False)
    for column in folding:
        table.add_column(column, overflow="fold", min_width=8)
    for column in columns:
        table.add_column(column, no_wrap=True)
    return table


def print_plan(plan: Any, schedule: Any) -> None:
    """Token counts and multiply-adds of every site (there may be none); multiply-adds in total, by what schedule."""
    if plan.sites:
        _print_sites(plan)
    console.print(
        f"{schedule.described}; multiply-adds: {plan.multiply_adds_before / 1e9:.4g} G before, "
        f"{plan.multiply_adds_after / 1e9:.4g} G after, {plan.ratio:.2f}x fewer",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )


def _print_sites(plan: Any) -> None:
    table = make_table(
        "Plan (one sample; multiply-adds from each site to the next)",
        ["site", "module"],
        *("tokens\nbefore", "tokens\nafter", "G mult-adds\nbefore", "G mult-adds\nafter"),
    )
    for site in plan.sites:
        before, after = ("\n".join(f"{s} {n}" for s, n in c.items()) for c in (site.before, site.after))
        table.add_row(site.name, site.module, before, after, *(f"{n / 1e9:.3g}" for n in site.multiply_adds))
    console.print(table)


def print_bench(report: Any) -> None:
    """Latency, throughput and memory of every artifact at every batch size."""
    compared = len(report.artifacts) > 1
    columns = [
        "batch",
        "p50 ms",
        "p90",
        "p99",
        "mean",
        "samples/s",
        "MiB",
        *(["first is\nfaster by"] if compared else []),
    ]
    settings = report.settings
    table = make_table(f"Latency of {settings['iterations']} calls, after {settings['warmup']}", ["artifact"], *columns)
    for row in report.measurements:
        times = (row.percentile(50), row.percentile(90), row.percentile(99), row.mean)
        memory = "" if row.peak_memory is None else f"{row.peak_memory / 2**20:.0f}"
        ratio = report.speed_up(row)
        faster = ["" if ratio is None else f"{ratio:.2f}x"] if compared else []
        cells = [f"{time:.3g}" if time < 100 else f"{time:.0f}" for time in times]
        table.add_row(row.artifact, str(row.batch), *cells, f"{row.throughput:.4g}", memory, *faster)
    console.print(table)
    providers = sorted({about["provider"] for about in report.artifacts.values()})
    machine = report.environment
    gpus = ", ".join(gpu["name"] for gpu in machine["gpus"].values())
    where = gpus or f"{machine['usable_cores']} cores, {machine['cpu']}"
    for path, about in report.artifacts.items():
        console.print(f"{path}: {about['reduced_by']}", markup=False, highlight=False)
    console.print(f"{', '.join(providers)}; {where}", markup=False, highlight=False)


def print_report(report: Any) -> None:
    """Decisions, outputs and notes of a parity report."""
    if report.reducers:
        columns = ("differ", "near-ties", "indices\nflipped", "largest\nmargin", "verdict")
        table = make_table(f"Decisions ({report.samples} samples)", ["reducer"], *columns)
        for row in report.reducers:
            verdict = ("pass" if row.judged else "reported") if row.passed else "FAIL"
            table.add_row(
                row.name,
                str(row.differ),
                str(row.near_ties),
                f"{row.flip_rate:.2%}",
                f"{row.worst_margin:.1e}",
                verdict,
            )
        console.print(table)
    table = make_table(
        f"Outputs against eager PyTorch ({report.dtype}, {report.provider})",
        ["output"],
        *("against", "samples", "absolute\nmax, mean", "relative\nmax, norm", "cosine", "top-1", "verdict"),
    )
    for row in report.outputs:
        verdict = ("pass" if row.passed else "FAIL") if row.judged or not row.finite else "reported"
        errors = (f"{row.max_abs:.2e}\n{row.mean_abs:.2e}", f"{row.max_rel:.2e}\n{row.max_norm:.2e}")
        against = row.against.replace("_", " ")
        table.add_row(row.name, against, str(row.samples), *errors, f"{row.cosine:.6f}", f"{row.top1:.1%}", verdict)
    console.print(table)
    for note in report.notes:
        console.print(f"note: {note}", markup=False, highlight=False)
