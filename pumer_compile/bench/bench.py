"""Latency, throughput and memory of artifacts; two of them take turns, so that a busy machine slows both."""

from __future__ import annotations

import json
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..artifacts.engine import Engine
from ..artifacts.formats import format_of, takers
from ..artifacts.manifest import artifact_bytes, library_versions, reduced_by
from ..artifacts.profile import Profile
from ..artifacts.runtime import fitted
from ..capture.capture import batch_inputs
from ..capture.make_inputs import read_arrays
from ..capture.samples import Samples, kinds_of, resized_batch
from ..errors import UsageError
from ..files import atomic_path, sha256_file
from ..guards import check_prompts
from ..plan import PromptPlace
from .foreign import feed_for, manifest_of, opened
from .generating import Generation, bench_generation
from .memory import memory_in_a_process, synchronize
from .spread import WIDE, factor_interval, spread

FORMAT = 1
SEED = 0


@dataclass(frozen=True)
class Measurement:
    """One artifact at one batch size.

    Attributes:
        artifact: its path, as given.
        batch: samples of a call.
        milliseconds: of every call, in order, inputs and outputs on the device.
        peak_memory: bytes that the artifact adds to a process of its own: at its peak on the CPU, after running on a
            GPU; None where the system does not tell.
    """

    artifact: str
    batch: int
    milliseconds: list[float]
    peak_memory: int | None

    def percentile(self, share: float) -> float:
        """Milliseconds that this share (0 to 100) of the calls did not exceed."""
        return float(np.percentile(self.milliseconds, share))

    @property
    def mean(self) -> float:
        """Milliseconds of a call."""
        return float(np.mean(self.milliseconds))

    @property
    def throughput(self) -> float:
        """Samples a second, one call after another."""
        return 1e3 * self.batch / self.mean

    def to_dict(self) -> dict[str, Any]:
        """Every sample, and what follows from them."""
        return {
            "artifact": self.artifact,
            "batch": self.batch,
            "p50_ms": self.percentile(50),
            "p90_ms": self.percentile(90),
            "p99_ms": self.percentile(99),
            "mean_ms": self.mean,
            "samples_per_second": self.throughput,
            "peak_memory_bytes": self.peak_memory,
            "milliseconds": self.milliseconds,
        }


@dataclass(frozen=True)
class Comparison:
    """Two artifacts at one batch size: `faster` is `factor` (at least 1) times as fast as `slower`, by medians.

    Attributes:
        low, high: the 95% bootstrap interval of the factor.
    """

    batch: int
    faster: str
    slower: str
    factor: float
    low: float = field(default=1.0, compare=False)
    high: float = field(default=1.0, compare=False)

    @property
    def proved(self) -> bool:
        """Whether the interval leaves no doubt about which is faster."""
        return self.low > 1


@dataclass
class BenchReport:
    """What was measured, on what.

    Attributes:
        settings: iterations, warm-up, where inputs came from.
        environment: of the machine.
        artifacts: what was measured: hash, dtype, schedule (in words: `reduced_by`) and provider by path.
        measurements: by batch, then by artifact.
        generation: of prefills with a step of decoding, where that was asked for.
    """

    settings: dict[str, Any]
    environment: dict[str, Any]
    artifacts: dict[str, dict[str, Any]]
    measurements: list[Measurement] = field(default_factory=list)
    generation: list[Generation] = field(default_factory=list)

    def warnings(self) -> list[str]:
        """What makes the figures doubtful, in sentences."""
        found = []
        for row in self.measurements:
            wide = spread(row.milliseconds)
            if wide > WIDE:
                found.append(
                    f"The times of {row.artifact} at a batch of {row.batch} spread over {wide:.0%} of their median "
                    "(10th to 90th percentile): something else runs on this machine. Measure again when it is idle."
                )
        for one in self.comparisons():
            if not one.proved:
                found.append(
                    f"At a batch of {one.batch} these calls do not tell which of {one.faster} and {one.slower} is "
                    f"faster: the factor is between {one.low:.2f} and {one.high:.2f} (95%). Use more --iterations."
                )
        return found

    def comparisons(self) -> list[Comparison]:
        """The first artifact beside every other, at every batch size, by their medians."""
        found = []
        for row in self.measurements:
            first = next(m for m in self.measurements if m.batch == row.batch)
            if row is not first:
                fast, slow = sorted((first, row), key=lambda m: m.percentile(50))
                factor = slow.percentile(50) / fast.percentile(50)
                interval = factor_interval(slow.milliseconds, fast.milliseconds)
                found.append(Comparison(row.batch, fast.artifact, slow.artifact, factor, *interval))
        return found

    def to_dict(self) -> dict[str, Any]:
        """Everything, as JSON holds it."""
        return {
            "format": FORMAT,
            "settings": self.settings,
            "environment": self.environment,
            "artifacts": self.artifacts,
            "measurements": [row.to_dict() for row in self.measurements],
            "comparisons": [asdict(one) for one in self.comparisons()],
            "warnings": self.warnings(),
            **({"generation": [one.to_dict() for one in self.generation]} if self.generation else {}),
        }

    def save(self, path: Path) -> None:
        """Write it as JSON."""
        with atomic_path(path) as temporary:
            temporary.write_text(json.dumps(self.to_dict(), indent=1) + "\n", encoding="utf-8")


