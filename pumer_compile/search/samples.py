"""Samples that schedules are judged on: inputs from an .npz, in batches of one size, and labels."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from ..capture.capture import batch_inputs
from ..capture.inputs import forward_inputs
from ..capture.make_inputs import load_inputs, read_arrays
from ..errors import UsageError

Array = np.ndarray


@dataclass(frozen=True)
class Samples:
    """Inputs of a model, and what is right for each.

    Attributes:
        inputs: by name.
        batched: names of those with an entry for each sample; the others belong to all of them.
        count: how many.
        batch: of a call.
        labels: int `[count]`, of the right class; or float `[count, classes]`, what each answer is worth; None: none.
        sha256: of all arrays.
    """

    inputs: dict[str, Tensor]
    batched: tuple[str, ...]
    count: int
    batch: int
    labels: Array | None
    sha256: str

    def batches(self) -> Iterator[tuple[dict[str, Tensor], int]]:
        """Batches of one size, and how many of each count: the last sample fills the last one up."""
        for start in range(0, self.count, self.batch):
            rows = torch.arange(start, start + self.batch).clamp(max=self.count - 1)
            batch = {n: t[rows] if n in self.batched else t for n, t in self.inputs.items()}
            yield batch, min(self.batch, self.count - start)

    @property
    def first(self) -> dict[str, Tensor]:
        """The first batch: what the model is captured with."""
        return next(self.batches())[0]


def load_samples(
    path: Path, source: object, labels: Path | None = None, batch: int = 32, *, exact: bool = False
) -> Samples:
    """Samples from files.

    Args:
        path: .npz of arrays by input name. Where they do not have one number of rows (packed patches), all samples go
            into one call.
        source: the model.
        labels: .npz or .npy with one array.
        batch: samples of a call.
        exact: whether it stays, where there are fewer samples.

    Raises:
        UsageError: a file that cannot be read or has no picture; labels of another length.
    """
    _check_picture(path, source)
    inputs = load_inputs(path, source)  # type: ignore[arg-type]
    count = _count(inputs)
    batched = batch_inputs(inputs)
    together = any(t.ndim and t.shape[0] != count and n not in batched for n, t in inputs.items())
    rows = count if together else batch if exact else min(batch, count)
    digest = hashlib.sha256()
    for name, tensor in sorted(inputs.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\0".encode())
        digest.update(tensor.contiguous().numpy().tobytes() if tensor.dtype != torch.bfloat16 else b"")
    found = None if labels is None else _labels(labels, count, path)
    return Samples(inputs, tuple(batched), count, rows, found, digest.hexdigest())


def _check_picture(path: Path, source: object) -> None:
    """Pixels (or features of regions) must be among the inputs of a model that takes some."""
    if not isinstance(source, nn.Module):
        return
    given, taken = set(read_arrays(path)), forward_inputs(source)
    pictures = [name for name in taken if any(word in name for word in ("pixel", "visual", "image", "patches"))]
    floating = [name for name in pictures if "mask" not in name and "type" not in name and "size" not in name]
    if floating and not given & set(floating):
        raise UsageError(
            f"{path} has no picture: its arrays are {', '.join(sorted(given)) or 'none'}, and a schedule is judged by "
            f"what becomes of image tokens. {type(source).__name__} takes {' or '.join(floating[:3])}: save what its "
            "processor makes of pictures and texts with numpy.savez."
        )


def _count(inputs: Mapping[str, Tensor]) -> int:
    for name in ("input_ids", *inputs):
        if name in inputs and inputs[name].ndim:
            return int(inputs[name].shape[0])
    raise UsageError("The inputs hold no array with a row for each sample.")


def _labels(path: Path, count: int, inputs: Path) -> Array:
    """Labels, one row for each sample.

    Raises:
        UsageError: there is no such file, several arrays, another length or kind.
    """
    arrays = read_arrays(path)
    found = arrays.get("labels", next(iter(arrays.values()))) if "labels" in arrays or len(arrays) == 1 else None
    if found is None:
        raise UsageError(f"{path} has the arrays {', '.join(arrays)}; labels are one array (or the one called labels).")
    if found.ndim == 0 or len(found) != count:
        raise UsageError(
            f"{path} has {len(found) if found.ndim else 'no'} labels, and {inputs} has {count} samples: give one label "
            "for each sample, in the same order."
        )
    whole = found.ndim == 1 and np.issubdtype(found.dtype, np.integer)
    worth = found.ndim == 2 and np.issubdtype(found.dtype, np.floating)
    if not whole and not worth:
        raise UsageError(
            f"{path} has labels {found.dtype}{list(found.shape)}; give integers [samples], the number of the right "
            "answer, or floats [samples, answers], what each is worth."
        )
    return np.asarray(found)
