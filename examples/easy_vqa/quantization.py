"""What int8 costs: the demo's reduced model in every mode of `--quantize int8`, on the whole test set.

python -m examples.easy_vqa.quantization

writes `quantization.json`, from which the README's table is made. Time is not measured: it is the processor's, and
`pumer-compile bench` tells it where the model is to run.
"""

import json
import tempfile
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
import torch
import typer
from transformers import AutoTokenizer, ViltForQuestionAnswering

import pumer_compile as pumer
from examples.easy_vqa.data import Split, load_split
from pumer_compile.exporters import export
from pumer_compile.exporters.quantize import QuantizeMode

HERE = Path(__file__).parent
PACKAGES = ["easy-vqa", "torch", "transformers", "onnx", "onnxruntime"]
MODES: list[QuantizeMode | None] = [None, "weights", "dynamic", "static"]
BATCH = 64


def draw(split: Split, count: int, seed: int) -> torch.Tensor:
    """Rows of `count` questions, drawn without replacement."""
    return torch.randperm(len(split), generator=torch.Generator().manual_seed(seed))[:count]


def answer(session: pumer.OnnxSession, split: Split) -> np.ndarray:
    """Labels of all questions, int64 `[questions]`."""
    batches = (session.run(split.batch(rows)) for rows in torch.arange(len(split)).split(BATCH))
    return np.concatenate([batch["logits"].argmax(-1) for batch in batches])


def measure(
    reduced: pumer.Reduced, mode: QuantizeMode | None, folder: Path, test: Split, samples: int, float32: Any
) -> tuple[dict[str, Any], np.ndarray]:
    """One artifact: its row, and its answers.

    Args:
        float32: answers to compare with; None where these are they.
    """
    path = folder / f"{mode or 'float32'}.onnx"
    options = pumer.OnnxOptions()
    if mode is not None:
        calibration = folder / "calibration.npz" if mode == "static" else None
        options = pumer.OnnxOptions(quantize="int8", quantize_mode=mode, calibration=calibration)
    batches = [test.batch(rows) for rows in draw(test, samples, seed=0).split(BATCH)]
    report = export(reduced, path, options=options, samples=batches).report
    assert report is not None  # verified
    given = answer(pumer.OnnxSession(path), test)
    row = {
        "mode": mode,
        "bytes": path.stat().st_size,
        "correct": int((given == test.labels.numpy()).sum()),
        "total": len(test),
        "agree": len(test) if float32 is None else int((given == float32).sum()),
        "parity_samples": report.samples,
        "forced_error": next(o.max_norm for o in report.outputs if o.against == "forced"),
        "reducers": {r.name: {"differ": r.differ, "flip_rate": r.flip_rate} for r in report.reducers},
    }
    print(row, flush=True)
    return row, given


def main(
    model_folder: Path = HERE / "model_paper",
    schedule: Path = HERE / "schedule.yaml",
    calibration: int = 320,
    samples: int = 512,
    results_path: Path = HERE / "quantization.json",
) -> None:
    """Compile, prove and evaluate every mode; calibrate on CALIBRATION training questions, prove on SAMPLES."""
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    test, train = load_split("test", tokenizer), load_split("train", tokenizer)
    model = ViltForQuestionAnswering.from_pretrained(model_folder).eval()
    reduced = pumer.reduce(pumer.capture(model, test.batch(torch.arange(2)), dynamic_batch=True), schedule)
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        folder, float32 = Path(name), None
        given = train.batch(draw(train, calibration, seed=1))
        np.savez(folder / "calibration.npz", **{name: tensor.numpy() for name, tensor in given.items()})
        for mode in MODES:
            row, answers = measure(reduced, mode, folder, test, samples, float32)
            float32 = answers if float32 is None else float32
            rows.append(row)
    results = {
        "versions": {"pumer-compile": pumer.__version__} | {name: version(name) for name in PACKAGES},
        "calibration_samples": calibration,
        "rows": rows,
    }
    results_path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    typer.run(main)
