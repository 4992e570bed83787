"""What benchmarks share: the machine that they ran on, and the model that most of them measure."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pumer_compile import Schedule


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    from pumer_compile.artifacts.manifest import library_versions

    models = [
        line.split(":")[1].strip() for line in Path("/proc/cpuinfo").read_text().splitlines() if "model name" in line
    ]
    return {
        "cpu": models[0] if models else platform.processor(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "versions": library_versions(),
        "load_average_before": os.getloadavg(),
    }


def published(schedule: str) -> Schedule:
    """A schedule under the semantics of the published code, in which all committed results are."""
    from pumer_compile import Schedule

    return Schedule.load(schedule, semantics="reference")


def save_model(folder: Path) -> None:
    """A ViLT-B/32 for question answering (3129 labels) with random weights, as a save_pretrained folder."""
    import torch
    from transformers import ViltConfig, ViltForQuestionAnswering

    torch.manual_seed(0)
    ViltForQuestionAnswering(ViltConfig(num_labels=3129)).save_pretrained(folder)
