"""Fine-tune a trained model with its reducers in place, as PuMer does; the same command goes on after an interruption.

    python -m examples.scenes.finetune DATA runs/vilt-0/model runs/pumer-1.8-s0 --row pumer-1.8 --seed 0

The loss is the answers' cross-entropy and, unless `--no-distillation`, the divergence from the unreduced model. The row
`dynamicvit` trains its predictors as well, with masks and the published weights of its losses; they are saved beside
the model.
"""

from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoTokenizer, ViltForQuestionAnswering

import pumer_compile as pumer
from pumer_compile.distill import distillation_loss, keep_ratio_loss, noted_masks, save_predictors
from pumer_compile.reduce import Analysed

from .data import Split, load_split
from .measure import at_ratio, batch_of
from .rows import Row, shelf_rows
from .train import Recipe, advancing, save_folder
from .vilt import answer_logits, packed

RATIO_WEIGHT, ITS_DISTILLATION = 2.0, 0.5
"""Of DynamicViT's losses, as published."""
DYNAMIC = {"method": "dynamicvit", "layers": (1, 2, 4), "training": True}


@dataclass(frozen=True)
class Settings:
    """What is trained, and how.

    Attributes:
        schedule: keys of it; empty trains the unreduced model further, the control.
        distillation: weight of the teacher's part.
    """

    schedule: dict[str, Any]
    distillation: float
    recipe: Recipe

    @property
    def dynamic(self) -> bool:
        """Whether predictors are trained."""
        return bool(self.schedule.get("training"))


class FineTuning:
    """A model with reducers in its graph, its teacher, optimizer and step, in a folder."""

    def __init__(self, folder: Path, base: Path, settings: Settings, sample: dict[str, Tensor]) -> None:
        torch.manual_seed(settings.recipe.seed)
        self.folder, self.settings, self.recipe, self.step = folder, settings, settings.recipe, 0
        self.teacher = ViltForQuestionAnswering.from_pretrained(base).eval().requires_grad_(False)
        # A capture copies no weight: training the reduced module trains the student.
        self.student = ViltForQuestionAnswering.from_pretrained(base)
        program = pumer.capture(self.student, sample, dynamic_batch=True)
        schedule = pumer.Schedule(**settings.schedule) if settings.schedule else pumer.Schedule.load("none")
        self.module = pumer.reduce(program, schedule).module
        self.parameters = list(self.module.parameters())
        self.optimizer = torch.optim.AdamW(self.parameters, betas=(0.9, 0.98), weight_decay=0.05)
        if self._path.exists():
            state = torch.load(self._path, weights_only=True)
            self.module.load_state_dict(state["module"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.step = state["step"]

    @property
    def _path(self) -> Path:
        return self.folder / "state.pt"

    def save(self) -> None:
        """Write `state.pt` whole, or leave the last one."""
        parts = {"module": self.module.state_dict(), "optimizer": self.optimizer.state_dict(), "step": self.step}
        staging = self._path.with_suffix(".new")
        torch.save(parts, staging)
        staging.replace(self._path)

    def losses(self, split: Split) -> dict[str, Tensor]:
        """Of the present step's samples, weighted."""
        pictures, asked = self.recipe.samples(self.step, split)
        questions = pictures * split.labels.shape[1] + asked[:, 0]
        batch, labels = split.batch(questions), split.labels.flatten()[questions]
        losses: dict[str, Tensor] = {}
        # The draw of masks, from the step alone.
        torch.manual_seed(1_000_003 * self.recipe.seed + self.step)
        with torch.autocast("cpu", torch.bfloat16):
            if self.settings.dynamic:
                with noted_masks(self.module) as masks:
                    logits = self.module(**batch).logits.float()
                losses["ratio"] = RATIO_WEIGHT * keep_ratio_loss(masks.values())
            else:
                logits = self.module(**batch).logits.float()
            if self.settings.distillation:
                with torch.no_grad():
                    *_, (text, _) = packed(self.teacher, batch["pixel_values"], batch["input_ids"][:, None], True)
                    wanted = answer_logits(self.teacher, text)[:, 0].float()
                losses["distillation"] = self.settings.distillation * distillation_loss(logits, wanted)
        losses["answers"] = functional.cross_entropy(logits, labels)
        return losses

    def advance(self, split: Split) -> dict[str, float]:
        """One step; its losses."""
        self.module.train()
        losses = self.losses(split)
        self.optimizer.zero_grad()
        torch.stack(list(losses.values())).sum().backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(self.step)
        self.optimizer.step()
        self.step += 1
        return {name: value.item() for name, value in losses.items()}


def schedule_of(row: Row, base: Path, sample: dict[str, Tensor]) -> dict[str, Any]:
    """Keys of the schedule that meets a row's ratio; empty for a row that reduces nothing."""
    if not row.family:
        return {}
    program = pumer.capture(ViltForQuestionAnswering.from_pretrained(base).eval(), sample, dynamic_batch=True)
    schedule = at_ratio(Analysed(program), row).schedule
    return schedule.model_dump(mode="json", exclude_none=True)


def main(
    data: Path,
    base: Path,
    folder: Path,
    row: Annotated[str, typer.Option(help="Of examples.scenes.rows, off the shelf; or `dynamicvit`.")],
    steps: int = 1500,
    learning_rate: float = 2e-4,
    distillation: Annotated[bool, typer.Option(help="Learn from the unreduced model too.")] = True,
    keep: Annotated[float, typer.Option(help="Of `dynamicvit`: share kept at the first stage.")] = 0.7,
    seed: int = 0,
    minutes: float = 3.0,
) -> None:
    """Fine-tune BASE by a row's reduction, in FOLDER."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "PID").write_text(f"{os.getpid()}\n")
    tokenizer = AutoTokenizer.from_pretrained(base)
    train = load_split(data, "train", tokenizer)
    sample = batch_of(train, torch.arange(2), None)
    said = folder / "schedule.json"
    if not said.exists():  # found once, since it takes a minute
        chosen = {one.name: one for one in shelf_rows()}
        found = {**DYNAMIC, "keep": keep} if row == "dynamicvit" else schedule_of(chosen[row], base, sample)
        said.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    schedule = json.loads(said.read_text(encoding="utf-8"))
    recipe = Recipe(0, 0, steps, steps, learning_rate=learning_rate, warmup_steps=50, seed=seed)
    weight = ITS_DISTILLATION if row == "dynamicvit" else 1.0
    tuning = FineTuning(folder, base, Settings(schedule, weight if distillation else 0.0, recipe), sample)
    started = time.process_time()
    for losses in advancing(tuning, train, minutes):
        line = {"step": tuning.step, "cpu_seconds": round(time.process_time() - started)}
        line |= {name: round(value, 4) for name, value in losses.items()}
        print(json.dumps(line), flush=True)
        with (folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
    tuning.save()
    if not (folder / "model").exists():
        if tuning.settings.dynamic:
            save_predictors(tuning.module, folder / "predictors.safetensors")
        elif schedule:
            # Who compiles the model need not know how it was trained.
            tuning.student.config.pumer_schedule = schedule
        save_folder(tuning.student.eval(), tokenizer, folder / "model")


if __name__ == "__main__":
    typer.run(main)
