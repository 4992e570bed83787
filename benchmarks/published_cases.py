"""Every published case of token pruning, through the command line and onnxruntime.

    python -m benchmarks.published_cases [METHOD ...] [--new]

The tests run all cases in eager PyTorch and one or two of each method as artifacts; this runs all as artifacts: each is
compiled by `pumer-compile` and given the case's inputs under plain onnxruntime. The logits of the last position are
compared with what the published code computes (tests/oracle): another token kept moves them by 0.2 and more. Of DART,
whose published code takes pivots in the order of a hash table, those prompts are run whose order is ascending, as ours
is. Written to benchmarks/results/published_cases.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import yaml

ROOT = Path(__file__).resolve().parents[1]
ORACLE = ROOT / "tests/oracle"
RESULTS = ROOT / "benchmarks/results/published_cases.json"
Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """One case.

    Attributes:
        folder: the model.
        method, name: of the case.
        schedule: its keys.
        inputs: two samples, or those of the two that are comparable.
        wanted: their published logits of the last position.
    """

    folder: str
    method: str
    name: str
    schedule: dict[str, Any]
    inputs: Arrays
    wanted: np.ndarray


def schedule_of(folder: str, method: str, case: dict[str, Any]) -> dict[str, Any] | None:
    """The keys of a case; None where it is no reduction."""
    tokens = 144
    if method == "visionzip" and "dominant" in case:
        return {"dominant": case["dominant"], "contextual": case["contextual"]}
    if method == "divprune":
        return {"budget": round(case["ratio"] * tokens)}
    if method == "fastv":
        return {"layer": case["layer"], "budget": case["budget"]}
    if method == "vispruner" and "important" in case:
        return {"budget": case["budget"], "important": case["important"]}
    if method == "pdrop":
        return {"method": "pyramiddrop", "stages": dict(zip(case["layers"], case["ratios"], strict=True))}
    if method == "dart" and any(case["pivot_order_ascending"]):
        pivots = {"image": case["pivot_image"], "text": case["pivot_text"]}
        return {"layer": case["layer"], "budget": case["kept"], "pivots": pivots}
    if method == "cdpruner_openvino":
        keys = {"method": "cdpruner", "variant": "openvino", "relevance_weight": case["weight"]}
        return {**keys, "budget": round(tokens * (1 - case["prune_percent"] / 100)), "split": bool(case["split"])}
    if method == "holov" and "budget" in case:
        return {"budget": case["budget"], "crops": case["crops"]}
    if method == "holov" and "kept" in case:  # of Qwen2.5-VL, whose positions come from a grid
        return {"budget": case["kept"], "crops": case["crops"], "positions": "original"}
    if method == "cdpruner":
        return {"budget": case["budget"], "text_tower": str(ORACLE / folder / "clip_text")}
    if method == "fastervlm":
        return {"budget": case["budget"]}
    return None


def cases(methods: list[str]) -> Iterator[Case]:
    """All of them, or those of some methods."""
    for path in sorted(ORACLE.glob("*/cases_*.json")):
        folder, method = path.parent.name, path.stem.removeprefix("cases_")
        if methods and method not in methods:
            continue
        given, expected = np.load(path.parent / "inputs.npz"), np.load(path.parent / f"expected_{method}.npz")
        for name, case in json.loads(path.read_text(encoding="utf-8")).items():
            keys = schedule_of(folder, method, case)
            if keys is None:
                continue
            rows = np.flatnonzero(case.get("pivot_order_ascending", [True, True]))
            ids = given[f"input_ids_{case['prompt']}"][rows]
            pixels = given["pixel_values"][np.array(case["images"])[rows]].astype(np.float32)
            inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids), "pixel_values": pixels}
            if "image_sizes" in given:
                inputs["image_sizes"] = np.repeat(given["image_sizes"], len(ids), 0)
            if "image_grid_thw" in given:  # patches of all images one after the other
                inputs["pixel_values"] = pixels.reshape(-1, pixels.shape[-1])
                inputs["image_grid_thw"] = np.repeat(given["image_grid_thw"], len(ids), 0)
                # Without it the model counts the image's positions as those of words.
                placeholder = json.loads((path.parent / "config.json").read_text(encoding="utf-8"))["image_token_id"]
                inputs["mm_token_type_ids"] = (ids == placeholder).astype(np.int32)
            if method == "cdpruner":
                inputs["question_ids"] = np.repeat(given[case["text"]][None], len(ids), 0)
            wanted = expected[f"{name}.logits_last"][rows]
            yield Case(folder, method, name, {"method": method, **keys}, inputs, wanted)


def run(case: Case, folder: Path) -> dict[str, Any]:
    """Compile a case by the command and run its artifact."""
    import onnxruntime

    from pumer_compile.cli.commands import main

    schedule, samples, out = (folder / name for name in ("schedule.yaml", "inputs.npz", "model.onnx"))
    schedule.write_text(yaml.safe_dump(case.schedule), encoding="utf-8")
    np.savez(samples, **case.inputs)  # type: ignore[arg-type]  # numpy's own annotation
    start = time.perf_counter()
    try:
        # On made-up samples of these random weights rounding alone comes near the usual limit (2.6e-4, choices alike).
        command = ["compile", str(ORACLE / case.folder), "-s", str(schedule), "--inputs", str(samples)]
        main([*command, "--atol", "1e-3", "-o", str(out)])
    except SystemExit as stop:
        if stop.code:
            return {"error": f"exit code {stop.code}"}
    session = onnxruntime.InferenceSession(str(out), providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    feed = {value.name: case.inputs[value.name] for value in session.get_inputs()}
    for value in session.get_inputs():  # a question may be compiled for a longer one: -1 behind the last
        if value.name == "question_ids" and (more := value.shape[1] - feed[value.name].shape[1]) > 0:
            feed[value.name] = np.pad(feed[value.name], ((0, 0), (0, more)), constant_values=-1)
    found = dict(zip(names, session.run(None, feed), strict=True))
    difference = float(np.abs(found["logits"][:, -1] - case.wanted).max())
    seconds = round(time.perf_counter() - start, 1)
    return {"difference": difference, "prompts": len(case.wanted), "seconds": seconds}


def main_() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help="these alone")
    parser.add_argument("--new", action="store_true", help="cases without a result alone")
    given = parser.parse_args()
    found: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    for case in cases(given.methods):
        name = f"{case.folder} {case.method} {case.name}"
        if given.new and name in found:
            continue
        with tempfile.TemporaryDirectory() as folder:
            found[name] = run(case, Path(folder))
        print(name, found[name], flush=True)
        RESULTS.write_text(json.dumps(found, indent=1) + "\n")
    worst = max((case.get("difference", np.inf) for case in found.values()), default=0.0)
    print(f"{len(found)} cases, largest difference {worst:.1e}")


if __name__ == "__main__":
    main_()
