"""`make demo`: compile a fine-tuned model, run it, prove it, and print what was gained.

The model is a small ViLT trained on easy-VQA and fine-tuned with its reducers (`finetune_reduced.py`). Every step is
a command or a call that a user would make; the artifacts stay in `build/easy_vqa/`.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer
from transformers.utils import logging

from examples.easy_vqa.data import TEXT_LENGTH, Split, answers, load_split
from pumer_compile import OnnxSession

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
MODEL = HERE / "model_paper"
OUT = ROOT / "build" / "easy_vqa"
BATCH = 32
QUESTIONS = 1024
ROUNDS = 15


def command(*arguments: str | Path) -> None:
    """Run pumer-compile as a user would, and show the command."""
    shown = " ".join(str(Path(a).relative_to(ROOT)) if isinstance(a, Path) else a for a in arguments)
    print(f"\n$ pumer-compile {shown}", flush=True)
    subprocess.run([sys.executable, "-m", "pumer_compile", *map(str, arguments)], check=True)


def answer(session: OnnxSession, split: Split, rows: torch.Tensor) -> np.ndarray:
    """Labels, int64 `[rows]`, batch by batch."""
    batches = (session.run(split.batch(part)) for part in rows.split(BATCH))
    return np.concatenate([batch["logits"].argmax(-1) for batch in batches])


def alternate(sessions: Mapping[str, OnnxSession], split: Split) -> dict[str, float]:
    """Median milliseconds of a batch, the sessions taking turns."""
    batch = split.batch(torch.arange(BATCH))
    samples: dict[str, list[float]] = {name: [] for name in sessions}
    for _ in range(ROUNDS):
        for name, session in sessions.items():
            start = time.perf_counter()
            session.run(batch)
            samples[name].append(1e3 * (time.perf_counter() - start))
    return {name: float(np.median(values[2:])) for name, values in samples.items()}


def main() -> None:
    """The whole way, from checkpoint to proved artifact."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    OUT.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    test = load_split("test", tokenizer)
    inputs = OUT / "inputs.npz"
    np.savez(inputs, **{name: tensor.numpy() for name, tensor in test.batch(torch.arange(BATCH)).items()})

    print("easy-VQA: 64 x 64 images of one shape, 13 answers; a ViLT of 6 layers, fine-tuned with its reducers.")
    schedule = HERE / "schedule.yaml"
    reduced, unreduced = OUT / "model.onnx", OUT / "unreduced.onnx"
    command(MODEL, "--schedule", schedule, "--inputs", inputs, "-o", reduced, "--with-decisions")
    command("parity", reduced, "--model", MODEL, "--inputs", inputs)
    command(MODEL, "--schedule", "none", "--inputs", inputs, "-o", unreduced)

    sessions = {"unreduced": OnnxSession(unreduced), "reduced": OnnxSession(reduced)}
    rows = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))[:QUESTIONS]
    labels = test.labels[rows].numpy()
    given = {name: answer(session, test, rows) for name, session in sessions.items()}
    print("\nThe reduced ONNX model answers:")
    for row, label in list(zip(rows, given["reduced"], strict=True))[:5]:
        question = tokenizer.decode(test.input_ids[row], skip_special_tokens=True)
        truth = answers()[int(test.labels[row])]
        print(f"  image {int(test.image_index[row]):4d}: {question} -> {answers()[label]} (truth: {truth})")

    medians = alternate(sessions, test)
    print(
        f"\nonnxruntime on this CPU, batch {BATCH}, {TEXT_LENGTH} text and 65 image tokens; {QUESTIONS} test questions:"
    )
    print(f"  {'':<12}{'ms a batch':>12}{'accuracy':>10}")
    for name, median in medians.items():
        print(f"  {name:<12}{median:>12.1f}{(given[name] == labels).mean():>10.1%}")
    print(f"  {medians['unreduced'] / medians['reduced']:.2f}x faster. The artifacts are in {OUT.relative_to(ROOT)}/.")
    print("A small model on synthetic images: it shows that the compiler works, not what a large model loses.")


if __name__ == "__main__":
    main()
