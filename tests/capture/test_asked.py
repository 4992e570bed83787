"""Asked: which inputs what a model asked fixes, and which predicates it leaves on the others."""

from __future__ import annotations

import json
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pumer_compile.capture.asked import Asked, Made, guards_of
from pumer_compile.errors import CaptureError, UsageError
from pumer_compile.guards import Guard

pytestmark = pytest.mark.fast

Tensors = dict[str, Tensor]
IDS = Made.input("ids")
GRID = Made.input("grid")
SAMPLE: Tensors = {"ids": torch.tensor([[3, 9, 9]]), "grid": torch.tensor([[2, 3]]), "pixels": torch.ones(1, 4)}
CONTENT = frozenset({"ids", "pixels"})


def asked(made: Made, value: Tensor, *, stale: bool = False) -> tuple[tuple[str, ...], tuple[Guard, ...]]:
    return guards_of([Asked(made, value, "model.py:7", stale)], CONTENT, SAMPLE, "Model")


def call(function: Callable[..., Tensor], *args: object, **kwargs: object) -> Made:
    return Made.call(function, args, kwargs)


def test_geometry_is_fixed_as_a_whole() -> None:
    assert asked(call(Tensor.sum, GRID), torch.tensor(5)) == (("grid",), ())


def test_words_leave_a_predicate() -> None:
    fixed, (guard,) = asked(call(Tensor.eq, IDS, 9), SAMPLE["ids"] == 9)
    assert fixed == () and guard.inputs == ("ids",) and guard.where == "model.py:7"
    assert guard.expression == {"call": "eq", "args": [{"input": "ids"}, 9], "kwargs": {}}
    assert Guard.from_dict(json.loads(json.dumps(guard.to_dict()))) == guard


def test_both_at_once() -> None:
    """As many placeholders as the grid says: the grid is fixed, and the words are looked at with it."""
    made = call(Tensor.eq, call(Tensor.sum, call(Tensor.eq, IDS, 9)), call(Tensor.argmax, GRID))
    with pytest.raises(CaptureError, match="numbers of grid and ids through argmax"):
        asked(made, torch.tensor(True))
    made = call(Tensor.eq, call(Tensor.sum, call(Tensor.eq, IDS, 9)), call(Tensor.amin, GRID))
    fixed, (guard,) = asked(made, torch.tensor(True))
    assert fixed == ("grid",) and guard.inputs == ("grid", "ids")


def test_asked_twice_is_one_guard() -> None:
    made = call(Tensor.eq, IDS, 9)
    questions = [Asked(made, SAMPLE["ids"] == 9, where) for where in ("a.py:1", "b.py:2")]
    (guard,) = guards_of(questions, CONTENT, SAMPLE, "Model")[1]
    assert guard.where == "a.py:1"


def test_what_is_only_moved_says_no_more() -> None:
    made = call(Tensor.unsqueeze, call(Tensor.eq, IDS, 9), -1)
    made = call(Tensor.expand, made, 1, 3, 8)
    ((guard,),) = asked(made, (SAMPLE["ids"] == 9)[..., None].expand(1, 3, 8))[1:]
    guard.check(SAMPLE)
    assert guard.expression["call"] == "eq"
    with pytest.raises(UsageError, match="at 1 to 2, and was given 0 to 1"):
        guard.check({"ids": torch.tensor([[9, 9, 3]])})


@pytest.mark.parametrize(
    ("made", "value"),
    [
        (call(Tensor.sum, Made.input("pixels")), torch.tensor(4.0)),
        (Made.input("pixels"), torch.ones(1, 4)),
    ],
)
def test_a_float_of_the_content(made: Made, value: Tensor) -> None:
    with pytest.raises(CaptureError) as caught:
        asked(made, value)
    assert str(caught.value) == (
        "Model decides by the numbers of pixels (model.py:7) what it computes, and whether other inputs decide the "
        "same could not be checked. Let the model compute both ways and choose with a mask."
    )


def test_a_mask_of_every_number_of_the_words_is_one_of_the_words() -> None:
    """Of a long prompt and wide embeddings it would have millions of numbers."""
    made = call(Tensor.expand, call(Tensor.unsqueeze, call(Tensor.eq, IDS, 9), -1), 1, 3, 1 << 20)
    ((guard,),) = asked(made, (SAMPLE["ids"] == 9)[..., None].expand(1, 3, 1 << 20))[1:]
    assert guard.value == [[False, True, True]]


def test_another_type_is_no_move() -> None:
    """Whether pixels are 0 is asked, and not what they are."""
    made = call(Tensor.unsqueeze, call(Tensor.to, Made.input("pixels"), torch.bool), -1)
    ((guard,),) = asked(made, torch.ones(1, 4, 1, dtype=torch.bool))[1:]
    guard.check({"pixels": torch.full((1, 4), 0.3)})
    with pytest.raises(UsageError, match="looks at pixels"):
        guard.check({"pixels": torch.zeros(1, 4)})
    made = call(Tensor.to, call(Tensor.eq, IDS, 9), torch.device("cpu"))
    ((guard,),) = asked(made, SAMPLE["ids"] == 9)[1:]
    assert guard.expression["call"] == "eq"


def test_an_operator_that_is_not_replayed() -> None:
    with pytest.raises(CaptureError, match=r"numbers of ids through argmax \(model.py:7\)"):
        asked(call(Tensor.argmax, IDS), torch.tensor(1))


def test_a_predicate_that_is_not_true_of_its_own_sample() -> None:
    with pytest.raises(CaptureError, match="decides by the numbers of ids"):
        asked(call(Tensor.eq, IDS, 9), SAMPLE["ids"] == 3)


def test_one_that_does_not_say_what_it_holds() -> None:
    with pytest.raises(CaptureError, match="decides by the numbers of ids"):
        asked(call(Tensor.eq, IDS, 9), SAMPLE["ids"] == 9, stale=True)


def test_one_that_is_too_large() -> None:
    """A mask of all pixels of a picture is no predicate for a manifest."""
    sample = {"pixels": torch.ones(1, 1 << 21)}
    question = Asked(call(Tensor.eq, Made.input("pixels"), 0), sample["pixels"] == 0, "")
    with pytest.raises(CaptureError, match="decides by the numbers of pixels"):
        guards_of([question], CONTENT, sample, "Model")


def test_a_table_is_looked_up_by_what_an_input_holds() -> None:
    moved = call(Tensor.masked_fill, IDS, call(Tensor.eq, IDS, 9), 0)
    assert moved.carried() == {"ids"}
    assert call(Tensor.long, call(Tensor.eq, IDS, 9)).carried() == frozenset()  # a kind of token, not the token
    assert call(Tensor.cumsum, IDS, -1).carried() == frozenset()


@given(token=st.integers(0, 3), other=st.lists(st.integers(0, 3), min_size=3, max_size=3))
def test_true_where_the_answer_is_the_same(token: int, other: list[int]) -> None:
    """Of any words, the count of a token is asked: a guard lets those pass that have as many."""
    sample = {"ids": torch.tensor([[0, 1, 1]])}
    made = call(Tensor.sum, call(Tensor.eq, IDS, token))
    (guard,) = guards_of([Asked(made, (sample["ids"] == token).sum(), "")], CONTENT, sample, "Model")[1]
    same = other.count(token) == sample["ids"].flatten().tolist().count(token)
    if same:
        guard.check({"ids": torch.tensor([other])})
    else:
        with pytest.raises(UsageError, match="where it looks at ids"):
            guard.check({"ids": torch.tensor([other])})
