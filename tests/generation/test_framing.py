"""Prompts of several lengths in the frame of an artifact, against where every token ought to stand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from pumer_compile.errors import UsageError
from pumer_compile.generation.framing import _BEHIND, _OF_LAST, _WITHOUT_PADDING, frame
from pumer_compile.reducers.base import Signal

pytestmark = pytest.mark.fast
IMAGE = 99
# Four words, three rows of an image, five words.
FRAME = 4, 3, 5


def manifest(**changes: Any) -> dict[str, Any]:
    before, rows, after = FRAME
    shape = [2, before + rows + after]
    place = {"input": "input_ids", "placeholder": IMAGE, "start": before, "stop": before + rows}
    said = {
        "schedule": {"method": "vispruner", "budget": 2, "positions": "original"},
        "plan": {"prompts": [place], "signals": ["class_token"]},
        "inputs": {name: {"shape": shape} for name in ("input_ids", "attention_mask")},
        "counted_masks": ["attention_mask"],
    }
    return {**said, **changes}


def prompt(before: int, after: int) -> list[int]:
    """Words numbered from 1, around the image."""
    return [*range(1, before + 1), *[IMAGE] * FRAME[1], *range(before + 1, before + after + 1)]


def given(*rows: list[int], behind: bool = False, **more: Tensor) -> dict[str, Tensor]:
    """Prompts padded in front, as processors for generation do it, or behind."""
    longest = max(map(len, rows))
    padded = [[(row, [0] * (longest - len(row))), ([0] * (longest - len(row)), row)][not behind] for row in rows]
    ids = torch.tensor([[*first, *second] for first, second in padded])
    return {"input_ids": ids, "attention_mask": (ids > 0).long(), **more}


def test_a_prompt_of_the_compiled_length_is_left_alone() -> None:
    inputs = given(prompt(4, 5), prompt(4, 5))
    framed = frame(manifest(), inputs)
    assert framed.lengths == (12, 12) and framed.padding == (0, 0)
    assert all(torch.equal(framed.inputs[name], tensor) for name, tensor in inputs.items())


@pytest.mark.parametrize("behind", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_images_stand_where_the_frame_has_them(masked: bool, behind: bool) -> None:
    """However the prompts come padded: each token's place follows from the image's."""
    if masked:
        inputs = given(prompt(2, 5), prompt(4, 1), behind=behind)
    else:
        inputs = {"input_ids": given(prompt(3, 2), prompt(3, 2))["input_ids"]}
    framed = frame(manifest(), inputs)
    texts = ((2, 5), (4, 1)) if masked else ((3, 2), (3, 2))
    for row, (before, after) in enumerate(texts):
        wanted = [0] * (4 - before) + prompt(before, after) + [0] * (5 - after)
        assert framed.inputs["input_ids"][row].tolist() == wanted
        assert framed.inputs["attention_mask"][row].tolist() == [int(token > 0) for token in wanted]
        assert framed.prompts[row].tolist() == prompt(before, after)
        assert (framed.front[row], framed.back[row], framed.lengths[row]) == (4 - before, 5 - after, 3 + before + after)


def test_what_goes_by_token_goes_with_it() -> None:
    """Types and places that text reads; pixels of a colliding size stay."""
    inputs = given(prompt(4, 3), prompt(4, 3))
    ids = inputs["input_ids"]
    types, reads = (ids == IMAGE).long(), torch.rand(2, ids.shape[1], 1, 2)
    pixels = torch.rand(2, ids.shape[1], 4)
    more = {"token_type_ids": types, "cross_attention_mask": reads, "pixel_values": pixels}
    framed = frame(manifest(), {**inputs, **more}).inputs
    assert torch.equal(framed["token_type_ids"], torch.cat([types, torch.zeros(2, 2, dtype=torch.int64)], 1))
    assert torch.equal(framed["cross_attention_mask"], torch.cat([reads, torch.zeros(2, 2, 1, 2)], 1))
    assert framed["pixel_values"] is pixels


@pytest.mark.parametrize("first", [0, 1])
def test_positions_count_no_padding(first: int) -> None:
    takes = {name: {"shape": [2, 12]} for name in ("input_ids", "attention_mask", "position_ids")}
    framed = frame(manifest(inputs=takes, counted_masks=[]), given(prompt(4, 5), prompt(1, 4)), first=first)
    positions = framed.inputs["position_ids"]
    assert positions[0].tolist() == [*range(first, first + 12)]
    assert positions[1].tolist() == [0, 0, 0, *range(first, first + 8), 0]


# --- several images ---------------------------------------------------------------------------------------------------


def of_two(between: int = 4, rows: tuple[int, int] = (3, 3), kept: tuple[int, int] = (2, 2)) -> dict[str, Any]:
    """Two words, an image, so many words, an image, three words; so many rows of each image are kept."""
    stop = 2 + rows[0]
    places = [(2, stop), (stop + between, stop + between + rows[1])]
    length = places[1][1] + 3
    sites = [{"before": {f"prompt{i}_image": rows[i]}, "after": {f"prompt{i}_image": kept[i]}} for i in (0, 1)]
    plan = {
        "prompts": [{"input": "input_ids", "placeholder": IMAGE, "start": a, "stop": b} for a, b in places],
        "signals": ["class_token"],
        "sites": sites,
    }
    takes = {name: {"shape": [1, length]} for name in ("input_ids", "attention_mask", "position_ids")}
    return manifest(plan=plan, inputs=takes, counted_masks=[])


def two(before: int, between: int, after: int, rows: tuple[int, int] = (3, 3)) -> list[int]:
    """Words numbered from 1, around two images."""
    first, second = before, before + between
    words = [*range(1, first + 1)], [*range(first + 1, second + 1)], [*range(second + 1, second + after + 1)]
    return [*words[0], *[IMAGE] * rows[0], *words[1], *[IMAGE] * rows[1], *words[2]]


def test_a_shorter_text_between_images() -> None:
    framed = frame(of_two(), given(two(1, 2, 2)))
    assert framed.inputs["input_ids"].tolist() == [
        [0, 1, IMAGE, IMAGE, IMAGE, 0, 0, 2, 3, IMAGE, IMAGE, IMAGE, 4, 5, 0]
    ]
    assert framed.inputs["attention_mask"].tolist() == [[0, 1, 1, 1, 1, 0, 0, 1, 1, 1, 1, 1, 1, 1, 0]]
    assert framed.inputs["position_ids"].tolist() == [[0, 0, 1, 2, 3, 0, 0, 4, 5, 6, 7, 8, 9, 10, 0]]
    assert (framed.lengths, framed.extents, framed.padding) == ((11,), (13,), (4,))
    assert framed.prompts[0].tolist() == two(1, 2, 2)
    # Two of three rows stay: one is gone in front of the padding, and one more behind it.
    reduced = torch.tensor([0, 1, IMAGE, IMAGE, 0, 0, 2, 3, IMAGE, IMAGE, 4, 5, 0])
    left = torch.cat([reduced[span] for span in framed.spans(0, len(reduced))])
    assert left.tolist() == [1, IMAGE, IMAGE, 2, 3, IMAGE, IMAGE, 4, 5]


def test_where_padding_between_images_is_open() -> None:
    """Of images of several sizes; the whole prompt and those with all words between them are as they are."""
    said, rows = of_two(rows=(3, 4)), (3, 4)
    framed = frame(said, given(two(2, 3, 3, rows)))
    assert [own.tolist() for own in framed.prompts] == [two(2, 3, 3, rows)]
    with pytest.raises(UsageError, match=r"fewer tokens between its images .* several sizes"):
        framed.spans(0, 13)
    (span,) = frame(said, given(two(2, 4, 1, rows))).spans(0, 13)
    assert span == slice(0, 11)


@pytest.mark.parametrize("rows", [(3, 3), (3, 5)])
def test_other_texts_and_images_than_compiled(rows: tuple[int, int]) -> None:
    longer = two(2, 5, 1) if rows == (3, 3) else two(2, 4, 3, rows)
    with pytest.raises(
        UsageError, match=r"5 tokens between its images, .* at most 4|17 tokens, and .* compiled for 15"
    ):
        frame(of_two(), given(longer))


# --- refused ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("before", "after", "said"), [(5, 1, "5 tokens before .* at most 4"), (1, 6, "6 tokens beh")])
def test_a_text_that_is_too_long(before: int, after: int, said: str) -> None:
    with pytest.raises(UsageError, match=said):
        frame(manifest(), given(prompt(4, 5), prompt(before, after)))


def test_padding_among_the_tokens() -> None:
    inputs = given(prompt(4, 5), prompt(4, 5))
    inputs["attention_mask"][1, 3] = 0
    with pytest.raises(UsageError, match="zeros among its tokens"):
        frame(manifest(), inputs)
    inputs["attention_mask"][1] = 0
    with pytest.raises(UsageError, match="a row of zeros"):
        frame(manifest(), inputs)


def test_positions_of_padding_in_front_that_nobody_takes_out() -> None:
    front, back = given(prompt(3, 5), prompt(4, 5)), given(prompt(4, 5), prompt(4, 4), behind=True)
    compact = {"method": "vispruner", "budget": 2}
    for said in (manifest(counted_masks=[]), manifest(schedule=compact)):
        with pytest.raises(UsageError, match=r"counts padding in front .* 11 and 12 tokens .* position_ids"):
            frame(said, front)
        assert frame(said, back).back == (0, 1)


@pytest.mark.parametrize("signal", ["last_query", "next_query"])
def test_the_last_token_stays_last_where_it_decides(signal: str) -> None:
    """Padding goes between the image and the text, and takes no positions."""
    takes = {name: {"shape": [2, 12]} for name in ("input_ids", "attention_mask", "position_ids")}
    said = manifest(plan={**manifest()["plan"], "signals": ["keys", signal]}, inputs=takes, counted_masks=[])
    framed = frame(said, given(prompt(4, 5), prompt(3, 2)))
    assert framed.inputs["input_ids"][1].tolist() == [0, 1, 2, 3, *[IMAGE] * 3, 0, 0, 0, 4, 5]
    assert framed.inputs["attention_mask"][1].tolist() == [0, *[1] * 6, 0, 0, 0, 1, 1]
    assert framed.inputs["position_ids"][1].tolist() == [0, *range(6), 0, 0, 0, 6, 7]
    assert framed.back == (0, 0) and framed.gap == (0, 3) and framed.padding == (0, 4)
    assert [own.tolist() for own in framed.prompts] == [prompt(4, 5), prompt(3, 2)]
    del takes["position_ids"]
    with pytest.raises(UsageError, match=r"counts padding in front of the text behind the image .* position_ids"):
        frame(said, given(prompt(4, 5), prompt(4, 4)))


def test_text_that_decides() -> None:
    """Where the text behind the image decides, only padding in front is none of it; where all does, no padding."""
    front, back = given(prompt(3, 5), prompt(4, 5)), given(prompt(4, 5), prompt(4, 4), behind=True)
    behind, every = ({**manifest()["plan"], "signals": ["keys", read]} for read in ("text_keys", "text_to_image"))
    assert frame(manifest(plan=behind), front).front == (1, 0)
    with pytest.raises(UsageError, match=r"by its text \(text_keys\), and padding in prompts of 11 and 12"):
        frame(manifest(plan=behind), back)
    for inputs in (front, back):
        with pytest.raises(UsageError, match=r"by its text \(text_to_image\)"):
            frame(manifest(plan=every), inputs)


def test_signals_are_known() -> None:
    """A new one is refused until somebody says what it holds; none is both."""
    known = {signal.value for signal in Signal}
    kinds = (_WITHOUT_PADDING, _OF_LAST, _BEHIND)
    assert known >= set().union(*kinds) and sum(map(len, kinds)) == len(set().union(*kinds))
    assert known - set().union(*kinds) == {"text_to_image", "text_weights"}


def test_artifacts_that_take_no_padding() -> None:
    short = given(prompt(4, 5), prompt(4, 4), behind=True)
    with pytest.raises(UsageError, match="takes no attention_mask"):
        frame(manifest(inputs={"input_ids": {"shape": [2, 12]}}), short)
    with pytest.raises(UsageError, match="takes no attention_mask"):
        frame(manifest(unpadded_inputs=["attention_mask"]), short)
    for plan in (None, {"signals": []}, {"prompts": manifest()["plan"]["prompts"]}):
        with pytest.raises(UsageError, match="does not say where its images stand"):
            frame(manifest(plan=plan), {n: t[:, :-1] for n, t in given(prompt(4, 5), prompt(4, 5)).items()})


def test_a_prompt_without_ids() -> None:
    with pytest.raises(UsageError, match="comes as input_ids; given were inputs_embeds"):
        frame(manifest(), {"inputs_embeds": torch.zeros(2, 12, 4)})
