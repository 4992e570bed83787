"""Accuracy on the whole easy-VQA test set, unreduced and reduced, as `results.json` and a Markdown table.

python -m examples.easy_vqa.evaluate --retrained strong=examples/easy_vqa/model_strong
python -m examples.easy_vqa.evaluate --again safe    # the rows of one semantics alone; the others stay as they are
"""

import json
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, get_args

import torch
import typer
from transformers import AutoTokenizer, ViltForQuestionAnswering

import pumer_compile as pumer
from examples.easy_vqa.data import TEXT_LENGTH, Split, load_split, question_only_correct
from examples.easy_vqa.random_pruning import RandomPruning, TokenCounts
from examples.easy_vqa.results import Results, Row, render_table
from examples.easy_vqa.schedules import STRENGTHS, Semantics, Strength, reduce_model, schedule_for
from examples.easy_vqa.training import count_correct, raster_logits

HERE = Path(__file__).parent
RANDOM_SEEDS = [0, 1, 2]
PACKAGES = ["easy-vqa", "torch", "transformers"]


def measure(model_folder: Path, retrained: dict[Strength, Path], control: Path | None) -> Results:
    """Every row, each on the whole test set."""
    test = load_split("test", AutoTokenizer.from_pretrained(model_folder))
    model = ViltForQuestionAnswering.from_pretrained(model_folder).eval()
    reduced_rows: list[Row] = []
    for strength in STRENGTHS:
        for semantics in get_args(Semantics):
            reduced = reduce_model(model, test, schedule_for(strength, semantics))
            reduced_rows.append(_reduced_row(f"reduced, {semantics}", strength, reduced, test))
        # The last plan is the reference's: the control keeps as many tokens as the published algorithm.
        reduced_rows.append(_random_row(model, strength, reduced.plan, test))
        if strength in retrained:
            tuned = ViltForQuestionAnswering.from_pretrained(retrained[strength]).eval()
            tuned_reduced = reduce_model(tuned, test, schedule_for(strength, "reference"))
            reduced_rows.append(_reduced_row("reduced, reference, retrained", strength, tuned_reduced, test))
    plan = reduced.plan
    unreduced_rows = [_unreduced_row("unreduced", model, plan, test)]
    if control is not None:
        further = ViltForQuestionAnswering.from_pretrained(control).eval()
        name = "unreduced, trained further by the same recipe (control)"
        unreduced_rows.append(_unreduced_row(name, further, plan, test))
    return {
        "versions": {"pumer-compile": pumer.__version__} | {name: version(name) for name in PACKAGES},
        "random_seeds": RANDOM_SEEDS,
        "schedules": STRENGTHS,
        "rows": [*unreduced_rows, _question_only_row(), *reduced_rows],
    }


def measure_again(results: Results, semantics: Semantics, model_folder: Path) -> None:
    """Replace the rows of the model reduced under one semantics; each must be there."""
    test = load_split("test", AutoTokenizer.from_pretrained(model_folder))
    model = ViltForQuestionAnswering.from_pretrained(model_folder).eval()
    for strength in STRENGTHS:
        name = f"reduced, {semantics}"
        (place,) = (i for i, r in enumerate(results["rows"]) if (r["name"], r["strength"]) == (name, strength))
        reduced = reduce_model(model, test, schedule_for(strength, semantics))
        results["rows"][place] = _reduced_row(name, strength, reduced, test)


def plan_again(results: Results, model_folder: Path) -> None:
    """Count multiply-adds anew, of rows whose answers stay as they are: what is computed less changes none."""
    test = load_split("test", AutoTokenizer.from_pretrained(model_folder))
    model = ViltForQuestionAnswering.from_pretrained(model_folder).eval()
    for strength in STRENGTHS:
        plans = {s: reduce_model(model, test, schedule_for(strength, s)).plan for s in get_args(Semantics)}
        for row in results["rows"]:
            if row["strength"] == strength:
                plan = plans["safe" if row["name"] == "reduced, safe" else "reference"]
                row["multiply_adds"] = plan.multiply_adds_after
            elif row["strength"] is None and row["multiply_adds"] is not None:
                row["multiply_adds"] = plans["reference"].multiply_adds_before


