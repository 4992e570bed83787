"""Milliseconds of the rows in onnxruntime, the rows taking turns, on a machine that does nothing else.

    python -m examples.scenes.latency DATA RUN/model examples/scenes/results/vilt-0

writes `latency.json` into RESULTS: every sample of every row that has a result there. What a row takes does not depend
on its weights, so that all are timed with those of the one model.
"""

from __future__ import annotations

import json
import os
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated, Any

import numpy as np
import torch
import typer
from torch import Tensor
from transformers import AutoTokenizer, ViltForQuestionAnswering

import pumer_compile as pumer
from pumer_compile.distill import save_predictors

from .data import Split, load_split
from .measure import batch_of, captured, surroundings
from .rows import FAMILIES, TRAINED, Row, shelf_rows, tuned_rows

FILE = "latency.json"


def session_of(model: ViltForQuestionAnswering, split: Split, row: Row, keys: dict[str, Any], folder: Path) -> Any:
    """A row as an ONNX model."""
    program = captured(model, split, row)
    if row.family == TRAINED:
        new = pumer.Schedule(**FAMILIES[TRAINED](0.3), training=True)
        path = folder / "predictors.safetensors"
        save_predictors(pumer.reduce(program, new).module, path)
        keys = {**keys, "predictors": str(path)}
    schedule = pumer.Schedule(**keys) if keys else pumer.Schedule.load("lossless")
    artifact = folder / f"{row.name}.onnx"
    pumer.export(pumer.reduce(program, schedule), artifact)
    return pumer.OnnxSession(artifact)


def take_turns(sessions: dict[str, Any], batches: dict[str, dict[str, Tensor]], rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every batch, each session once in a round; the first two rounds warm up and are left out."""
    samples: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(rounds + 2):
        for name, session in sessions.items():
            started = time.perf_counter()
            session.run(batches[name])
            samples[name].append(round(1e3 * (time.perf_counter() - started), 3))
    return {name: found[2:] for name, found in samples.items()}


def main(
    data: Path,
    model_folder: Path,
    results: Path,
    batch: int = 32,
    rounds: int = 15,
    only: Annotated[str, typer.Option(help="Rows whose name begins with this, and the unreduced one.")] = "",
) -> None:
    """Time the rows that RESULTS has."""
    test = load_split(data, "test", AutoTokenizer.from_pretrained(model_folder))
    model = ViltForQuestionAnswering.from_pretrained(model_folder).eval()
    every = {row.name: row for row in [*shelf_rows(), *(row for rows in tuned_rows().values() for row in rows)]}
    chosen = {name: row for name, row in every.items() if name.startswith(only) or name == "unreduced"}
    chosen = {name: row for name, row in chosen.items() if (results / f"{name}.json").exists()}
    questions = torch.arange(batch) * test.labels.shape[1]
    with TemporaryDirectory() as folder:
        sessions, batches = {}, {}
        for name, row in chosen.items():
            keys = json.loads((results / f"{name}.json").read_text(encoding="utf-8"))["schedule"]
            sessions[name] = session_of(model, test, row, keys, Path(folder))
            batches[name] = batch_of(test, questions, row.image_size)
            print(f"{name}: exported", flush=True)
        samples = take_turns(sessions, batches, rounds)
    told = {"batch": batch, "cores": os.cpu_count(), "load": os.getloadavg()[0], **surroundings(), "samples": samples}
    staging = results / f"{FILE}.new"
    staging.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    staging.replace(results / FILE)
    for name, found in samples.items():
        print(f"{name}: {np.median(found):.1f} ms")


if __name__ == "__main__":
    typer.run(main)
