"""The tables of docs/accuracy.md: figures by hand, what is missing is said, and the page is what the results make."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import typer

from examples.scenes import tables
from examples.scenes.measure import nearest_share
from examples.scenes.rows import FAMILIES, TRAINED, shelf_rows, tuned_rows
from pumer_compile import Schedule

pytestmark = pytest.mark.fast


def result(name: str, right: str, pictures: int, multiply_adds: int = 100) -> dict[str, Any]:
    told = {"name": name, "right": right, "pictures": pictures, "multiply_adds": multiply_adds}
    return told | {"tokens": [{"image": 9}], "model": "vilt-0", "commit": "abc", "versions": {"torch": "2"}}


def test_figures_by_hand() -> None:
    before, after = result("unreduced", "110111", 3), result("x", "100101", 3)
    assert tables.by_picture(before) == [1.0, 0.5, 1.0]
    mean, half = tables.mean_and_half_width([1.0, 0.5, 1.0])
    assert mean == pytest.approx(5 / 6) and half == pytest.approx(1.96 * math.sqrt((1 / 36 + 1 / 9 + 1 / 36) / 2 / 3))
    # Lost by picture: 0.5, 0, 0.5; questions that were right go wrong in the first and the last.
    points, width = tables.lost([after], before)
    assert points == pytest.approx(100 / 3)
    assert width == pytest.approx(100 * 1.96 * math.sqrt(2 * (1 / 6) ** 2 / 2 / 3 + (1 / 3) ** 2 / 2 / 3))
    assert tables.lost([before, after], before)[0] == pytest.approx(100 / 6)


def test_what_is_missing_is_said() -> None:
    assert tables.table(0, {}) == "Not measured yet: the unreduced model."
    found = {"unreduced": result("unreduced", "1101", 2), "tome-1.8": result("tome-1.8", "1001", 2, 56)}
    table = tables.table(0, found)
    assert "| unreduced | 1.00x |  | 9 | 75.0 ± 49.0 |  |  |" in table
    assert "| tome | 1.79x |  | 9 | 50.0 ± 0.0 | +25.0 ± 49.0 |  |" in table
    assert table.count("not measured yet") == len({row.group for row in shelf_rows()}) - 2
    for number in range(1, 6):
        assert "not measured yet" in tables.table(number, found) and "| 50.0" not in tables.table(number, found)
    tuned = {f"tuned-pumer-1.8-s{seed}": result("", "1001" if seed else "1111", 2, 56) for seed in range(3)}
    assert "| PuMer | 1.8x asked | | | not measured yet, 1 of 3 seeds | | |" in tables.table(
        1, {**found, "tuned-pumer-1.8-s0": tuned["tuned-pumer-1.8-s0"]}
    )
    assert "| PuMer | 1.79x |  | 9 | 66.7 ± 0.0 | +8.3 ± 49.0 | 3: 50.0 to 100.0 |" in tables.table(
        1, {**found, **tuned}
    )
    with pytest.raises(typer.BadParameter, match="there is no table 6"):
        tables.table(6, found)


def test_rows_that_were_timed_say_their_median(tmp_path: Path) -> None:
    (tmp_path / "unreduced.json").write_text(json.dumps(result("unreduced", "1101", 2)))
    assert "| unreduced | 1.00x |  | 9 |" in tables.table(0, tables.load_results(tmp_path))
    (tmp_path / "latency.json").write_text(json.dumps({"samples": {"unreduced": [3.0, 9.0, 4.04]}}))
    assert "| unreduced | 1.00x | 4.0 | 9 |" in tables.table(0, tables.load_results(tmp_path))


def test_who_wins_is_told_by_the_interval() -> None:
    ours = result("text-informed-once-1.8", "1" * 40, 20)
    theirs = {f"random-once-1.8-{seed}": result("", "10" * 20, 20) for seed in range(5)}
    said = tables.compared({"text-informed-once-1.8": ours, **theirs})
    assert "1.8x, against random: 50.0 ± 0.0 points above, by more than the interval." in said
    assert "1.8x, against uniform: not measured yet." in said


def test_the_page_holds_what_the_results_make() -> None:
    empty = tables.page({})
    assert empty.splitlines()[2].startswith("**Small models, synthetic pictures.**")
    assert "Nothing has been measured yet." in empty
    found = {"unreduced": result("unreduced", "1101", 2), "tome-1.8": result("tome-1.8", "1001", 2, 56)}
    made = tables.page(found)
    assert "Model `vilt-0`; 2 pictures of the test split with 2 questions each; commit abc; torch 2." in made
    assert tables.table(0, found) in made and tables.compared(found) in made


def test_schedules_of_the_rows_are_valid() -> None:
    names = [row.name for row in shelf_rows()]
    assert len(set(names)) == len(names)
    tuned = [row for rows in tuned_rows().values() for row in rows]
    assert len({row.name for row in tuned}) == len(set(tuned)) == 32 and not {row.name for row in tuned} & set(names)
    for row in [*shelf_rows(), *tuned]:
        if row.family:
            training = {"training": True} if row.family == TRAINED else {}
            Schedule(**{**FAMILIES[row.family](0.4), **dict(row.extra), **training})


@pytest.mark.parametrize(("wanted", "power"), [(1.4, 1.0), (1.8, 3.0), (2.5, 0.5)])
def test_a_share_for_a_ratio(wanted: float, power: float) -> None:
    tried: list[float] = []

    def ratio_at(share: float) -> float | None:
        tried.append(share)
        return None if share < 0.05 or share > 0.9 else 1 + 2 * share**power

    share = nearest_share(ratio_at, wanted)
    assert 1 + 2 * share**power == pytest.approx(wanted, rel=0.02) and len(tried) <= 8
    with pytest.raises(ValueError, match="the nearest are"):
        nearest_share(lambda share: 1 + 0.1 * share, 1.8)
