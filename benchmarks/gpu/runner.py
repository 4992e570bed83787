"""Steps in processes of their own, each with a share of the time, and the table of what they found.

Not in `__main__`, where a spawned process would not find them.
"""

from __future__ import annotations

import json
import multiprocessing
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from . import step_compile, step_decisions, step_engines, step_ort, step_prompts
from .harness import Bench, Settings

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
    for name in steps:
        (settings.out / f"{name}.json").unlink(missing_ok=True)  # an earlier run's would pass for this one's
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
