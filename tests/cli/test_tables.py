"""What commands print at 80 columns: a few lines where all went well, tables for who asks, no name cut."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import Any

import pytest
import typer
from rich.console import Console

from pumer_compile.bench.bench import BenchReport, Measurement
from pumer_compile.cli import tables as cli_tables
from pumer_compile.cli.commands import app
from pumer_compile.cli.tables import (
    column_of,
    print_bench,
    print_plan,
    print_report,
    shapes,
    size,
    summary,
    without_common_prefix,
    wrapped,
)
from pumer_compile.parity.report import OutputReport, ParityReport, ReducerReport
from pumer_compile.plan import Plan, SitePlan
from pumer_compile.schedule import Schedule
from tests.support.commands import artifact, done, folder, schedule

LAYER = "language_model.model.layers"


@pytest.fixture
def screen(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    """80 columns."""
    text = io.StringIO()
    monkeypatch.setattr(cli_tables, "console", Console(file=text, width=80))
    return text


def test_common_prefixes_are_dropped_at_dots() -> None:
    names = [f"{LAYER}.{i}.self_attn" for i in (2, 10)]
    assert without_common_prefix(names) == (LAYER, ["2.self_attn", "10.self_attn"])
    assert without_common_prefix(["logits", "logits"]) == ("", ["logits", "logits"])
    assert without_common_prefix(["a.b", "a.b"]) == ("a", ["b", "b"])
    assert without_common_prefix(["one.alone"]) == ("", ["one.alone"])
    assert without_common_prefix(["layer.1", "layers.1"]) == ("", ["layer.1", "layers.1"])
    assert without_common_prefix(["/a/x/m.onnx", "/a/y/m.onnx"], "/") == ("/a", ["x/m.onnx", "y/m.onnx"])
    assert without_common_prefix([]) == ("", [])


def test_long_names_break_at_dots_and_lose_no_letter() -> None:
    name = "past_key_values.0.key.rather_long_name_of_a_cache"
    lines = wrapped(name, 14).split("\n")
    assert "".join(lines) == name and max(map(len, lines)) <= 14
    assert wrapped("vision.3.attention", 11) == "vision.3.\nattention"
    assert wrapped("logits", 14) == "logits"
    assert wrapped("withoutanybreakinit", 8) == "withoutanybreakinit"
    assert column_of(["a.x", "a.x", "a.y", "b.z"], 9) == ("", ["a.x", "", "a.y", "b.z"])


def test_sizes_and_shapes_in_words() -> None:
    assert [size(n) for n in (999, 99_949, 5_390_000, 1_234_000_000)] == ["1.0 kB", "99.9 kB", "5.4 MB", "1.23 GB"]
    inputs = {"input_ids": [2, 12], "pixel_values": (2, 3, 96, 96)}
    assert shapes(inputs) == "input_ids [2, 12], pixel_values [2, 3, 96, 96]"
    assert shapes(inputs, open_batch=True) == "input_ids [batch, 12], pixel_values [batch, 3, 96, 96]"


# --- parity ---------------------------------------------------------------------------------------------------------


def many_outputs() -> ParityReport:
    outputs = [
        OutputReport(name, against, against == "forced", 1e-4, 1e-4, samples=6, max_abs=3e-6)
        for name in ["logits", *(f"past_key_values.{i}.{part}" for i in range(24) for part in ("key", "value"))]
        for against in ("forced", "end_to_end", "unreduced")
    ]
    outputs.append(OutputReport("rest", "end_to_end", False, 1e-4, 1e-4))
    reducers = [ReducerReport(f"reducer.cross_modal_{i}.image", samples=6, differ=i, near_ties=i) for i in range(2)]
    found = ParityReport("m.onnx", "float32", "CPUExecutionProvider", samples=6, end_to_end=5, decisions_compared=True)
    found.reducers, found.outputs, found.notes = reducers, outputs, ["a note"]
    return found


def test_a_report_in_one_line(screen: io.StringIO) -> None:
    report = many_outputs()
    assert summary(report) == (
        "6 samples, 5 of them end to end; decisions of 2 reducers: 1 differ, 1 of them near-ties; largest error 3.0e-06"
    )
    print_report(report, whole=False)
    assert screen.getvalue() == "note: a note\n"


def test_tables_fit_80_columns_and_cut_nothing(screen: io.StringIO) -> None:
    print_report(many_outputs())
    lines = screen.getvalue().splitlines()
    assert max(map(len, lines)) <= 80 and "…" not in screen.getvalue()
    assert "(in reducer)" in screen.getvalue() and "cross_modal_0.image" in screen.getvalue()
    names = "".join(line[:15].strip() for line in lines)
    assert "past_key_values.0.key" in names and "past_key_values.23.value" in names
    (rest,) = [i for i, line in enumerate(lines) if line.startswith("rest")]
    assert " ".join(lines[rest].split() + lines[rest + 1].split()) == "rest end to end 0 not compared"
    assert screen.getvalue().count("reported") == 2 * 49 and "max, mean" in screen.getvalue()
    # A name stands at the first of its three rows.
    assert sum(line.startswith("logits") for line in lines) == 1


# --- bench ----------------------------------------------------------------------------------------------------------


def bench_report(first: float, second: float) -> BenchReport:
    about = {"provider": "CPUExecutionProvider", "dtype": "float32", "bytes": 5_000_000, "reduced_by": "not reduced"}
    reduced = {**about, "reduced_by": "pumer, semantics safe", "fewer_multiply_adds": 1.8}
    machine = {"gpus": {}, "usable_cores": 2, "cpu": "a processor"}
    paths = ("/very/long/folder/reduced/model.onnx", "/very/long/folder/unreduced/model.onnx")
    rows = [
        Measurement(path, batch, [time] * 3, None)
        for batch in (1, 8)
        for path, time in zip(paths, (first, second), strict=True)
    ]
    return BenchReport({"iterations": 3, "warmup": 1}, machine, dict(zip(paths, (reduced, about), strict=True)), rows)


@pytest.mark.parametrize(("first", "second"), [(10.0, 18.4), (18.4, 10.0)])
def test_which_is_faster_than_which(first: float, second: float, screen: io.StringIO) -> None:
    print_bench(bench_report(first, second))
    fast, slow = ("reduced", "unreduced") if first < second else ("unreduced", "reduced")
    text = screen.getvalue()
    for batch in (1, 8):
        line = (
            f"batch {batch}: {fast}/model.onnx is 1.84x faster than {slow}/model.onnx (medians); 95%: 1.84x to 1.84x."
        )
        assert line in " ".join(text.split())
    line = "reduced/model.onnx: pumer, semantics safe, 1.80x fewer multiply-adds; float32, 5.0 MB."
    assert line in " ".join(text.split())
    assert max(map(len, text.splitlines())) <= 80 and "…" not in text


# --- The commands -----------------------------------------------------------------------------------------------------


def test_a_compilation_says_a_few_lines_and_what_comes_next(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    out = done(folder(layers=1), "--schedule", "lossless", "-o", path, "--batch", 2, "--dynamic-batch").out
    said = " ".join(out.split())
    assert "verdict" not in out and "cosine" not in out and len(out.splitlines()) < 15
    assert re.match(
        rf"Wrote {path} \([\d.]+ kB\) and {path}.manifest.json; proved against eager PyTorch: \d+ samples", said
    )
    assert re.search(
        r"largest error \d\.\de-\d\d\. Lossless; multiply-adds: .* G before, .* G after, 1.\d\dx fewer\.", said
    )
    assert "Fixed shapes: input_ids [batch, 12], attention_mask [batch, 12], pixel_values [batch, 3, 96, 96]" in said
    assert said.endswith(f"Next: pumer-compile bench {path}")
    assert all(len(line) <= 80 or str(path) in line for line in out.splitlines())


def test_a_plan_says_the_shapes_and_the_next_command() -> None:
    out = done("plan", folder(), "--schedule", schedule(), "--semantics", "safe").out
    said = " ".join(out.split())
    assert re.search(r"pumer, semantics safe; multiply-adds: .*x fewer\. Fixed shapes: input_ids \[1, 12\]", said)
    assert said.endswith(f"Next: pumer-compile {folder()} --schedule {schedule()} --semantics safe -o model.onnx")


def test_a_plan_of_deep_modules_fits(screen: io.StringIO) -> None:
    module = f"{LAYER}.{{}}.self_attn.attention"
    counts = ({"prompt_image": 576, "text": 40}, {"prompt_image": 128, "text": 40})
    sites = tuple(SitePlan(f"cross_modal.{i}", module.format(i), *counts, {}, {}, (10**12, 10**11)) for i in (2, 10))
    print_plan(Plan(sites, 2 * 10**12, 10**12), Schedule(layers=(2, 10), prune=0.1))
    text = screen.getvalue()
    assert max(map(len, text.splitlines())) <= 80 and f"(in {LAYER})" in text
    assert "prompt_image 576 → 128" in text and "cross_modal.10  10.self_attn." in text and "1e+03 → 100" in text
    assert text.endswith("pumer, semantics safe; multiply-adds: 2000 G before, 1000 G after, 2.00x fewer.\n")


def test_a_passed_parity_is_one_sentence() -> None:
    out = done("parity", artifact(), "--model", folder()).out
    said = " ".join(out.split())
    assert said.startswith(f"{artifact()} agrees with eager PyTorch (pumer, semantics reference; float32, CPUExecution")
    assert re.search(
        r": \d+ samples, \d+ of them end to end; decisions of 2 reducers: .*; largest error \d\.\de-\d\d\.$", said
    )
    assert "verdict" in done("parity", artifact(), "--model", folder(), "-v").out


# --- Help -------------------------------------------------------------------------------------------------------------

CHOICES = {
    "--dtype": ("float32", "float16", "bfloat16"),
    "--quantize-mode": ("weights", "dynamic", "static"),
    "--target": ("onnxruntime-cpu", "onnxruntime-cuda", "tensorrt"),
    "--onnx-passes": ("strides", "rows", "projections", "attention", "none"),
    "--builder": ("tensorrt", "tensorrt-rtx"),
    "--semantics": ("safe", "reference", "paper", "stable"),
    "--component": ("vision",),
    "--quantize": ("int8",),
}


def options_of(command: Any) -> dict[str, tuple[str | None, str]]:
    return {p.opts[0]: (p.rich_help_panel, p.help or "") for p in command.params if p.param_type_name == "option"}


def test_options_are_in_groups_with_their_choices() -> None:
    found = options_of(typer.main.get_command(app).commands["compile"])  # type: ignore[attr-defined]
    own = {name: panel for name, (panel, _) in found.items() if name != "--help"}
    assert len(own) == 42 and None not in own.values()
    groups = {panel: [n for n, p in own.items() if p == panel] for panel in own.values()}
    assert {"ONNX", "Engines", "Proof"} <= groups.keys() and max(map(len, groups.values())) <= 9
    text = done("compile", "--help").out
    assert all(panel in text for panel in groups if panel) and "…" not in text
    for name, choices in CHOICES.items():
        (_, after) = re.split(rf" {name}[ ,]", text, maxsplit=1)
        shown = re.sub(r"[│ \n]+", " ", after)[:400]
        assert all(choice in shown for choice in choices), name
