"""What shows itself does so in a few short lines, with the numbers that it has."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest
import torch

import pumer_compile as pumer
from pumer_compile.parity.report import OutputReport, ParityReport, ReducerReport
from pumer_compile.plan import Plan, SitePlan
from pumer_compile.shown.tables import ROWS, Table, giga
from tests.support.tiny import image_inputs, text_inputs, tiny_vilt


class _Cells(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.cells: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: object) -> None:
        self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open[-1] == "td":
            self.cells.append(data)


def cells(page: str) -> list[str]:
    parser = _Cells()
    parser.feed(page)
    assert parser.open == []
    return parser.cells


def plan(sites: int) -> Plan:
    made = [
        SitePlan(f"vision.{i}", "a.b", {"image": 9 + i}, {"image": 5}, {}, {}, multiply_adds=(3_000_000 + i, 20))
        for i in range(sites)
    ]
    return Plan(tuple(made), 4_000_000_000, 1_000_000_000, {f"layer.{i}": {"image": i} for i in range(400)})


@pytest.mark.fast
def test_a_table_in_text_and_in_html_has_the_same_cells() -> None:
    table = Table("a <heading>", ("one", "other"), [("1", "2 < 3"), ("longer", "")])
    assert table.text() == "a <heading>\n  one     other\n  1       2 < 3\n  longer"
    assert cells(table.html()) == ["1", "2 < 3", "longer"]
    assert "a &lt;heading&gt;" in table.html()
    assert Table("alone").text() == "alone" and cells(Table("alone").html()) == []


@pytest.mark.fast
def test_many_rows_are_counted_and_not_shown() -> None:
    shown, page = (plan(ROWS + 5).tables()[0].text(), plan(ROWS + 5)._repr_html_())
    assert "and 5 more" in shown and "and 5 more" in page
    assert f"vision.{ROWS - 1} " in shown and f"vision.{ROWS} " not in shown
    assert "more" not in plan(ROWS).tables()[0].text()


@pytest.mark.fast
def test_a_plan_says_its_counts() -> None:
    text = repr(plan(2))
    assert text.splitlines()[0] == "Plan of 2 sites: 4 G multiply-adds before, 1 G after, 4.00x fewer"
    assert re.search(r"vision.1 +image 10 -> 5 +3 M -> 20 +a.b", text)
    assert str(plan(2)) == text and len(text) < 400
    assert giga(2.5e12) == "2.5 T" and giga(7) == "7"


@pytest.mark.fast
def test_a_parity_report_says_its_verdict_and_what_was_not_compared() -> None:
    report = ParityReport("model.onnx", "float32", "cpu", samples=2, end_to_end=1)
    report.reducers = [ReducerReport("reducer.a", 2, differ=1, near_ties=1, chosen=8, flipped=1), ReducerReport("b")]
    report.outputs = [
        OutputReport("logits", "forced", True, 1e-4, 1e-4),
        OutputReport("x", "end_to_end", True, 1, 1, 2),
    ]
    text = repr(report)
    assert text.splitlines()[0] == "Parity of model.onnx (float32, cpu), 2 samples: passed"
    assert re.search(r"reducer.a +1 +1 +12.50% +pass", text)
    assert re.search(r"\n +b +0 +0 +0.00% +not compared", text)
    assert re.search(r"logits +forced +not compared", text)
    assert re.search(r"x +end to end +0.00e\+00 +0.00e\+00 +pass", text)
    report.outputs[1].required_atol = 2.0
    assert "failed: output x" in repr(report) and "FAIL" in repr(report)


def test_a_program_and_what_is_reduced_fit_a_screen() -> None:
    program = pumer.capture(tiny_vilt(), {**text_inputs(2), **image_inputs([(96, 96)] * 2, (96, 96))})
    reduced = pumer.reduce(program, pumer.Schedule(layers=[0], prune=0.1, merge={"image": 0.3, "text": 0.2}))
    nodes = len(list(program.module.graph.nodes))
    first, *inputs = repr(program).splitlines()
    assert first == f"Program of ViltForQuestionAnswering: {nodes} nodes"
    assert [line.split()[0] for line in inputs[1:]] == list(program.inputs)
    text = repr(reduced)
    assert len(text) < 1200 and len(text.splitlines()) < 12
    assert repr(reduced.plan) in text and first in text and reduced.schedule.described in text
    assert set(cells(reduced.plan._repr_html_())) <= set(cells(reduced._repr_html_()))
    assert str(list(program.inputs["pixel_values"].shape)) in cells(program._repr_html_())
    with torch.no_grad():  # showing it changes nothing
        assert reduced.module(**program.inputs).logits.isfinite().all()
