"""Schedules that methods propose for models in outline: valid, with the usual numbers and with any others."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import replace
from typing import TypeVar

import pytest

from pumer_compile.methods import METHODS
from pumer_compile.methods.proposing import Outline, Usual, at_depths

pytestmark = pytest.mark.fast
T = TypeVar("T", bound=str | int)

FUSION = Outline({"text": 40, "image": 145}, tuple(f"cross_modal.{i}" for i in range(12)), learned=1)
PROMPT = Outline({"text": 30, "prompt_image": 576}, tower=("vision.0",), crops=576, rows=576, layers=32)
TILES = Outline({"text": 30, "prompt_image": 80}, crops=16, rows=80, frames=5, layers=4)
POOLED = Outline({"text": 30, "prompt_image": 1}, crops=1, rows=1, layers=4)
OUTLINES = {"fusion": FUSION, "prompt": PROMPT, "tiles": TILES, "pooled": POOLED, "nothing": Outline()}


class Drawn:
    """Any number that may be chosen; notes what was asked for."""

    def __init__(self, seed: int) -> None:
        self.random, self.asked = random.Random(seed), list[str]()

    def share(self, name: str, most: float, usual: float) -> float:
        assert 0 <= usual <= most < 1
        self.asked.append(name)
        return self.random.choice([0.0, round(self.random.uniform(0, most), 2)])

    def count(self, name: str, least: int, most: int, usual: int) -> int:
        assert 0 <= least <= most
        self.asked.append(name)
        return self.random.randint(least, most)

    def one_of(self, name: str, values: Sequence[T], usual: T) -> T:
        assert usual in values
        self.asked.append(name)
        return self.random.choice(values)


@pytest.mark.parametrize("name", METHODS)
def test_whatever_is_drawn_is_a_schedule_and_the_same_is_asked_for(name: str) -> None:
    for outline in OUTLINES.values():
        asked = []
        for seed in range(12):
            drawn = Drawn(seed)
            for schedule in METHODS[name].proposals(outline, drawn):
                assert schedule.method == name
                assert METHODS[name].load(schedule.model_dump(exclude_none=True)).sha256 == schedule.sha256
            asked.append(drawn.asked)
        assert all(one == asked[0] for one in asked)


def proposing(outline: Outline) -> set[str]:
    return {name for name, kind in METHODS.items() if next(iter(kind.proposals(outline, Usual())), None)}


def test_who_proposes_for_whom() -> None:
    controls = {"random", "uniform", "downsample"}
    assert {"pumer", "tome"} | controls == proposing(FUSION)
    assert {"vispruner", "fastv", "visionzip", "dart", "pyramiddrop", "divprune"} | controls <= proposing(PROMPT)
    assert "pumer" not in proposing(PROMPT) and not {"evs", "vidcom2"} & proposing(PROMPT)
    assert {"evs", "vidcom2"} <= proposing(TILES)
    assert proposing(Outline()) == set()
    assert not {"vispruner", "fastv", "divprune"} & proposing(POOLED)


def test_usual_numbers_are_the_papers() -> None:
    (first, image_only) = METHODS["pumer"].proposals(FUSION, Usual())
    assert first.sha256 == METHODS["pumer"].load("vilt-vqa").with_semantics("safe").sha256
    assert all(site.merge.text == 0 for site in image_only.resolve())  # type: ignore[attr-defined]
    (keeps, *_) = METHODS["vispruner"].proposals(PROMPT, Usual())
    assert (keeps.budget, keeps.semantics, keeps.positions) == (192, "stable", "compact")  # type: ignore[attr-defined]
    (drops, *_) = METHODS["pyramiddrop"].proposals(PROMPT, Usual())
    assert drops.stages == {8: 0.5, 16: 0.25, 24: 0.125}  # type: ignore[attr-defined]


def test_what_is_read_by_cross_attention_is_reduced_by_text_first() -> None:
    read = replace(PROMPT, read=True, informed=("cross_modal.0", "cross_modal.1"))
    assert "pumer" in proposing(read) and read.fuses and not PROMPT.fuses
    order = sorted(METHODS.values(), key=lambda kind: -kind.suggested)
    assert order[0] is METHODS["pumer"] and METHODS["random"].suggested == 0


def test_depths_are_those_of_twelve_layers() -> None:
    assert at_depths(range(12)) == [2, 5, 8]
    assert at_depths(range(6)) == [1, 2, 4]
    assert at_depths([7]) == [7] and at_depths([]) == []
