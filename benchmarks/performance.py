"""Everything that takes a model's time, side by side in one run: what this package makes, and its peers.

For each model and batch size all contenders take turns in one process, so that a busy machine slows them alike:
transformers in eager PyTorch, inductor, transformers' own ONNX exporter (plain, and with its fusions for onnxruntime),
and of this package the unreduced and the reduced model as ONNX, under `torch.compile` and in eager PyTorch. Beside the
times stand multiply-adds, the share of the machine's matrix peak (measured in every round), the reducers' share of
onnxruntime's time, memory beyond the weights, the size of artifacts, compile time by stage, and the memory of a
training step. Weights are random.

    python -m benchmarks.performance                        # many minutes
    python -m benchmarks.performance --work vilt --batch 1  # a part
    python -m benchmarks.performance --tiny                 # the machinery alone

Writes one JSON with every sample and the machine, and a plot, after each model and batch size; what an earlier run on
the same machine measured of others stays.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import onnxruntime
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

import pumer_compile as pumer
from benchmarks.common import machine, published
from benchmarks.torch_compile import traceable
from pumer_compile.artifacts.options import OnnxOptions, Target
from pumer_compile.capture.make_inputs import make_inputs
from pumer_compile.exporters.onnx import torch_onnx
from pumer_compile.files import atomic_path
from pumer_compile.frontends.meter import MeterConfig, MeterForQuestionAnswering

RESULTS = Path(__file__).parent / "results" / "performance_cpu.json"
TEXT = 40
REST = 0.3
"""Seconds before each run: threads of the runtime before it spin for a while, and would take its processor."""


@dataclass
class Contender:
    """Something that runs the model.

    Attributes:
        run: once.
        multiply_adds: of one sample.
        facts: size of its artifact, seconds by stage.
    """

    run: Callable[[], Any]
    multiply_adds: int
    facts: dict[str, Any] = field(default_factory=dict)


def vilt() -> nn.Module:
    """ViLT-B/32 for question answering."""
    from transformers import ViltConfig, ViltForQuestionAnswering

    torch.manual_seed(0)
    return ViltForQuestionAnswering(ViltConfig(num_labels=3129)).eval()


def meter() -> nn.Module:
    """METER at 384 pixels."""
    torch.manual_seed(0)
    return MeterForQuestionAnswering(MeterConfig()).eval()


def tiny() -> nn.Module:
    """A model of no use but to try this script."""
    from transformers import ViltConfig, ViltForQuestionAnswering

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 9}
    return ViltForQuestionAnswering(ViltConfig(**sizes, image_size=64, patch_size=16, vocab_size=99)).eval()


WORKS: dict[str, tuple[Callable[[], nn.Module], tuple[str, ...], tuple[int, ...]]] = {
    "vilt": (vilt, ("vilt-vqa", "vilt-ve"), (1, 8)),
    "meter": (meter, ("meter-vqa", "meter-vqa-tower", "meter-ve-tower"), (4,)),
    "tiny": (tiny, ("vilt-vqa",), (1, 2)),
}


class MatrixPeak:
    """The machine's float32 matrix arithmetic, measured where the contenders are: products of the sizes of a large
    linear layer, for half a second of every round."""

    def __init__(self) -> None:
        self.rows, self.inner, self.columns = 1536, 768, 3072
        self.a, self.b = torch.randn(self.rows, self.inner), torch.randn(self.inner, self.columns)
        self.samples: list[float] = []

    def run(self, seconds: float = 0.5) -> None:
        """Take one sample: the median of products one after another."""
        found, end = [], time.perf_counter() + seconds
        while time.perf_counter() < end:
            start = time.perf_counter()
            self.a @ self.b
            found.append(self.rows * self.inner * self.columns / (time.perf_counter() - start))
        self.samples.append(statistics.median(found))

    @property
    def multiply_adds(self) -> float:
        """In a second, median over the rounds."""
        return statistics.median(self.samples)


# --- contenders -----------------------------------------------------------------------------------------------------


def onnx_contender(path: Path, inputs: dict[str, Tensor], multiply_adds: int, **facts: Any) -> Contender:
    """An ONNX model under onnxruntime, given arrays."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feed = {i.name: inputs[i.name].numpy() for i in session.get_inputs()}
    size = path.stat().st_size + sum(data.stat().st_size for data in path.parent.glob(f"{path.name}*.data"))
    facts["activation_bytes"] = forward_memory(path, inputs)
    return Contender(lambda: session.run(None, feed), multiply_adds, {"bytes": size, **facts})


