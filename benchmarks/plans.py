"""Plans of the models that the first page speaks of, and its figure: tokens along ViLT and along Qwen2.5-VL.

    python -m benchmarks.plans             # plan (random weights, or none), then draw
    python -m benchmarks.plans --render    # draw docs/figures/tokens.svg from benchmarks/results/plans.json

The ratios of these schedules stand on many pages; all are written from this file (`python -m benchmarks.readme`).
"""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "plans.json"
FIGURE = ROOT / "docs" / "figures" / "tokens.svg"
TEXT = 40
PROMPT_BUDGET = 81  # a quarter of the 324 image tokens

Plans = dict[str, dict[str, Any]]


def vilt() -> Plans:
    """ViLT-B/32, 384 px, 3,129 answers."""
    from transformers import ViltConfig, ViltForQuestionAnswering

    return _fusion(ViltForQuestionAnswering(ViltConfig(num_labels=3129)).eval(), ("vilt-vqa", "vilt-ve", "lossless"))


def meter() -> Plans:
    """METER with CLIP-ViT-B/16 at 384 px."""
    from pumer_compile.frontends.meter.configuration import MeterConfig
    from pumer_compile.frontends.meter.heads import MeterForQuestionAnswering

    model = MeterForQuestionAnswering(MeterConfig(image_size=384)).eval()
    return _fusion(model, ("meter-vqa", "meter-ve", "meter-vqa-tower", "meter-ve-tower"))


def _fusion(model: Any, schedules: tuple[str, ...]) -> Plans:
    import pumer_compile as pumer
    from benchmarks.common import published
    from pumer_compile.capture.make_inputs import make_inputs

    program = pumer.capture(model, make_inputs(model, text_length=TEXT, padding=False))
    found = {}
    for name in schedules:
        schedule = pumer.Schedule.load(name) if name == "lossless" else published(name)
        found[name] = _said(pumer.reduce(program, schedule).plan)
    return found


def qwen() -> Plans:
    """Qwen2.5-VL-7B, one image of 504 px in a prompt."""
    import pumer_compile as pumer
    from benchmarks.prompt_plans import MODELS

    model, inputs = MODELS["Qwen2.5-VL-7B"]()
    program = pumer.capture(model, inputs, outputs=["logits"])
    schedule = pumer.Schedule(method="vispruner", budget=PROMPT_BUDGET, positions="original")
    return {f"vispruner, {PROMPT_BUDGET} tokens": _said(pumer.reduce(program, schedule).plan)}


MODELS: dict[str, Callable[[], Plans]] = {"ViLT-B/32": vilt, "METER": meter, "Qwen2.5-VL-7B": qwen}


def _said(plan: Any) -> dict[str, Any]:
    return {**plan.to_dict(), "layers": plan.tokens()}


# --- The figure -------------------------------------------------------------------------------------------------------

WIDTH, HEIGHT, LEFT, TOP, BASE = 760, 300, 46, 64, 232
IMAGE, TEXT_COLOUR, GONE = "#3f6fb5", "#d98c3a", "#d7dbe2"


def figure(results: dict[str, Plans]) -> str:
    """Both panels as SVG: a bar for each layer, what was there before in grey behind what is left."""
    panels = [
        _panel("ViLT-B/32, vilt-vqa", results["ViLT-B/32"]["vilt-vqa"], 0),
        _panel("Qwen2.5-VL-7B, a quarter of the image", next(iter(results["Qwen2.5-VL-7B"].values())), WIDTH // 2),
    ]
    legend = "".join(
        f'<rect x="{x}" y="270" width="12" height="12" fill="{colour}"/><text x="{x + 17}" y="280">{name}</text>'
        for x, colour, name in ((46, IMAGE, "image tokens"), (160, TEXT_COLOUR, "text tokens"), (270, GONE, "reduced"))
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="12" fill="#222" role="img" aria-label="Tokens in every layer before and after reduction">'
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="#fff"/>{"".join(panels)}{legend}</svg>\n'
    )


def counts(plan: dict[str, Any]) -> tuple[tuple[int, int], list[tuple[int, int]]]:
    """Image and text tokens before reduction, and in every layer of the model that reads both."""
    layers = [layer for layer in plan["layers"].values() if len(layer) > 1 or "prompt" in "".join(layer)]
    pairs = [_pair(layer) for layer in layers]
    first = plan["sites"][0]["before"]
    image = max(count for name, count in first.items() if "image" in name)
    return (image, max(text for _, text in pairs)), pairs


def _pair(layer: dict[str, int]) -> tuple[int, int]:
    image = sum(count for name, count in layer.items() if "image" in name)
    return image, sum(layer.values()) - image


def _panel(title: str, plan: dict[str, Any], x: int) -> str:
    (image, text), pairs = counts(plan)
    scale, step = (BASE - TOP) / (image + text), (WIDTH / 2 - LEFT - 20) / len(pairs)
    said = plan["multiply_adds"]
    parts = [f'<text x="{x + LEFT}" y="24" font-size="14" font-weight="bold">{title}</text>']
    parts.append(
        f'<text x="{x + LEFT}" y="44">{said["before"] / 1e9:,.4g} G multiply-adds before, {said["after"] / 1e9:,.4g} G '
        f"after: {said['ratio']:.2f}x fewer</text>"
    )
    for index, (kept, words) in enumerate(pairs):
        left, wide = x + LEFT + index * step, step * 0.78
        for colour, tokens, below in ((GONE, image + text, 0), (IMAGE, kept, words), (TEXT_COLOUR, words, 0)):
            high = tokens * scale
            y = BASE - high - below * scale
            parts.append(f'<rect x="{left:.1f}" y="{y:.1f}" width="{wide:.1f}" height="{high:.1f}" fill="{colour}"/>')
    parts += [
        f'<text x="{x + LEFT - 6}" y="{TOP + 4}" text-anchor="end">{image + text}</text>',
        f'<text x="{x + LEFT - 6}" y="{BASE}" text-anchor="end">0</text>',
        f'<text x="{x + LEFT}" y="{BASE + 18}">layer 1</text>',
        f'<text x="{x + WIDTH // 2 - 22}" y="{BASE + 18}" text-anchor="end">layer {len(pairs)}</text>',
    ]
    return "".join(parts)


def main() -> None:
    """Plan and draw."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true", help="draw from the results there are")
    given = parser.parse_args()
    if not given.render:
        logging.getLogger("pumer_compile").setLevel(logging.ERROR)
        results: dict[str, Plans] = {}
        for name, plans in MODELS.items():
            results[name] = plans()
            ratios = {schedule: round(plan["multiply_adds"]["ratio"], 3) for schedule, plan in results[name].items()}
            print(name, ratios, flush=True)
            RESULTS.write_text(json.dumps({"text": TEXT, "models": results}, indent=1) + "\n", encoding="utf-8")
    FIGURE.parent.mkdir(parents=True, exist_ok=True)
    FIGURE.write_text(figure(json.loads(RESULTS.read_text(encoding="utf-8"))["models"]), encoding="utf-8")


if __name__ == "__main__":
    main()
