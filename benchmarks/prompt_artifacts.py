"""Every prompt family, reduced and under onnxruntime, against the models' own modules given what stays.

    python -m benchmarks.prompt_artifacts                    # all families without a result yet
    python -m benchmarks.prompt_artifacts internvl gemma3    # these anew
    python -m benchmarks.prompt_artifacts --render           # write the table of docs/prompts.md from the results

The suite holds the graphs of these small models (tests/support/prompt_families.py) in eager PyTorch against a program
that shares no code with the package (`prompt_oracle.py`, `fastv_families.py`). Exporting them all takes too long for
it: this does, and gives each ONNX model the same two samples, which keep other tokens. A family is done in a process of
its own. Written to benchmarks/results/prompt_artifacts.json.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import tempfile
import time
from pathlib import Path
from typing import Any

from .common import machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/prompt_artifacts.json"
PAGE = ROOT / "docs/prompts.md"
MARKS = "<!-- artifacts -->", "<!-- end of artifacts -->"
METHODS = ("vispruner", "fastv")
SECONDS = 900
BUDGET = 4
Result = dict[str, Any]


def examine(name: str, method: str) -> Result:
    """Reduce a family, export it, and compare: the largest difference over two samples, over the largest output."""
    import torch

    import pumer_compile as pumer
    from pumer_compile.errors import PumerError
    from tests.support import fastv_families, prompt_oracle
    from tests.support.prompt_families import captured, placeholders

    began = time.process_time()
    model, make, output, program = captured(name)
    keys: dict[str, Any] = {"budget": BUDGET, "positions": "original"}
    if method == "fastv":
        keys = {"budget": fastv_families.BUDGET, "layer": fastv_families.LAYER}
    try:
        reduced = pumer.reduce(program, pumer.Schedule(method=method, **keys))
    except PumerError as error:
        return {"refused": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}
    differs, places = [], []
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        pumer.export(reduced, path, verify=False)
        engine = pumer.Engine(path)
        for seed in (0, 1):
            inputs = make(seed)
            if method == "fastv":
                first = fastv_families.FEWER_FROM.get(name, fastv_families.LAYER)
                wanted, kept = fastv_families.by_hand(model, inputs, first)
            else:
                wanted, kept = prompt_oracle.by_hand(model, inputs, BUDGET, placeholders(name))
            found = torch.as_tensor(engine(**inputs)[output])
            differs.append(float((found - wanted).abs().max() / wanted.abs().max()))
            places.append(kept)
    return {
        "difference": max(differs),
        "other_tokens": not torch.equal(*places),
        "tokens": [int(inputs["input_ids"].shape[1]), int(places[0].shape[1])],
        "prompts": len(inputs["input_ids"]),
        "cpu_seconds": round(time.process_time() - began),
    }


def in_a_process(name: str, methods: list[str]) -> dict[str, Result]:
    """Of a family by method, in a process of its own."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        signal.alarm(SECONDS)
        os.close(reading)
        with os.fdopen(writing, "w") as pipe:
            for method in methods:
                try:
                    found = examine(name, method)
                except Exception as error:  # whatever it is, it is the result
                    found = {"failed": f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]}
                pipe.write(json.dumps({method: found}) + "\n")
                pipe.flush()
        os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as pipe:
        lines = pipe.read().splitlines()
    os.waitpid(child, 0)
    found = {method: result for line in lines for method, result in json.loads(line).items()}
    return found or {method: {"failed": f"no result within {SECONDS} seconds"} for method in methods}


def kept() -> dict[str, Any]:
    """The results there are."""
    return json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {"families": {}}


def _write(results: dict[str, Any]) -> None:
    temporary = RESULTS.with_suffix(".part")
    temporary.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    temporary.replace(RESULTS)


def said(result: Result | None) -> str:
    """In a cell of the table."""
    if result is None:
        return "not run"
    if "refused" in result:
        return "refused"
    if "failed" in result:
        return "failed"
    before, after = result["tokens"]
    return f"{result['difference']:.0e} ({before} to {after} tokens)"


def table(results: dict[str, Any]) -> str:
    """As the page has it."""
    versions = results["machine"]["versions"]
    lines = [
        ", ".join(f"{name} {version}" for name, version in versions.items()) + ":",
        "",
        "| Small model | Prompts | `vispruner` | `fastv` |",
        "| --- | --- | --- | --- |",
    ]
    for name, found in sorted(results["families"].items()):
        prompts = next((str(r["prompts"]) for r in found.values() if "prompts" in r), "")
        lines.append(f"| {name} | {prompts} | {said(found.get('vispruner'))} | {said(found.get('fastv'))} |")
    return "\n".join(lines)


def render(results: dict[str, Any]) -> None:
    """Write the table into the page."""
    begin, end = MARKS
    page = PAGE.read_text(encoding="utf-8")
    before, rest = page.split(begin)
    PAGE.write_text(f"{before}{begin}\n{table(results)}\n{end}{rest.split(end)[1]}", encoding="utf-8")


def main() -> None:
    """Examine, keep, write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("names", nargs="*", help="families; all without a result if none is named")
    parser.add_argument("--method", action="append", choices=METHODS, help="of these alone")
    parser.add_argument("--render", action="store_true", help="from the results there are")
    options = parser.parse_args()
    methods = options.method or list(METHODS)
    if not options.render:
        import torch
        import transformers

        from tests.support.prompt_families import FAMILIES

        transformers.logging.set_verbosity_error()
        torch.set_num_threads(1)
        results = kept()
        results["machine"] = {k: v for k, v in machine().items() if k != "load_average_before"}
        for name in options.names or sorted(FAMILIES):
            have = results["families"].setdefault(name, {})
            wanted = [method for method in methods if options.names or method not in have]
            if wanted:
                have.update(in_a_process(name, wanted))
                print(name, {method: said(have[method]) for method in wanted}, flush=True)
                _write(results)
    render(kept())


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    main()