def counts_by_layer(plan: pumer.Plan) -> dict[int, TokenCounts]:
    """The tokens `plan` keeps after each of its layers.

    Every layer of ViLT is cross-modal, so site `cross_modal.2` is layer 2.
    """
    return {
        int(site.site.removeprefix("cross_modal.")): TokenCounts(site.after["text"], site.after["image"])
        for site in plan.sites
    }


def _unreduced_row(name: str, model: ViltForQuestionAnswering, plan: pumer.Plan, test: Split) -> Row:
    return {
        "name": name,
        "strength": None,
        "correct": [count_correct(lambda batch: raster_logits(model, batch), test)],
        "total": len(test),
        "text_tokens": [TEXT_LENGTH],
        "image_tokens": [_image_tokens(model)],
        "multiply_adds": plan.multiply_adds_before,
    }


def _question_only_row() -> Row:
    correct, total = question_only_correct()
    return {
        "name": "question only (most frequent training answer per question)",
        "strength": None,
        "correct": [correct],
        "total": total,
        "text_tokens": [],
        "image_tokens": [],
        "multiply_adds": None,
    }


def _reduced_row(name: str, strength: Strength, reduced: pumer.Reduced, test: Split) -> Row:
    correct = count_correct(lambda batch: reduced.module(**batch).logits, test)
    return _planned_row(name, strength, [correct], reduced.plan, test)


def _random_row(model: ViltForQuestionAnswering, strength: Strength, plan: pumer.Plan, test: Split) -> Row:
    counts = counts_by_layer(plan)
    correct = [count_correct(RandomPruning(model, counts, seed), test) for seed in RANDOM_SEEDS]
    return _planned_row("random pruning", strength, correct, plan, test)


def _planned_row(name: str, strength: Strength, correct: list[int], plan: pumer.Plan, test: Split) -> Row:
    counts = counts_by_layer(plan).values()
    first = plan.sites[0].before
    row: Row = {
        "name": name,
        "strength": strength,
        "correct": correct,
        "total": len(test),
        "text_tokens": [first["text"], *(count.text for count in counts)],
        "image_tokens": [first["image"], *(count.image for count in counts)],
        "multiply_adds": plan.multiply_adds_after,
    }
    print(f"{name}, {strength}: {correct} of {len(test)}", flush=True)
    return row


def _image_tokens(model: ViltForQuestionAnswering) -> int:
    return model.vilt.embeddings.position_embeddings.shape[1]


def _parse_retrained(option: str) -> tuple[Strength, Path]:
    strength, separator, folder = option.partition("=")
    if strength not in STRENGTHS or not separator:
        raise typer.BadParameter(f"{option!r} is not STRENGTH=FOLDER with a strength of {', '.join(STRENGTHS)}")
    return strength, Path(folder)


def main(
    model_folder: Path = HERE / "model",
    retrained: Annotated[list[str] | None, typer.Option(help="STRENGTH=FOLDER of a retrained model.")] = None,
    control: Annotated[Path | None, typer.Option(help="Folder of the control.")] = None,
    again: Annotated[str | None, typer.Option(help="Semantics: measure its rows alone anew.")] = None,
    results_path: Path = HERE / "results.json",
) -> None:
    """Measure every row, write RESULTS_PATH and print the table."""
    torch.manual_seed(0)
    if again is not None:
        if again not in get_args(Semantics):
            raise typer.BadParameter(f"{again!r} is none of {', '.join(get_args(Semantics))}")
        results: Results = json.loads(results_path.read_text(encoding="utf-8"))
        measure_again(results, again, model_folder)
        plan_again(results, model_folder)
    else:
        results = measure(model_folder, dict(map(_parse_retrained, retrained or [])), control)
    results_path.write_text(json.dumps(results, indent=1) + "\n")
    print(render_table(results))


if __name__ == "__main__":
    typer.run(main)
