"""Guards: what must be true of inputs, written down as JSON, and the message where it is not."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from pumer_compile.errors import UsageError
from pumer_compile.guards import REPLAYED, Guard, check_prompts

pytestmark = pytest.mark.fast

IDS = {"input": "input_ids"}


def call(name: str, *args: Any, **kwargs: Any) -> dict[str, Any]:
    return {"call": name, "args": list(args), "kwargs": kwargs}


def guard(expression: Any, value: Any, *names: str) -> Guard:
    """As a manifest has it."""
    said = Guard(names or ("input_ids",), expression, value, "model.py:7").to_dict()
    return Guard.from_dict(json.loads(json.dumps(said)))


PLACES = guard(call("eq", IDS, 99), [[False, True, True, False, True]])


def test_placeholders_at_their_places() -> None:
    PLACES.check({"input_ids": torch.tensor([[5, 99, 99, 6, 99]])})
    PLACES.check({"input_ids": torch.tensor([[1, 99, 99, 2, 99]])})


@pytest.mark.parametrize(
    ("ids", "spans"),
    [
        ([[99, 99, 6, 6, 99]], "0 to 1 and 4"),
        ([[6, 6, 6, 6, 6]], "no place"),
        ([[6, 99, 99, 6, 99], [99, 6, 6, 6, 6]], "1 to 2 and 4; 0"),
    ],
)
def test_placeholders_elsewhere(ids: list[list[int]], spans: str) -> None:
    with pytest.raises(UsageError) as caught:
        PLACES.check({"input_ids": torch.tensor(ids)})
    assert str(caught.value) == (
        "The artifact was compiled for prompts with the placeholders (id 99) of input_ids at 1 to 2 and 4, and was "
        f"given {spans}. Compile it for prompts of this form."
    )


def test_placeholders_of_one_prompt() -> None:
    """The model may look at the first prompt alone."""
    first = guard(call("eq", call("getitem", IDS, 0), 99), [False, True])
    first.check({"input_ids": torch.tensor([[3, 99], [99, 99]])})
    with pytest.raises(
        UsageError, match=r"finds \[False, True\] where it looks at input_ids \(model.py:7\), and finds"
    ):
        first.check({"input_ids": torch.tensor([[99, 99], [3, 99]])})


def test_an_image_that_is_all_black() -> None:
    black = call("eq", {"input": "pixel_values"}, 0.0)
    real = guard(call("ne", call("sum", black, dim=[-1, -2]), 4), [[True, True]], "pixel_values")
    pixels = torch.ones(1, 2, 2, 2)
    real.check({"pixel_values": pixels})
    pixels[0, 1] = 0
    with pytest.raises(
        UsageError, match=r"finds \[\[True, True\]\] where it looks at pixel_values .* \[\[True, False\]\]"
    ):
        real.check({"pixel_values": pixels})


def test_inputs_that_lack_one_of_its_own_are_not_looked_at() -> None:
    both = guard(call("eq", IDS, {"input": "pixel_values"}), [[True]], "input_ids", "pixel_values")
    both.check({"input_ids": torch.tensor([[1]])})
    with pytest.raises(UsageError, match="input_ids and pixel_values"):
        both.check({"input_ids": torch.tensor([[1]]), "pixel_values": torch.tensor([[2]])})


@pytest.mark.parametrize("name", ["tofile", "numpy", "share_memory_", "backward", "__class__", "storage", "apply_", ""])
def test_an_operator_that_guards_are_not_made_of(name: str) -> None:
    """A manifest is read from a file: nothing else is called."""
    with pytest.raises(UsageError, match=f"a guard with '{name}', which guards are not made of"):
        guard(call(name, IDS), True).check({"input_ids": torch.tensor([[1]])})


def test_every_operator_is_a_method_without_effect() -> None:
    for name in REPLAYED - {"part", "setitem"}:
        assert not name.endswith("_") and "file" not in name
    given_ids = torch.tensor([[1, 2], [3, 4]])
    before = given_ids.clone()
    written = call("setitem", IDS, [0, 1], 9)
    guard(call("sum", written), 17).check({"input_ids": given_ids})
    for name in ("iadd", "isub"):
        guard(call("sum", call(name, IDS, 1)), 14 if name == "iadd" else 6).check({"input_ids": given_ids})
    for name in ("ior", "iand"):
        guard(call("numel", call(name, call("eq", IDS, 1), call("eq", IDS, 2))), 4).check({"input_ids": given_ids})
    assert torch.equal(given_ids, before)  # what a caller gave is never changed


@pytest.mark.parametrize(
    ("expression", "value"),
    [
        (call("getitem", IDS, [{"ellipsis": True}, {"slice": [1, None, None]}]), [[2], [4]]),
        (call("getitem", IDS, {"slice": [None, 1, None]}), [[1, 2]]),
        (call("part", call("unbind", IDS, 1), 1), [2, 4]),
        (call("to", call("eq", IDS, 3), {"dtype": "int64"}), [[0, 0], [1, 0]]),
        (call("add", IDS, {"constant": [[1, 1], [0, 0]], "dtype": "int64"}), [[2, 3], [3, 4]]),
        (call("is_all_true", call("gt", IDS, 0)), True),
        (call("rsub", IDS, 5), [[4, 3], [2, 1]]),
        (call("floordiv", IDS, 2), [[0, 1], [1, 2]]),
        (call("invert", call("eq", IDS, 1)), [[False, True], [True, True]]),
        (call("nonzero", call("eq", IDS, 3)), [[1, 0]]),
    ],
)
def test_expressions(expression: Any, value: Any) -> None:
    guard(expression, value).check({"input_ids": torch.tensor([[1, 2], [3, 4]])})
    with pytest.raises(UsageError):
        guard(expression, value).check({"input_ids": torch.tensor([[0, 7], [8, -1]])})


@given(data=st.data(), batch=st.integers(1, 3), length=st.integers(1, 6))
def test_true_of_just_the_masks_it_was_made_of(data: st.DataObject, batch: int, length: int) -> None:
    ids = st.lists(st.lists(st.integers(98, 99), min_size=length, max_size=length), min_size=batch, max_size=batch)
    first, second = torch.tensor(data.draw(ids)), torch.tensor(data.draw(ids))
    made = guard(call("eq", IDS, 99), (first == 99).tolist())
    made.check({"input_ids": first})
    if torch.equal(first, second):
        made.check({"input_ids": second})
    else:
        with pytest.raises(UsageError, match="placeholders"):
            made.check({"input_ids": second})


# --- what a manifest says ---------------------------------------------------------------------------------------------


def ids(*tokens: int) -> dict[str, Tensor]:
    return {"input_ids": torch.tensor([tokens])}


def test_another_grid() -> None:
    manifest = {"fixed_inputs": {"image_grid_thw": [[1, 12, 12]]}}
    check_prompts(manifest, {"image_grid_thw": torch.tensor([[1, 12, 12]])})
    check_prompts(manifest, ids(1))  # an input that it has not is somebody else's to miss
    with pytest.raises(UsageError, match=r"compiled for image_grid_thw \[\[1, 12, 12\]\].*given \[\[1, 8, 18\]\]"):
        check_prompts(manifest, {"image_grid_thw": torch.tensor([[1, 8, 18]])})
    # As many numbers in another form are other numbers.
    with pytest.raises(UsageError, match="image_grid_thw"):
        check_prompts(manifest, {"image_grid_thw": torch.tensor([1, 12, 12])})


def test_guards_of_a_manifest() -> None:
    manifest = {"guards": [PLACES.to_dict()]}
    check_prompts(manifest, ids(5, 99, 99, 6, 99))
    with pytest.raises(UsageError, match="placeholders"):
        check_prompts(manifest, ids(99, 99, 5, 6, 99))


def test_a_guard_on_an_input_that_is_written_into_the_artifact() -> None:
    """Callers leave such an input out; what is asked of another one together with it is looked at all the same."""
    text = call("eq", {"input": "kinds"}, 0)
    said = guard(
        call("all", call("or", call("bool", {"input": "attention_mask"}), text)), True, "attention_mask", "kinds"
    )
    manifest = {"fixed_inputs": {"kinds": [[0, 1]]}, "guards": [said.to_dict()]}
    check_prompts(manifest, {"attention_mask": torch.tensor([[0, 1]])})
    with pytest.raises(UsageError, match="attention_mask and kinds"):
        check_prompts(manifest, {"attention_mask": torch.tensor([[1, 0]])})


def test_a_manifest_without_any() -> None:
    check_prompts({}, ids(1, 2))
    check_prompts({"guards": None, "fixed_inputs": None, "plan": None}, ids(1, 2))
