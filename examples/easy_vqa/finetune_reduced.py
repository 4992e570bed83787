"""Fine-tune the base model with its reducers in place, as PuMer does, and save it as a stock ViLT.

    python -m examples.easy_vqa.finetune_reduced --strength strong

The loss is the answers' cross-entropy plus the divergence from the unreduced base model, the teacher. Strength `none`
gives the control: the unreduced model, trained further by the same recipe.
"""

from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import torch
import typer
from torch import Tensor
from torch.nn import functional
from transformers import AutoTokenizer, ViltForQuestionAnswering

from examples.easy_vqa.data import load_split
from examples.easy_vqa.schedules import reduce_model, schedule_for
from examples.easy_vqa.training import LogitsOf, Recipe, count_correct, fit, raster_logits, save_folder
from pumer_compile.distill import distillation_loss

HERE = Path(__file__).parent


def main(
    strength: Literal["mild", "paper", "strong", "none"] = "strong",
    model_folder: Path = HERE / "model",
    folder: Annotated[Path | None, typer.Option(help="Where to save; by default model_STRENGTH.")] = None,
    epochs: int = 4,
    learning_rate: float = 2e-4,
    batch_size: int = 64,
    distillation: Annotated[float, typer.Option(help="Weight of the teacher's part of the loss; 0 for none.")] = 1.0,
    seed: int = 0,
) -> None:
    """Fine-tune, report reduced test accuracy after every epoch, and keep the latest epoch in FOLDER."""
    torch.manual_seed(seed)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    train, test = load_split("train", tokenizer), load_split("test", tokenizer)
    teacher = ViltForQuestionAnswering.from_pretrained(model_folder).eval()
    # Reducers have no parameters and a capture copies no weight: training `reduced.module` trains `student`.
    student = ViltForQuestionAnswering.from_pretrained(model_folder)
    if strength == "none":
        logits_of: LogitsOf = partial(raster_logits, student)
    else:
        schedule = schedule_for(strength, "reference")
        reduced = reduce_model(student, train, schedule).module
        # Kept in config.json: who compiles the model need not know how it was trained.
        student.config.pumer_schedule = schedule.model_dump(mode="json", exclude_none=True)

        def logits_of(batch: dict[str, Tensor]) -> Tensor:
            return reduced(**batch).logits

    target = folder or HERE / f"model_{strength}"

    def loss_of(batch: dict[str, Tensor], labels: Tensor) -> Tensor:
        logits = logits_of(batch).float()
        with torch.no_grad():
            teacher_logits = raster_logits(teacher, batch).float()
        return functional.cross_entropy(logits, labels) + distillation * distillation_loss(logits, teacher_logits)

    def report_and_save(epoch: int) -> None:
        correct = count_correct(logits_of, test)
        print(f"epoch {epoch}: test {correct}/{len(test)} = {correct / len(test):.4f}", flush=True)
        save_folder(student, tokenizer, target)

    fit(student, loss_of, train, Recipe(epochs, learning_rate, batch_size, seed=seed), report_and_save)


if __name__ == "__main__":
    typer.run(main)
