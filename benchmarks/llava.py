"""LLaVA-1.5-7B's shape under VisPruner: multiply-adds of every part (FastV's too), and the time of a prefill that fits
this machine; multiply-adds of LLaVA-1.5-13B and LLaVA-NeXT-7B (an image in four crops and an overview) as well.

The plans are made on the meta device, so nothing of these models is ever held. The prefill that is timed has the 7B's
vision tower (CLIP ViT-L/14 at 336 px) and widths, but few language layers; eager PyTorch, float32, random weights,
batch 1, 40 text tokens, all budgets and the unreduced model taking turns in one process. The selection is timed by
itself too.

python -m benchmarks.llava [--layers 2] [--rounds 5] [--output benchmarks/results/llava_cpu.json]
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import fx

import pumer_compile as pumer
from benchmarks.common import machine
from pumer_compile import Program, Schedule
from pumer_compile.analysis.nodes import module_path
from pumer_compile.analysis.propagate import count_multiply_adds
from pumer_compile.reducers import reducers_of

BUDGETS = (192, 128, 64, 32)
FASTV_LAYER = 2  # as its paper has it
TEXT, BEFORE, IMAGE, PLACEHOLDER = 40, 5, 576, 32000
# Width, width between, heads and layers of the language model.
VICUNA_7B, VICUNA_13B = (4096, 11008, 32, 32), (5120, 13824, 40, 40)
CROPS, PICTURE = 5, 672


def model_of(language: tuple[int, int, int, int], device: str, *, crops: bool = False) -> Any:
    """LLaVA-1.5 (or LLaVA-NeXT) with a language model of these sizes."""
    from transformers import (
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaNextConfig,
        LlavaNextForConditionalGeneration,
    )

    vision = {
        "model_type": "clip_vision_model",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
        "image_size": 336,
        "patch_size": 14,
        "projection_dim": 768,
    }
    width, between, heads, layers = language
    text = {
        "model_type": "llama",
        "vocab_size": 32064,
        "hidden_size": width,
        "intermediate_size": between,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "max_position_embeddings": 4096,
    }
    shared = {"vision_config": vision, "text_config": text, "image_token_index": PLACEHOLDER}
    torch.manual_seed(0)
    with torch.device(device):
        if crops:
            config = LlavaNextConfig(**shared, image_grid_pinpoints=[[PICTURE, PICTURE]])
            return LlavaNextForConditionalGeneration(config).eval()
        return LlavaForConditionalGeneration(LlavaConfig(**shared)).eval()


def prompt(*, crops: bool = False) -> dict[str, torch.Tensor]:
    """One image among 40 words."""
    # A newline behind each of the picture's 48 rows.
    image = CROPS * IMAGE + PICTURE // 14 if crops else IMAGE
    ids = torch.full((1, image + TEXT), 7)
    ids[:, BEFORE : BEFORE + image] = PLACEHOLDER
    shape = (1, CROPS, 3, 336, 336) if crops else (1, 3, 336, 336)
    pixels = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    sizes = {"image_sizes": torch.tensor([[PICTURE, PICTURE]])} if crops else {}
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels, **sizes}


def parts(module: fx.GraphModule, program: Program) -> dict[str, int]:
    """Multiply-adds of tower, selection, projector and prefill."""
    counts = count_multiply_adds(module, program.inputs)
    found = dict.fromkeys(("tower", "selection", "projector", "prefill"), 0)
    for node, count in counts.items():
        path = str(node.target) if node.op == "call_module" else module_path(node)
        if path.startswith("reducer."):
            found["selection"] += count
        elif "vision_tower" in path:
            found["tower"] += count
        elif "multi_modal_projector" in path:
            found["projector"] += count
        else:
            found["prefill"] += count
    return found


def plan() -> list[dict[str, Any]]:
    """Multiply-adds at the 7B's shape, unreduced and at every budget: of VisPruner, and of FastV."""
    start = time.perf_counter()
    program = pumer.capture(model_of(VICUNA_7B, "meta"), prompt(), outputs=["logits"])
    whole = parts(program.module, program)
    rows = [{"budget": IMAGE, "multiply_adds": whole, "fastv": whole}]
    for budget in BUDGETS:
        reduced = pumer.reduce(program, Schedule(method="vispruner", budget=budget))
        late = pumer.reduce(program, Schedule(method="fastv", budget=budget, layer=FASTV_LAYER))
        counts = {"multiply_adds": parts(reduced.module, program), "fastv": parts(late.module, program)}
        rows.append({"budget": budget, **counts})
    print(f"LLaVA-1.5-7B, {TEXT} text tokens; G multiply-adds (plans made in {time.perf_counter() - start:.0f} s)")
    for name, key in (("VisPruner", "multiply_adds"), (f"FastV, layer {FASTV_LAYER}", "fastv")):
        print(name)
        _print_plan([{"budget": row["budget"], "multiply_adds": row[key]} for row in rows])
    return rows


