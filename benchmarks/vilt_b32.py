"""Full-size ViLT-B/32 under onnxruntime on the CPU: reduced against the same exporter's unreduced model.

Random weights, 384 px, 32 text tokens (the paper's Table 7), float32. Every variant is compiled in a process of its
own (its time and peak memory are recorded), then all run in one process, alternating, so that a busy machine slows
all of them alike. Prints a table and writes one JSON with every sample and the machine.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

VARIANTS = ("none", "vilt-vqa", "vilt-ve")
TEXT_LENGTH = 32


def save_model(folder: Path) -> None:
    """A ViLT-B/32 for question answering (3129 labels) with random weights, as a save_pretrained folder."""
    import torch
    from transformers import ViltConfig, ViltForQuestionAnswering

    torch.manual_seed(0)
    ViltForQuestionAnswering(ViltConfig(num_labels=3129)).save_pretrained(folder)


def compile_variant(model: Path, variant: str, batch: int, output: Path) -> dict[str, float]:
    """Compile with verification through the command line; seconds and peak resident GiB of that process."""
    command = [sys.executable, "-m", "pumer_compile.cli", str(model), "--schedule", variant, "-o", str(output)]
    command += ["--batch", str(batch), "--text-length", str(TEXT_LENGTH)]
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL)
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"compiling {variant} failed: {' '.join(command)}")
    return {"seconds": time.perf_counter() - start, "peak_gib": usage.ru_maxrss / 2**20}


def run_alternating(paths: dict[str, Path], batch: int, rounds: int) -> dict[str, list[float]]:
    """Milliseconds of every run, variants taking turns."""
    import onnxruntime

    random = np.random.default_rng(0)
    feed = {
        "input_ids": random.integers(1000, 30000, (batch, TEXT_LENGTH)),
        "attention_mask": np.ones((batch, TEXT_LENGTH), dtype=np.int64),
        "pixel_values": random.standard_normal((batch, 3, 384, 384), dtype=np.float32),
        "pixel_mask": np.ones((batch, 384, 384), dtype=np.int64),
    }
    sessions = {n: onnxruntime.InferenceSession(str(p), providers=["CPUExecutionProvider"]) for n, p in paths.items()}
    feeds = {n: {i.name: feed[i.name] for i in s.get_inputs()} for n, s in sessions.items()}
    samples: dict[str, list[float]] = {name: [] for name in sessions}
    for turn in range(rounds + 2):
        for name, session in sessions.items():
            start = time.perf_counter()
            session.run(None, feeds[name])
            if turn >= 2:  # two rounds of warm-up
                samples[name].append(1e3 * (time.perf_counter() - start))
    return samples


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    from pumer_compile.exporters.manifest import library_versions

    models = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": library_versions(),
        "load_average_before": os.getloadavg(),
    }


def main() -> None:
    """Compile, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batch", type=int, nargs="+", default=[8, 1])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "vilt_b32_cpu.json")
    arguments = parser.parse_args()
    result: dict[str, object] = {"machine": machine(), "text_length": TEXT_LENGTH, "batches": {}}
    print("batch schedule    median ms        quartiles  speed-up  compile s  peak GiB")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save_model(folder / "model")
        for batch in arguments.batch:
            compiled = {v: compile_variant(folder / "model", v, batch, folder / f"{v}_{batch}.onnx") for v in VARIANTS}
            samples = run_alternating({v: folder / f"{v}_{batch}.onnx" for v in VARIANTS}, batch, arguments.rounds)
            medians = {v: statistics.median(s) for v, s in samples.items()}
            for v in VARIANTS:
                low, _, high = statistics.quantiles(samples[v], n=4)
                row = f"{batch:>5} {v:<10}{medians[v]:>11.1f}{f'{low:.0f} to {high:.0f}':>17}"
                cost = compiled[v]
                row += f"{medians['none'] / medians[v]:>9.2f}x{cost['seconds']:>11.1f}{cost['peak_gib']:>10.2f}"
                print(row, flush=True)
            result["batches"][batch] = {"milliseconds": samples, "compile": compiled}  # type: ignore[index]
    arguments.output.parent.mkdir(parents=True, exist_ok=True)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"Wrote {arguments.output}.")


if __name__ == "__main__":
    main()
