"""TensorRT-RTX engines of the demo model, full-size ViLT-B/32 and a METER-size model, built without a GPU.

Each is compiled through the command line in a process of its own. Prints the time of the whole command, the builder's
share of it, the process's peak memory and the engine's size; ends with an error where an engine cannot be built.
Nothing is executed. Full-size models have random weights, and are not proved (a batch of one, 32 text tokens).

python -m benchmarks.engines [--json benchmarks/results/engines.json]
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.common import machine, save_model

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "examples/easy_vqa/model"


def save_meter(folder: Path) -> None:
    """METER for question answering (CLIP-ViT-B/16 at 384 px, RoBERTa-base, six pairs) with random weights."""
    import torch

    from pumer_compile.frontends.meter.configuration import MeterConfig
    from pumer_compile.frontends.meter.heads import MeterForQuestionAnswering

    torch.manual_seed(0)
    MeterForQuestionAnswering(MeterConfig(image_size=384)).save_pretrained(folder)


@dataclass(frozen=True)
class Case:
    """An engine to build.

    Attributes:
        model: what it is called in the table.
        schedule: preset, or file.
        options: of the command line.
    """

    model: str
    schedule: str
    options: tuple[str, ...] = ()


FULL_SIZE = ("--no-verify", "--text-length", "32", "--semantics", "reference")
CASES = (
    Case("easy-vqa", str(DEMO.parent / "schedule.yaml")),
    Case("easy-vqa", str(DEMO.parent / "schedule.yaml"), ("--profile", "batch=1:8:16", "--dtype", "float16")),
    *(
        Case("vilt-b32", schedule, (*FULL_SIZE, "--dtype", dtype))
        for dtype in ("float32", "float16")
        for schedule in ("vilt-vqa", "vilt-ve")
    ),
    Case("meter", "meter-vqa", (*FULL_SIZE, "--dtype", "float16")),
)
MODELS: dict[str, Callable[[Path], None]] = {"vilt-b32": save_model, "meter": save_meter}


def build(case: Case, model: Path, output: Path) -> dict[str, Any]:
    """Compile an engine; what it took."""
    command = [
        sys.executable,
        "-m",
        "pumer_compile",
        str(model),
        "--schedule",
        case.schedule,
        "-o",
        str(output),
    ]
    start = time.perf_counter()
    process = subprocess.Popen([*command, *case.options, "--builder", "tensorrt-rtx", "--quiet"])
    _, status, usage = os.wait4(process.pid, 0)
    if status:
        raise SystemExit(f"building an engine failed: {' '.join(command)}")
    manifest = json.loads(output.with_name(f"{output.name}.manifest.json").read_text(encoding="utf-8"))
    return {
        "model": case.model,
        "schedule": Path(case.schedule).stem,
        "dtype": manifest["dtype"],
        "profiles": manifest["profiles"],
        "proved": manifest["parity"].get("passed", False),
        "seconds": time.perf_counter() - start,
        "builder_seconds": manifest["build_seconds"],
        "peak_gib": usage.ru_maxrss / 2**20,
        "mib": output.stat().st_size / 2**20,
        "builder": f"{manifest['builder']} {manifest['builder_version']}",
    }


def main() -> None:
    """Build all, print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--json", type=Path, help="write the figures")
    arguments = parser.parse_args()
    print(f"{'engine':34}{'dtype':10}{'seconds':>8}{'builder':>9}{'peak GiB':>10}{'MiB':>8}", flush=True)
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for case in CASES:
            model = Path(folder) / case.model if case.model in MODELS else DEMO
            if not model.exists():
                MODELS[case.model](model)
            output = Path(folder) / f"engine-{len(rows)}" / "model.engine"
            output.parent.mkdir()
            row = build(case, model, output)
            output.unlink()
            rows.append(row)
            name = " ".join([row["model"], row["schedule"], *row["profiles"]])
            print(
                f"{name:34}{row['dtype']:10}{row['seconds']:8.0f}{row['builder_seconds']:9.1f}"
                f"{row['peak_gib']:10.1f}{row['mib']:8.0f}",
                flush=True,
            )
    if arguments.json:
        text = json.dumps({"machine": machine(), "rows": rows}, indent=2)
        arguments.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
