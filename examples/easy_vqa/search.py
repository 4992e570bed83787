"""Search for a schedule of the demo model on one half of the test set, and check it on the other half.

    python -m examples.easy_vqa.search

The hand-written schedule is `schedule.yaml`. Results are kept in `search.json`; the found schedule, every trial and the
picture lie in `build/easy_vqa/`.
"""

from __future__ import annotations

import json
import resource
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from transformers import AutoTokenizer

import pumer_compile as pumer
from examples.easy_vqa.data import Split, load_split
from pumer_compile.capture.loading import load_model
from pumer_compile.search.quality import Judge, outputs_of
from pumer_compile.search.samples import Samples

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MODEL = HERE / "model_paper"
OUT = ROOT / "build" / "easy_vqa"
HAND_WRITTEN = HERE / "schedule.yaml"
BATCH = 32


def halves(split: Split, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows for searching and rows for checking; all questions about an image are in one of them."""
    images = torch.randperm(len(split.images), generator=torch.Generator().manual_seed(seed))
    first = torch.isin(split.image_index, images[: len(images) // 2])
    return first.nonzero().flatten(), (~first).nonzero().flatten()


def write(split: Split, rows: torch.Tensor, name: str) -> tuple[Path, Path]:
    """Inputs and labels as files."""
    inputs, labels = OUT / f"{name}.npz", OUT / f"{name}_labels.npz"
    np.savez(inputs, **{key: tensor.numpy() for key, tensor in split.batch(rows).items()})
    np.savez(labels, labels=split.labels[rows].numpy())
    return inputs, labels


def judge(split: Split, rows: torch.Tensor, schedules: dict[str, Path]) -> dict[str, dict[str, float]]:
    """Cost and accuracy on some rows of the unreduced model and of schedules."""
    inputs = split.batch(rows)
    samples = Samples(inputs, tuple(inputs), len(rows), BATCH, split.labels[rows].numpy(), "")
    program = pumer.capture(load_model(MODEL), samples.first)
    judge = Judge(samples, outputs_of(program.module))
    found = {"unreduced": {"multiply_adds": 1.0, "accuracy": judge.baseline.value, "samples": len(rows)}}
    for name, path in schedules.items():
        reduced = pumer.reduce(program, path)
        cost = reduced.plan.multiply_adds_after / reduced.plan.multiply_adds_before
        accuracy = judge.judge(outputs_of(reduced.module)).value
        found[name] = {"multiply_adds": round(cost, 4), "accuracy": round(accuracy, 5)}
    return found


def main(
    trials: int = 100,
    samples: Annotated[int, typer.Option(help="Of the first half that are searched on; 0: all.")] = 960,
    seed: int = 0,
) -> None:
    """Search, check, keep."""
    OUT.mkdir(parents=True, exist_ok=True)
    test = load_split("test", AutoTokenizer.from_pretrained(MODEL))
    validation, rest = halves(test)
    validation = validation[torch.randperm(len(validation), generator=torch.Generator().manual_seed(seed))]
    validation = validation[:samples] if samples else validation
    inputs, labels = write(test, validation, "validation")
    before = judge(test, validation, {"hand-written": HAND_WRITTEN})
    # No more is to be lost than by the hand-written schedule.
    drop = max(0.0, before["unreduced"]["accuracy"] - before["hand-written"]["accuracy"])
    found = OUT / "found.yaml"
    command = [MODEL, "--inputs", inputs, "--labels", labels, "--max-drop", f"{drop:.5f}", "--trials", trials]
    start = time.perf_counter()
    line = [sys.executable, "-m", "pumer_compile", "search", *command, "--seed", seed, "-o", found]
    subprocess.run([str(word) for word in line], check=True)
    seconds, used = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
    schedules = {"hand-written": HAND_WRITTEN, "found": found}
    results = {
        "versions": {name: version(name).partition("+")[0] for name in ("torch", "transformers", "optuna")},
        "seconds": round(seconds, 1),
        "cpu_seconds": round(used.ru_utime + used.ru_stime, 1),
        "trials": trials,
        "seed": seed,
        "schedule": pumer.Schedule.load(found).model_dump(mode="json", exclude_none=True),
        "validation": judge(test, validation, schedules),
        "test": judge(test, rest, schedules),
    }
    (HERE / "search.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    for half in ("validation", "test"):
        for name, row in results[half].items():
            cost, accuracy = row["multiply_adds"], row["accuracy"]
            print(f"{half:<12}{name:<14}{cost:.4f} of the multiply-adds, accuracy {accuracy:.4f}")
    artifact = OUT / "found.onnx"
    compiling = [MODEL, "--schedule", found, "--inputs", one_batch(test), "-o", artifact]
    line = [sys.executable, "-m", "pumer_compile", *compiling]
    subprocess.run([str(word) for word in line], check=True)


def one_batch(test: Split) -> Path:
    """One batch, to compile with."""
    path = OUT / "inputs.npz"
    np.savez(path, **{name: tensor.numpy() for name, tensor in test.batch(torch.arange(BATCH)).items()})
    return path


if __name__ == "__main__":
    typer.run(main)
