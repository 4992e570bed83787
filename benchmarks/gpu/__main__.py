"""Measure everything on a GPU, in order of value, within a time budget.

    python -m benchmarks.gpu --minutes 12 --out DIR              # on a machine with a GPU
    python -m benchmarks.gpu --device cpu --tiny --out DIR       # every step with small models, to try the machinery

Steps: 1 `torch.compile` of ViLT-B/32; 2 the first and every further token of LLaVA-1.5-7B and Qwen2.5-VL-7B;
3 TensorRT engines; 4 onnxruntime on the device; 5 choices that differ from float32 on the CPU. Each runs in a process
of its own, which is ended when its time is up, and writes `DIR/<step>.json` after every row: machine, driver,
versions, commit, every sample. Time that a step leaves over goes to the next ones. Ends with a table.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from . import step_compile, step_decisions, step_engines, step_ort, step_prompts
from .harness import ROUNDS, Bench, Settings, commit

# Each with its share of the time: minutes out of twelve.
STEPS: dict[str, tuple[float, Callable[[Bench], None]]] = {
    "1-torch-compile": (3, step_compile.run),
    "2-prompts": (4, step_prompts.run),
    "3-tensorrt": (2, step_engines.run),
    "4-onnxruntime": (2, step_ort.run),
    "5-decisions": (1, step_decisions.run),
}
# A step may end what it is at; one that hangs is ended, though not beyond the time of all.
GRACE_SECONDS = 30.0


def work(name: str, run: Callable[[Bench], None], settings: Settings, deadline: float) -> None:
    """A step, in its own process."""
    bench = Bench(name, settings, deadline)
    bench.write()
    run(bench)
    bench.write(complete=True)


def run_steps(
    steps: Mapping[str, tuple[float, Callable[[Bench], None]]], settings: Settings, minutes: float, start: str = "spawn"
) -> dict[str, str]:
    """Run each in its process; how each ended.

    Not forked: a process whose parent has looked at a GPU cannot use it. A step that breaks the device (or its memory)
    breaks no other.
    """
    context: Any = multiprocessing.get_context(start)
    ended: dict[str, str] = {}
    end, left = time.monotonic() + 60 * minutes, sum(share for share, _ in steps.values())
    for name, (share, run) in steps.items():
        now = time.monotonic()
        # What is over from earlier steps is shared out among the rest.
        seconds = max(0.0, end - now) * share / left
        left -= share
        print(f"==> {name}: {seconds:.0f} s", flush=True)
        process = context.Process(target=work, args=(name, run, settings, now + seconds))
        process.start()
        process.join(min(seconds + GRACE_SECONDS, max(end - now, 1.0)))
        if process.is_alive():
            process.kill()
            process.join()
            ended[name] = f"ended after {time.monotonic() - now:.0f} s, in the middle of a row"
        else:
            ended[name] = "complete" if process.exitcode == 0 else f"its process ended with {process.exitcode}"
        print(f"    {ended[name]}, {time.monotonic() - now:.0f} s", flush=True)
    return ended


# --- The table --------------------------------------------------------------------------------------------------------


def line(row: Mapping[str, Any]) -> str:
    """A row of the table: the case, then what was found or why nothing."""
    case = ", ".join(f"{value:.2f}" if isinstance(value, float) else str(value) for value in _case(row).values())
    if "reason" in row:
        return f"  {case}: {row['reason']}"
    said = []
    if "median_ms" in row:
        low, high = row["quartiles_ms"]
        said.append(f"{row['median_ms']:.2f} ms ({low:.2f} to {high:.2f})")
    for key, name in (("cuda_graph", "CUDA graph"), ("token", "a further token")):
        inner = row.get(key) or {}
        if "median_ms" in inner:
            said.append(f"{name} {inner['median_ms']:.2f} ms")
    said += [f"{row[k]:.2f}x {w}" for k, w in (("speed_up", "faster"), ("fewer_multiply_adds", "fewer")) if k in row]
    said += [f"reducers {row['reducers_share_in_eager']:.0%}"] if "reducers_share_in_eager" in row else []
    said += [f"up to {row['largest']:.1%} chosen otherwise"] if "largest" in row else []
    said += [f"{row['seconds']:.0f} s, proved on {row['proved_on']}"] if "proved_on" in row else []
    return f"  {case}: {'; '.join(said)}"


def _case(row: Mapping[str, Any]) -> dict[str, Any]:
    """What tells a row from the others: its first, plain entries."""
    names = ("model", "subject", "builder", "schedule", "dtype", "batch", "contender", "method", "image_tokens")
    return {name: row[name] for name in (*names, "provider", "artifact", "what") if name in row}


def table(out: Path, steps: Mapping[str, Any], ended: Mapping[str, str]) -> str:
    """All steps, from their files."""
    lines = []
    for name in steps:
        path = out / f"{name}.json"
        lines.append(f"{name} ({ended[name]})")
        rows = json.loads(path.read_text(encoding="utf-8"))["rows"] if path.exists() else []
        lines += [line(row) for row in rows] or ["  nothing was measured"]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=12.0)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tiny", action="store_true", help="small models, to try the machinery")
    parser.add_argument("--inner", default="inductor", help="backend behind torch.compile; eager compiles nothing")
    parser.add_argument("--step", nargs="+", help="these alone, by name or number")
    parser.add_argument("--least", action="store_true", help="the first case of every step alone, for a test")
    parser.add_argument("--rounds", type=int, help=f"calls that are counted ({ROUNDS}; 5 where tiny)")
    given = parser.parse_args(arguments)
    chosen = {n: s for n, s in STEPS.items() if not given.step or {n, n.partition("-")[0]} & {*given.step}}
    if not chosen:
        parser.error(f"no step {given.step[0]!r}; there are {', '.join(STEPS)}")
    given.out.mkdir(parents=True, exist_ok=True)
    rounds = given.rounds or (5 if given.tiny else ROUNDS)
    device = torch.device(given.device)
    settings = Settings(device, given.tiny, given.out, given.inner, commit(), rounds, given.least)
    ended = run_steps(chosen, settings, given.minutes)
    print(table(given.out, chosen, ended))
    sys.exit(0 if all(how == "complete" for how in ended.values()) else 1)


if __name__ == "__main__":
    main()
