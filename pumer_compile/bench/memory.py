"""What memory an artifact adds to a process: its peak on the CPU, what is taken after running on a GPU."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..errors import ExportError
from .foreign import opened

Feeds = Sequence[Mapping[str, Tensor]]
_CHILD = "from pumer_compile.bench.memory import measure_memory; measure_memory()"


def memory_in_a_process(path: str, options: Mapping[str, Any], feeds: Feeds, on_gpu: bool) -> list[int | None]:
    """Bytes that an artifact adds, for each batch; in a process of its own, where nothing else was loaded before."""
    asked = io.BytesIO()
    torch.save({"path": path, "options": dict(options), "feeds": [dict(feed) for feed in feeds], "gpu": on_gpu}, asked)
    child = subprocess.run(
        [sys.executable, "-c", _CHILD],
        input=asked.getvalue(),
        capture_output=True,
        check=False,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(entry for entry in sys.path if entry)},
    )
    lines = child.stdout.decode().splitlines()
    if child.returncode != 0 or not lines:
        reason = (child.stderr.decode(errors="replace").strip().splitlines() or [f"exit code {child.returncode}"])[-1]
        raise ExportError(f"The memory of {path} could not be measured, because it did not run: {reason}")
    return list(json.loads(lines[-1]))


def measure_memory() -> None:
    """The other side of `memory_in_a_process`: the question on standard input, a JSON list on standard output."""
    asked = torch.load(io.BytesIO(sys.stdin.buffer.read()), weights_only=True)
    _forget_the_peak()
    before = _used(asked["gpu"])
    engine, found = opened(asked["path"], **asked["options"]), []
    for feed in asked["feeds"]:
        for _ in range(2):  # the second call finds the memory of the first
            engine(**feed)
        synchronize(engine.device)
        after = _used(asked["gpu"])
        found.append(None if after is None or before is None else after - before)
    print(json.dumps(found))


def _used(on_gpu: bool) -> int | None:
    """Bytes in use on the GPU now, or by this process at its peak; None where the system does not tell."""
    if on_gpu:  # runtimes take memory past torch, whose own counters do not see it
        free, total = torch.cuda.mem_get_info()
        return int(total - free)
    # `getrusage` would count the parent's peak as well.
    try:
        lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), None)


def _forget_the_peak() -> None:
    """Imports may have needed more for a moment than stays; without the right to reset, the peak is theirs as well."""
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    except OSError:
        pass


def synchronize(device: torch.device) -> None:
    """Wait for what was queued on a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
