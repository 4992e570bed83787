"""VisPruner's two orders at LLaVA's 576 tokens: how often rounding changes what is kept, and what the choice costs.

python -m benchmarks.vispruner_flips [--images 16] [--rounds 5]     # about two minutes on one core

Rounding: features and attention in float32 against the same rounded to float16 or bfloat16. Two kinds of images, since
there is no trained tower here. `tower`: what a CLIP of 12 layers and width 256 with random weights makes of random
images with structure at four scales; its attention is almost flat, the hardest case. `smooth`: features that vary
slowly over the image, with noise, and attention as peaked as that of trained towers. `coverage` is the cosine of a
removed token to its most similar kept one, in the mean: how much of the image is still there.

Time: the choice for one image beside a CLIP ViT-L/14 at 336 px (24 layers, width 1024, 577 tokens, random weights,
float32), one thread, taking turns. Writes benchmarks/results/vispruner_flips.json.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.common import machine
from pumer_compile.reducers.vispruner import VisPruner

ORDERS = ("reference", "stable")
BUDGETS = (192, 128, 64, 32)
ROUNDED = {"float16": torch.float16, "bfloat16": torch.bfloat16}
GRID = 24
Image = tuple[Tensor, Tensor]


def clip(width: int, layers: int, heads: int, attention: str) -> torch.nn.Module:
    """A CLIP vision tower at 336 px with random weights."""
    from transformers import CLIPVisionConfig, CLIPVisionModel

    torch.manual_seed(0)
    sizes = {"hidden_size": width, "intermediate_size": 4 * width, "num_hidden_layers": layers}
    config = CLIPVisionConfig(**sizes, num_attention_heads=heads, image_size=336, patch_size=14)
    config._attn_implementation = attention
    return CLIPVisionModel(config).eval()


def random_picture(generator: torch.Generator, scales: tuple[int, ...] = (4, 12, 48, 168)) -> Tensor:
    """`[1, 3, 336, 336]`, with structure at several scales."""
    noise = [torch.randn(1, 3, n, n, generator=generator) for n in scales]
    return torch.stack([F.interpolate(n, size=336, mode="bilinear") for n in noise]).sum(0)


def tower_images(count: int) -> list[Image]:
    """Features and attention as LLaVA takes them: of the last layer but one."""
    model, generator = clip(256, 12, 4, "eager"), torch.Generator().manual_seed(0)
    images = []
    for _ in range(count):
        out = model(random_picture(generator), output_hidden_states=True, output_attentions=True)
        images.append((out.hidden_states[-2][:, 1:].clone(), out.attentions[-2][:, :, 0, 1:].mean(1)))
    return images


def smooth_images(count: int, width: int = 1024, looks: int = 64, noise: float = 0.3) -> list[Image]:
    """Random fields of a 6 x 6 grid, enlarged, in `looks` dimensions of the features, and noise in all."""
    g = torch.Generator().manual_seed(1)

    def field(channels: int) -> Tensor:
        coarse = torch.randn(1, channels, 6, 6, generator=g)
        return F.interpolate(coarse, size=(GRID, GRID), mode="bicubic").flatten(2).transpose(1, 2)

    images = []
    for _ in range(count):
        features = field(looks) @ torch.randn(looks, width, generator=g) / looks**0.5
        features = features + noise * torch.randn(1, GRID**2, width, generator=g) + torch.randn(width, generator=g)
        attention = (field(1)[..., 0] + 0.5 * torch.randn(1, GRID**2, generator=g)).softmax(-1)
        images.append((features, attention))
    return images


def coverage(features: Tensor, kept: Tensor) -> float:
    """Cosine of a removed token to its most similar kept one, mean over the removed ones of one image."""
    unit = F.normalize(features[0], dim=-1)
    removed = torch.ones(len(unit), dtype=torch.bool)
    removed[kept[0]] = False
    return float((unit[removed] @ unit[kept[0]].T).amax(-1).mean())


def flips(images: list[Image], budget: int, order: str) -> dict[str, Any]:
    """How rounding changes what is kept of each image."""
    pruner = VisPruner(budget, order=order)  # type: ignore[arg-type]
    chosen = [pruner(*image).kept for image in images]
    row: dict[str, Any] = {
        "budget": budget,
        "order": order,
        "coverage": statistics.mean(coverage(image[0], kept) for image, kept in zip(images, chosen, strict=True)),
    }
    for name, dtype in ROUNDED.items():
        rounded = [pruner(features.to(dtype), attention.to(dtype)).kept for features, attention in images]
        changed = [budget - int(torch.isin(kept, other).sum()) for kept, other in zip(chosen, rounded, strict=True)]
        row[name] = {"images_changed": sum(n > 0 for n in changed), "tokens_changed": changed}
    return row


def onnx_runner(pruner: VisPruner, image: Image, folder: Path) -> Callable[[], object]:
    """The choice under onnxruntime, one thread."""
    import onnxruntime

    path = folder / f"{pruner.order}.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(pruner, image, path, input_names=["features", "attention"], verbose=False)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    feed = {"features": image[0].numpy(), "attention": image[1].numpy()}
    return lambda: session.run(None, feed)


def times(rounds: int, folder: Path) -> dict[str, list[float]]:
    """Milliseconds of every run, taking turns: the tower once, each choice five times."""
    image = smooth_images(1)[0]
    pixels, model = random_picture(torch.Generator().manual_seed(0)), clip(1024, 24, 16, "sdpa")
    runs: dict[str, Callable[[], object]] = {"tower": lambda: model(pixels)}
    for order in ORDERS:
        for budget in BUDGETS:
            pruner = VisPruner(budget, order=order).eval()  # type: ignore[arg-type]
            runs[f"eager, {order}, {budget}"] = lambda pruner=pruner: pruner(*image)  # type: ignore[misc]
            if budget == 64:
                runs[f"onnxruntime, {order}, {budget}"] = onnx_runner(pruner, image, folder)
    samples: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(rounds + 1):
        for name, run in runs.items():
            for _ in range(1 if name == "tower" else 5):
                start = time.perf_counter()
                run()
                if turn:  # one round of warm-up
                    samples[name].append(1e3 * (time.perf_counter() - start))
    return samples


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "vispruner_flips.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    result: dict[str, Any] = {"machine": machine(), "tokens": GRID**2, "images": arguments.images, "flips": {}}
    print("images  budget order      coverage  changed by float16 (tokens)  by bfloat16 (tokens)")
    for name, make in (("tower", tower_images), ("smooth", smooth_images)):
        images = make(arguments.images)
        rows = [flips(images, budget, order) for budget in BUDGETS for order in ORDERS]
        result["flips"][name] = rows
        for row in rows:
            cells = [
                f"{row[d]['images_changed'] / len(images):>14.0%} ({statistics.mean(row[d]['tokens_changed']):.1f})"
                for d in ROUNDED
            ]
            print(f"{name:<8}{row['budget']:>6} {row['order']:<10}{row['coverage']:>9.3f}", *cells, flush=True)
    with tempfile.TemporaryDirectory() as folder:
        samples = times(arguments.rounds, Path(folder))
    result["milliseconds"] = samples
    result["load_average_after"] = os.getloadavg()
    medians = {name: statistics.median(values) for name, values in samples.items()}
    for name, median in medians.items():
        print(f"{name:<32}{median:>9.1f} ms{median / medians['tower']:>9.2%} of the tower")
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"Wrote {arguments.output}.")


if __name__ == "__main__":
    main()
