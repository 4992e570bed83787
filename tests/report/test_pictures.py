"""Pictures as they were before the processor: against the pictures themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from pumer_compile.errors import UsageError
from pumer_compile.report.pictures import Colours, canvases_of, check_pictures, colours_of, placed
from pumer_compile.report.svg import MOST_PIXELS, data_uri, png

pytestmark = pytest.mark.fast
NORMAL: dict[str, Any] = {"image_mean": [0.1, 0.5, 0.4], "image_std": [0.2, 0.5, 0.3]}


def picture(height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def normalised(pixels: np.ndarray) -> torch.Tensor:
    """`[3, height, width]`, by the formula on the processor's page."""
    values = (pixels / 255 - np.array(NORMAL["image_mean"])) / np.array(NORMAL["image_std"])
    return torch.from_numpy(values.transpose(2, 0, 1)).float()


def test_channels_first_whatever_stands_before_them(tmp_path: Path) -> None:
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(NORMAL))
    originals = [picture(6, 10, seed) for seed in range(4)]
    stacked = torch.stack([normalised(one) for one in originals]).view(2, 2, 3, 6, 10)
    found = canvases_of({"pixel_values": stacked, "ids": torch.ones(2, 4).long()}, colours_of(tmp_path), 1)
    assert list(found) == ["pixel_values"]
    for canvas, original in zip(found["pixel_values"], originals, strict=True):
        assert np.array_equal(canvas.picture.pixels, original)
        assert canvas.picture.size == (10, 6)


@pytest.mark.parametrize(("high", "wide"), [(24, 40), (32, 16)])
def test_patches_as_qwens_processor_makes_them(high: int, wide: int) -> None:
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    processor = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, do_resize=False, **NORMAL)
    originals = [picture(high, wide, 1), picture(wide, high, 2)]
    made = processor([Image.fromarray(one) for one in originals], return_tensors="pt")
    found = canvases_of(dict(made), colours_of(processor), 2)["pixel_values"]
    for canvas, original in zip(found, originals, strict=True):
        assert np.array_equal(canvas.picture.pixels, original)
    # The rows of the prompt: each owns four patches that follow one another, and stands on 8 x 8 pixels.
    rows = high * wide // 64
    owners = np.repeat(np.arange(2 * rows), 4)[:, None].repeat(96, 1)
    pictures: list[list[Any]] = [[]]
    (places,) = placed({"pixel_values": found}, {"pixel_values": owners}, pictures, 2 * rows)
    assert [p.name for p in pictures[0]] == ["pixel_values 0", "pixel_values 1"]
    for image, (height, width) in enumerate([(high, wide), (wide, high)]):
        expected = [(x, y, 8, 8) for y in range(0, height, 8) for x in range(0, width, 8)]
        assert [place.box for place in places if place is not None and place.picture == image] == expected


def test_colours_are_stretched_and_said_to_be_where_nobody_tells(tmp_path: Path) -> None:
    for content in (None, {"do_normalize": False, **NORMAL}, {"size": 3}, [1]):
        if content is not None:
            (tmp_path / "preprocessor_config.json").write_text(json.dumps(content))
        colours = colours_of(tmp_path)
        assert colours == Colours() and "stretched" in str(colours)
    values = np.array([[[-1.0, 0.0, 3.0]]])
    assert colours.shown(values).tolist() == [[[0, 64, 255]]]
    (tmp_path / "processor_config.json").write_text(json.dumps({"image_processor": NORMAL}))
    assert colours_of(tmp_path).mean == (0.1, 0.5, 0.4) and "processor_config.json" in str(colours_of(tmp_path))
    assert colours_of(None) == Colours()


def test_a_png_is_the_picture(tmp_path: Path) -> None:
    pixels = picture(7, 5)
    (tmp_path / "one.png").write_bytes(png(pixels))
    with Image.open(tmp_path / "one.png") as image:
        assert image.mode == "RGB" and np.array_equal(np.array(image), pixels)
    large = np.full((MOST_PIXELS * 2, 8, 3), 77, dtype=np.uint8)
    assert len(data_uri(large)) < 1500 and data_uri(pixels).startswith("data:image/png;base64,")


def test_inputs_without_a_picture_are_refused() -> None:
    with pytest.raises(UsageError, match=r"no picture among the inputs \(input_ids, attention_mask\)"):
        check_pictures({"input_ids": torch.ones(1, 3).long(), "attention_mask": torch.ones(1, 3).long()})
    check_pictures({"pixel_values": torch.zeros(1, 3, 4, 4)})
