"""What each exact optimization of a graph gains under onnxruntime, by itself and with the others.

Full-size ViLT-B/32, random weights. Every variant of the reduced model is opened anew in each round, in random order,
because where its buffers come to lie in memory moves its time by several percent; ratios are of runs in one round.

    python -m benchmarks.graph_optimizations
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import onnxruntime
import torch

import pumer_compile as pumer
from benchmarks.common import machine, published
from benchmarks.performance import TEXT, tiny, vilt
from pumer_compile.capture.make_inputs import make_inputs
from pumer_compile.exporters.onnx import OnnxOptions
from pumer_compile.exporters.onnx_passes import DEFAULT_PASSES
from pumer_compile.files import atomic_path

RESULTS = Path(__file__).parent / "results" / "lean_cpu.json"
BEFORE = ("postpone", "one_query")
"""Passes before the export."""
ALONE = (*BEFORE, "strides", "rows", "projections")
TAKEN = (*BEFORE, *DEFAULT_PASSES[None])


@contextmanager
def without(names: set[str]) -> Iterator[None]:
    """Compile without some of `BEFORE`."""
    off = {
        "postpone": ("pumer_compile.rewrite.sink_projections.projections", {}),
        "one_query": ("pumer_compile.passes.absorb_single_query.absorb_single_query", 0),
    }
    with ExitStack() as stack:
        for name in names:
            target, nothing = off[name]
            stack.enter_context(mock.patch(target, lambda *args, nothing=nothing: nothing))
        yield


def build(
    model: torch.nn.Module, inputs: dict[str, torch.Tensor], schedule: str, folder: Path, alone: tuple[str, ...]
) -> dict[str, Path]:
    """ONNX models: as it is, reduced without any of the passes, with some of them alone, with those that are taken."""
    program = pumer.capture(model, inputs)
    variants = {"reduced": (), **{name: (name,) for name in alone}, "taken": TAKEN}
    paths = {"none": folder / "none.onnx"}
    pumer.export(program, paths["none"], verify=False)
    for name, chosen in variants.items():
        paths[name] = folder / f"{name}.onnx"
        with without(set(BEFORE) - set(chosen)):
            options = OnnxOptions(onnx_passes=tuple(n for n in chosen if n not in BEFORE))
            pumer.export(pumer.reduce(program, published(schedule)), paths[name], options=options, verify=False)
    return paths


def measure(paths: dict[str, Path], inputs: dict[str, torch.Tensor], rounds: int, runs: int) -> dict[str, list[float]]:
    """Milliseconds of every round: the median of its runs."""
    samples: dict[str, list[float]] = {name: [] for name in paths}
    for _ in range(rounds):
        for name, path in random.sample(sorted(paths.items()), len(paths)):
            session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
            feed = {i.name: inputs[i.name].numpy() for i in session.get_inputs()}
            session.run(None, feed)
            times = []
            for _ in range(runs):
                start = time.perf_counter()
                session.run(None, feed)
                times.append(1e3 * (time.perf_counter() - start))
            samples[name].append(statistics.median(times))
            del session
    return samples


def gain(samples: dict[str, list[float]], name: str, base: str = "reduced") -> float:
    """How many times faster than another, round by round."""
    return statistics.median(a / b for a, b in zip(samples[base], samples[name], strict=True))


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--schedule", nargs="+", default=["vilt-vqa", "vilt-ve"], help="of the first, each pass alone")
    parser.add_argument("--rounds", type=int, default=12)
    parser.add_argument("--tiny", action="store_true", help="a small model, and no file unless --output is given")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    output = arguments.output or (None if arguments.tiny else RESULTS)
    command = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    result: dict[str, Any] = {"machine": machine(), "commit": commit, "schedules": {}}
    model = tiny() if arguments.tiny else vilt()
    for schedule, (batch, runs) in itertools.product(arguments.schedule, ((1, 9), (8, 3))):
        inputs = make_inputs(model, batch=batch, text_length=16 if arguments.tiny else TEXT, padding=False)
        alone = ALONE if schedule == arguments.schedule[0] else ()
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            paths = build(model, inputs, schedule, Path(folder), alone)
            samples = measure(paths, inputs, arguments.rounds, runs)
        result["schedules"].setdefault(schedule, {})[str(batch)] = samples
        print(f"{schedule}, batch {batch}: median ms, times faster than `reduced`, and than `none`")
        for name, times in samples.items():
            ratios = gain(samples, name), gain(samples, name, "none")
            print(f"  {name:<12}{statistics.median(times):>9.1f}{ratios[0]:>8.3f}{ratios[1]:>8.3f}", flush=True)
    if output is not None:
        with atomic_path(output) as path:
            path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"Wrote {output}.")


if __name__ == "__main__":
    main()
