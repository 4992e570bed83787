"""What the steps share: the clock, the file that each writes as it goes, and how calls are timed."""

from __future__ import annotations

import copy
import gc
import json
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import torch

from pumer_compile.bench.bench import environment
from pumer_compile.files import atomic_path

ROOT = Path(__file__).resolve().parents[2]
ROUNDS, WARMUP, FEWEST = 50, 10, 5
# A case that is slow is measured less often rather than at the cost of the next one.
SECONDS_OF_A_CASE = 15.0
REASON_LENGTH = 400

Run = Callable[[], Any]
Row = dict[str, Any]
T = TypeVar("T")


class NotHere(RuntimeError):
    """This machine cannot do a case; the message is the row's reason."""


@dataclass(frozen=True)
class Settings:
    """What a run of the benchmark is asked for.

    Attributes:
        device: that everything runs on.
        tiny: small models in place of full-size ones, to try the machinery.
        out: folder of the results.
        inner: backend of `torch.compile` behind the reducers, and of what they are compared with.
        commit: of this repository.
        rounds: calls that are counted, of each contender.
        least: of every list of cases the first alone, for a test.
    """

    device: torch.device
    tiny: bool
    out: Path
    inner: str = "inductor"
    commit: str = "unknown"
    rounds: int = ROUNDS
    least: bool = False

    def some(self, cases: Sequence[T]) -> Sequence[T]:
        """The cases that are to be measured."""
        return cases[:1] if self.least else cases

    @property
    def on_gpu(self) -> bool:
        """Whether the device is a GPU."""
        return self.device.type == "cuda"


@dataclass
class Bench:
    """One step at work: its clock and its rows, which are on the disk as soon as they are known.

    Attributes:
        name: of the step; the file is `<name>.json`.
        settings: see there.
        deadline: on `time.monotonic`; what was not begun by then gets a row that says so.
        rows: so far.
    """

    name: str
    settings: Settings
    deadline: float
    rows: list[Row] = field(default_factory=list)
    _started: float = field(default_factory=time.monotonic)

    @property
    def path(self) -> Path:
        """Of the results."""
        return self.settings.out / f"{self.name}.json"

    @property
    def seconds_left(self) -> float:
        """Until the deadline."""
        return self.deadline - time.monotonic()

    def add(self, case: Mapping[str, Any], **found: Any) -> None:
        """A row: what was measured (or why not, as `reason`); writes the file."""
        self.rows.append({**case, **found, "at_seconds": round(time.monotonic() - self._started, 1)})
        self.write()

    def attempt(self, case: Mapping[str, Any], work: Callable[[], Row]) -> None:
        """Add the row that `work` gives, or the reason why there is none. What fails does not end the step."""
        if self.seconds_left <= 0:
            self.add(case, reason="not begun: the step's time was up")
            return
        try:
            found = work()
        except Exception as error:
            found = {"reason": reason_of(error)}
        self.add(case, **found)
        forget(self.settings.device)

    def write(self, *, complete: bool = False) -> None:
        """The file, whole at any time."""
        result = {
            "step": self.name,
            "complete": complete,
            "tiny": self.settings.tiny,
            "inner": self.settings.inner,
            "commit": self.settings.commit,
            "seconds": round(time.monotonic() - self._started, 1),
            "machine": {**environment([self.settings.device]), "driver": driver()},
            "rows": self.rows,
        }
        with atomic_path(self.path) as temporary:
            temporary.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


def reason_of(error: BaseException) -> str:
    """An error in one line; the end of a long one, where libraries say what it was."""
    text = " ".join(str(error).split()) or type(error).__name__
    named = text if isinstance(error, NotHere) else f"{type(error).__name__}: {text}"
    return named if len(named) <= REASON_LENGTH else f"{named[: REASON_LENGTH // 2]} ... {named[-REASON_LENGTH // 2 :]}"


