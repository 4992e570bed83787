"""Step 5: how many choices differ on the device, by dtype and method, from float32 on the CPU."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import pumer_compile as pumer
from pumer_compile.capture.loading import load_model
from pumer_compile.capture.make_inputs import make_inputs
from pumer_compile.reduce import with_decisions
from pumer_compile.schedule import Schedule

from .harness import Bench, Row
from .models import DEMO, Inputs, llava, made_on, placed, prompts_of

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Subject:
    """A model whose choices are compared.

    Attributes:
        name: in the table.
        build: the model on a device in a dtype; the weights are the same ones, rounded.
        inputs: samples for it.
        schedule: what chooses.
    """

    name: str
    build: Callable[[torch.device, torch.dtype], nn.Module]
    inputs: Callable[[nn.Module], Inputs]
    schedule: Schedule


def subjects(bench: Bench) -> list[Subject]:
    """The demo's trained model, and a prompt model of few layers with random weights (whose scores are closer)."""
    tiny = bench.settings.tiny
    samples = 8 if tiny else 64

    def demo(device: torch.device, dtype: torch.dtype) -> nn.Module:
        return load_model(DEMO / "model").model.to(device, dtype).eval()  # type: ignore[union-attr]

    def noise(model: nn.Module) -> Inputs:
        made = make_inputs(model, batch=samples, text_length=16, padding=False)
        return placed(made, next(model.parameters()))

    found = []
    for semantics in ("safe",) if tiny else ("safe", "reference"):
        schedule = Schedule.load(DEMO / "schedule.yaml", semantics=semantics)
        found.append(Subject(f"easy-VQA, pumer, {semantics}", demo, noise, schedule))
    prompt = llava(tiny=tiny, layers=4, width=1024)

    def from_cpu(device: torch.device, dtype: torch.dtype) -> nn.Module:
        # Random numbers differ from device to device: the weights are the CPU's.
        made: nn.Module = made_on(prompt, torch.device("cpu"), torch.float32).to(device, dtype)
        return made

    def one_image(model: nn.Module) -> Inputs:
        return prompts_of(prompt, model, 2 if tiny else 4)

    budget = round(prompt.rows * 0.25)
    schedules = [Schedule(method=name, budget=budget) for name in ("vispruner", "divprune")]
    schedules.append(Schedule(method="fastv", budget=budget, layer=1 if tiny else 2))
    return found + [Subject(f"{prompt.name}, {s.method}", from_cpu, one_image, s) for s in schedules]


def run(bench: Bench) -> None:
    """Every subject in float32 on the CPU, then on the device in each dtype."""
    logging.getLogger("pumer_compile").setLevel(logging.ERROR)
    cpu = torch.device("cpu")
    for subject in bench.settings.some(subjects(bench)):
        expected: dict[str, Tensor] = {}
        for dtype in bench.settings.some(DTYPES):

            def compared(subject: Subject = subject, dtype: torch.dtype = dtype, known: Any = expected) -> Row:
                if not known:
                    known.update(choices(subject, cpu, torch.float32))
                return differences(known, choices(subject, bench.settings.device, dtype))

            bench.attempt({"subject": subject.name, "dtype": str(dtype).removeprefix("torch.")}, compared)


def choices(subject: Subject, device: torch.device, dtype: torch.dtype) -> dict[str, Tensor]:
    """Indices by reducer and kind, int64 `[samples, chosen]`, on the CPU."""
    model = subject.build(device, dtype)
    program = pumer.capture(model, subject.inputs(model))
    twin, names = with_decisions(pumer.reduce(program, subject.schedule).module)
    with torch.inference_mode():
        found = twin(**program.inputs)
    return {name: found[name].cpu() for name in names}


def differences(expected: dict[str, Tensor], found: dict[str, Tensor]) -> Row:
    """Of each kind of choice, the share of indices that are not among those of float32; and of samples with any."""
    shares, touched = {}, torch.zeros(len(next(iter(expected.values()))), dtype=torch.bool)
    for name, indices in expected.items():
        rows = zip(indices.flatten(1).tolist(), found[name].flatten(1).tolist(), strict=True)
        missed = [len(set(b) - set(a)) / max(len(set(b)), 1) for a, b in rows]
        shares[name] = sum(missed) / len(missed)
        touched |= torch.tensor(missed) > 0
    return {"share_that_differs": shares, "largest": max(shares.values()), "samples": float(touched.float().mean())}
