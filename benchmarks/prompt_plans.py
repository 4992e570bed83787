"""Plans of prompt models as they are deployed, with no weights: docs/prompts.md.

    python -m benchmarks.prompt_plans            # capture and reduce all on the meta device, and write the table
    python -m benchmarks.prompt_plans --render       # write it from the results there are

Each model is built on the meta device at its published size (from its public configuration), captured once with one
image and 60 tokens of text, and reduced to 50, 25 and 11% of its image rows. Each runs in a process of its own; results
are kept in benchmarks/results/prompt_plans.json.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/prompt_plans.json"
PAGE = ROOT / "docs/prompts.md"
SHARES = (0.5, 0.25, 0.11)
BEFORE, AFTER = 20, 40
Built = tuple[Any, dict[str, Tensor]]
MODELS: dict[str, Callable[[], Built]] = {}


def _model(name: str) -> Callable[[Callable[[], Built]], None]:
    def add(build: Callable[[], Built]) -> None:
        MODELS[name] = build

    return add


def _prompt(token: int, rows: int, **more: Tensor) -> dict[str, Tensor]:
    ids = torch.randint(5, 1000, (1, BEFORE + rows + AFTER))
    ids[:, BEFORE : BEFORE + rows] = token
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), **more}


def _empty(config: Any, cls: Any) -> Any:
    with torch.device("meta"):
        return cls(config).to(torch.bfloat16).eval()


def _pixels(*shape: int) -> Tensor:
    return torch.empty(*shape, dtype=torch.bfloat16, device="meta")


def _packed(side: int, width: int, token: int) -> dict[str, Tensor]:
    """One image of `side` x `side` patches, merged 2 x 2."""
    rows = side * side // 4
    prompt = _prompt(token, rows)
    kinds = torch.zeros_like(prompt["input_ids"])
    kinds[:, BEFORE : BEFORE + rows] = 1
    grid = torch.tensor([[1, side, side]])
    return {**prompt, "pixel_values": _pixels(side * side, width), "image_grid_thw": grid, "mm_token_type_ids": kinds}


@_model("Qwen2.5-VL-7B")
def _qwen2_5() -> Built:
    import transformers as hf

    vision = {"depth": 32, "hidden_size": 1280, "num_heads": 16, "intermediate_size": 3420, "out_hidden_size": 3584}
    vision |= {"patch_size": 14, "window_size": 112, "fullatt_block_indexes": [7, 15, 23, 31]}
    text = {"hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28, "num_attention_heads": 28}
    rope = {"rope_type": "default", "mrope_section": [16, 24, 24], "rope_theta": 1e6}
    text |= {"num_key_value_heads": 4, "vocab_size": 152064, "rope_parameters": rope}
    config = hf.Qwen2_5_VLConfig(vision_config=vision, text_config=text, image_token_id=151655, video_token_id=151656)
    return _empty(config, hf.Qwen2_5_VLForConditionalGeneration), _packed(36, 1176, 151655)


@_model("Qwen3-VL-4B")
def _qwen3() -> Built:
    import transformers as hf

    vision = {"depth": 24, "hidden_size": 1024, "num_heads": 16, "intermediate_size": 4096, "out_hidden_size": 2560}
    vision |= {"patch_size": 16, "deepstack_visual_indexes": [5, 11, 17], "num_position_embeddings": 2304}
    rope = {"rope_type": "default", "mrope_section": [24, 20, 20], "mrope_interleaved": True, "rope_theta": 5e6}
    text = {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36, "num_attention_heads": 32}
    text |= {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 151936, "rope_parameters": rope}
    config = hf.Qwen3VLConfig(vision_config=vision, text_config=text, image_token_id=151655, video_token_id=151656)
    return _empty(config, hf.Qwen3VLForConditionalGeneration), _packed(32, 1536, 151655)


@_model("InternVL3-8B")
def _internvl() -> Built:
    import transformers as hf

    vision = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 24, "num_attention_heads": 16}
    vision |= {"image_size": [448, 448], "patch_size": [14, 14], "attention_bias": True}
    text = {"model_type": "qwen2", "hidden_size": 3584, "intermediate_size": 18944, "num_hidden_layers": 28}
    text |= {"num_attention_heads": 28, "num_key_value_heads": 4, "vocab_size": 151674}
    config = hf.InternVLConfig(vision_config=vision, text_config=text, image_token_id=151667)
    prompt = _prompt(151667, 256)
    return _empty(config, hf.InternVLForConditionalGeneration), {**prompt, "pixel_values": _pixels(1, 3, 448, 448)}


@_model("Gemma-3-4B")
def _gemma3() -> Built:
    import transformers as hf

    vision = {"hidden_size": 1152, "intermediate_size": 4304, "num_hidden_layers": 27, "num_attention_heads": 16}
    vision |= {"image_size": 896, "patch_size": 14, "vision_use_head": False, "model_type": "siglip_vision_model"}
    text = {"model_type": "gemma3_text", "hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
    text |= {"num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "vocab_size": 262208}
    text |= {"sliding_window": 1024}
    config = hf.Gemma3Config(vision_config=vision, text_config=text, image_token_index=262144, mm_tokens_per_image=256)
    prompt = _prompt(262144, 256)
    kinds = (prompt["input_ids"] == 262144).long()
    more = {"pixel_values": _pixels(1, 3, 896, 896), "token_type_ids": kinds}
    return _empty(config, hf.Gemma3ForConditionalGeneration), {**prompt, **more}


def plan_one(name: str) -> dict[str, Any]:
    """Capture and reduce one model; multiply-adds of the prefill, seconds and memory."""
    import transformers

    import pumer_compile as pumer

    transformers.logging.set_verbosity_error()
    model, inputs = MODELS[name]()
    start = time.process_time()
    program = pumer.capture(model, inputs, outputs=["logits"])
    captured = time.process_time() - start
    token = int(inputs["input_ids"][0, BEFORE])
    rows = int((inputs["input_ids"] == token).sum())
    budgets, reduced = {}, []
    for share in SHARES:
        start = time.process_time()
        schedule = pumer.Schedule(method="vispruner", budget=round(rows * share), positions="original")
        plan = pumer.reduce(program, schedule).plan
        reduced.append(time.process_time() - start)
        budgets[str(round(rows * share))] = [plan.multiply_adds_before, plan.multiply_adds_after]
    return {
        "name": name,
        "rows": rows,
        "parameters": sum(p.numel() for p in model.parameters()),
        "budgets": budgets,
        "capture_seconds": round(captured, 1),
        "reduce_seconds": round(max(reduced), 1),
        "gibibytes": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20, 2),
        "versions": {p: version(p).partition("+")[0] for p in ("transformers", "torch")},
    }


def table(results: list[dict[str, Any]]) -> str:
    """Markdown, one row a model."""
    head = "| Model, one image | Rows | Multiply-adds of the prefill | " + " | ".join(f"{s:.0%}" for s in SHARES)
    lines = [head + " | Plan made in |", "| --- " * (len(SHARES) + 4) + "|"]
    for r in results:
        cells = [f"{budget} rows: {a / 1e9:,.0f} G ({b / a:.2f}x)" for budget, (b, a) in r["budgets"].items()]
        before = next(iter(r["budgets"].values()))[0] / 1e9
        seconds = f"{r['capture_seconds']:.0f} + {r['reduce_seconds']:.0f} s, {r['gibibytes']} GiB"
        lines.append(f"| {r['name']} | {r['rows']} | {before:,.0f} G | {' | '.join(cells)} | {seconds} |")
    return "\n".join(lines)


def render(results: list[dict[str, Any]]) -> None:
    """Write the table between its marks in the page."""
    begin, end = "<!-- plans -->", "<!-- end of plans -->"
    text = PAGE.read_text(encoding="utf-8")
    PAGE.write_text(
        f"{text.partition(begin)[0]}{begin}\n{table(results)}\n{end}{text.partition(end)[2]}", encoding="utf-8"
    )


def main() -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--render", action="store_true", help="from the results there are")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(plan_one(options.one)))
        return
    if not options.render:
        results = []
        for name in MODELS:
            command = [sys.executable, "-m", "benchmarks.prompt_plans", "--one", name]
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
            if done.returncode:
                sys.exit(f"{name}: {done.stderr[-2000:]}")
            results.append(json.loads(done.stdout.splitlines()[-1]))
            print(f"{name}: {results[-1]}")
        RESULTS.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    render(json.loads(RESULTS.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
