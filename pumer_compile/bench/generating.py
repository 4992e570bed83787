"""Generation: time to the first token, tokens a second, and what the reducers take of the prefill."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ..errors import UsageError
from ..generation import Generator

REDUCERS = "reducer."
PROFILED = 3


@dataclass(frozen=True)
class Generation:
    """One prefill with a decoding step.

    Attributes:
        artifact: the prefill.
        first_token_ms: median milliseconds from the prompt to the first token.
        tokens_per_second: of those behind the first, of one sample, at the median.
        tokens: that were made.
        reducers_share: of the time of the prefill's operators; 0 where nothing is reduced.
    """

    artifact: str
    first_token_ms: float
    tokens_per_second: float
    tokens: int
    reducers_share: float

    def to_dict(self) -> dict[str, Any]:
        """As JSON holds it."""
        return asdict(self)


def bench_generation(
    prefills: list[str],
    decode: Path,
    feed: Mapping[str, Tensor],
    *,
    tokens: int = 32,
    iterations: int = 5,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Generation]:
    """Measure generation with each prefill in turn, by the same step of decoding.

    Args:
        prefills: artifacts that give logits and caches.
        decode: made by `export_decode` from the same model.
        feed: a prompt.
        tokens: to make, at least two.
        iterations: rounds that count; one before them does not.
        progress: told what is going on.

    Raises:
        UsageError: see `Generator`; fewer than two tokens.
    """
    if tokens < 2:
        raise UsageError("Tokens a second are of those behind the first: make two or more.")
    generators = {path: Generator(path, decode) for path in prefills}
    first: dict[str, list[float]] = {path: [] for path in prefills}
    whole: dict[str, list[float]] = {path: [] for path in prefills}
    for turn in range(iterations + 1):
        progress(f"generating: round {turn} of {iterations}")
        for path in prefills[:: -1 if turn % 2 else 1]:
            for count, kept in ((1, first), (tokens, whole)):
                start = time.perf_counter()
                generators[path].generate(feed, count)
                if turn:
                    kept[path].append(1e3 * (time.perf_counter() - start))
    found = []
    for path in prefills:
        to_first, to_last = float(np.median(first[path])), float(np.median(whole[path]))
        rest = max(to_last - to_first, 1e-6)
        share = reducers_share(Path(path), feed)
        found.append(Generation(path, to_first, 1e3 * (tokens - 1) / rest, tokens, share))
    return found


def reducers_share(path: Path, feed: Mapping[str, Tensor]) -> float:
    """What the operators of reducers take of the time of all, under onnxruntime on the CPU.

    Operators that a fusion has renamed count for the model, so it is a lower bound.
    """
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    options.log_severity_level = 3
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        given = {i.name: feed[i.name].numpy() for i in session.get_inputs()}
        for _ in range(PROFILED):
            session.run(None, given)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    kernels = [e for e in events if e.get("cat") == "Node" and str(e["name"]).endswith("_kernel_time")]
    total = sum(e["dur"] for e in kernels)
    return sum(e["dur"] for e in kernels if REDUCERS in e["name"]) / total if total else 0.0
