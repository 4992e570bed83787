"""What the teacher adds: retrained models with and without distillation, on the whole test set.

python -m examples.easy_vqa.distillation --tuned paper:0=FOLDER --tuned paper:1=FOLDER

writes `distillation.json`, from which the README's table is made. FOLDER is what `finetune_reduced` saved with the
strength and the weight (`--distillation`) named before it.
"""

import json
from pathlib import Path
from typing import Annotated, Any

import typer
from transformers import AutoTokenizer, ViltForQuestionAnswering

from examples.easy_vqa.data import load_split
from examples.easy_vqa.schedules import STRENGTHS, reduce_model, schedule_for
from examples.easy_vqa.training import count_correct

HERE = Path(__file__).parent


def main(
    tuned: Annotated[list[str], typer.Option(help="STRENGTH:WEIGHT=FOLDER of a retrained model.")],
    epochs: int = 1,
    model_folder: Path = HERE / "model",
    results_path: Path = HERE / "distillation.json",
) -> None:
    """Measure every model and write RESULTS_PATH."""
    test = load_split("test", AutoTokenizer.from_pretrained(model_folder))
    rows: list[dict[str, Any]] = []
    for option in tuned:
        name, _, folder = option.partition("=")
        strength, _, weight = name.partition(":")
        if strength not in STRENGTHS or not folder:
            raise typer.BadParameter(f"{option!r} is not STRENGTH:WEIGHT=FOLDER")
        model = ViltForQuestionAnswering.from_pretrained(folder).eval()
        reduced = reduce_model(model, test, schedule_for(strength, "reference"))
        correct = count_correct(lambda batch, module=reduced.module: module(**batch).logits, test)
        rows.append({"strength": strength, "weight": float(weight), "correct": correct, "total": len(test)})
        print(rows[-1], flush=True)
    results_path.write_text(json.dumps({"epochs": epochs, "rows": rows}, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
