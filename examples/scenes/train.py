"""Train a small ViLT or LLaVA; the same command goes on after an interruption.

    python -m examples.scenes.train DATA RUN

RUN gets `state.pt` (parameters, moments, step) every few minutes and at SIGTERM, a line of `log.jsonl` every hundred
steps, `model/` (a stock model with its tokenizer) at the end, and the process in `PID`. The order of samples depends on
the seed and the step alone.
"""

from __future__ import annotations

import json
import os
import signal
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Protocol

import torch
import typer
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase, ViltImageProcessor

from .data import KINDS, Split, load_split
from .draw import CELL
from .hints import Hints
from .learners import Kind, Learner, make_learner
from .scene import SIDE


@dataclass(frozen=True)
class Recipe:
    """AdamW: linear warm-up, a constant rate, and a linear decay to zero over the last steps.

    Attributes:
        seeing_steps: of the first layers alone, on pictures without a question: what cells show (`hints`).
        packed_steps: then with several questions a picture.
        stock_steps: then with stock attention.
        decay_steps: the last of all, over which the rate falls.
        seen, pictures, stock_pictures: of a step of each kind.
        questions: about each picture of a step with several.
    """

    seeing_steps: int
    packed_steps: int
    stock_steps: int
    decay_steps: int
    seen: int = 24
    pictures: int = 16
    questions: int = 12
    stock_pictures: int = 48
    learning_rate: float = 1e-3
    warmup_steps: int = 200
    weight_decay: float = 0.05
    cells: float = 0.5
    phrases: float = 0.5
    seed: int = 0

    @property
    def steps(self) -> int:
        """In all."""
        return self.seeing_steps + self.packed_steps + self.stock_steps

    def is_seeing(self, step: int) -> bool:
        """Whether a step has no questions."""
        return step < self.seeing_steps

    def is_stock(self, step: int) -> bool:
        """Whether a step has stock attention."""
        return step >= self.seeing_steps + self.packed_steps

    def rate(self, step: int) -> float:
        """The learning rate at a step."""
        rising = (step + 1) / self.warmup_steps
        falling = (self.steps - step) / self.decay_steps if self.decay_steps else 1.0
        return self.learning_rate * min(1.0, rising, falling)

    def samples(self, step: int, split: Split) -> tuple[Tensor, Tensor]:
        """Pictures, int64 [pictures], and questions about each, int64 [pictures, questions]."""
        count, asked = self.pictures, self.questions
        if self.is_seeing(step):
            count = self.seen
        elif self.is_stock(step):
            count, asked = self.stock_pictures, 1
        spans = (
            (self.seeing_steps, self.seen),
            (self.packed_steps, self.pictures),
            (self.stock_steps, self.stock_pictures),
        )
        left, done = step, 0
        for steps, size in spans:
            done += min(left, steps) * size
            left = max(0, left - steps)
        places = range(done, done + count)
        pictures = torch.tensor(
            [_order(self.seed, place // len(split), len(split))[place % len(split)] for place in places]
        )
        draw = torch.Generator().manual_seed(1_000_003 * self.seed + step)
        per_picture = split.labels.shape[1]
        questions = torch.rand(count, per_picture, generator=draw).argsort(dim=1)[:, :asked]
        return pictures, questions


_ORDERS: dict[tuple[int, int, int], list[int]] = {}


def _order(seed: int, epoch: int, size: int) -> list[int]:
    key = seed, epoch, size
    if key not in _ORDERS:
        draw = torch.Generator().manual_seed(7919 * seed + epoch)
        _ORDERS[key] = torch.randperm(size, generator=draw).tolist()
    return _ORDERS[key]


class Training(Protocol):
    """What `advancing` goes on with."""

    recipe: Recipe
    step: int

    def advance(self, split: Split) -> dict[str, float]:
        """One step; its losses."""

    def save(self) -> None:
        """Write a checkpoint whole, or leave the last one."""


class Run:
    """A training: its model, heads, optimizer and step, in a folder."""

    def __init__(self, folder: Path, recipe: Recipe, kind: Kind = "vilt") -> None:
        self.folder, self.recipe, self.step, self.cpu_seconds = folder, recipe, 0, 0.0
        self.learner = make_learner(kind, recipe.seed)
        self.model = self.learner.model
        self.hints = Hints(self.learner.width)
        named = [*self.model.parameters(), *self.hints.parameters()]
        groups = [
            {"params": [p for p in named if p.squeeze().dim() >= 2], "weight_decay": recipe.weight_decay},
            {"params": [p for p in named if p.squeeze().dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98))
        self.parameters = named
        if self._path.exists():
            self._load()

    @property
    def _path(self) -> Path:
        return self.folder / "state.pt"

    def _load(self) -> None:
        state = torch.load(self._path, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.hints.load_state_dict(state["hints"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.step, self.cpu_seconds = state["step"], state["cpu_seconds"]

    def save(self) -> None:
        """Write `state.pt` whole, or leave the last one."""
        parts: dict[str, Any] = {name: getattr(self, name).state_dict() for name in ("model", "hints", "optimizer")}
        staging = self._path.with_suffix(".new")
        torch.save(parts | {"step": self.step, "cpu_seconds": self.cpu_seconds}, staging)
        staging.replace(self._path)

    def losses(self, split: Split) -> dict[str, Tensor]:
        """Of the present step's samples."""
        pictures, questions = self.recipe.samples(self.step, split)
        rows = pictures[:, None]
        stock = self.recipe.is_stock(self.step)
        attributes, centres = split.attributes[pictures], split.centres[pictures]
        losses = {}
        if self.recipe.is_seeing(self.step):
            with torch.autocast("cpu", torch.bfloat16):
                cells = self.learner.cells(split.pixels(pictures))
                return {"cells": self.hints.cell_loss(cells, split.owners[pictures], attributes, centres)}
        with torch.autocast("cpu", torch.bfloat16):
            seen = self.learner.answered(split.pixels(pictures), split.input_ids[rows, questions], stock)
            losses["cells"] = self.hints.cell_loss(seen.cells, split.owners[pictures], attributes, centres)
            mentions = split.mentions[rows, questions]
            losses["phrases"] = self.hints.phrase_loss(seen.words, mentions, attributes, centres)
        targets = self.learner.targets(split.labels[rows, questions].flatten())
        losses["answers"] = functional.cross_entropy(seen.logits.float().flatten(0, 1), targets)
        return losses

    def advance(self, split: Split) -> dict[str, float]:
        """One step; its losses."""
        started = time.process_time()
        self.model.train()
        losses = self.losses(split)
        weights = {"answers": 1.0, "cells": self.recipe.cells, "phrases": self.recipe.phrases}
        loss = torch.stack([weights[name] * value for name, value in losses.items()]).sum()
        self.optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.recipe.rate(self.step)
        self.optimizer.step()
        self.step += 1
        self.cpu_seconds += time.process_time() - started
        return {name: value.item() for name, value in losses.items()}


@torch.no_grad()
def accuracies(learner: Learner, split: Split, pictures: int, stock: bool) -> dict[str, float]:
    """Share of right answers by kind of question, and of `all`, about the first pictures."""
    learner.model.eval()
    right = []
    for rows in torch.arange(pictures).split(20):
        ids = split.input_ids[rows]
        pixels = split.pixels(rows)
        if stock:
            pixels, ids = pixels.repeat_interleave(ids.shape[1], dim=0), ids.flatten(0, 1)[:, None]
        with torch.autocast("cpu", torch.bfloat16):
            given = learner.answered(pixels, ids, stock).logits.argmax(-1)
        right.append(given.view(len(rows), -1) == learner.targets(split.labels[rows]))
    correct, kinds = torch.cat(right).float(), split.kinds[:pictures]
    by_kind = {name: float(correct[kinds == number].mean()) for number, name in enumerate(KINDS)}
    return {"all": float(correct.mean())} | {name: round(value, 3) for name, value in by_kind.items()}


def save_folder(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write model, tokenizer and image preprocessing to a folder that is not there yet."""
    staging = folder.with_name(folder.name + ".new")
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    ViltImageProcessor(size={"shortest_edge": SIDE}, size_divisor=CELL).save_pretrained(staging)
    staging.rename(folder)


def advancing(run: Training, split: Split, minutes: float) -> Iterator[dict[str, float]]:
    """Mean losses every hundred steps; saves every few minutes, and when the process is asked to end."""
    asked: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: asked.append(number))
    sums: dict[str, float] = {}
    steps = 0  # since the last line, or since the run went on
    saved = time.monotonic()
    while run.step < run.recipe.steps:
        for name, value in run.advance(split).items():
            sums[name] = sums.get(name, 0.0) + value
        steps += 1
        if asked or time.monotonic() - saved > 60 * minutes:
            run.save()
            saved = time.monotonic()
        if asked:
            raise SystemExit(f"stopped at step {run.step}, saved")
        if run.step % 100 == 0:
            yield {name: value / steps for name, value in sums.items()}
            sums, steps = {}, 0


def main(
    data: Path,
    folder: Path,
    kind: Kind = "vilt",
    seeing_steps: int = 3500,
    packed_steps: int = 6000,
    stock_steps: int = 3000,
    decay_steps: int = 2500,
    seed: int = 0,
    evaluate: Annotated[int, typer.Option(help="Steps between looks at the validation split.")] = 500,
    minutes: Annotated[float, typer.Option(help="Between checkpoints.")] = 3.0,
) -> None:
    """Train on the pictures of DATA, in FOLDER."""
    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "PID").write_text(f"{os.getpid()}\n")
    recipe = Recipe(seeing_steps, packed_steps, stock_steps, decay_steps, seed=seed)
    (folder / "recipe.json").write_text(json.dumps(asdict(recipe), indent=1) + "\n")
    run = Run(folder, recipe, kind)
    train, validation = (load_split(data, name, run.learner.tokenizer) for name in ("train", "validation"))
    print(f"{len(train)} pictures; at step {run.step} of {recipe.steps}", flush=True)
    for losses in advancing(run, train, minutes):
        line: dict[str, Any] = {"step": run.step, "cpu_seconds": round(run.cpu_seconds)}
        line |= {name: round(value, 4) for name, value in losses.items()}
        if (run.step % evaluate == 0 and not recipe.is_seeing(run.step)) or run.step == recipe.steps:
            stock = recipe.is_stock(run.step)
            line |= accuracies(run.learner, validation, len(validation) // (4 if stock else 1), stock)
        print(json.dumps(line), flush=True)
        with (folder / "log.jsonl").open("a") as log:
            log.write(json.dumps(line) + "\n")
    run.save()
    if not (folder / "model").exists():
        save_folder(run.model.eval(), run.learner.tokenizer, folder / "model")


if __name__ == "__main__":
    typer.run(main)