def forward_memory(path: Path, inputs: dict[str, Tensor]) -> int:
    """Peak memory of a run under onnxruntime beyond what the loaded model takes, in bytes; in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        torch.save(inputs, f"{folder}/inputs.pt")
        command = [sys.executable, "-m", "benchmarks.performance", "--forward", str(path), f"{folder}/inputs.pt"]
        done = subprocess.run(command, capture_output=True, check=True, text=True)
    return int(done.stdout.splitlines()[-1])


def forward(path: str, inputs: str) -> None:
    """Print what `forward_memory` gives."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    tensors = torch.load(inputs, weights_only=True)
    feed = {i.name: tensors[i.name].numpy() for i in session.get_inputs()}
    base = reset_peak()
    session.run(None, feed)
    print(_memory("VmHWM") - base)


def ours(
    program: pumer.Program,
    schedule: str,
    folder: Path,
    inputs: dict[str, Tensor],
    whole: int,
    target: Target | None = None,
) -> Iterator[tuple[str, Contender]]:
    """The ONNX model of a schedule, and the reduced module in eager PyTorch.

    Of a variant (with a target's operators, or without padding) the ONNX model alone.
    """
    variant = " fused" if target else " no padding" if program.unpadded else ""
    stages: dict[str, float] = {}

    @contextmanager
    def stage(name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        stages[name] = time.perf_counter() - start

    with stage("reduce"):
        reduced = None if schedule == "none" else pumer.reduce(program, published(schedule))
    path = folder / f"{schedule}{variant.replace(' ', '-')}.onnx"
    with stage("export and prove"):
        pumer.export(reduced or program, path, options=OnnxOptions(target=target))
    count = whole if reduced is None else reduced.plan.multiply_adds_after
    name = f"onnx {schedule}{variant}"
    shares = operator_shares(path, inputs)
    yield name, onnx_contender(path, inputs, count, stages=stages, **shares)
    if reduced is not None and not variant:
        yield f"eager {schedule}", Contender(lambda: reduced.module(**inputs), count)


def operator_shares(path: Path, inputs: dict[str, Tensor]) -> dict[str, float]:
    """Shares of the operators' time under onnxruntime: of the reducers (with the attention that they are given), and of
    the published softmax that stands for the model's."""
    options = onnxruntime.SessionOptions()
    options.enable_profiling = True
    with tempfile.TemporaryDirectory() as folder:
        options.profile_file_prefix = str(Path(folder) / "profile")
        session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        feed = {i.name: inputs[i.name].numpy() for i in session.get_inputs()}
        for _ in range(5):
            session.run(None, feed)
        events = json.loads(Path(session.end_profiling()).read_text(encoding="utf-8"))
    kernels = [e for e in events if e.get("cat") == "Node" and str(e["name"]).endswith("_kernel_time")]
    total = sum(e["dur"] for e in kernels)
    parts = {"reducers": "reducer.", "published_softmax": "published_softmax."}
    return {part: sum(e["dur"] for e in kernels if name in e["name"]) / total for part, name in parts.items()}


def peers(
    model: nn.Module, inputs: dict[str, Tensor], folder: Path, whole: int, compiled: bool
) -> Iterator[tuple[str, Contender]]:
    """The unreduced model as others run it."""
    from transformers.exporters.configs import OnnxConfig
    from transformers.exporters.exporter_onnx import OnnxExporter

    yield "eager", Contender(lambda: model(**inputs), whole)
    if compiled:
        inductor = torch.compile(model, backend="inductor", fullgraph=True, dynamic=False)
        yield "inductor", Contender(lambda: inductor(**inputs), whole)
    if not isinstance(model, PreTrainedModel):
        return
    for name, fusions in (("transformers onnx", None), ("transformers onnx fused", "cpu")):
        path = folder / f"{name.replace(' ', '-')}.onnx"
        with torch_onnx():
            exported = OnnxExporter().export(model, dict(inputs), OnnxConfig(ort_fusions=fusions))
        OnnxExporter.save_program(exported.program, path)
        yield name, onnx_contender(path, inputs, whole)


def contenders(
    model: nn.Module,
    schedules: tuple[str, ...],
    inputs: dict[str, Tensor],
    folder: Path,
    compiled: bool,
    few: bool = False,
) -> dict[str, Contender]:
    """Everybody, ready to run; under `torch.compile` where that is asked for (minutes for each).

    With `few` our ONNX models and reduced modules alone.
    """
    start = time.perf_counter()
    program = pumer.capture(model, inputs)
    captured = time.perf_counter() - start
    whole = pumer.reduce(program, published(schedules[0])).plan.multiply_adds_before
    found: dict[str, Contender] = {} if few else dict(peers(model, inputs, folder, whole, compiled))
    for schedule in ("none", *(() if few else ("lossless",)), *schedules):
        found.update(ours(program, schedule, folder, inputs, whole))
        found[f"onnx {schedule}"].facts["stages"]["capture"] = captured
        gc.collect()
    if few:
        return found
    if compiled:
        unpadded = pumer.capture(model, inputs, padding=False)
        for schedule in ("none", schedules[-1]):
            found.update(ours(unpadded, schedule, folder, inputs, whole))
    for schedule in schedules if compiled else ():
        if isinstance(model, PreTrainedModel):
            found.update(ours(program, schedule, folder, inputs, whole, "onnxruntime-cpu"))
        options = {"schedule": schedule}
        reduced = torch.compile(model, backend="pumer", options=options, fullgraph=True, dynamic=False)
        count = found[f"onnx {schedule}"].multiply_adds
        found[f"torch.compile {schedule}"] = Contender(lambda f=reduced: f(**inputs), count)
    return found


def alternate(found: dict[str, Contender], rounds: int, peak: MatrixPeak) -> dict[str, list[float]]:
    """Milliseconds of every run, in turn, after two rounds of warm-up. What PyTorch runs comes first in each round, as
    threads of onnxruntime spin on for a while."""
    samples: dict[str, list[float]] = {name: [] for name in found}
    for turn in range(rounds + 2):
        peak.run()
        for name, contender in sorted(found.items(), key=lambda item: "onnx" in item[0]):
            time.sleep(REST)
            start = time.perf_counter()
            contender.run()
            if turn >= 2:
                samples[name].append(1e3 * (time.perf_counter() - start))
    return samples


# --- a training step ------------------------------------------------------------------------------------------------


def train_step(work: str, schedule: str, batch: int) -> None:
    """Print the peak memory of one training step beyond weights, gradients and optimizer state, in bytes."""
    model = WORKS[work][0]()
    inputs = make_inputs(model, batch=batch, text_length=TEXT if work != "tiny" else 16, padding=False)
    forward: Any = model
    if schedule != "none":
        forward = pumer.reduce(pumer.capture(model, inputs), published(schedule)).module
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    gc.collect()
    base = reset_peak()
    forward(**inputs).logits.float().pow(2).mean().backward()
    optimizer.step()
    print(_memory("VmHWM") - base)


def reset_peak() -> int:
    """Let the high-water mark of this process's memory start anew; what it has now, in bytes."""
    base = _memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")
    return base


def _memory(name: str) -> int:
    """Bytes that Linux counts under a name for this process."""
    lines = Path("/proc/self/status").read_text(encoding="utf-8").splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(name))


