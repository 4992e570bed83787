"""Made-up samples: what is read off captured inputs, and what is drawn."""

from __future__ import annotations

import functools
import json
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import pumer_compile as pumer
from pumer_compile.artifacts.profile import Profile
from pumer_compile.capture.make_inputs import make_inputs
from pumer_compile.capture.samples import (
    InputKind,
    Samples,
    captured_batch,
    describe_samples,
    kinds_of,
    proof_batches,
    proof_sizes,
)
from pumer_compile.errors import UsageError
from pumer_compile.plan import PromptPlace
from tests.support.tiny import tiny_vilt


class Reader(nn.Module):
    """Reads every kind of input that processors make, and adds up what it finds."""

    def __init__(self) -> None:
        super().__init__()
        self.words, self.kinds, self.rows = nn.Embedding(50, 4), nn.Embedding(2, 4), nn.Embedding(30, 4)

    def forward(self, **given: Tensor) -> Tensor:
        x = self.words(given["input_ids"].to(torch.int64)).sum((1, 2))
        for name, table in (("token_type_ids", self.kinds), ("row_ids", self.rows)):
            if name in given:
                x = x + table(given[name]).sum((1, 2))
        others = (
            "attention_mask",
            "image_position_mask",
            "places",
            "boxes",
            "bbox",
            "key_padding_mask",
            "pixel_values",
        )
        for name in others:
            if name in given:
                x = x + given[name].float().mean()
        return x


IDS = torch.tensor([[3, 4, 5, 6, 7], [3, 9, 9, 0, 0]])


def described(**inputs: Tensor) -> dict[str, InputKind]:
    return describe_samples(pumer.capture(Reader(), {"input_ids": IDS, **inputs}))


@functools.cache
def vilt() -> Any:
    model = tiny_vilt(pad_token_id=7, eos_token_id=2)
    return pumer.capture(model, make_inputs(model, batch=2))


# --- What captured inputs are -----------------------------------------------------------------------------------------


class Guarded(nn.Module):
    """Looks words up that were made fit before, as models do with the places of an image."""

    def __init__(self, guard: str) -> None:
        super().__init__()
        self.words, self.guard = nn.Embedding(50, 4), guard

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        if self.guard == "where":
            input_ids = torch.where(input_ids == 50, 0, input_ids)
        elif self.guard == "clamp":
            input_ids = input_ids.clamp(0, 49)
        elif self.guard == "part":
            input_ids = input_ids[:, :-1]
        return self.words(input_ids.reshape(-1).to(torch.int32))


@pytest.mark.parametrize("guard", ["none", "where", "clamp", "part"])
def test_the_range_of_ids_is_said_where_it_is_sure(guard: str) -> None:
    (kind,) = describe_samples(pumer.capture(Guarded(guard), {"input_ids": IDS})).values()
    assert kind.rows == (50 if guard == "none" else None)
    assert InputKind.from_dict(kind.to_dict()) == kind


def test_the_kinds_of_a_model_of_words_and_pixels() -> None:
    kinds = describe_samples(vilt())
    assert {name: kind.kind for name, kind in kinds.items()} == {
        "input_ids": "ids",
        "attention_mask": "mask",
        "pixel_values": "noise",
        "pixel_mask": "mask",
    }
    ids, image = kinds["input_ids"], kinds["pixel_mask"]
    assert (ids.low, ids.high, ids.reserved, ids.pad) == (0, 59, (2, 7), 7)  # the whole table, not what was captured
    assert (image.axes, image.step) == (2, 16)


def test_numbers_that_stand_for_something_stay_as_captured() -> None:
    """Kinds of tokens, numbers of rows, places of an image: other values could be wrong ones."""
    kinds, rows = torch.tensor([[0, 0, 1, 1, 1]] * 2), torch.tensor([[0, 7, 29, 3, 3]] * 2)
    place = torch.tensor([[0, 1, 1, 0, 0]] * 2)
    inputs = {"token_type_ids": kinds, "row_ids": rows, "image_position_mask": place, "attention_mask": IDS.sign()}
    found = described(**inputs)
    drawn = Samples(found)
    batches = [drawn.batch(size) for size in (None, 3, 1)]
    for batch in batches:
        for name, captured in (("token_type_ids", kinds), ("row_ids", rows), ("image_position_mask", place)):
            assert batch[name].equal(captured[:1].expand(len(batch[name]), -1))
    assert [len(batch["row_ids"]) for batch in batches] == [2, 3, 1]
    assert not batches[0]["input_ids"].equal(batches[1]["input_ids"][:2])


