"""Sample inputs made at random from a model's config, or read from an .npz file."""

from __future__ import annotations

import inspect
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from ..errors import UsageError
from .exported_inputs import check_exported_inputs, example_inputs, exported_inputs
from .inputs import check_inputs, describe, float_dtype, forward_inputs, lookup
from .loading import LoadedModel, first_line

DEFAULT_TEXT_LENGTH = 40


def make_inputs(
    model: nn.Module | ExportedProgram | LoadedModel,
    *,
    batch: int | None = None,
    text_length: int | None = None,
    image_size: int | tuple[int, int] | None = None,
    seed: int = 0,
    padding: bool = True,
) -> dict[str, Tensor]:
    """Random, seeded sample inputs for a transformers model, from its config and its forward's arguments.

    - `input_ids` int64 `[batch, text_length]`: from the vocabulary without its special tokens; `batch` is 1
      and `text_length` 40, or less where the position table is shorter, unless given.
    - `attention_mask` int64: with `padding`, samples are padded on the right to different lengths; the first
      is not (a batch of 1 is padded unless the seed is 0).
    - `pixel_values` in the model's dtype `[batch, channels, height, width]`: standard normal, of the config's
      image size unless given; `[batch, images, ...]` where the config says that a sample has several images.
    - `pixel_mask` int64, if the forward takes one: with `padding`, every second sample is a smaller image,
      zero beyond.

    An exported program gets inputs like its own examples. Raises UsageError where the config does not say
    enough.
    """
    model = model.source if isinstance(model, LoadedModel) else model
    generator = torch.Generator().manual_seed(seed)
    if isinstance(model, ExportedProgram):
        alike = _like_examples(model, batch, generator)
        _check_fixed(alike, text_length, image_size)
        return alike
    name, config, accepted = type(model).__name__, getattr(model, "config", None), forward_inputs(model)
    if config is None:
        raise UsageError(
            f"{name} has no transformers config to make sample inputs from. Give them: an .npz file with the "
            f"arrays that its forward takes ({', '.join(accepted)})."
        )
    batch = 1 if batch is None else batch
    _check_positive(batch=batch, text_length=text_length, image_size=image_size)
    padded = [padding and (row > 0 or (batch == 1 and seed != 0)) for row in range(batch)]
    made: dict[str, Tensor] = {}
    if "input_ids" in accepted:
        made |= make_text(config, padded, text_length, generator)
    if "pixel_values" in accepted:
        made |= _make_images(config, batch, image_size, generator, name)
    if "pixel_mask" in accepted and "pixel_values" in made:
        made |= _make_image_padding(config, made["pixel_values"], padded, generator)
    made = {key: tensor for key, tensor in made.items() if key in accepted}
    required = [key for key, p in accepted.items() if p.default is inspect.Parameter.empty]
    missing = [key for key in required if key not in made]
    if missing or not made:
        raise UsageError(
            f"No sample values can be made for {missing[0] if missing else 'any input'} of {name}. Give the "
            f"inputs: an .npz file with the arrays that its forward takes ({', '.join(accepted)})."
        )
    if lookup(config, "text_config", "image_token_id", "image_token_index") is not None and "pixel_values" in made:
        raise UsageError(
            f"{name} marks the place of an image by special tokens in its text, which random text does not "
            "have. Give the inputs its processor makes: an .npz file with input_ids, pixel_values and what "
            "else it takes."
        )
    return check_inputs(model, {key: made[key] for key in accepted if key in made})


def load_inputs(
    path: str | Path, model: nn.Module | ExportedProgram | LoadedModel, added: Collection[str] = ()
) -> dict[str, Tensor]:
    """Sample inputs from an .npz file with one array for each input, by name.

    Floating arrays are cast to the model's floating dtype and integers to int64 (for an exported program, to
    the dtypes it takes). `added` are those that the model does not take, and a method adds. Raises UsageError for a
    file that is no .npz, and for names and shapes that do not fit.
    """
    path, model = Path(path), model.source if isinstance(model, LoadedModel) else model
    arrays = read_arrays(path)
    if isinstance(model, ExportedProgram):
        expected = exported_inputs(model)
        tensors = {name: _tensor(path, name, array, None) for name, array in arrays.items()}
        cast = {n: t.to(expected[n].dtype) if n in expected else t for n, t in tensors.items()}
        return check_exported_inputs(model, cast)
    dtype = float_dtype(model)
    tensors = {name: _tensor(path, name, array, dtype) for name, array in arrays.items()}
    more = {name: tensors.pop(name) for name in added if name in tensors}
    return {**check_inputs(model, tensors), **more}


def read_arrays(path: Path) -> dict[str, np.ndarray[Any, Any]]:
    """Arrays by name from an .npz file.

    Raises:
        UsageError: no such file, or no .npz of plain arrays.
    """
    try:
        with path.open("rb") as file:
            content = np.load(file, allow_pickle=False)
            arrays = None if isinstance(content, np.ndarray) else dict(content)
    except FileNotFoundError as error:
        raise UsageError(f"The inputs file {path} does not exist.") from error
    except Exception as error:  # damage shows as anything from OSError to zlib.error
        raise UsageError(
            f"The inputs file {path} cannot be read as an .npz of plain arrays: {first_line(error)}. Write "
            "it with numpy.savez(name=array)."
        ) from error
    if arrays is None:
        raise UsageError(f"The inputs file {path} is one array. Write it with numpy.savez(name=array).")
    return arrays


