"""Draw the pictures and write the questions, in parallel; a run that was stopped goes on where it was.

    python -m examples.scenes.generate FOLDER

A picture depends on its split and number alone. Each shard is `SPLIT-NUMBER.npy`, the pictures, and then
`SPLIT-NUMBER.json`, whose presence says that the shard is whole.
"""

from __future__ import annotations

import json
import os
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path
from random import Random
from typing import Annotated, Any

import numpy as np
import typer

from .draw import draw
from .questions import ask
from .scene import random_scene

SHARD = 250
"""Pictures of a shard."""
QUESTIONS = 12
"""Questions about each picture."""
PICTURES = {"train": 16000, "validation": 500, "test": 1000}


def sample(split: str, number: int) -> tuple[np.ndarray[Any, Any], dict[str, Any]]:
    """One picture of a split, uint8 `[112, 112, 3]`, with its scene, cell owners and questions."""
    rng = Random(f"scenes {split} {number}")
    scene = random_scene(rng)
    questions = ask(scene, rng, QUESTIONS)
    picture, owners = draw(scene, rng)
    told = {"scene": scene.as_json(), "owners": owners.hex(), "questions": [asdict(q) for q in questions]}
    return np.asarray(picture), told


def write_shard(folder: Path, split: str, number: int, size: int = SHARD) -> Path:
    """Write one shard, unless it is there; its JSON file."""
    target = folder / f"{split}-{number:04d}.json"
    if not target.exists():
        samples = [sample(split, number * SHARD + row) for row in range(size)]
        _replace(target.with_suffix(".npy"), lambda path: _save(path, np.stack([picture for picture, _ in samples])))
        _replace(target, lambda path: path.write_text(json.dumps([told for _, told in samples]), encoding="utf-8"))
    return target


def _save(path: Path, pictures: np.ndarray[Any, Any]) -> None:
    with path.open("wb") as file:
        np.save(file, pictures)


def _replace(path: Path, write: Any) -> None:
    staging = path.with_name(f"{path.name}.{os.getpid()}.new")
    write(staging)
    staging.replace(path)


def main(
    folder: Path,
    jobs: Annotated[int, typer.Option(help="Processes.")] = os.cpu_count() or 1,
    train: Annotated[int, typer.Option(help="Pictures to train with, a multiple of 250.")] = PICTURES["train"],
) -> None:
    """Write every shard that FOLDER does not have yet."""
    folder.mkdir(parents=True, exist_ok=True)
    wanted = [
        (split, number)
        for split, pictures in {**PICTURES, "train": train}.items()
        for number in range(pictures // SHARD)
        if not (folder / f"{split}-{number:04d}.json").exists()
    ]
    with ProcessPoolExecutor(jobs) as pool:
        for done, future in enumerate(
            as_completed([pool.submit(write_shard, folder, split, number) for split, number in reversed(wanted)])
        ):
            print(f"{done + 1}/{len(wanted)} {future.result().stem}", flush=True)


if __name__ == "__main__":
    typer.run(main)
