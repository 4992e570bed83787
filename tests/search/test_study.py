"""The search on a model small enough to judge a schedule in a few milliseconds: what it takes, keeps and refuses."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import pumer_compile as pumer
from pumer_compile.errors import UsageError
from pumer_compile.search.choosing import best_of
from pumer_compile.search.limits import Limits
from pumer_compile.search.objective import Result, front
from pumer_compile.search.output import write_plot, write_schedule, write_trials
from pumer_compile.search.samples import Samples
from pumer_compile.search.study import Found, Settings, search
from tests.support.tiny import image_inputs, text_inputs, tiny_vilt

COUNT = 24


def made(seed: int = 0, labels: np.ndarray | None = None) -> Samples:
    inputs = {**text_inputs(COUNT, seed=seed), **image_inputs([(96, 96)] * COUNT, (96, 96), seed=seed)}
    return Samples(inputs, tuple(inputs), COUNT, 8, labels, f"samples {seed}")


@pytest.fixture(scope="module")
def program() -> pumer.Program:
    return pumer.capture(tiny_vilt(), made().first)


def searched(program: pumer.Program, limits: Limits, samples: Samples | None = None, **settings: Any) -> Found:
    return search(program, samples or made(), limits, Settings(**{"methods": ("pumer",), **settings}))


@pytest.fixture(scope="module")
def found(program: pumer.Program) -> Found:
    return searched(program, Limits(max_drop=0.3), trials=20)


def test_what_is_taken_is_the_cheapest_that_loses_no_more(found: Found) -> None:
    assert found.best is not None and found.measure == "agreement" and found.baseline == 1.0
    meeting = [r for r in found.results if r.state == "done" and r.drop <= 0.3 and r.multiply_adds < 1]
    assert found.best.multiply_adds == min(r.multiply_adds for r in meeting)
    assert [r.number for r in found.results] == list(range(20))
    stages = [stage for stage, _ in itertools.groupby(r.stage for r in found.results)]
    assert stages == ["proposed", "sensitivity", "combined", "search"]


def test_what_is_said_of_it_is_what_it_does(found: Found, program: pumer.Program) -> None:
    """Reduced anew and run by hand."""
    assert found.best is not None and found.schedule is not None
    reduced = pumer.reduce(program, found.schedule)
    plan, samples = reduced.plan, made()
    assert found.best.multiply_adds == plan.multiply_adds_after / plan.multiply_adds_before
    alike = 0
    for start in range(0, COUNT, 8):
        batch = {name: tensor[start : start + 8] for name, tensor in samples.inputs.items()}
        with torch.no_grad():
            own, other = program.model(**batch).logits, reduced.module(**batch)  # type: ignore[misc]
        alike += int((own.argmax(-1) == dict(other)["logits"].argmax(-1)).sum())
    assert found.best.value == pytest.approx(alike / COUNT)


def test_each_number_was_tried_alone(found: Found) -> None:
    alone = [r for r in found.results if r.stage == "sensitivity"]
    assert len(alone) == 6  # prune, and merge of image and text, at each of two sites
    for result in alone:
        (site,) = result.schedule["sites"] if "sites" in result.schedule else [result.schedule]
        budgets = [site["prune"], site["merge"]["image"], site["merge"]["text"]]
        assert sum(bool(budget) for budget in budgets) == 1
    assert {s.number.name.partition("/")[0] for s in found.sensitivities} == {"pumer"}


def test_the_front_is_what_no_other_beats(found: Found) -> None:
    places = {(r.multiply_adds, r.drop) for r in found.results if r.state == "done"}

    def beaten(place: tuple[float, float]) -> bool:
        return any(one != place and one[0] <= place[0] and one[1] <= place[1] for one in places)

    assert {(r.multiply_adds, r.drop) for r in front(found.results)} == {one for one in places if not beaten(one)}


def test_what_it_leaves(found: Found, tmp_path: Path) -> None:
    schedule, trials, plot = tmp_path / "s.yaml", tmp_path / "s.trials.json", tmp_path / "s.png"
    write_schedule(schedule, found, "pumer-compile search ...")
    write_trials(trials, found)
    write_plot(plot, found)
    assert found.schedule is not None
    assert pumer.Schedule.load(schedule).sha256 == found.schedule.sha256
    text = schedule.read_text()
    assert text.startswith("# Found by pumer-compile search") and "24 samples" in text and "drop of at most 0.3" in text
    assert plot.read_bytes().startswith(b"\x89PNG")
    assert "NaN" not in trials.read_text() and '"sensitivities"' in trials.read_text()


def test_a_limit_out_of_reach_names_the_nearest(program: pumer.Program) -> None:
    found = searched(program, Limits(multiply_adds=0.05, max_drop=0.5), trials=12)
    assert found.best is None and found.why_not.startswith("No schedule of 12 tried meets the limits")
    cheapest = min(r.multiply_adds for r in found.results if not math.isnan(r.multiply_adds))
    assert f"{cheapest:.3f}" in found.why_not
    assert all(r.state in ("dear", "refused") for r in found.results)  # what is too dear is never run


def test_labels_count_right_answers(program: pumer.Program) -> None:
    with torch.no_grad():
        own = torch.cat([program.model(**batch).logits[:n] for batch, n in made().batches()])  # type: ignore[misc]
    labels = own.argmax(-1).numpy()
    labels[:6] = (labels[:6] + 1) % 5
    found = searched(program, Limits(max_drop=0.5), made(labels=labels), trials=2)
    assert (found.measure, found.baseline) == ("accuracy", 0.75)


def test_a_search_goes_on_where_it_was_stopped(program: pumer.Program, tmp_path: Path) -> None:
    storage = str(tmp_path / "search.journal")
    limits = Limits(max_drop=0.3)
    first = searched(program, limits, trials=9, storage=storage)
    with pytest.raises(UsageError, match=r"9 trials.*--resume"):
        searched(program, limits, trials=9, storage=storage)
    second = searched(program, limits, trials=13, storage=storage, resume=True)
    assert [r.to_dict() for r in second.results[:9]] == [r.to_dict() for r in first.results]
    assert len(second.results) == 13
    # Nothing is tried twice by name: the stages begin where they ended.
    named = [str(sorted(r.schedule.items())) for r in second.results if r.stage in ("proposed", "sensitivity")]
    assert len(named) == len(set(named))


def test_a_stored_search_of_another_model_or_other_samples(program: pumer.Program, tmp_path: Path) -> None:
    storage = str(tmp_path / "search.journal")
    searched(program, Limits(max_drop=0.3), trials=1, storage=storage)
    other = pumer.capture(tiny_vilt(seed=1), made().first)
    with pytest.raises(UsageError, match="another model"):
        searched(other, Limits(max_drop=0.3), trials=2, storage=storage, resume=True)
    with pytest.raises(UsageError, match="other samples"):
        searched(program, Limits(max_drop=0.3), made(seed=1), trials=2, storage=storage, resume=True)
    with pytest.raises(UsageError, match="no search to resume"):
        searched(program, Limits(max_drop=0.3), trials=2, storage=str(tmp_path / "none.journal"), resume=True)


def test_an_interrupt_keeps_what_is_done(program: pumer.Program, tmp_path: Path) -> None:
    storage = str(tmp_path / "search.journal")

    def stop(result: Result, best: Result | None, judged: int) -> None:
        if result.number == 4:
            raise KeyboardInterrupt

    settings = Settings(methods=("pumer",), trials=50, storage=storage)
    found = search(program, made(), Limits(max_drop=0.9), settings, stop)
    assert found.interrupted and len(found.results) == 5 and found.best is not None
    again = search(program, made(), Limits(max_drop=0.9), replace(settings, trials=6, resume=True))
    assert [r.to_dict() for r in again.results[:5]] == [r.to_dict() for r in found.results]


def test_an_unknown_method(program: pumer.Program) -> None:
    with pytest.raises(UsageError, match="no method 'pummer'"):
        searched(program, Limits(), methods=("pummer",))


def test_without_a_drop_what_loses_least_is_taken() -> None:
    results = [
        Result(0, "search", "done", multiply_adds=0.5, drop=0.03),
        Result(1, "search", "done", multiply_adds=0.6, drop=0.01),
        Result(2, "search", "done", multiply_adds=0.9, drop=0.01),
        Result(3, "search", "done", multiply_adds=0.4, drop=0.20),
    ]

    def number(limits: Limits) -> int | None:
        best = best_of(results, limits)
        return None if best is None else best.number

    assert number(Limits(multiply_adds=0.95)) == 1
    assert number(Limits(multiply_adds=0.55)) == 0
    assert number(Limits(max_drop=0.05)) == 0
    assert number(Limits(max_drop=0.5)) == 3
    assert number(Limits(max_drop=0.001)) is None