def bench(
    artifacts: Sequence[str | os.PathLike[str]],
    *,
    batches: Sequence[int] = (),
    iterations: int = 50,
    warmup: int = 10,
    inputs: Path | None = None,
    provider: str | None = None,
    cuda_graph: bool = False,
    decode: Path | None = None,
    tokens: int = 32,
    progress: Callable[[str], None] = lambda text: None,
) -> BenchReport:
    """Measure one artifact, or several in turn.

    Made-up inputs do as well as real ones: no shape in an artifact depends on values.

    Args:
        artifacts: paths; the first, which is made by pumer-compile, is what others are compared with. These may be ONNX
            models that others made, of the same inputs.
        batches: sizes; none takes the one that the first artifact was compiled with, or the one its profile is tuned
            for.
        iterations: calls of each artifact at each size.
        warmup: calls before, which are not counted.
        inputs: an .npz of arrays by input name, repeated or cut to each size; None makes them up.
        provider: for ONNX artifacts: `cpu`, `cuda` or `tensorrt`.
        cuda_graph: for engines.
        decode: a step of decoding (`export_decode`): generation with each artifact is measured too.
        tokens: that it makes.
        progress: told what is going on.

    Raises:
        UsageError: artifacts that take different inputs or sizes, or something that this machine lacks.
    """
    paths = [str(path) for path in artifacts]
    if len(set(paths)) != len(paths) or not paths or iterations < 1 or warmup < 0:
        raise UsageError("Give different artifacts, at least one iteration, and no negative warm-up.")
    manifests = {path: manifest_of(Path(path)) for path in paths}
    if manifests[paths[0]].get("foreign"):
        raise UsageError(f"{paths[0]} was not made by pumer-compile. Name it with --vs, behind an artifact that was.")
    sizes = sorted(set(batches)) or [_own_batch(manifests[paths[0]])]
    feeds = {size: _inputs(manifests, size, inputs) for size in sizes}
    how = _options(paths, provider=provider, cuda_graph=cuda_graph)
    engines = {path: opened(path, **how[path]) for path in paths}
    fed = {path: {size: _fed(path, manifests, feed) for size, feed in feeds.items()} for path in paths}
    memory = _memory(engines, how, fed, progress)
    report = BenchReport(
        {"iterations": iterations, "warmup": warmup, "inputs": inputs.name if inputs else "made up", "seed": SEED},
        environment([engine.device for engine in engines.values()]),
        {path: _described(path, engine) for path, engine in engines.items()},
    )
    for index, size in enumerate(sizes):
        own = {path: fed[path][size] for path in paths}
        samples = alternate(engines, own, iterations, warmup, progress)
        report.measurements += [Measurement(path, size, samples[path], memory[path][index]) for path in paths]
    if decode is not None:
        how_long: dict[str, Any] = {"tokens": tokens, "iterations": min(iterations, 5)}
        report.generation = bench_generation(paths, decode, feeds[sizes[0]], **how_long, progress=progress)
    return report


def _memory(
    engines: Mapping[str, Engine],
    how: Mapping[str, Mapping[str, Any]],
    fed: Mapping[str, Mapping[int, Mapping[str, Tensor]]],
    progress: Callable[[str], None],
) -> dict[str, list[int | None]]:
    """Bytes of each artifact by batch size; every batch is looked at before anything is measured."""
    for path, engine in engines.items():
        for feed in fed[path].values():
            fitted(feed, engine.input_specs)
    found = {}
    for path, engine in engines.items():
        progress(f"memory of {path}")
        on_gpu = engine.device.type == "cuda"
        found[path] = memory_in_a_process(path, how[path], list(fed[path].values()), on_gpu)
    return found


