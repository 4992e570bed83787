"""`safe` in the tokens' old order, and by saliency as published: how often rounding changes what is reduced.

python -m benchmarks.order_flips [--questions 512] [--methods pumer tome] [--kinds float32 float16 weights dynamic]

The demo's test set (easy-VQA) and its model that was not fine-tuned with reduction, at the published ratios: float32
beside float16 (both in eager PyTorch), and int8 by each mode that needs no samples (under onnxruntime). A new token is
told by the tokens of the model that went into it, whatever its place, so that both orders are measured alike.
`samples`: where any reducer made any token of others than in float32. `sets`: the same of each reducer of each sample.
`tokens`: of those after the last reducer. The order before was that of `reference` (`in_order` false in this script
alone); accuracy is of answers in each. About a minute of one core for what is eager, half a minute for each export.
Writes benchmarks/results/order_flips.json, in which rows that are not measured again stay.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoTokenizer, ViltForQuestionAnswering

import pumer_compile as pumer
from benchmarks.common import machine
from examples.easy_vqa.data import Split, load_split
from examples.easy_vqa.schedules import STRENGTHS
from pumer_compile.exporters.chain import cast_program
from pumer_compile.reducers import ModalityAwareMerger, TextInformedPruner, noted_decisions

Array = np.ndarray[Any, Any]
ROOT = Path(__file__).resolve().parents[1]
# Of the image alone: the model reads the text's first token, which ToMe may merge away.
MERGES: dict[str, Any] = {"layers": [1, 2, 4], "merge": {"image": 0.3}}
SCHEDULES = {
    "pumer": pumer.Schedule(method="pumer", semantics="safe", **STRENGTHS["paper"]),
    "tome": pumer.Schedule(method="tome", semantics="safe", **MERGES),
}
ORDERS = ("published", "raster")
KINDS = ("float32", "float16", "weights", "dynamic")
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


def run(session: Callable[[dict[str, torch.Tensor]], dict[str, Array]], split: Split, rows: torch.Tensor) -> Any:
    """All outputs for some questions."""
    parts = [session(split.batch(part)) for part in rows.split(BATCH)]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def eager(reduced: pumer.Reduced, batch: dict[str, torch.Tensor]) -> dict[str, Array]:
    """Logits and decisions in eager PyTorch, in the module's dtype."""
    dtype = next(reduced.module.parameters()).dtype
    given = {name: value.to(dtype) if value.is_floating_point() else value for name, value in batch.items()}
    with noted_decisions(reduced.module) as noted:
        outputs = {"logits": reduced.module(**given).logits.float().numpy()}
    decided = {(name, what): value for name, made in noted.items() for what, value in made._asdict().items()}
    return outputs | {f"{name}.{what}": value.numpy() for (name, what), value in decided.items()}


def opened(program: pumer.Program, method: str, kind: str, folder: Path) -> Any:
    """What runs a batch in one of `KINDS`."""
    if kind.startswith("float"):
        return partial(eager, pumer.reduce(cast_program(program, kind), SCHEDULES[method]))
    path = folder / f"{kind}.onnx"
    options = pumer.OnnxOptions(quantize="int8", quantize_mode=kind)  # type: ignore[arg-type]
    reduced = pumer.reduce(program, SCHEDULES[method])
    pumer.export(reduced, path, options=options, verify=False, with_decisions=True)
    return pumer.OnnxSession(path).run


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


def measure(
    program: pumer.Program, method: str, order: str, kinds: Sequence[str], split: Split, rows: torch.Tensor
) -> list[dict[str, Any]]:
    """One method in one order: a row for each kind."""
    found: list[dict[str, Any]] = []
    tokens = {"text": split.input_ids.shape[1], "image": 65}
    exact: dict[str, Array] = {}
    with tempfile.TemporaryDirectory() as folder:
        for kind in kinds:
            with ordered(order):
                session = opened(program, method, kind, Path(folder))
            outputs = run(session, split, rows)
            made, answers = made_of(outputs, order, tokens), outputs["logits"].argmax(-1)
            if kind == "float32":
                exact, given = made, answers
            correct = int((answers == split.labels[rows].numpy()).sum())
            row = {"method": method, "order": order, "kind": kind, "correct": correct, "total": len(rows)}
            row |= {"agree": int((answers == given).sum()), **row_of(made, exact)}
            found.append(row)
            shares = "".join(f"{row[what]:>10.2%}" for what in ("samples", "sets", "tokens"))
            print(f"{method:<8}{order:<12}{kind:<10}{correct / len(rows):>9.2%}{shares}", flush=True)
    return found


def save(path: Path, about: dict[str, Any], rows: list[dict[str, Any]]) -> None:
    """Write, and keep older rows of the same questions."""
    before = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.is_file() else []
    names = [(row["method"], row["order"], row["kind"]) for row in rows]
    kept = [row for row in before if (row["method"], row["order"], row["kind"]) not in names]
    rows = [row for row in kept if row["total"] == about["questions"]] + rows
    path.write_text(json.dumps({**about, "rows": rows}, indent=1) + "\n", encoding="utf-8")


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--questions", type=int, default=512, help="so many of the test set, drawn")
    parser.add_argument("--methods", nargs="+", choices=list(SCHEDULES), default=list(SCHEDULES))
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=KINDS, help="float32 comes first")
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "order_flips.json")
    arguments = parser.parse_args()
    torch.set_grad_enabled(False)
    folder = ROOT / "examples" / "easy_vqa" / "model"
    split = load_split("test", AutoTokenizer.from_pretrained(folder))
    rows = torch.randperm(len(split), generator=torch.Generator().manual_seed(0))[: arguments.questions]
    model = ViltForQuestionAnswering.from_pretrained(folder).eval()
    program = pumer.capture(model, split.batch(torch.arange(2)), dynamic_batch=True)
    about = {"machine": machine(), "questions": len(rows)}
    about["schedules"] = {name: schedule.canonical() for name, schedule in SCHEDULES.items()}
    kinds = ["float32", *(kind for kind in arguments.kinds if kind != "float32")]
    print(f"{'method':<8}{'order':<12}{'kind':<10}{'accuracy':>9}{'samples':>10}{'sets':>10}{'tokens':>10}")
    for method in arguments.methods:
        for order in ORDERS:
            save(arguments.output, about, measure(program, method, order, kinds, split, rows))
    print(f"Wrote {arguments.output}.")


if __name__ == "__main__":
    main()