def larger_plans() -> dict[str, list[dict[str, Any]]]:
    """VisPruner's multiply-adds at other shapes; the budget is of each crop."""
    found = {}
    for name, language, crops in (("LLaVA-1.5-13B", VICUNA_13B, False), ("LLaVA-NeXT-7B", VICUNA_7B, True)):
        program = pumer.capture(model_of(language, "meta", crops=crops), prompt(crops=crops), outputs=["logits"])
        rows = [{"budget": IMAGE, "multiply_adds": parts(program.module, program)}]
        for budget in BUDGETS:
            reduced = pumer.reduce(program, Schedule(method="vispruner", budget=budget))
            rows.append({"budget": budget, "multiply_adds": parts(reduced.module, program)})
        found[name] = rows
        print(f"{name}, {TEXT} text tokens; tokens of each {'crop' if crops else 'image'}")
        _print_plan(rows)
    return found


def _print_plan(rows: list[dict[str, Any]]) -> None:
    whole = sum(rows[0]["multiply_adds"].values())
    columns = ("tower", "selection", "projector", "prefill", "all", "fewer", "prefill fewer")
    print(f"{'tokens':>7}" + "".join(f"{name:>15}" for name in columns))
    for row in rows:
        counts = row["multiply_adds"]
        total = sum(counts.values())
        fewer = 1 - counts["prefill"] / rows[0]["multiply_adds"]["prefill"]
        shown = [*(f"{counts[part] / 1e9:.2f}" for part in columns[:4]), f"{total / 1e9:.1f}"]
        shown += [f"{1 - total / whole:.1%}", f"{fewer:.1%}"]
        print(f"{row['budget']:>7}" + "".join(f"{text:>15}" for text in shown))


def timed(layers: int, rounds: int) -> dict[str, Any]:
    """Milliseconds of every prefill, and of the selection and the tower alone."""
    program = pumer.capture(model_of((*VICUNA_7B[:3], layers), "cpu"), prompt(), outputs=["logits"])
    before = sum(parts(program.module, program).values())
    runs: dict[str, Callable[[], Any]] = {str(IMAGE): lambda: program.module(**program.inputs)}
    ratios = {str(IMAGE): 1.0}
    selections: dict[str, Callable[[], Any]] = {}
    for budget in BUDGETS:
        reduced = pumer.reduce(program, Schedule(method="vispruner", budget=budget))
        runs[str(budget)] = lambda module=reduced.module: module(**program.inputs)
        ratios[str(budget)] = before / sum(parts(reduced.module, program).values())
        selections[str(budget)] = _selection(reduced.module, program)
    tower = program.model.model.vision_tower  # type: ignore[union-attr]
    runs["tower"] = lambda: tower(pixel_values=program.inputs["pixel_values"])
    samples: dict[str, list[float]] = {name: [] for name in (*runs, *(f"selection {b}" for b in selections))}
    with torch.no_grad():
        for turn in range(rounds + 1):
            for name, run in (*runs.items(), *((f"selection {b}", s) for b, s in selections.items())):
                start = time.perf_counter()
                run()
                if turn:  # one round of warm-up
                    samples[name].append(1e3 * (time.perf_counter() - start))
    medians = {name: statistics.median(times) for name, times in samples.items()}
    print(f"\nPrefill with {layers} language layers, eager PyTorch; medians of {rounds}")
    print(f"{'tokens':>7}{'ms':>9}{'speed-up':>10}{'multiply-adds':>15}{'selection ms':>14}{'of the tower':>14}")
    for name, ratio in ratios.items():
        select = medians.get(f"selection {name}")
        shown = "" if select is None else f"{select:>14.1f}{select / medians['tower']:>14.1%}"
        print(
            f"{name:>7}{medians[name]:>9.0f}{medians[str(IMAGE)] / medians[name]:>9.2f}x{ratio:>14.2f}x{shown}",
            flush=True,
        )
    return {"language_layers": layers, "ratios": ratios, "milliseconds": samples}


def _selection(module: fx.GraphModule, program: Program) -> Callable[[], Any]:
    """The selection of a reduced module on the features and attention that it gets there."""
    seen: list[Any] = []
    (reducer,) = reducers_of(module).values()
    handle = reducer.register_forward_pre_hook(lambda module, args: seen.append(args))
    with torch.no_grad():
        module(**program.inputs)
    handle.remove()
    return lambda: reducer(*seen[0])


def main() -> None:
    """Plan, time, write."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path, default=Path(__file__).parent / "results" / "llava_cpu.json")
    arguments = parser.parse_args()
    logging.getLogger("pumer_compile").setLevel(logging.ERROR)
    result = {"machine": machine(), "text": TEXT, "plan": plan(), "plans": larger_plans()}
    result["prefill"] = timed(arguments.layers, arguments.rounds)
    arguments.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"Wrote {arguments.output}.")


if __name__ == "__main__":
    main()
