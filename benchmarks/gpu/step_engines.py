"""Step 3: TensorRT engines of ViLT in float16: built, proved on the device, timed."""

from __future__ import annotations

import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

import pumer_compile as pumer
from pumer_compile.exporters import EngineOptions
from pumer_compile.runtimes.tensorrt_library import load_library

from .harness import Bench, NotHere, Row, alternate, figures, reason_of
from .models import vilt, vilt_inputs, vilt_schedules


def run(bench: Bench) -> None:
    """TensorRT where it is installed, else TensorRT-RTX; the reduced model first, then the unreduced one."""
    cpu = torch.device("cpu")
    with tempfile.TemporaryDirectory() as folder:
        first = next(iter(vilt_schedules(bench.settings)))
        for builder in ("tensorrt", "tensorrt-rtx"):
            try:
                load_library(builder)
            except Exception as error:
                bench.add({"builder": builder}, reason=reason_of(error))
                continue
            model = vilt(bench.settings, torch.float32, cpu)
            inputs = vilt_inputs(model, 1, bench.settings)
            program = pumer.capture(model, inputs)
            for name in bench.settings.some((first, "none")):
                path = Path(folder) / f"{builder}-{name}.engine"
                done = program if name == "none" else pumer.reduce(program, vilt_schedules(bench.settings)[name])
                case = {"builder": builder, "schedule": name, "dtype": "float16", "batch": 1}
                bench.attempt({**case, "what": "build"}, partial(_built, done, path, builder, bench))
                for graph in (False, True):
                    what = {**case, "what": "run, CUDA graph" if graph else "run"}
                    bench.attempt(what, partial(_ran, path, inputs, graph, bench))


def _built(done: Any, path: Path, builder: str, bench: Bench) -> Row:
    """Build and prove; the report says on what."""
    start = time.perf_counter()
    options, verify = EngineOptions(dtype="float16", builder=builder), not bench.settings.least
    report = pumer.export(done, path, options=options, verify=verify).report
    return {
        "seconds": time.perf_counter() - start,
        "bytes": path.stat().st_size,
        "proved_on": "nothing" if report is None else report.stand_in or "the engine itself",
        "parity": None if report is None else report.to_dict(),
    }


def _ran(path: Path, inputs: Any, graph: bool, bench: Bench) -> Row:
    if not path.exists():
        raise NotHere("no engine was built")
    engine = pumer.Engine(path, cuda_graph=graph)
    fed = {name: tensor.to(engine.device) for name, tensor in inputs.items() if name in engine.inputs}
    cast = {n: t.to(engine.input_specs[n].dtype) for n, t in fed.items()}
    return figures(alternate({"engine": lambda: engine(**cast)}, bench)["engine"])