def test_places_stay_between_their_bounds_and_pixels_keep_their_spread() -> None:
    torch.manual_seed(0)
    found = described(places=torch.rand(2, 6, 4), pixel_values=5 + 2 * torch.randn(2, 1, 3, 3, 8, 8))
    assert found["places"].uniform and found["pixel_values"].shape == (2, 1, 3, 3, 8, 8)
    batch = Samples(found).batch(50)
    assert 0 <= batch["places"].min() and batch["places"].max() <= 1
    assert 4.8 < batch["pixel_values"].mean() < 5.2 and 1.8 < batch["pixel_values"].std() < 2.2


class Patches(nn.Module):
    """Patches whose first two numbers say where they stand (Pix2Struct, Kosmos-2.5)."""

    def __init__(self) -> None:
        super().__init__()
        self.rows, self.columns, self.layer = nn.Embedding(5, 4), nn.Embedding(5, 4), nn.Linear(6, 4)

    def forward(self, flattened_patches: Tensor) -> Tensor:
        row, column = flattened_patches[..., 0].long(), flattened_patches[..., 1].to(torch.long)
        return self.layer(flattened_patches[..., 2:]) + self.rows(row) + self.columns(column)


def test_numbers_inside_of_features_stay_as_captured() -> None:
    patches = torch.randn(2, 4, 8)
    patches[..., 0], patches[..., 1] = torch.tensor([0, 0, 1, 4]), torch.tensor([[0, 1, 0, 1], [1, 2, 3, 4]])
    kinds = describe_samples(pumer.capture(Patches(), {"flattened_patches": patches}))
    written = json.loads(json.dumps({"samples": {name: kind.to_dict() for name, kind in kinds.items()}}))
    batch = Samples(kinds_of(written)).batch(3)["flattened_patches"]
    assert batch[:2, :, :2].equal(patches[..., :2]) and batch[2, :, :2].equal(patches[0, :, :2])
    assert not batch[..., 2:].eq(batch[..., 2:].round()).any()


def test_a_dummy_is_no_picture() -> None:
    """Captured on black images, a proof would see no other."""
    for dummy in (torch.zeros(2, 3, 4, 4), torch.ones(2, 3, 4, 4)):
        kinds = described(pixel_values=dummy)
        assert 0.5 < float(Samples(kinds).batch(20)["pixel_values"].std()) < 1.5


def test_boxes_and_masks_that_are_added_stay_as_captured() -> None:
    boxes = torch.tensor([[[10.0, 20.0, 200.0, 300.0]], [[5.0, 5.0, 60.0, 90.0]]])
    hides = torch.zeros(2, 1, 5).masked_fill(torch.arange(5) > 2, float("-inf"))
    kinds = described(boxes=boxes, bbox=boxes.long(), attention_mask=hides, key_padding_mask=hides[:, 0] < 0)
    batch = Samples(kinds_of(json.loads(json.dumps({"samples": {n: k.to_dict() for n, k in kinds.items()}})))).batch()
    for name, captured in (("boxes", boxes), ("bbox", boxes.long()), ("attention_mask", hides)):
        assert batch[name].equal(captured)
    assert batch["key_padding_mask"].equal(hides[:, 0] < 0)


def test_inputs_without_the_batch_keep_their_size() -> None:
    """Several texts for each image (OWL-ViT)."""
    kinds = described(pixel_values=torch.randn(6, 3, 4, 4))
    assert kinds["input_ids"].batched and not kinds["pixel_values"].batched
    batch = Samples(kinds).batch(4)
    assert len(batch["input_ids"]) == 4 and len(batch["pixel_values"]) == 6


