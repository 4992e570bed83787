"""Step 1: `torch.compile` of ViLT: eager, inductor, and the backend `pumer`, which take turns on the same weights."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

import pumer_compile as pumer
from benchmarks.torch_compile import traceable
from pumer_compile.reducers import reducers_of

from .harness import Bench, Row, figures, measure, reason_of, timed
from .models import Inputs, vilt, vilt_inputs, vilt_schedules

SHARE_ROUNDS = 10


def run(bench: Bench) -> None:
    """bfloat16 before float32; the sizes that one graph with an open batch serves before a batch of one."""
    with traceable():
        for dtype in bench.settings.some((torch.bfloat16, torch.float32)):
            model = vilt(bench.settings, dtype)
            try:
                reduced = _reduced(model, bench)
            except Exception as error:
                bench.add({"dtype": str(dtype)}, reason=f"not captured: {reason_of(error)}")
                reduced = {}
            # Tiny: an open batch in one dtype and a fixed one in the other are every path there is.
            groups = _groups(bench)[:1] if bench.settings.tiny and dtype == torch.bfloat16 else _groups(bench)
            groups = groups[-1:] if bench.settings.tiny and dtype == torch.float32 else groups
            for batches in bench.settings.some(groups):
                with torch.inference_mode():
                    _group(model, bench.settings.some(batches), reduced, bench)


def _groups(bench: Bench) -> tuple[tuple[int, ...], ...]:
    return ((2, 3), (1,)) if bench.settings.tiny else ((8, 64, 256), (1,))


def _reduced(model: nn.Module, bench: Bench) -> dict[str, Any]:
    """The reduced programs by schedule, for any batch: their multiply-adds, and their modules in eager PyTorch."""
    program = pumer.capture(model, vilt_inputs(model, 2, bench.settings), dynamic_batch=True)
    return {name: pumer.reduce(program, schedule) for name, schedule in vilt_schedules(bench.settings).items()}


def _group(model: Any, batches: Sequence[int], reduced: dict[str, Any], bench: Bench) -> None:
    """Every contender at batch sizes that one compiled graph serves; each is compiled at the first of them."""
    torch._dynamo.reset()
    inner = bench.settings.inner
    schedules = vilt_schedules(bench.settings)
    contenders: dict[str, Callable[..., Any]] = {"eager": model}
    contenders["inductor"] = torch.compile(model, backend=inner, fullgraph=True)
    for name, schedule in schedules.items():
        options = {"schedule": schedule, "inner": inner}
        contenders[name] = torch.compile(model, backend="pumer", options=options, fullgraph=True)
    begun: dict[str, Row] = {}
    for batch in batches:
        inputs = vilt_inputs(model, batch, bench.settings)
        if batch > 1:
            for tensor in inputs.values():
                torch._dynamo.mark_dynamic(tensor, 0)
        case = {"dtype": str(next(model.parameters()).dtype).removeprefix("torch."), "batch": batch}
        runs: dict[str, Callable[[], Tensor]] = {}
        for name, contender in list(contenders.items()):
            if bench.seconds_left <= 0:
                bench.add({**case, "contender": name}, reason="not begun: the step's time was up")
                continue
            try:
                begun.setdefault(name, _compiled(contender, inputs, reduced.get(name)))
            except Exception as error:
                bench.add({**case, "contender": name}, reason=reason_of(error))
                del contenders[name]
                continue
            runs[name] = lambda contender=contender, inputs=inputs: contender(**inputs).logits  # type: ignore[misc]
        if runs:
            _measured(case, runs, begun, reduced, inputs, bench)


def _compiled(contender: Callable[..., Any], inputs: Inputs, reduced: Any) -> Row:
    """Seconds of the first call, and how far its logits are from those of the reduced module in eager PyTorch."""
    start = time.perf_counter()
    logits = contender(**inputs).logits
    seconds = time.perf_counter() - start
    if not logits.isfinite().all():
        raise ValueError("The logits are not finite.")
    if reduced is None:
        return {"first_call_seconds": seconds}
    difference = (logits.float() - reduced.module(**inputs).logits.float()).abs().max().item()
    return {"first_call_seconds": seconds, "largest_difference_from_eager": difference}


def _measured(
    case: Row, runs: dict[str, Any], begun: dict[str, Row], reduced: dict[str, Any], inputs: Inputs, bench: Bench
) -> None:
    """A row for each contender; speed-ups are against inductor where it is there."""
    try:
        found = measure(runs, bench)
    except Exception as error:  # out of memory, at the largest batch
        for name in runs:
            bench.add({**case, "contender": name}, reason=reason_of(error))
        return
    base = found.get("inductor") or found.get("eager")
    for name, row in found.items():
        more: Row = {**begun.get(name, {})}
        if base is not None:
            more["speed_up"] = base["median_ms"] / row["median_ms"]
        if name in reduced:
            more["fewer_multiply_adds"] = reduced[name].plan.ratio
            more["reducers_share_in_eager"] = reducers_share(reduced[name].module, inputs, bench)
        bench.add({**case, "contender": name}, **more, **row)


def reducers_share(module: nn.Module, inputs: Inputs, bench: Bench) -> float:
    """Of the time of a reduced module in eager PyTorch, what is spent in its reducers: medians of several calls."""
    device, on_gpu = bench.settings.device, bench.settings.on_gpu
    marks: list[Any] = []

    def mark(*_: Any) -> None:
        if on_gpu:
            event = torch.cuda.Event(enable_timing=True)
            event.record()
            marks.append(event)
        else:
            marks.append(1e3 * time.perf_counter())

    reducers = reducers_of(module).values()
    handles = [r.register_forward_pre_hook(mark) for r in reducers] + [r.register_forward_hook(mark) for r in reducers]
    shares = []
    try:
        for _ in range(2 if bench.settings.tiny else SHARE_ROUNDS):
            marks.clear()
            whole = timed(lambda: module(**inputs), device)
            pairs = zip(marks[::2], marks[1::2], strict=True)
            spent = sum(float(a.elapsed_time(b)) if on_gpu else b - a for a, b in pairs)
            shares.append(spent / whole)
    finally:
        for handle in handles:
            handle.remove()
    return float(figures(shares)["median_ms"])