def _fed(path: str, manifests: Mapping[str, Mapping[str, Any]], feed: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A batch as an artifact takes it."""
    manifest = manifests[path]
    return feed_for(path, manifest, next(iter(manifests.values())), feed) if manifest.get("foreign") else dict(feed)


def alternate(
    engines: Mapping[str, Engine],
    feeds: Mapping[str, Mapping[str, Tensor]],
    iterations: int,
    warmup: int,
    progress: Callable[[str], None] = lambda text: None,
) -> dict[str, list[float]]:
    """Milliseconds of every call by artifact; inputs lie on the device in the right dtypes before.

    Each round calls every artifact, every other round in reverse, so that none is always the first. `feeds` are by
    artifact.
    """
    fed = {name: fitted(feeds[name], engine.input_specs, engine.device) for name, engine in engines.items()}
    samples: dict[str, list[float]] = {name: [] for name in engines}
    rounds = warmup + iterations
    for turn in range(rounds):
        if turn % max(1, rounds // 10) == 0:  # a line each where there is no terminal
            progress(f"round {turn + 1} of {rounds}")
        for name in list(engines)[:: -1 if turn % 2 else 1]:
            engine = engines[name]
            synchronize(engine.device)
            start = time.perf_counter()
            engine(**fed[name])
            synchronize(engine.device)
            if turn >= warmup:
                samples[name].append(1e3 * (time.perf_counter() - start))
    return samples


# --- What is fed ------------------------------------------------------------------------------------------------------


def _own_batch(manifest: Mapping[str, Any]) -> int:
    profiles = manifest.get("profiles") or ()
    return Profile.parse(profiles[0]).optimum if profiles else _captured_batch(manifest)


def _captured_batch(manifest: Mapping[str, Any]) -> int:
    shapes = {name: spec["shape"] for name, spec in manifest["inputs"].items()}
    batched = batch_inputs({name: torch.empty(shape, device="meta") for name, shape in shapes.items()})
    return int(shapes[batched[0]][0]) if batched else 1


def _inputs(manifests: Mapping[str, Mapping[str, Any]], size: int, inputs: Path | None) -> dict[str, Tensor]:
    """A batch that every artifact takes."""
    first_path, first = next(iter(manifests.items()))
    for path, manifest in manifests.items():
        if manifest.get("foreign"):
            continue
        if set(manifest["inputs"]) != set(first["inputs"]):
            raise UsageError(
                f"{path} takes {', '.join(manifest['inputs'])}, and {first_path} {', '.join(first['inputs'])}. Compare "
                "artifacts of one model."
            )
        fixed = _captured_batch(manifest)
        if not manifest.get("dynamic_batch") and size != fixed:
            raise UsageError(
                f"{path} was compiled for a batch of {fixed} and takes no other, such as {size}. Leave --batch out, or "
                "compile with --dynamic-batch or --profile."
            )
    if inputs is not None:
        return resized_batch([_from_file(inputs, first)], size)
    prompts = [PromptPlace(**place) for place in (first.get("plan") or {}).get("prompts", ())]
    made = Samples(kinds_of(first), prompts, padded=False, seed=SEED).batch(size)
    return {name: made[name] for name in first["inputs"]}


def _from_file(path: Path, manifest: Mapping[str, Any]) -> dict[str, Tensor]:
    arrays = read_arrays(path)
    missing = [name for name in manifest["inputs"] if name not in arrays]
    if missing:
        raise UsageError(f"{path} has no array {missing[0]}; it has {', '.join(arrays)}.")
    given = {name: torch.from_numpy(array) for name, array in arrays.items()}
    check_prompts(manifest, given)
    return {name: given[name] for name in manifest["inputs"]}


# --- What it runs on --------------------------------------------------------------------------------------------------


def _options(paths: Sequence[str], **given: Any) -> dict[str, dict[str, Any]]:
    """Of every artifact, the options that its format has; each option must be for one of them."""
    formats = {path: format_of(Path(path)) for path in paths}
    for name, value in given.items():
        if value and not any(name in known.options for known in formats.values()):
            flag = f"--{name.replace('_', '-')}"
            raise UsageError(f"{flag} is for {takers(name)}, and none of these is one. Leave it out.")
    return {path: {n: v for n, v in given.items() if n in known.options} for path, known in formats.items()}


def _described(path: str, engine: Engine) -> dict[str, Any]:
    said = ("dtype", "schedule_sha256", "tokens", "builder", "builder_version", "versions", "profiles")
    plan = engine.manifest.get("plan")
    return {
        "sha256": sha256_file(path),
        "bytes": artifact_bytes(Path(path)),
        "provider": engine.provider,
        "device": str(engine.device),
        "reduced_by": reduced_by(engine.manifest),
        "fewer_multiply_adds": plan["multiply_adds"]["ratio"] if plan else None,
        **{name: engine.manifest.get(name) for name in said},
    }


def environment(devices: Sequence[torch.device] = ()) -> dict[str, Any]:
    """The machine: processor, cores, load, versions, and the GPUs among `devices`."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    return {
        "cpu": _processor(),
        "cores": os.cpu_count(),
        "usable_cores": usable,
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS"),
        "load_average": list(os.getloadavg()) if hasattr(os, "getloadavg") else None,
        "system": f"{platform.system()} {platform.release()} {platform.machine()}",
        "python": platform.python_version(),
        "versions": library_versions(),
        "gpus": {str(device): _gpu(device) for device in devices if device.type == "cuda"},
    }


def _gpu(device: torch.device) -> dict[str, Any]:
    about = torch.cuda.get_device_properties(device)
    return {
        "name": about.name,
        "compute_capability": f"{about.major}.{about.minor}",
        "memory_bytes": about.total_memory,
        "cuda": torch.version.cuda,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