def test_special_tokens_stand_where_they_stood() -> None:
    model = tiny_vilt(bos_token_id=3, eos_token_id=2)
    inputs = make_inputs(model, batch=2, padding=False)
    inputs["input_ids"][:, 0], inputs["input_ids"][:, -1] = 3, 2
    (kind, *_) = describe_samples(pumer.capture(model, inputs)).values()
    assert kind.reserved == (2, 3) and kind.template == ((3, *[-1] * 10, 2),)
    samples = Samples({"input_ids": kind})
    ids = samples.batch(40)["input_ids"]
    assert (ids[:, 0] == 3).all() and (ids[:, -1] == 2).all()
    assert not torch.isin(ids[:, 1:-1], torch.tensor([2, 3])).any() and (ids[0] != ids[1]).any()


@pytest.mark.parametrize(
    ("mask", "expected"),
    [
        ([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]], ("mask", False)),
        ([[1, 1, 1, 1, 1], [1, 1, 1, 1, 1]], ("mask", False)),
        ([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]], ("mask", True)),
        ([[1, 1, 1, 1, 1], [1, 0, 1, 1, 1]], ("constant", False)),  # no padding: something else
        ([[1, 1, 1, 1, 1], [0, 0, 0, 0, 0]], ("constant", False)),
        ([[2, 2, 2, 2, 2], [1, 1, 1, 0, 0]], ("constant", False)),
    ],
)
def test_what_is_a_mask_of_padding(mask: list[list[int]], expected: tuple[str, bool]) -> None:
    found = described(attention_mask=torch.tensor(mask))["attention_mask"]
    assert (found.kind, found.left) == expected


def test_padding_of_a_captured_text_tells_the_id_of_padding() -> None:
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0]])
    ids = IDS.where(mask.bool(), 44)
    kinds = describe_samples(pumer.capture(Reader(), {"input_ids": ids, "attention_mask": mask}))
    batch = Samples(kinds).batch(8)
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 44).all()


def test_what_is_never_padded_is_never_padded_in_a_proof() -> None:
    model = tiny_vilt()
    captured = pumer.capture(model, make_inputs(model, batch=2, padding=False), padding=False)
    kinds = describe_samples(captured)
    assert {name for name, kind in kinds.items() if kind.kind == "constant"} == {"attention_mask", "pixel_mask"}
    batch = Samples(kinds).batch(6)
    assert batch["attention_mask"].all() and batch["pixel_mask"].all() and len(batch["pixel_mask"]) == 6


def test_a_manifest_draws_what_the_program_draws() -> None:
    kinds = describe_samples(vilt())
    written = json.loads(json.dumps({"samples": {name: kind.to_dict() for name, kind in kinds.items()}}))
    assert kinds_of(written) == kinds
    one, other = Samples(kinds), Samples(kinds_of(written))
    for _ in range(2):
        mine, theirs = one.batch(), other.batch()
        assert all(mine[name].equal(theirs[name]) and mine[name].dtype == theirs[name].dtype for name in kinds)


def test_a_manifest_of_before_tells_shapes() -> None:
    inputs = {
        "input_ids": {"shape": [2, 5], "dtype": "int64"},
        "attention_mask": {"shape": [2, 5], "dtype": "int64"},
        "token_type_ids": {"shape": [2, 5], "dtype": "int64"},
        "pixel_values": {"shape": [2, 3, 8, 8], "dtype": "float32"},
    }
    made = Samples(kinds_of({"inputs": inputs, "fixed_inputs": {"sizes": [[8, 8]]}})).batch()
    assert {name: list(tensor.shape) for name, tensor in made.items()} == {n: s["shape"] for n, s in inputs.items()}
    with pytest.raises(UsageError, match=r"boxes.*--inputs"):
        kinds_of({"inputs": {**inputs, "boxes": {"shape": [2, 4], "dtype": "int64"}}})


def test_constants_that_are_too_large_are_not_written_down() -> None:
    """The export, which has the captured inputs, takes them from there."""
    rows = torch.arange(2**17).reshape(2, -1) % 30
    kinds = described(row_ids=rows)
    assert kinds["row_ids"].values is None
    with pytest.raises(UsageError, match=r"row_ids.*--inputs"):
        Samples(kinds)
    assert Samples(kinds, captured={"row_ids": rows}).batch()["row_ids"].equal(rows)


