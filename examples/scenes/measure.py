"""Accuracy and multiply-adds of a trained model, reduced without training; the same command goes on where it was.

    python -m examples.scenes.measure DATA RUN/model results/vilt-0

Each row is a file of RESULTS with everything that its figures come from: the schedule, the answer to every question as
right or wrong, the commit and the versions.
"""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image
from torch import Tensor
from transformers import AutoTokenizer, ViltForQuestionAnswering

import pumer_compile as pumer
from pumer_compile.errors import PumerError
from pumer_compile.reduce import Analysed

from .data import Split, load_split
from .rows import FAMILIES, Row, shelf_rows

PACKAGES = ("torch", "transformers", "numpy", "pillow")
BATCH = 48
_TRIES, _NEAR = 8, 0.01
"""Shares that are tried to meet a ratio, and how near is near enough."""


def nearest_share(ratio_at: Callable[[float], float | None], wanted: float) -> float:
    """The share at which a growing ratio is nearest to what is wanted, by the rule of false position.

    Args:
        ratio_at: of a share from 0 to 1; None where there is none, since nothing is reduced at small shares and nothing
            would be left at large ones.
        wanted: above 1.

    Raises:
        ValueError: none comes within twice `_NEAR` of it.
    """
    low, high = (0.0, 1.0), (1.0, 2 * wanted)
    best = (0.0, 1.0)
    for _ in range(_TRIES):
        slope = (high[1] - low[1]) / (high[0] - low[0])
        share = low[0] + min(max((wanted - low[1]) / slope, 0.1 * (high[0] - low[0])), 0.9 * (high[0] - low[0]))
        found = ratio_at(share)
        if found is None:
            low, high = ((share, 1.0), high) if share < 0.1 else (low, (share, high[1]))
            continue
        best = min(best, (share, found), key=lambda tried: abs(tried[1] / wanted - 1))
        if abs(found / wanted - 1) < _NEAR:
            break
        low, high = ((share, found), high) if found < wanted else (low, (share, found))
    if abs(best[1] / wanted - 1) > 2 * _NEAR:
        raise ValueError(f"{wanted} times fewer multiply-adds are asked, and the nearest are {best[1]:.3f} times")
    return best[0]


def schedule_at(program: pumer.Program, row: Row, **more: Any) -> dict[str, Any]:
    """Keys of the schedule of a row, with `more`; empty for one that reduces nothing.

    Raises:
        ValueError: the family does not come near the ratio.
    """
    if not row.family:
        return {}
    # What the exact passes save, they save for the unreduced model as well.
    whole = pumer.reduce(program, pumer.Schedule.load("lossless")).plan.multiply_adds_after
    analysed, meeting = Analysed(program), {**dict(row.extra), **more}
    if row.like:
        meeting["layers"] = row.like

    def ratio_at(share: float) -> float | None:
        try:
            plan = analysed.reduce(pumer.Schedule(**{**FAMILIES[row.family](share), **meeting})).plan
        except PumerError:
            return None
        return whole / plan.multiply_adds_after

    keys = {**FAMILIES[row.family](nearest_share(ratio_at, row.ratio)), **dict(row.extra), **more}
    return {key: value for key, value in keys.items() if key != row.without}


def smaller(pixels: Tensor, size: int) -> Tensor:
    """Pictures, uint8-valued float32 [batch, 3, 112, 112] in [-1, 1], at another size (Pillow, bicubic)."""
    made = []
    for picture in ((pixels + 1) * 127.5).round().byte().permute(0, 2, 3, 1).numpy():
        small = Image.fromarray(picture).resize((size, size), Image.Resampling.BICUBIC)
        made.append(torch.from_numpy(np.array(small)).permute(2, 0, 1))
    return torch.stack(made).float() / 127.5 - 1


def batch_of(split: Split, questions: Tensor, image_size: int | None) -> dict[str, Tensor]:
    """The model's inputs for some questions."""
    batch = split.batch(questions)
    if image_size is not None:
        batch["pixel_values"] = smaller(batch["pixel_values"], image_size)
        batch["pixel_mask"] = torch.ones(len(questions), image_size, image_size, dtype=torch.int64)
    return batch


@torch.no_grad()
def answered(module: Callable[..., Any], split: Split, pictures: int, image_size: int | None) -> Tensor:
    """Which questions about the first pictures are answered rightly, bool [pictures, questions]."""
    per_picture, right = split.labels.shape[1], []
    for questions in torch.arange(pictures * per_picture).split(BATCH):
        given = module(**batch_of(split, questions, image_size)).logits.argmax(-1)
        right.append(given == split.labels.flatten()[questions])
    return torch.cat(right).view(pictures, per_picture)


def captured(model: ViltForQuestionAnswering, split: Split, row: Row) -> pumer.Program:
    """The model as a row's pictures go through it, for any batch."""
    return pumer.capture(model, batch_of(split, torch.arange(2), row.image_size), dynamic_batch=True)


def result_of(program: pumer.Program, keys: dict[str, Any], split: Split, row: Row, pictures: int) -> dict[str, Any]:
    """What a result file holds of one row: a program reduced by the keys of a schedule, or not at all."""
    reduced = pumer.reduce(program, pumer.Schedule(**keys) if keys else pumer.Schedule.load("lossless"))
    right = answered(reduced.module, split, pictures, row.image_size)
    told = {name: value for name, value in keys.items() if name != "predictors"}
    return {
        "name": row.name,
        "label": row.label,
        "ratio": row.ratio,
        "image_size": row.image_size,
        "seed": row.seed,
        "schedule": told,
        "multiply_adds": reduced.plan.multiply_adds_after,
        "tokens": [dict(site.after) for site in reduced.plan.sites],
        "right": right.flatten().int().tolist(),
        "pictures": pictures,
        **surroundings(),
    }


def surroundings() -> dict[str, Any]:
    """Commit and versions."""
    commit = subprocess.run(["git", "describe", "--always", "--dirty"], capture_output=True, text=True, check=False)
    found = {name: version(name).partition("+")[0] for name in PACKAGES}
    return {"commit": commit.stdout.strip(), "versions": {"pumer-compile": pumer.__version__, **found}}


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a result file whole; right and wrong answers as a line of ones and zeros."""
    staging = path.with_name(f"{path.name}.{os.getpid()}.new")
    told = {**result, "right": "".join(map(str, result["right"]))}
    staging.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    staging.replace(path)


def main(
    data: Path,
    model_folder: Path,
    results: Path,
    pictures: Annotated[int, typer.Option(help="Of the test split, each with all its questions.")] = 1000,
    only: Annotated[str, typer.Option(help="Rows whose name begins with this.")] = "",
) -> None:
    """Measure every row that RESULTS does not have yet."""
    torch.set_num_threads(1)
    results.mkdir(parents=True, exist_ok=True)
    test = load_split(data, "test", AutoTokenizer.from_pretrained(model_folder))
    model = ViltForQuestionAnswering.from_pretrained(model_folder).eval()
    for row in shelf_rows():
        path = results / f"{row.name}.json"
        if path.exists() or not row.name.startswith(only):
            continue
        program = captured(model, test, row)
        result = result_of(program, schedule_at(program, row), test, row, pictures)
        write_result(path, {**result, "model": model_folder.parent.name})
        print(f"{row.name}: {sum(result['right']) / len(result['right']):.4f}", flush=True)


if __name__ == "__main__":
    typer.run(main)
