"""VisPruner: what was published on a small LLaVA and LLaVA-NeXT; its selection is held against lists in
`tests/reducers/test_vispruner.py`, and other families in `tests/architectures`."""

from __future__ import annotations

import numpy as np
import pytest
import torch

import pumer_compile as pumer
from pumer_compile import Schedule
from pumer_compile.errors import PlanError, ScheduleError
from pumer_compile.reducers import VisualReducer
from tests.support.published import Vectors, assert_last, kept_and_logits

WHOLE, CROPS = Vectors("prompt-tiny", "vispruner"), Vectors("next-tiny", "vispruner")
ONE = "T48-r0.25"


def schedule(vectors: Vectors, case: str) -> Schedule:
    spec = vectors.cases[case]
    return Schedule(method="vispruner", budget=spec["budget"], important=spec["important"])


@pytest.mark.parametrize("case", WHOLE.cases)
def test_the_published_tokens_and_logits(case: str) -> None:
    (kept,), logits = kept_and_logits(WHOLE.reduced(case, schedule(WHOLE, case)), WHOLE.inputs(case))
    np.testing.assert_array_equal(kept.numpy(), WHOLE.wanted(case, "kept"))
    assert_last(logits, WHOLE.wanted(case, "logits_last"))


@pytest.mark.parametrize("case", CROPS.cases)
def test_the_published_crops(case: str) -> None:
    """Of each of five crops its own, in the order of the whole picture."""
    (kept,), logits = kept_and_logits(CROPS.reduced(case, schedule(CROPS, case)), CROPS.inputs(case))
    assert kept.shape == (2, 5 * CROPS.cases[case]["budget"])
    assert_last(logits, CROPS.wanted(case, "logits_last"))


def test_images_one_by_one() -> None:
    (together,), logits = kept_and_logits(WHOLE.reduced(ONE, schedule(WHOLE, ONE)), WHOLE.inputs(ONE))
    for row in range(2):
        inputs = WHOLE.inputs(ONE, slice(row, row + 1))
        alone = pumer.capture(WHOLE.model, inputs, outputs=["logits"])
        (kept,), own = kept_and_logits(pumer.reduce(alone, schedule(WHOLE, ONE)), inputs)
        assert torch.equal(kept[0], together[row])
        torch.testing.assert_close(own[0], logits[row], atol=1e-5, rtol=1e-5)


def test_what_is_refused() -> None:
    with pytest.raises(PlanError, match="more than the 144 tokens that the vision tower gives"):
        WHOLE.reduced(ONE, Schedule(method="vispruner", budget=145))
    with pytest.raises(ScheduleError, match="important"):
        Schedule(method="vispruner", budget=4, important=1.5)


def test_near_ties() -> None:
    """Where rounding decides between two tokens, `stable` swaps these and no others."""
    generator = torch.Generator().manual_seed(0)
    tokens, votes = torch.randn(1, 40, 6, generator=generator), torch.rand(1, 40, generator=generator)
    reducer = VisualReducer([range(40)], 12, 0.5, order="stable")
    order = votes[0].argsort(descending=True)
    kept = []
    for sign in (1, -1):
        votes[0, order[5]] = votes[0, order[6]] * (1 + sign * 1e-6)
        tokens[0, order[6]] = tokens[0, order[5]]
        kept.append(set(reducer(tokens, votes).kept[0].tolist()))
    assert kept[0] ^ kept[1] == {int(order[5]), int(order[6])}