def forget(device: torch.device) -> None:
    """Give back what nobody holds: captured programs hold each other."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()


def driver() -> str | None:
    """Version of NVIDIA's driver; None where there is none."""
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        said = subprocess.run(query, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return said.stdout.split("\n")[0].strip() or None


def commit() -> str:
    """Of the checkout that this runs in; `unknown` without one."""
    asked = ["git", "-C", str(ROOT), "rev-parse", "HEAD"]
    try:
        said = subprocess.run(asked, capture_output=True, text=True, check=False, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return said.stdout.strip() or "unknown"


# --- Times ------------------------------------------------------------------------------------------------------------


def timed(run: Run, device: torch.device) -> float:
    """Milliseconds of one call, begun on an idle device: by its own events on a GPU."""
    if device.type != "cuda":
        start = time.perf_counter()
        run()
        return 1e3 * (time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize(device)
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize(device)
    return float(begin.elapsed_time(end))


def alternate(runs: Mapping[str, Run], bench: Bench) -> dict[str, list[float]]:
    """Milliseconds of every call by contender, taking turns, every other round in reverse.

    A round is skipped where the step's time is up and each has been measured a few times.
    """
    settings, names = bench.settings, list(runs)
    samples: dict[str, list[float]] = {name: [] for name in names}
    warmup, began = (1 if settings.tiny else WARMUP), time.monotonic()
    for turn in range(warmup + settings.rounds):
        spent = time.monotonic() - began
        enough = turn >= warmup + FEWEST
        if enough and (bench.seconds_left <= 0 or spent > SECONDS_OF_A_CASE * len(names)):
            break
        for name in names[:: -1 if turn % 2 else 1]:
            milliseconds = timed(runs[name], settings.device)
            if turn >= warmup:
                samples[name].append(milliseconds)
    return samples


def figures(milliseconds: Sequence[float]) -> Row:
    """Median and quartiles, and every sample."""
    low, median, high = (
        statistics.quantiles(milliseconds, n=4) if len(milliseconds) > 1 else [*milliseconds, *milliseconds * 2][:3]
    )
    return {"median_ms": median, "quartiles_ms": [low, high], "milliseconds": list(milliseconds)}


def peak_memory(run: Run, device: torch.device) -> int | None:
    """Bytes that a call takes at its peak beyond what lies there; None on the CPU, where torch does not count."""
    if device.type != "cuda":
        return None
    torch.cuda.synchronize(device)
    torch.cuda.reset_peak_memory_stats(device)
    before = torch.cuda.memory_allocated(device)
    run()
    torch.cuda.synchronize(device)
    return int(torch.cuda.max_memory_allocated(device) - before)


def graphed(run: Run, device: torch.device) -> Run:
    """A call as a CUDA graph, to be replayed on the same inputs.

    Raises:
        NotHere: no GPU, or the call cannot be recorded (it waits for the device, say).
    """
    if device.type != "cuda":
        raise NotHere("CUDA graphs need a GPU")
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream(device).wait_stream(stream)
    torch.cuda.synchronize(device)
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            held = run()
    except Exception as error:
        torch.cuda.synchronize(device)
        raise NotHere(f"not recorded as a CUDA graph: {reason_of(error)}") from error

    def replay() -> Any:
        graph.replay()
        return held

    return replay


def measure(runs: Mapping[str, Run], bench: Bench) -> dict[str, Row]:
    """What every contender takes: times launched and as CUDA graphs, and peak memory."""
    device = bench.settings.device
    found = {name: figures(samples) for name, samples in alternate(runs, bench).items()}
    graphs: dict[str, Run] = {}
    for name, run in runs.items():
        found[name]["peak_bytes"] = peak_memory(run, device)
        try:
            graphs[name] = graphed(run, device)
        except NotHere as error:
            found[name]["cuda_graph"] = {"reason": str(error)}
    for name, samples in (alternate(graphs, bench) if graphs else {}).items():
        found[name]["cuda_graph"] = figures(samples)
    return found


def fresh_cache(cache: Any) -> Any:
    """A transformers cache that a call may lengthen without changing the one it is made from."""
    made = copy.copy(cache)
    made.layers = [copy.copy(layer) for layer in cache.layers]
    return made
