"""What becomes of each token, from the matrices that reducers give, worked out by hand."""

from __future__ import annotations

from dataclasses import dataclass, replace

import pytest
import torch

from pumer_compile.reducers.base import Choice, Reducer, Signal, kept_alone
from pumer_compile.report.data import Place, Step
from pumer_compile.report.steps import SAYS, Track, _fate, site_and_stream
from pumer_compile.report.svg import boxes_path, heat, hue, lines_path, overlay

pytestmark = pytest.mark.fast


def rows(*groups: tuple[int, ...], of: int) -> torch.Tensor:
    """The matrix that puts these tokens into one each, `[1, groups, of]`."""
    matrix = torch.zeros(1, len(groups), of)
    for number, group in enumerate(groups):
        matrix[0, number, list(group)] = 1
    return matrix


def test_two_reducers_one_after_the_other() -> None:
    """Of six tokens: 4 is pruned, 1 and 5 become one; then 0 is pruned, and 3 joins these two."""
    track = Track.start("first", 1, 6)
    before = track.pass_(rows((0,), (2,), (1, 5), (3,), of=6))
    assert before.tolist() == [[0, 1, 2, 3, 4, 5]]
    assert track.now.tolist() == [[0, 2, 1, 3, -1, 2]]
    assert track.merged.tolist() == [[False, True, False, False, False, True]]
    before = track.pass_(rows((1,), (2, 3), of=4))
    assert before.tolist() == [[0, 2, 1, 3, -1, 2]]
    assert track.now.tolist() == [[-1, 1, 0, 1, -1, 1]]
    moved = zip(before[0].tolist(), track.now[0].tolist(), track.merged[0].tolist(), strict=True)
    assert [_fate(*one) for one in moved] == ["pruned", "merged", "kept", "merged", "gone", "merged"]


def step(scores: tuple[float, ...] | None = None) -> Step:
    places = (*(Place(0, (10 * i, 0, 10, 5)) for i in range(4)), None)
    fates = ("pruned", "merged", "kept", "merged", "kept")
    return Step("a.0", "image", 5, 3, (), fates, (-1, 1, 0, 1, 2), scores, places)


def test_what_is_drawn_over_a_picture() -> None:
    assert step().groups == {1: [1, 3]} and step().count("kept") == 2
    drawn = overlay(step(), 0, 1)
    assert [name for name, *_ in drawn] == ["pruned", "kept", "merged", "joined"]
    assert drawn[0][1] == "M0 0h10v5h-10z"
    assert drawn[2][1] == "M11 1h8v3h-8zM31 1h8v3h-8z" and f"--h:{hue(1)}" in drawn[2][2]
    assert drawn[3][1] == "M15 2.5L35 2.5" == lines_path([((10, 0, 10, 5), (30, 0, 10, 5))])
    assert overlay(step(), 1, 1) == [] and boxes_path([]) == ""


def test_the_darkest_has_the_highest_score() -> None:
    nan = float("nan")
    shades = heat(step((nan, 0.5, 100.0, 0.1, 7.0)), 0)  # the fifth stands nowhere
    assert {path[:4]: opacity for opacity, path in shades} == {"M10 ": "0.26", "M20 ": "0.90", "M30 ": "0.00"}
    assert heat(step(), 0) == [] and heat(step((nan,) * 5), 0) == []


@dataclass
class Evidence:
    votes: torch.Tensor
    likeness: torch.Tensor


def test_tokens_are_ranked_by_the_first_of_what_they_were_chosen_by() -> None:
    """Where that is a number for each of them."""
    votes, likeness = torch.rand(2, 6), torch.rand(2, 4, 6)
    reducer, choice = Reducer(6, 3), Choice(kept_alone(torch.zeros(2, 3).long()), likeness, votes)
    for evidence in (votes, (votes, likeness), Evidence(votes, likeness)):
        assert reducer.ranking(replace(choice, evidence=evidence)) is votes
    for evidence in (None, likeness, votes[:, :4], [votes], Evidence(likeness, votes)):
        assert reducer.ranking(replace(choice, evidence=evidence)) is None


def test_signals_have_words_and_names_come_apart() -> None:
    assert set(SAYS) <= set(Signal) and all(SAYS.values())
    assert site_and_stream("reducer.cross_modal_2.call_1.image") == ("cross_modal_2.call_1", "image")
