"""Quality: accuracy, agreement, metrics, held against what is counted by hand; and what is given up early."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from torch import Tensor

from pumer_compile.errors import UsageError
from pumer_compile.search.quality import Hopeless, Judge, answers_of, divergence, load_metric
from pumer_compile.search.samples import Samples

pytestmark = pytest.mark.fast


def samples(count: int, batch: int, labels: np.ndarray | None = None) -> Samples:
    return Samples({"x": torch.arange(count)}, ("x",), count, batch, labels, "")


def answering(table: Tensor, name: str = "logits"):  # type: ignore[no-untyped-def]
    """A model that answers sample i with row i of a table."""

    def run(batch: dict[str, Tensor]) -> Mapping[str, Tensor]:
        return {name: table[batch["x"]]}

    return run


def test_batches_have_one_size_and_every_sample_counts_once() -> None:
    found = samples(7, 3)
    seen = [row for batch, count in found.batches() for row in batch["x"][:count].tolist()]
    assert seen == list(range(7)) and [len(batch["x"]) for batch, _ in found.batches()] == [3, 3, 3]


def test_accuracy_is_the_share_of_right_answers() -> None:
    table = torch.eye(4)[[0, 1, 2, 3, 0]]
    labels = np.array([0, 1, 2, 0, 1])
    judge = Judge(samples(5, 2, labels), answering(table))
    assert judge.measure == "accuracy" and judge.baseline.value == pytest.approx(3 / 5)
    worse = torch.eye(4)[[1, 1, 2, 3, 0]]  # one right answer fewer
    found = judge.judge(answering(worse))
    assert (found.value, found.drop) == pytest.approx((2 / 5, 1 / 5))
    assert found.scores.tolist() == [0, 1, 1, 0, 0]


def test_answers_may_be_worth_something() -> None:
    worth = np.array([[0.3, 0.0], [0.6, 1.0]])
    judge = Judge(samples(2, 2, worth), answering(torch.tensor([[1.0, 0.0], [2.0, 1.0]])))
    assert judge.baseline.value == pytest.approx((0.3 + 0.6) / 2)


def test_agreement_is_with_the_unreduced_model() -> None:
    own = torch.tensor([[3.0, 0.0], [0.0, 2.0], [1.0, 0.0]])
    judge = Judge(samples(3, 2), answering(own))
    assert judge.measure == "agreement" and judge.baseline.value == 1.0
    other = torch.tensor([[2.0, 0.0], [1.0, 0.0], [1.0, 0.0]])
    found = judge.judge(answering(other))
    assert found.value == pytest.approx(2 / 3) and found.drop == pytest.approx(1 / 3)

    def kl(p: list[float], q: list[float]) -> float:
        p, q = ([math.exp(v) / sum(map(math.exp, row)) for v in row] for row in (p, q))
        return sum(a * math.log(a / b) for a, b in zip(p, q, strict=True))

    by_hand = [kl(a, b) for a, b in zip(own.tolist(), other.tolist(), strict=True)]
    assert found.divergence == pytest.approx(sum(by_hand) / 3, rel=1e-6)


def test_the_last_token_answers_a_prompt_and_one_score_is_yes_or_no() -> None:
    prompt = torch.zeros(2, 3, 4)
    prompt[0, -1, 2] = prompt[1, -1, 1] = 1.0
    assert answers_of({"logits": prompt}).argmax(-1).tolist() == [2, 1]
    assert answers_of({"itm": torch.tensor([[-1.0], [2.0]])}).argmax(-1).tolist() == [0, 1]


def test_an_output_that_could_be_several_is_asked_for() -> None:
    outputs = {"a": torch.zeros(2, 3), "b": torch.zeros(2, 3)}
    with pytest.raises(UsageError, match="a, b") as refused:
        answers_of(outputs)
    assert "--answers" in str(refused.value)
    assert answers_of(outputs, "b").shape == (2, 3)


def test_labels_of_more_answers_than_there_are() -> None:
    with pytest.raises(UsageError, match=r"9 answers.*has 2"):
        Judge(samples(2, 2, np.array([0, 8])), answering(torch.zeros(2, 2)))


def test_a_metric_judges_all_outputs_at_once() -> None:
    def metric(outputs: dict[str, np.ndarray], labels: np.ndarray | None) -> float:
        assert outputs["logits"].shape == (5, 2) and labels is None
        return float(outputs["logits"].sum())

    judge = Judge(samples(5, 2), answering(torch.ones(5, 2)), metric=metric)
    assert judge.baseline.value == 10
    found = judge.judge(answering(torch.ones(5, 2) * 0.5))
    assert (found.value, found.drop) == (5, 5) and math.isnan(found.divergence)


@pytest.mark.parametrize(
    ("fails", "words"), [(lambda o, y: 1 / 0, "ZeroDivisionError"), (lambda o, y: float("nan"), "nan")]
)
def test_a_metric_that_fails(fails, words: str) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(UsageError, match=words):
        Judge(samples(2, 2), answering(torch.ones(2, 2)), metric=fails)


@pytest.mark.parametrize("text", ["no_colon", "no.such.module:f", "math:nothing", "math:pi"])
def test_a_metric_that_is_none(text: str) -> None:
    with pytest.raises(UsageError, match="--metric"):
        load_metric(text)


def test_what_cannot_be_saved_is_given_up_and_what_can_is_not() -> None:
    count, labels = 100, np.zeros(100, dtype=np.int64)
    right, wrong = torch.tensor([[1.0, 0.0]]).repeat(count, 1), torch.tensor([[0.0, 1.0]]).repeat(count, 1)
    judge = Judge(samples(count, 10, labels), answering(right))
    with pytest.raises(Hopeless) as given_up:
        judge.judge(answering(wrong), lambda drop: drop > 0.5)
    assert given_up.value.samples == 20  # a fifth is seen before anything is given up
    late = torch.cat([wrong[:2], right[2:]])  # the only wrong ones come first
    assert judge.judge(answering(late), lambda drop: drop > 0.5).value == pytest.approx(0.98)


def test_divergence_of_the_same_is_nothing() -> None:
    rows = np.random.default_rng(0).normal(size=(4, 6))
    assert np.abs(divergence(rows, rows + 3.0)).max() < 1e-12
