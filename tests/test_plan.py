"""Token counts: as the published code has them, by the paper, in absolute numbers, and what cannot be done."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pumer_compile.errors import PlanError, UsageError
from pumer_compile.methods.budgets import SiteBudget as Site
from pumer_compile.methods.budgets import merge_count, merge_limit
from pumer_compile.methods.pumer import image_counts, published_code_skips
from pumer_compile.plan import Plan, SitePlan
from pumer_compile.rewrite.sites import Site as Place
from pumer_compile.rewrite.sites import Stream
from pumer_compile.schedule import Merge, Schedule
from tests.support.helpers import paper_counts, published_counts

pytestmark = pytest.mark.fast

ORACLE = Path(__file__).parent / "oracle" / "vilt-tiny" / "cases.json"
SHARES = st.floats(0, 1, exclude_max=True, allow_nan=False)


def site(prune: float = 0, image: float = 0, text: float = 0) -> Site:
    return Site(at="cross_modal.3", prune=prune, merge=Merge(image=image, text=text))


@pytest.mark.parametrize("case", json.loads(ORACLE.read_text()).values(), ids=json.loads(ORACLE.read_text()))
def test_counts_of_the_published_runs(case: dict) -> None:
    budgets = site(float(case["prune"]), float(case["merge_image"]), float(case["merge_text"]))
    after = case["tokens_after_layer"]
    text, image = 40, 145
    for layer, expected in enumerate(after):
        if layer in case["layers"]:
            keep, merge = image_counts(image, budgets, "reference", 1)
            text -= merge_count("cross_modal.0", "text", budgets.merge.text, text, text, 1)
            image = keep - merge
        assert [text, image] == expected


@pytest.mark.parametrize(
    ("tokens", "prune", "merge", "keep", "merged"),
    [
        (145, 0.1, 0.3, 131, 44),  # round(14.5) = 14, round(43.5) = 44: half to even
        (25, 0.1, 0.1, 23, 2),  # round(2.5) = 2
        (35, 0.1, 0.1, 31, 4),  # round(3.5) = 4
        (5, 0.5, 0.5, 3, 1),  # round(2.5) = 2; of 3 only 1 can merge
        (10, 0.0, 0.9, 10, 4),  # at most (10 - 1) // 2
        (11, 0.0, 0.9, 11, 5),
        (4, 0.5, 0.99, 2, 0),
        (3, 0.0, 0.0, 3, 0),
    ],
)
def test_published_rounding(tokens: int, prune: float, merge: float, keep: int, merged: int) -> None:
    assert image_counts(tokens, site(prune, merge), "reference", 1) == (keep, merged)


@pytest.mark.parametrize(
    ("tokens", "prune", "merge", "keep", "merged"),
    [
        (145, 0.1, 0.3, 130, 39),  # round(130.5) = 130, of which 39
        (100, 0.5, 0.5, 50, 24),  # round(25) but at most (50 - 1) // 2
        (10, 0.0, 0.3, 10, 3),
    ],
)
def test_paper_rounding(tokens: int, prune: float, merge: float, keep: int, merged: int) -> None:
    assert image_counts(tokens, site(prune, merge), "paper", 1) == (keep, merged)


@given(tokens=st.integers(2, 600), text=st.integers(1, 60), shares=st.tuples(SHARES, SHARES, SHARES))
def test_published_counts(tokens: int, text: int, shares: tuple[float, float, float]) -> None:
    prune, image, words = shares
    keep, merged, text_merged = published_counts(tokens, text, prune, image, words)
    if keep < 1:
        with pytest.raises(PlanError):
            image_counts(tokens, site(prune, image), "reference", 1)
        return
    assert image_counts(tokens, site(prune, image), "reference", 1) == (keep, merged)
    assert merge_count("s", "text", words, text, text, 1) == text_merged


@given(tokens=st.integers(2, 600), text=st.integers(1, 60), shares=st.tuples(SHARES, SHARES, SHARES))
def test_paper_counts(tokens: int, text: int, shares: tuple[float, float, float]) -> None:
    prune, image, words = shares
    keep, merged, _ = paper_counts(tokens, text, prune, image, words)
    if keep < 1:
        with pytest.raises(PlanError):
            image_counts(tokens, site(prune, image), "paper", 1)
        return
    assert image_counts(tokens, site(prune, image), "paper", 1) == (keep, merged)


@given(tokens=st.integers(2, 200), prune=st.integers(0, 199), merge=st.integers(0, 100))
def test_absolute_budgets_are_exact_or_refused(tokens: int, prune: int, merge: int) -> None:
    keep = tokens - prune
    possible = keep >= 1 and merge <= (keep - 1) // 2
    for semantics in ("reference", "paper", "safe"):
        if possible:
            assert image_counts(tokens, site(prune, merge), semantics, 1) == (keep, merge)
        else:
            with pytest.raises(PlanError):
                image_counts(tokens, site(prune, merge), semantics, 1)


def test_absolute_and_relative_budgets_mix() -> None:
    assert image_counts(100, site(10, 0.25), "reference", 1) == (90, 25)
    assert image_counts(100, site(10, 0.25), "paper", 1) == (90, 22)
    assert image_counts(100, site(0.1, 7), "reference", 1) == (90, 7)


# --- limits -------------------------------------------------------------------------------------------------


@given(tokens=st.integers(0, 300), protected=st.integers(1, 12))
@example(tokens=3, protected=2)
def test_the_limit_is_what_matching_can_do(tokens: int, protected: int) -> None:
    """Even positions after the protected ones, as long as there is an odd one that is not protected."""
    sources = [i for i in range(0, tokens, 2) if i >= protected]
    targets = [i for i in range(1, tokens, 2) if i >= protected]
    assert merge_limit(tokens, protected) == (len(sources) if targets else 0)


@pytest.mark.parametrize(("tokens", "limit"), [(0, 0), (1, 0), (2, 0), (3, 1), (4, 1), (5, 2), (40, 19), (145, 72)])
def test_the_published_limit(tokens: int, limit: int) -> None:
    assert merge_limit(tokens, 1) == limit


def test_class_tokens_lower_the_limit() -> None:
    assert merge_limit(9, 3) == 3  # of 0 2 4 6 8 only 4 6 8 may go
    assert image_counts(9, site(0, 0.9), "safe", 3) == (9, 3)


# --- errors -------------------------------------------------------------------------------------------------


def test_pruning_too_much_names_the_site_and_the_limit() -> None:
    with pytest.raises(PlanError) as caught:
        image_counts(145, site(145), "reference", 1)
    message = str(caught.value)
    assert all(part in message for part in ("cross_modal.3", "145 of 145", "144", "prune"))
    assert isinstance(caught.value, UsageError)


def test_pruning_never_takes_class_tokens_under_safe() -> None:
    assert image_counts(10, site(7), "safe", 3) == (3, 0)
    with pytest.raises(PlanError, match="at most 7"):
        image_counts(10, site(8), "safe", 3)


def test_a_share_that_leaves_nothing_is_refused() -> None:
    with pytest.raises(PlanError, match="10 of 10"):
        image_counts(10, site(0.99), "reference", 1)


def test_merging_too_much_names_stream_and_limit() -> None:
    with pytest.raises(PlanError) as caught:
        merge_count("cross_modal.3", "text", 20, 40, 40, 1)
    assert all(part in str(caught.value) for part in ("cross_modal.3", "20 of 40 text", "19", "merge: {text"))
    with pytest.raises(PlanError, match="image"):
        image_counts(145, site(100, 23), "reference", 1)


# --- all streams of a site ------------------------------------------------------------------------------------

MODALITY = {"text": "text", "caption": "text", "image": "image", "image_1": "image", "audio": "audio"}
LEARNED = {"text": 0, "caption": 3, "image": 1, "image_1": 2, "audio": 0}


def counted(wanted: Schedule, **before: int) -> dict[str, tuple[int, int]]:
    """Tokens to keep and to merge of every stream that shrinks."""
    streams = [Stream(name, MODALITY[name], tokens, LEARNED[name]) for name, tokens in before.items()]
    made = wanted.reducers(Place(None, budget=wanted.resolve()[0]), streams)
    return {name: (reducer.keep, reducer.merge) for name, reducer in made.items()}


def wanted(semantics: str = "reference", **budgets: object) -> Schedule:
    return Schedule(semantics=semantics, layers=(0,), **budgets)


def test_every_stream_by_its_modality() -> None:
    budgets = {"prune": 0.2, "merge": {"image": 0.3, "text": 0.25}}
    found = counted(wanted(**budgets), text=8, image=25, image_1=13, audio=9)
    assert found == {"text": (8, 2), "image": (20, 8), "image_1": (10, 4)}
    keep, merge, words = published_counts(25, 8, 0.2, 0.3, 0.25)
    assert (found["image"], found["text"]) == ((keep, merge), (8, words))


def test_streams_that_stay_as_they_are_are_left_out() -> None:
    assert counted(wanted(merge={"text": 2}), text=8, image=25) == {"text": (8, 2)}
    assert counted(wanted(prune=3), text=8, image=25) == {"image": (22, 0)}
    with pytest.raises(PlanError, match=r"cross_modal\.0 would reduce nothing.*'text': 2"):
        counted(wanted(merge={"text": 0.1}), text=2)


def test_learned_tokens_count_under_safe_alone() -> None:
    """Two lead the second image, three the caption."""
    most = {"prune": 0.5, "merge": {"image": 0.99, "text": 0.99}}
    assert counted(wanted("reference", **most), image_1=12, caption=11) == {"image_1": (6, 2), "caption": (11, 5)}
    assert counted(wanted("safe", **most), image_1=12, caption=11) == {"image_1": (6, 2), "caption": (11, 4)}
    with pytest.raises(PlanError, match="at most 10"):
        counted(wanted("safe", prune=11), image_1=12)
    assert counted(wanted("reference", prune=11), image_1=12) == {"image_1": (1, 0)}


@given(tokens=st.integers(2, 80), learned=st.integers(0, 3), merge=st.integers(1, 40))
def test_tome_merges_and_nothing_else(tokens: int, learned: int, merge: int) -> None:
    """Every even token may go, but for the learned ones."""
    tome = Schedule(method="tome", sites=({"at": "vision.0", "merge": {"image": merge}},))
    sources = [i for i in range(0, tokens, 2) if i >= learned]
    targets = [i for i in range(1, tokens, 2) if i >= learned]
    site, streams = Place(None, budget=tome.resolve()[0]), [Stream("image", "image", tokens, learned)]
    if targets and merge <= len(sources):
        (reducer,) = tome.reducers(site, streams).values()
        assert (reducer.keep, reducer.merge, reducer.prunes) == (tokens, merge, False)
    else:
        with pytest.raises(PlanError, match="at most"):
            tome.reducers(site, streams)


@pytest.mark.parametrize(
    ("prune", "image", "stands"),
    [(0.02, 25, True), (0.021, 25, False), (0.02, 24, True), (0, 25, False), (1, 3, False), (0.0, 25, False)],
)
def test_where_the_published_code_does_nothing(prune: float, image: int, stands: bool) -> None:
    """A share that rounds to no token, half to even; a number, or merging alone, is meant as it is."""
    assert published_code_skips(site(prune, 0.3), image) == stands


# --- the plan -----------------------------------------------------------------------------------------------


def test_plan_as_json() -> None:
    sites = (
        SitePlan(
            "cross_modal.2",
            "encoder.layer.2",
            before={"text": 40, "image": 145},
            after={"text": 32, "image": 87},
            pruned={"text": 0, "image": 14},
            merged={"text": 8, "image": 44},
            multiply_adds=(700, 300),
        ),
    )
    plan = Plan(sites, 1000, 500)
    assert plan.ratio == 2.0
    assert json.loads(json.dumps(plan.to_dict())) == {
        "signals": [],
        "sites": [
            {
                "site": "cross_modal.2",
                "module": "encoder.layer.2",
                "before": {"text": 40, "image": 145},
                "after": {"text": 32, "image": 87},
            }
        ],
        "multiply_adds": {"before": 1000, "after": 500, "ratio": 2.0},
    }


def test_a_layer_that_runs_again_has_a_name_of_its_own() -> None:
    first = SitePlan("cross_modal.2", "layer.2", {"text": 4}, {"text": 3}, {"text": 0}, {"text": 1})
    again = SitePlan("cross_modal.2", "layer.2", {"text": 4}, {"text": 3}, {"text": 0}, {"text": 1}, call=1)
    assert (first.name, again.name) == ("cross_modal.2", "cross_modal.2@1")
    plan = Plan((first, again), 2, 1, {"cross_modal.2": {"text": 3}, "cross_modal.2@1": {"text": 3}})
    assert [entry["site"] for entry in plan.to_dict()["sites"]] == ["cross_modal.2", "cross_modal.2@1"]
    assert plan.tokens() == {"cross_modal.2": {"text": 3}, "cross_modal.2@1": {"text": 3}}
