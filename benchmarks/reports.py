"""The reports in docs/reports/: the demo, a METER and a Qwen2.5-VL of random weights, on pictures of easy-VQA.

python -m benchmarks.reports            writes docs/reports/*.html
python -m benchmarks.reports --look     opens each in headless Chromium too, and takes docs/reports/report.png
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from easy_vqa import get_test_image_paths
from PIL import Image
from torch import Tensor

import pumer_compile as pumer

ROOT = Path(__file__).parents[1]
OUT = ROOT / "docs" / "reports"
MOST_BYTES = 600_000
NORMAL = {"image_mean": [0.5, 0.5, 0.5], "image_std": [0.5, 0.5, 0.5]}


class Processor:
    """How pictures are normalised below."""

    image_mean = NORMAL["image_mean"]
    image_std = NORMAL["image_std"]


def picture(number: int, size: int) -> Tensor:
    """A test picture of easy-VQA, normalised, `[3, size, size]`."""
    paths = get_test_image_paths()
    with Image.open(paths[sorted(paths)[number]]) as image:
        pixels = np.array(image.convert("RGB").resize((size, size)))
    return (torch.from_numpy(pixels).permute(2, 0, 1).float() / 255 - 0.5) / 0.5


def demo() -> pumer.Report:
    """The model of `make demo`, as an ONNX artifact that shows its decisions, with its proof and its latency."""
    from transformers import AutoTokenizer

    from examples.easy_vqa.data import load_split

    model, schedule = ROOT / "examples/easy_vqa/model_paper", ROOT / "examples/easy_vqa/schedule.yaml"
    test = load_split("test", AutoTokenizer.from_pretrained(model))
    batch = test.batch(torch.tensor([3, 500, 1500, 4000]))
    with tempfile.TemporaryDirectory() as folder:
        artifact, whole = Path(folder) / "model.onnx", Path(folder) / "unreduced.onnx"
        program = pumer.capture(pumer_model(model), batch)
        pumer.export(pumer.reduce(program, schedule), artifact, with_decisions=True)
        pumer.export(program, whole, verify=False)
        from pumer_compile.bench.bench import bench

        measured = Path(folder) / "bench.json"
        bench([artifact, whole], iterations=30).save(measured)
        return pumer.report(artifact, batch, model=model, bench=measured)


def pumer_model(folder: Path) -> object:
    """The model in a folder."""
    from pumer_compile.capture.loading import load_model

    return load_model(folder)


def meter() -> pumer.Report:
    """A small METER: its image and its text are reduced by cross-attention to one another."""
    from tests.support.meter import meter_inputs, tiny_meter

    model = tiny_meter(image_size=96, num_top_layer=3)
    batch = meter_inputs(2, length=9, size=96)
    batch["pixel_values"] = torch.stack([picture(number, 96) for number in (7, 21)])
    schedule = pumer.Schedule(method="pumer", layers=[0, 2], prune=0.2, merge={"image": 0.3, "text": 0.2})
    return pumer.report(pumer.reduce(pumer.capture(model, batch), schedule), batch, processor=Processor())


def qwen() -> pumer.Report:
    """A small Qwen2.5-VL: rows of its prompt are 2 x 2 patches, in windows inside its tower."""
    from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

    from tests.support.prompt_families import FAMILIES, IMAGE

    torch.manual_seed(0)
    model = FAMILIES["qwen2_5_vl"]()[0].eval()
    processor = Qwen2VLImageProcessorPil(patch_size=4, merge_size=2, temporal_patch_size=2, do_resize=False, **NORMAL)
    pixels = (picture(40, 72) * 0.5 + 0.5).mul(255).round().byte()
    made = processor(Image.fromarray(pixels.permute(1, 2, 0).numpy()), return_tensors="pt")
    rows = int(made["image_grid_thw"].prod()) // 4
    ids = torch.tensor([[3, 4, 5, *[IMAGE] * rows, 6, 7, 8, 9]])
    batch = {
        "input_ids": ids,
        "attention_mask": torch.ones_like(ids),
        "pixel_values": made["pixel_values"].float(),
        "image_grid_thw": made["image_grid_thw"],
        "mm_token_type_ids": (ids == IMAGE).long(),
    }
    stages = [
        {"method": "fastervlm", "budget": 40, "positions": "original"},
        {"method": "fastv", "layer": 1, "budget": 20},
    ]
    schedule = pumer.Schedule.load({"method": "stages", "stages": stages})
    return pumer.report(pumer.reduce(pumer.capture(model, batch), schedule), batch, processor=processor)


REPORTS: dict[str, Callable[[], pumer.Report]] = {"demo": demo, "meter": meter, "qwen2_5_vl": qwen}


def main(arguments: list[str]) -> None:
    """Write the reports."""
    OUT.mkdir(parents=True, exist_ok=True)
    names = [name for name in arguments if name in REPORTS] or list(REPORTS)
    for name in names:
        page = OUT / f"{name}.html"
        REPORTS[name]().save(page)
        size = page.stat().st_size
        print(f"{page.relative_to(ROOT)}: {size / 1e3:.0f} kB", flush=True)
        if size > MOST_BYTES:
            raise SystemExit(f"{page} is larger than {MOST_BYTES} bytes")
        if "--look" in arguments:
            check(page)


def check(page: Path) -> None:
    """Open a page in Chromium; nothing may be loaded, said on the console, or be wider than the window."""
    from tests.support.browser import look

    with tempfile.TemporaryDirectory() as folder:
        seen = look(page, Path(folder) / "page.png")
        if page.stem == "demo":
            with Image.open(Path(folder) / "page-1280-light.png") as whole:
                whole.convert("RGB").crop((0, 0, 1280, 1160)).resize((800, 725)).quantize(64).save(OUT / "report.png")
    wrong = [*seen.console, *seen.requests]
    wrong += [f"{width} px: {said}" for width, said in seen.probes.items() if said["overflow"] or said["unnamed"]]
    print(f"  {len(seen.pictures)} pictures, {len(seen.probes)} views, tabs {seen.tabs}; wrong: {wrong or 'nothing'}")
    if wrong or not seen.pictures or not all(seen.tabs):
        raise SystemExit(1)


if __name__ == "__main__":
    main(sys.argv[1:])
