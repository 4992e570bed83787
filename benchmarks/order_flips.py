"""`safe` in the tokens' old order, and by saliency as published: how often rounding changes what is reduced.

python -m benchmarks.order_flips [--questions N]     # about ten minutes on one core

The demo's test set (easy-VQA) and its model that was not fine-tuned with reduction, at the published ratios, under
onnxruntime: the artifact in float32 beside the same in float16, and in int8 by each mode that needs no samples. A new
token is told by the tokens of the model that went into it, whatever its place, so that both orders are measured alike.
`samples`: where any reducer made any token of others than in float32. `sets`: the same of each reducer of each sample.
`tokens`: of those after the last reducer. The order before was that of `reference` (`in_order` false in this script
alone); accuracy is of answers in each. Writes benchmarks/results/order_flips.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, ViltForQuestionAnswering

import pumer_compile as pumer
from benchmarks.common import machine
from examples.easy_vqa.data import Split, load_split
from examples.easy_vqa.schedules import STRENGTHS
from pumer_compile.reducers import ModalityAwareMerger, TextInformedPruner

Array = np.ndarray[Any, Any]
ROOT = Path(__file__).resolve().parents[1]
MERGES = {"layers": [1, 2, 4], "merge": {"image": 0.3, "text": 0.2}}
SCHEDULES = {
    "pumer": pumer.Schedule(method="pumer", semantics="safe", **STRENGTHS["paper"]),
    "tome": pumer.Schedule(method="tome", semantics="safe", **MERGES),
}
ORDERS = ("published", "raster")
ROUNDED = {
    "float32": pumer.OnnxOptions(),
    "float16": pumer.OnnxOptions(dtype="float16"),
    "int8, weights": pumer.OnnxOptions(quantize="int8", quantize_mode="weights"),
    "int8, dynamic": pumer.OnnxOptions(quantize="int8", quantize_mode="dynamic"),
}
BATCH = 64


@contextmanager
def ordered(order: str) -> Iterator[None]:
    """Within the block, `safe` orders tokens so."""
    before = [(kind, kind.__init__) for kind in (TextInformedPruner, ModalityAwareMerger)]

    def patched(init: Any) -> Any:
        return lambda self, *given, **named: init(self, *given, **{**named, "in_order": order == "raster"})

    try:
        for kind, init in before:
            kind.__init__ = patched(init)  # type: ignore[method-assign]
        yield
    finally:
        for kind, init in before:
            kind.__init__ = init  # type: ignore[method-assign]


def places(kept: int, source: Array, target: Array, order: str) -> Array:
    """Where each kept token goes, `[samples, kept]`."""
    stays = np.ones((len(source), kept), int)
    np.put_along_axis(stays, source, 0, 1)
    if order == "raster" or source.shape[1] == 0:
        place = stays.cumsum(1) - 1
    else:  # the even ones that stay, then the odd ones
        turn = [*range(0, kept, 2), *range(1, kept, 2)]
        place = np.empty_like(stays)
        place[:, turn] = stays[:, turn].cumsum(1) - 1
    np.put_along_axis(place, source, np.take_along_axis(place, target, 1), 1)
    return place


def made_of(outputs: dict[str, Array], order: str, tokens: dict[str, int]) -> dict[str, Array]:
    """For each reducer, a number for each of its new tokens that tells what tokens of the model are in it, ascending,
    `[samples, after]` uint64."""
    names = sorted({name.rsplit(".", 1)[0] for name in outputs if name.startswith("reducer.")})
    random, found, held = np.random.default_rng(0), {}, {}
    for stream, count in tokens.items():
        held[stream] = random.integers(0, 2**63, count, dtype=np.uint64)[None].repeat(len(outputs["logits"]), 0)
    for name in names:  # layers below ten sort as they run
        stream = name.rsplit(".", 1)[1]
        now = held[stream]
        if f"{name}.kept" in outputs:
            now = np.take_along_axis(now, outputs[f"{name}.kept"], 1)
        none = np.zeros((len(now), 0), int)
        source, target = (outputs.get(f"{name}.{what}", none).astype(int) for what in ("source", "target"))
        place = places(now.shape[1], source, target, order)
        after = np.zeros((len(now), now.shape[1] - source.shape[1]), np.uint64)
        np.add.at(after, (np.arange(len(now))[:, None], place), now)
        held[stream] = after
        found[name] = np.sort(after, 1)
    return found


def run(path: Path, split: Split, rows: torch.Tensor) -> dict[str, Array]:
    """Everything that an artifact gives for some questions."""
    session = pumer.OnnxSession(path)
    parts = [session.run(split.batch(part)) for part in rows.split(BATCH)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def row_of(made: dict[str, Array], exact: dict[str, Array]) -> dict[str, float]:
    """How often what was made differs."""
    differ = {name: (value != exact[name]).any(1) for name, value in made.items()}
    last = {name.rsplit(".", 1)[1]: name for name in made}
    strangers = [~np.isin(made[name], exact[name]) for name in last.values()]
    return {
        "samples": float(np.any(list(differ.values()), axis=0).mean()),
        "sets": float(np.mean(list(differ.values()))),
        **{f"sets {name.removeprefix('reducer.')}": float(value.mean()) for name, value in differ.items()},
        "tokens": float(np.concatenate(strangers, axis=1).mean()),
    }


def measure(program: pumer.Program, method: str, order: str, split: Split, rows: torch.Tensor) -> list[dict[str, Any]]:
    """One method in one order: a row for each artifact."""
    found: list[dict[str, Any]] = []
    with ordered(order):
        reduced = pumer.reduce(program, SCHEDULES[method])
    tokens = {"text": split.input_ids.shape[1], "image": 65}
    with tempfile.TemporaryDirectory() as folder:
        exact: dict[str, Array] = {}
        for name, options in ROUNDED.items():
            path = Path(folder) / f"{len(found)}.onnx"
            pumer.export(reduced, path, options=options, verify=False, with_decisions=True)
            outputs = run(path, split, rows)
            made, answers = made_of(outputs, order, tokens), outputs["logits"].argmax(-1)
            if name == "float32":
                exact, given = made, answers
            correct = int((answers == split.labels[rows].numpy()).sum())
            row = {"method": method, "order": order, "artifact": name, "correct": correct, "total": len(rows)}
            row |= {"agree": int((answers == given).sum()), **row_of(made, exact)}
            found.append(row)
            shares = "".join(f"{row[what]:>10.2%}" for what in ("samples", "sets", "tokens"))
            print(f"{method:<8}{order:<12}{name:<16}{correct / len(rows):>9.2%}{shares}", flush=True)
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, help="so many of the test set, drawn; all of them if left out")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "order_flips.json")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    folder = ROOT / "examples" / "easy_vqa" / "model"
    split = load_split("test", AutoTokenizer.from_pretrained(folder))
    rows = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[: arguments.questions]
    model = ViltForQuestionAnswering.from_pretrained(folder).eval()
    program = pumer.capture(model, split.batch(torch.arange(2)), dynamic_batch=True)
    about, results = machine(), []
    print(f"{'method':<8}{'order':<12}{'artifact':<16}{'accuracy':>9}{'samples':>10}{'sets':>10}{'tokens':>10}")
    for method in SCHEDULES:
        for order in ORDERS:
            results += measure(program, method, order, split, rows)
    found = {"machine": about, "questions": len(rows), "schedules": {n: s.canonical() for n, s in SCHEDULES.items()}}
    arguments.output.write_text(json.dumps({**found, "rows": results}, indent=1) + "\n", encoding="utf-8")
    print(f"Wrote {arguments.output}.")


if __name__ == "__main__":
    main()
