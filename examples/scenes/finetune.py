"""Fine-tune a trained model with its reducers in place, as PuMer does; the same command goes on after an interruption.

    python -m examples.scenes.finetune DATA RUN/model FOLDER --row tuned-pumer-1.8-s0 --results RESULTS

The loss is the answers' cross-entropy and, unless the row is without, the divergence from the unreduced model. Rows of
`dynamicvit` train its predictors as well, with masks and the published weights of its losses; they are saved beside
the model. What comes of it is measured at the end.
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

from .data import Split, load_split
from .measure import batch_of, captured, result_of, schedule_at, write_result
from .rows import FAMILIES, TRAINED, Row, tuned_rows
from .train import Recipe, advancing, save_folder
from .vilt import answer_logits, packed

RATIO_WEIGHT, ITS_DISTILLATION = 2.0, 0.5
"""Of DynamicViT's losses, as published."""


@dataclass(frozen=True)
class Settings:
    """What is trained, and how.

    Attributes:
        row: of the tables.
        keys: of its schedule; empty trains the unreduced model further, the control.
        distillation: weight of the teacher's part.
    """

    row: Row
    keys: dict[str, Any]
    distillation: float
    recipe: Recipe

    @property
    def dynamic(self) -> bool:
        """Whether predictors are trained."""
        return self.row.family == TRAINED

    @property
    def schedule(self) -> pumer.Schedule:
        """What is trained with: predictors mask tokens, and the rest reduces as it will."""
        if not self.keys:
            return pumer.Schedule.load("lossless")
        return pumer.Schedule(**self.keys, **({"training": True} if self.dynamic else {}))


class FineTuning:
    """A model with reducers in its graph, its teacher, optimizer and step, in a folder."""

    def __init__(self, folder: Path, base: Path, settings: Settings, split: Split) -> None:
        torch.manual_seed(settings.recipe.seed)
        self.folder, self.settings, self.recipe, self.step = folder, settings, settings.recipe, 0
        self.teacher = ViltForQuestionAnswering.from_pretrained(base).eval().requires_grad_(False)
        # A capture copies no weight: training the reduced module trains the student.
        self.student = ViltForQuestionAnswering.from_pretrained(base)
        self.module = pumer.reduce(captured(self.student, split, settings.row), settings.schedule).module
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
        batch, labels = batch_of(split, questions, self.settings.row.image_size), split.labels.flatten()[questions]
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
                    ids = batch["input_ids"][:, None]  # the teacher sees the whole picture
                    *_, (text, _) = packed(self.teacher, split.pixels(pictures), ids, True)
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


def keys_of(program: pumer.Program, row: Row, folder: Path) -> dict[str, Any]:
    """Keys of the schedule that meets a row's ratio, found once: it takes a minute."""
    said = folder / "schedule.json"
    if not said.exists():
        more = {}
        if row.family == TRAINED:  # how many tokens go does not depend on the weights: new ones will do
            new = pumer.Schedule(**FAMILIES[TRAINED](0.3), training=True)
            more["predictors"] = str(folder / "new.safetensors")
            save_predictors(pumer.reduce(program, new).module, more["predictors"])
        keys = schedule_at(program, row, **more)
        said.write_text(json.dumps({k: v for k, v in keys.items() if k not in more}, indent=1) + "\n", encoding="utf-8")
    found: dict[str, Any] = json.loads(said.read_text(encoding="utf-8"))
    return found


def main(
    data: Path,
    base: Path,
    folder: Path,
    row: Annotated[str, typer.Option(help="One of `examples.scenes.rows.tuned_rows`.")],
    results: Annotated[Path, typer.Option(help="Where its result file goes.")],
    steps: int = 1500,
    learning_rate: float = 2e-4,
    pictures: Annotated[int, typer.Option(help="Of the test split, each with all its questions.")] = 1000,
    minutes: Annotated[float, typer.Option(help="Between checkpoints.")] = 3.0,
) -> None:
    """Fine-tune BASE by a row's reduction, in FOLDER, and measure it."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "PID").write_text(f"{os.getpid()}\n")
    wanted = {one.name: one for rows in tuned_rows().values() for one in rows}[row]
    assert wanted.seed is not None
    tokenizer = AutoTokenizer.from_pretrained(base)
    train = load_split(data, "train", tokenizer)
    program = captured(ViltForQuestionAnswering.from_pretrained(base).eval(), train, wanted)
    keys = keys_of(program, wanted, folder)
    recipe = Recipe(0, 0, steps, steps, learning_rate=learning_rate, warmup_steps=50, seed=wanted.seed)
    weight = ITS_DISTILLATION if wanted.family == TRAINED else 1.0
    tuning = FineTuning(folder, base, Settings(wanted, keys, weight if wanted.distilled else 0.0, recipe), train)
    started = time.process_time()
    for losses in advancing(tuning, train, minutes):
        line = {"step": tuning.step, "cpu_seconds": round(time.process_time() - started)}
        line |= {name: round(value, 4) for name, value in losses.items()}
        print(json.dumps(line), flush=True)
        with (folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
    tuning.save()
    if wanted.family == TRAINED:
        save_predictors(tuning.module, folder / "predictors.safetensors")
        keys = {**keys, "predictors": str(folder / "predictors.safetensors")}
    elif keys:
        # Who compiles the model need not know how it was trained.
        tuning.student.config.pumer_schedule = keys
    if not (folder / "model").exists():
        save_folder(tuning.student.eval(), tokenizer, folder / "model")
    test = load_split(data, "test", tokenizer)
    result = result_of(captured(tuning.student.eval(), test, wanted), keys, test, wanted, pictures)
    results.mkdir(parents=True, exist_ok=True)
    trained = {"steps": steps, "learning_rate": learning_rate, "distillation": tuning.settings.distillation}
    write_result(results / f"{row}.json", {**result, "model": base.parent.name, "trained": trained})
    print(f"{row}: {sum(result['right']) / len(result['right']):.4f}", flush=True)


if __name__ == "__main__":
    typer.run(main)
