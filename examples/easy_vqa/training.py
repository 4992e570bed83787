"""What training the base model and fine-tuning the reduced one have in common."""

import math
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import PreTrainedTokenizerBase, ViltForQuestionAnswering, ViltImageProcessor

from examples.easy_vqa.data import IMAGE_SIZE, Split

MAX_SHIFT = 4

LogitsOf = Callable[[dict[str, Tensor]], Tensor]
"""From a batch of ViLT inputs to the answer logits, float [batch, answers]."""

LossOf = Callable[[dict[str, Tensor], Tensor], Tensor]
"""From a batch of ViLT inputs and its labels, int64 [batch], to a scalar loss."""


@dataclass(frozen=True)
class Recipe:
    """AdamW with linear warm-up and cosine decay to zero."""

    epochs: int
    learning_rate: float
    batch_size: int
    warmup: float = 0.05
    """Share of all steps."""
    weight_decay: float = 0.05
    bfloat16: bool = True
    """Compute matrix products in bfloat16, twice as fast on processors that have it; weights stay float32."""
    seed: int = 0

    def rate_at(self, step: int, steps: int) -> float:
        """The share of `learning_rate` in force at `step` of `steps`."""
        warmup_steps = max(1, int(self.warmup * steps))
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        return 0.5 * (1 + math.cos(math.pi * (step - warmup_steps) / max(1, steps - warmup_steps)))


def fit(
    model: nn.Module,
    loss_of: LossOf,
    split: Split,
    recipe: Recipe,
    after_epoch: Callable[[int], None],
) -> None:
    """Minimise `loss_of` over `split`, training the parameters of `model`; `after_epoch` gets 1, 2, ..."""
    order = torch.Generator().manual_seed(recipe.seed)
    optimizer = torch.optim.AdamW(
        _parameter_groups(model, recipe.weight_decay), lr=recipe.learning_rate, betas=(0.9, 0.98)
    )
    steps = recipe.epochs * math.ceil(len(split) / recipe.batch_size)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: recipe.rate_at(step, steps))
    for epoch in range(1, recipe.epochs + 1):
        model.train()
        started, total_loss = time.perf_counter(), 0.0
        for rows in torch.randperm(len(split), generator=order).split(recipe.batch_size):
            batch = split.batch(rows)
            batch["pixel_values"] = augment(batch["pixel_values"], order)
            with torch.autocast("cpu", torch.bfloat16, enabled=recipe.bfloat16):
                loss = loss_of(batch, split.labels[rows])
            optimizer.zero_grad()
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            total_loss += loss.item() * len(rows)
        seconds = time.perf_counter() - started
        print(f"epoch {epoch}: mean loss {total_loss / len(split):.4f}, {seconds:.0f} s", flush=True)
        model.eval()
        after_epoch(epoch)


def augment(pixel_values: Tensor, generator: torch.Generator) -> Tensor:
    """Mirror half of the images, float [batch, 3, height, width], and shift all by up to `MAX_SHIFT` pixels.

    No question is about a place or a direction. The background is one colour, so repeating the border is how
    the image would go on.
    """
    mirrored = torch.rand(len(pixel_values), 1, 1, 1, generator=generator) < 0.5
    pixel_values = torch.where(mirrored, pixel_values.flip(3), pixel_values)
    height, width = pixel_values.shape[2:]
    top, left = torch.randint(2 * MAX_SHIFT + 1, (2,), generator=generator).tolist()
    padded = functional.pad(pixel_values, (MAX_SHIFT,) * 4, mode="replicate")
    return padded[:, :, top : top + height, left : left + width]


def raster_embeds(model: ViltForQuestionAnswering, pixel_values: Tensor) -> Tensor:
    """CLS and patches of full-size images in raster order, float [batch, 1 + patches, hidden].

    Stock ViLT samples the patches of every image in random order, one image after the other, to fit images of
    different sizes in one batch. Attention does not see the order, so for images of one size handing this
    over as `image_embeds` gives the same logits sooner.
    """
    embeddings = model.vilt.embeddings
    patches = embeddings.patch_embeddings(pixel_values).flatten(2).transpose(1, 2)
    tokens = torch.cat([embeddings.cls_token.expand(len(patches), -1, -1), patches], dim=1)
    return tokens + embeddings.position_embeddings


def raster_logits(model: ViltForQuestionAnswering, batch: dict[str, Tensor]) -> Tensor:
    """The model's own logits for full-size images, sooner: see `raster_embeds`.

    Text columns that are padding in the whole batch are left out as well: they are masked everywhere.
    """
    image_embeds = raster_embeds(model, batch["pixel_values"])
    longest = int(batch["attention_mask"].sum(dim=1).max())
    return model(
        input_ids=batch["input_ids"][:, :longest],
        attention_mask=batch["attention_mask"][:, :longest],
        image_embeds=image_embeds,
        pixel_mask=torch.ones(image_embeds.shape[:2], dtype=torch.int64),
    ).logits


@torch.no_grad()
def count_correct(logits_of: LogitsOf, split: Split, batch_size: int = 256) -> int:
    """How many questions of `split` the highest logit answers correctly."""
    correct = 0
    for rows in torch.arange(len(split)).split(batch_size):
        correct += int((logits_of(split.batch(rows)).argmax(dim=-1) == split.labels[rows]).sum())
    return correct


def save_folder(model: ViltForQuestionAnswering, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write model, tokenizer and image preprocessing to `folder`; an interruption never leaves half of it."""
    staging, replaced = folder.with_name(folder.name + ".new"), folder.with_name(folder.name + ".old")
    for leftover in (staging, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    model.save_pretrained(staging)
    tokenizer.save_pretrained(staging)
    ViltImageProcessor(size={"shortest_edge": IMAGE_SIZE}, size_divisor=8).save_pretrained(staging)
    if folder.exists():
        folder.rename(replaced)
    staging.rename(folder)
    shutil.rmtree(replaced, ignore_errors=True)


def _parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, object]]:
    """Matrices decay; biases, norms and embeddings of a single row do not."""
    matrices = [parameter for parameter in model.parameters() if parameter.squeeze().dim() >= 2]
    others = [parameter for parameter in model.parameters() if parameter.squeeze().dim() < 2]
    return [{"params": matrices, "weight_decay": weight_decay}, {"params": others, "weight_decay": 0.0}]