# --- What is drawn ----------------------------------------------------------------------------------------------------


def test_texts_and_images_of_every_size() -> None:
    kinds = describe_samples(vilt())
    batch = Samples(kinds).batch(150)
    lengths = batch["attention_mask"].sum(1)
    heights, widths = batch["pixel_mask"].amax(2).sum(1), batch["pixel_mask"].amax(1).sum(1)
    assert lengths[:4].tolist() == [12, 1, 12, 1]
    assert heights[:4].tolist() == widths[:4].tolist() == [96, 96, 16, 16]
    assert set(lengths.tolist()) == set(range(1, 13))
    assert set(heights.tolist()) == set(widths.tolist()) == {16, 32, 48, 64, 80, 96}
    assert not batch["pixel_values"][~batch["pixel_mask"].bool().unsqueeze(1).expand(-1, 3, -1, -1)].any()
    assert (batch["input_ids"][batch["attention_mask"] == 0] == 7).all()
    full = Samples(kinds, padded=False).batch(3)
    assert full["attention_mask"].all() and full["pixel_mask"].all()


def test_the_sizes_go_on_from_batch_to_batch() -> None:
    one, other = Samples(describe_samples(vilt())), Samples(describe_samples(vilt()))
    singly = torch.cat([one.batch(1)["attention_mask"] for _ in range(4)])
    assert singly.equal(other.batch(4)["attention_mask"])


def test_no_word_comes_twice_before_all_have_come() -> None:
    kinds = describe_samples(vilt())
    samples = Samples(kinds, padded=False)
    words = torch.cat([samples.batch(2)["input_ids"].flatten() for _ in range(3)])[:58]
    assert sorted(words.tolist()) == [i for i in range(60) if i not in (2, 7)]
    assert samples.notes() == []
    few = Samples(kinds, padded=False)
    few.batch(1)
    assert few.notes() == ["made-up samples hold 20.7% of the 58 words of input_ids"]


def test_images_stand_in_their_places_of_a_prompt() -> None:
    kind = InputKind("ids", (2, 9), "int64", high=49)
    ids = Samples({"input_ids": kind}, [PromptPlace("input_ids", 63, 2, 6)]).batch()["input_ids"]
    assert (ids[:, 2:6] == 63).all() and (ids[:, :2] < 50).all() and (ids[:, 6:] < 50).all()


def test_several_images_of_a_sample_are_padded_alike() -> None:
    kind = InputKind("mask", (2, 3, 8, 8), "int64", axes=2, step=2)
    mask = Samples({"pixel_mask": kind}).batch(4)["pixel_mask"]
    assert mask[:2].all() and (mask[2:].sum((-1, -2)) == 4).all()


# --- Batches of a proof -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("captured", "dynamic", "profiles", "expected"),
    [
        (4, False, [], ([4], [])),
        (2, True, [], ([2, 1, 3], [])),
        (2, True, [Profile(1, 8, 32)], ([1, 8], [32])),
        (2, True, [Profile(1, 2, 4), Profile(4, 8, 16)], ([1, 2, 4, 8, 16], [])),
        (2, True, [Profile(64, 64, 128)], ([64], [128])),
    ],
)
def test_the_batch_sizes_of_a_proof(captured: int, dynamic: bool, profiles: Any, expected: Any) -> None:
    assert proof_sizes(captured, dynamic, profiles) == expected


@pytest.mark.parametrize(
    ("sizes", "expected"), [([1], [1] * 8), ([2], [2, 2, 2, 2]), ([8], [8, 8]), ([2, 1, 3], [2, 1, 3, 2])]
)
def test_a_proof_has_two_batches_and_eight_samples(sizes: list[int], expected: list[int]) -> None:
    batches = proof_batches(Samples(describe_samples(vilt())), sizes)
    assert [len(batch["input_ids"]) for batch in batches] == expected
    assert not batches[0]["pixel_values"][:1].equal(batches[1]["pixel_values"][:1])
    lengths = [int(mask.sum()) for batch in batches for mask in batch["attention_mask"]]
    assert min(lengths) == 1 and max(lengths) == 12
    assert captured_batch(describe_samples(vilt())) == 2