def _tensor(path: Path, name: str, array: Any, dtype: torch.dtype | None) -> Tensor:
    if array.dtype.kind == "f":
        native = np.float64 if array.dtype.itemsize > 4 else np.float32
        return torch.from_numpy(array.astype(native)).to(dtype)
    if array.dtype.kind in "iu":
        return torch.from_numpy(array.astype(np.int64))
    if array.dtype.kind == "b":
        return torch.from_numpy(array)
    raise UsageError(f"The array {name} in {path} has the dtype {array.dtype}; numbers or booleans are expected.")


def _check_positive(**sizes: int | tuple[int, int] | None) -> None:
    for name, size in sizes.items():
        if size is not None and min(size if isinstance(size, tuple) else (size,)) < 1:
            raise UsageError(f"{name.replace('_', ' ')} must be at least 1; found {size}.")


def make_text(config: Any, padded: list[bool], length: int | None, generator: torch.Generator) -> dict[str, Tensor]:
    """Random `input_ids` and `attention_mask`, int64 `[batch, length]`, of ordinary words; none where the config tells
    no vocabulary. `padded` says of each sample whether it is padded on the right."""
    # Of the language model first: PaliGemma's own vocabulary is larger than its word table.
    vocabulary = lookup(getattr(config, "text_config", None), "", "vocab_size") or lookup(config, "", "vocab_size")
    if not isinstance(vocabulary, int):
        return {}
    limit = lookup(config, "text_config", "max_text_length", "max_position_embeddings") or DEFAULT_TEXT_LENGTH
    length = min(limit, DEFAULT_TEXT_LENGTH) if length is None else length
    kinds = ("pad", "bos", "eos", "cls", "sep", "mask", "image", "video", "decoder_start")
    special = {lookup(config, "text_config", f"{kind}_token_id") for kind in kinds}
    ordinary = torch.tensor([i for i in range(vocabulary) if i not in special] or [0])
    ids = ordinary[torch.randint(len(ordinary), (len(padded), length), generator=generator)]
    mask = torch.ones_like(ids)
    for row in [row for row, pad in enumerate(padded) if pad and length > 1]:
        kept = int(torch.randint(max(1, length // 2), length, (), generator=generator))
        mask[row, kept:] = 0
    pad_id = lookup(config, "text_config", "pad_token_id")
    return {"input_ids": ids.where(mask.bool(), pad_id or 0), "attention_mask": mask}


def _make_images(
    config: Any, batch: int, image_size: int | tuple[int, int] | None, generator: torch.Generator, name: str
) -> dict[str, Tensor]:
    size = image_size if image_size is not None else lookup(config, "vision_config", "image_size")
    if size is None:
        raise UsageError(f"The config of {name} has no image_size. Give the size of the images.")
    height, width = (size, size) if isinstance(size, int) else tuple(size)
    channels = lookup(config, "vision_config", "num_channels") or 3
    images = getattr(config, "num_images", None)
    shape = (batch, *([images] if isinstance(images, int) and images > 1 else []), channels, height, width)
    return {"pixel_values": torch.randn(shape, generator=generator)}


def _make_image_padding(
    config: Any, pixels: Tensor, padded: list[bool], generator: torch.Generator
) -> dict[str, Tensor]:
    """A pixel mask with smaller images at every second padded sample, and the pixels zeroed beyond them."""
    patch = lookup(config, "vision_config", "patch_size")
    step = patch if isinstance(patch, int) else 1
    *batch, _, height, width = pixels.shape
    mask = torch.ones(*batch, height, width, dtype=torch.int64)
    for row in [row for row, pad in enumerate(padded) if pad and (row % 2 == 1 or len(padded) == 1)]:
        for axis, side in ((-2, height), (-1, width)):
            cells = max(1, side // step)
            kept = step * int(torch.randint((cells + 1) // 2, cells + 1, (), generator=generator))
            mask[row].narrow(axis, kept, side - kept).zero_()
    return {"pixel_values": pixels * mask.unsqueeze(-3), "pixel_mask": mask}


def _like_examples(exported: ExportedProgram, batch: int | None, generator: torch.Generator) -> dict[str, Tensor]:
    """Random inputs like the examples in an archive: noise, masks as they are, ids from the same range.

    `batch` only changes a symbolic batch.
    """
    expected, made = exported_inputs(exported), {}
    for name, example in example_inputs(exported).items():
        if batch is not None and example.ndim > 0 and not isinstance(expected[name].shape[0], int):
            example = example[torch.arange(batch) % example.shape[0]]
        if example.is_floating_point():
            made[name] = torch.randn(example.shape, generator=generator).to(example.dtype)
        elif int(example.max()) <= 1:
            made[name] = example.clone()
        else:
            low, high = int(example.min()), int(example.max())
            made[name] = torch.randint(low, high + 1, example.shape, generator=generator).to(example.dtype)
    found = made["input_ids"].shape[0] if "input_ids" in made else batch
    if batch is not None and found != batch:
        raise UsageError(f"A batch of {batch} was asked for, but the torch.export archive has a fixed one of {found}.")
    return check_exported_inputs(exported, made)


def _check_fixed(made: Mapping[str, Tensor], text_length: int | None, image_size: int | tuple[int, int] | None) -> None:
    """Refuse sizes that an archive, whose shapes are fixed, does not have."""
    size = (image_size, image_size) if isinstance(image_size, int) else image_size
    asked = {"input_ids": None if text_length is None else (text_length,), "pixel_values": size}
    for name, sizes in asked.items():
        if sizes and name in made and tuple(made[name].shape[-len(sizes) :]) != tuple(sizes):
            raise UsageError(
                f"The torch.export archive was exported with {name} {describe(made[name])}; other sizes "
                f"({', '.join(map(str, sizes))} were asked for) need another export."
            )