def training(work: str, schedules: tuple[str, ...], batch: int) -> dict[str, Any]:
    """Bytes that a step of each takes, three times, each in a process of its own."""
    found: dict[str, Any] = {schedule: [] for schedule in ("none", *schedules)}
    for schedule in 3 * tuple(found):
        command = [sys.executable, "-m", "benchmarks.performance", "--train-step", work, schedule, str(batch)]
        done = subprocess.run(command, capture_output=True, check=True, text=True)
        found[schedule].append(int(done.stdout.splitlines()[-1]))
    return found


# --- everything -----------------------------------------------------------------------------------------------------


def measure(work: str, batch: int, rounds: int, wanted: list[str] | None = None, few: bool = False) -> dict[str, Any]:
    """One model at one batch size."""
    build, schedules, _ = WORKS[work]
    schedules = tuple(schedule for schedule in schedules if wanted is None or schedule in wanted)
    model = build()
    inputs = make_inputs(model, batch=batch, text_length=TEXT if work != "tiny" else 16, padding=False)
    torch._dynamo.reset()
    command = ["git", "describe", "--always", "--dirty"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    conditions = {"commit": commit, "load_average_before": os.getloadavg()}
    with tempfile.TemporaryDirectory() as name, torch.no_grad(), traceable():
        found = contenders(model, schedules, inputs, Path(name), work != "meter", few)
        peak = MatrixPeak()
        samples = alternate(found, rounds, peak)
    rows = {}
    for name, contender in found.items():
        median = statistics.median(samples[name])
        share = contender.multiply_adds * batch / (median / 1e3) / peak.multiply_adds
        rows[name] = {
            "milliseconds": samples[name],
            "multiply_adds": contender.multiply_adds,
            "share_of_peak": share,
            **contender.facts,
        }
    return {**conditions, "matrix_peak_multiply_adds_per_second": peak.samples, "contenders": rows}


def print_rows(work: str, batch: int, rows: dict[str, Any]) -> None:
    """A table; ratios are to our own unreduced ONNX model."""
    peak, rows = statistics.median(rows["matrix_peak_multiply_adds_per_second"]), rows["contenders"]
    base = rows["onnx none"]
    print(f"\n{work}, batch {batch}; matrix peak {2 * peak / 1e9:.0f} GFLOP/s")
    heads = f"{'median ms':>10}{'quartiles':>16}{'time':>8}{'work':>8}{'of peak':>9}{'reducers':>10}{'MB':>7}{'+MB':>6}"
    print(f"{'':<28}{heads}")
    for name, row in rows.items():
        low, median, high = statistics.quantiles(row["milliseconds"], n=4)
        saved = statistics.median(base["milliseconds"]) / median
        less = base["multiply_adds"] / row["multiply_adds"]
        line = f"{name:<28}{median:>10.1f}{f'{low:.0f} to {high:.0f}':>16}{saved:>7.2f}x{less:>7.2f}x"
        line += f"{row['share_of_peak']:>9.0%}"
        if "bytes" in row:
            line += f"{row['reducers']:>10.1%}" if "reducers" in row else f"{'':>10}"
            line += f"{row['bytes'] / 1e6:>7.0f}{row['activation_bytes'] / 1e6:>6.0f}"
        print(line, flush=True)


def plot(result: dict[str, Any], path: Path) -> None:
    """Medians as bars, one panel for each model and batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = [(w, b, rows["contenders"]) for w, batches in result["works"].items() for b, rows in batches.items()]
    figure, axes = pyplot.subplots(1, len(panels), figsize=(6 * len(panels), 6), squeeze=False)
    for axis, (work, batch, rows) in zip(axes[0], panels, strict=True):
        names = list(rows)[::-1]
        medians = [statistics.median(rows[name]["milliseconds"]) for name in names]
        colours = ["tab:orange" if {*name.split()} & {*WORKS[work][1]} else "tab:gray" for name in names]
        axis.barh(names, medians, color=colours)
        axis.set_title(f"{work}, batch {batch}")
        axis.set_xlabel("ms (median); orange: reduced")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def measured_before(output: Path | None) -> dict[str, Any]:
    """What is in the file of results, where it is of this very machine and its packages; else nothing but these."""
    conditions: dict[str, Any] = {"machine": machine(), "threads": torch.get_num_threads(), "text_length": TEXT}
    del conditions["machine"]["load_average_before"]  # beside each measurement
    if output is not None and output.exists():
        earlier: dict[str, Any] = json.loads(output.read_text(encoding="utf-8"))
        if all(earlier.get(name) == condition for name, condition in conditions.items()):
            return earlier
    return {**conditions, "works": {}, "training": {}}


def write(result: dict[str, Any], output: Path | None) -> None:
    """The results so far, and their plot."""
    if output is None:
        return
    output.parent.mkdir(parents=True, exist_ok=True)
    with atomic_path(output) as path:
        path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    plot(result, output.with_suffix(".png"))


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", choices=WORKS, nargs="+", default=["vilt", "meter"])
    parser.add_argument("--batch", type=int, nargs="+")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--few", action="store_true", help="no peers: our ONNX models and reduced modules alone")
    parser.add_argument("--schedule", nargs="+", help="of the work's schedules, these alone")
    parser.add_argument("--tiny", action="store_true", help="a small model, and no file unless --output is given")
    parser.add_argument("--output", type=Path)
    parser.add_argument("--train-step", nargs=3, metavar=("WORK", "SCHEDULE", "BATCH"), help=argparse.SUPPRESS)
    parser.add_argument("--forward", nargs=2, metavar=("MODEL", "INPUTS"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.forward:
        forward(*arguments.forward)
        return
    if arguments.train_step:
        work, schedule, batch = arguments.train_step
        train_step(work, schedule, int(batch))
        return
    works = ["tiny"] if arguments.tiny else arguments.work
    output = arguments.output or (None if arguments.tiny else RESULTS)
    result = measured_before(output)
    for work in works:
        _, schedules, batches = WORKS[work]
        for batch in arguments.batch or batches:
            rows = measure(work, batch, arguments.rounds, arguments.schedule, arguments.few)
            result["works"].setdefault(work, {})[str(batch)] = rows
            print_rows(work, batch, rows)
            write(result, output)
        largest = max(batches)
        if work != "meter" and not arguments.few and largest in (arguments.batch or batches):
            steps = training(work, schedules, largest)
            result["training"][work] = {"batch": largest, "bytes": steps}
            for schedule in schedules:
                less = 1 - statistics.median(steps[schedule]) / statistics.median(steps["none"])
                print(f"training step of {work} at batch {largest}, {schedule}: {less:.0%} less memory")
            write(result, output)
    if output is not None:
        print(f"Wrote {output} and {output.with_suffix('.png')}.")


if __name__ == "__main__":
    main()
