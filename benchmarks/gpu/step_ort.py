"""Step 4: onnxruntime on the device, inputs and outputs in its memory: ViLT, and a LLaVA prefill of few layers."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch

import pumer_compile as pumer
from pumer_compile.exporters import OnnxOptions
from pumer_compile.runtimes.ort import check_provider
from pumer_compile.schedule import Schedule

from .harness import Bench, NotHere, Row, alternate, figures, reason_of
from .models import llava, made_on, prompts_of, vilt, vilt_inputs, vilt_schedules

LAYERS = 4


def run(bench: Bench) -> None:
    """What is missing is said once; ViLT at two batch sizes, then the prefill."""
    provider = "cuda" if bench.settings.on_gpu else "cpu"
    try:
        check_provider(provider)
    except Exception as error:
        bench.add({"model": "all", "provider": provider}, reason=reason_of(error))
        return
    with tempfile.TemporaryDirectory() as folder:
        for name, build in bench.settings.some([*_builds(bench).items()]):
            try:
                before, after = build()
            except Exception as error:
                bench.add({"model": name, "provider": provider}, reason=reason_of(error))
                continue
            _pair(name, before, after, provider, Path(folder), bench)


def _builds(bench: Bench) -> dict[str, Callable[[], tuple[Any, Any]]]:
    """Unreduced and reduced programs, captured on the CPU in float32; the artifacts are float16 on a GPU."""
    settings, cpu = bench.settings, torch.device("cpu")

    def of_vilt(batch: int) -> tuple[Any, Any]:
        model = vilt(settings, torch.float32, cpu)
        program = pumer.capture(model, vilt_inputs(model, batch, settings))
        return program, pumer.reduce(program, next(iter(vilt_schedules(settings).values())))

    def of_prompts() -> tuple[Any, Any]:
        model = llava(tiny=settings.tiny, layers=LAYERS)
        made = made_on(model, cpu, torch.float32)
        program = pumer.capture(made, prompts_of(model, made, 1), outputs=["logits"])
        return program, pumer.reduce(program, Schedule(method="vispruner", budget=round(model.rows * 0.11)))

    sizes = (1,) if settings.tiny else (1, 8)
    found: dict[str, Callable[[], tuple[Any, Any]]] = {f"ViLT, batch {size}": partial(of_vilt, size) for size in sizes}
    return {**found, "LLaVA prefill, 11% of the image": of_prompts}


def _pair(name: str, before: Any, after: Any, provider: str, folder: Path, bench: Bench) -> None:
    """Export both, prove the reduced one where it runs, let them take turns."""
    engines: dict[str, Any] = {}
    dtype = "float16" if bench.settings.on_gpu else "float32"
    # The fused form of RMSNorm does not pass the check of the ONNX model: language models are portable ones.
    target = None if name.startswith("LLaVA") else f"onnxruntime-{provider}"
    for what, done in bench.settings.some((("reduced", after), ("unreduced", before))):
        case = {"model": name, "provider": provider, "dtype": dtype, "artifact": what, "target": target}
        path = folder / f"{len(bench.rows)}.onnx"
        start = time.perf_counter()
        if bench.seconds_left <= 0:
            bench.add(case, reason="not begun: the step's time was up")
            continue
        try:
            pumer.export(done, path, options=OnnxOptions(dtype=dtype, target=target), verify=False)
            engine = pumer.Engine(path, provider=provider)
            if provider not in engine.provider.lower():
                raise NotHere(f"onnxruntime runs it on {engine.provider}, not on {provider}")
        except Exception as error:
            bench.add(case, reason=reason_of(error))
            continue
        engines[what] = (engine, path, time.perf_counter() - start)
    if not engines:
        return
    sample = before.inputs
    runs = {what: _call(engine, sample) for what, (engine, _, _) in engines.items()}
    try:
        samples = alternate(runs, bench)
    except Exception as error:
        bench.add({"model": name, "provider": provider, "dtype": dtype}, reason=reason_of(error))
        return
    rows = {what: figures(milliseconds) for what, milliseconds in samples.items()}
    for what, row in rows.items():
        engine, path, seconds = engines[what]
        more: Row = {"provider_in_use": engine.provider, "export_seconds": seconds}
        if what == "reduced":
            more["fewer_multiply_adds"] = after.plan.ratio
            more["parity"] = _parity(path, before.model, provider, bench)
            if "unreduced" in rows:
                more["speed_up"] = rows["unreduced"]["median_ms"] / row["median_ms"]
        bench.add({"model": name, "provider": provider, "dtype": dtype, "artifact": what}, **more, **row)


def _call(engine: Any, sample: Any) -> Callable[[], Any]:
    specs = engine.input_specs
    fed = {n: t.to(engine.device, specs[n].dtype) for n, t in sample.items() if n in specs}
    return lambda: engine(**fed)


def _parity(path: Path, model: Any, provider: str, bench: Bench) -> Row:
    """The proof on the device, or why there is none."""
    if bench.seconds_left <= 0 or bench.settings.least:
        return {"reason": "not begun: the step's time was up"}
    try:
        return pumer.parity(path, model, provider=provider).to_dict()
    except Exception as error:
        return {"reason": reason_of(error)}
