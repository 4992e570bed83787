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
import sys
from pathlib import Path

import torch

from .harness import ROUNDS, Settings, commit
from .runner import STEPS, run_steps, table


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
