"""Lengths of streams before and after their reducers."""

from __future__ import annotations

import pytest

from pumer_compile.analysis.attention import locate
from pumer_compile.analysis.axes import Dim, Fixed, Product, Segment, Tokens
from pumer_compile.rewrite.epochs import Step
from tests.support.models import schedule
from tests.support.walks import BASE, walk

pytestmark = pytest.mark.fast


def test_sizes_by_epoch() -> None:
    rewriter, _ = walk(BASE, schedule("paper", (0,)))
    text, learned, image = Segment("text", 7), Segment(None, 3), Segment("image", 25)
    axis = Tokens((text, learned, image))
    assert rewriter.epochs.size(axis, {}) == 35
    assert rewriter.epochs.size(axis, {"text": 1}) == 33
    assert rewriter.epochs.size(axis, {"text": 1, "image": 1}) == 5 + 3 + 14
    assert rewriter.epochs.size(Fixed(7), {"text": 1}) == 7
    assert rewriter.epochs.size(Product((Fixed(2), axis)), {"text": 1}) == 66
    assert rewriter.epochs.length(learned, {"text": 1}) == 3


def test_expected_shapes_follow_the_plan() -> None:
    rewriter, _ = walk(BASE, schedule("paper", (0,)))
    carrier = locate(rewriter.source, rewriter.annotation)[0].carrier
    assert rewriter.epochs.expected_shape(carrier) == [2, 19, 32]
    assert rewriter.epochs.at(Dim(carrier, 1)) == {"text": 1, "image": 1}
    assert rewriter.epochs.at(Dim(carrier, 2)) == {}
    steps = rewriter.epochs.steps["image"]
    assert [type(s) for s in steps] == [Step]
    assert (steps[0].after, steps[0].merged) == (14, True)
