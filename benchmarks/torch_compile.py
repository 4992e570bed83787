"""`torch.compile` on the CPU: a model unreduced under inductor against the same model under the backend `pumer`.

Both are compiled by inductor as one graph (ViLT's `visual_embed` in the same traceable form, without which stock
inductor would split the model), for one batch size at a time, and run in one process, alternating, so that a busy
machine slows both alike. Full-size ViLT-B/32 has random weights, 384 px and 40 text tokens; the other model is the
fine-tuned one of the demo. Prints a table and writes one JSON with every sample and the machine.

    python -m benchmarks.torch_compile            # several minutes
    python -m benchmarks.torch_compile --tiny     # the machinery alone, on a small model
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn
from transformers import ViltConfig, ViltForQuestionAnswering
from transformers.models.vilt.modeling_vilt import ViltEmbeddings

import pumer_compile as pumer
from benchmarks.common import machine, published
from pumer_compile.capture.loading import load_model
from pumer_compile.capture.make_inputs import make_inputs
from pumer_compile.frontends import vilt

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "examples" / "easy_vqa"

Measured = dict[str, Any]


def full_size() -> tuple[nn.Module, str, int]:
    """ViLT-B/32 for question answering with random weights; its schedule; its text tokens."""
    torch.manual_seed(0)
    return ViltForQuestionAnswering(ViltConfig(num_labels=3129)).eval(), "vilt-vqa", 40


def demo() -> tuple[nn.Module, str, int]:
    """The demo's model, fine-tuned on easy-VQA."""
    model = load_model(DEMO / "model").model
    assert model is not None
    return model.eval(), str(DEMO / "schedule.yaml"), 16


def tiny() -> tuple[nn.Module, str, int]:
    """A model of no use but to try this script."""
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 32, "num_hidden_layers": 6}
    config = ViltConfig(**sizes, image_size=64, patch_size=16, vocab_size=99, num_labels=5)
    return ViltForQuestionAnswering(config).eval(), str(DEMO / "schedule.yaml"), 16


MODELS: dict[str, Callable[[], tuple[nn.Module, str, int]]] = {"vilt-b32": full_size, "easy-vqa": demo}


@contextmanager
def traceable() -> Iterator[None]:
    """ViLT with the rewrite that this package traces, for the unreduced model too."""
    with mock.patch.object(ViltEmbeddings, "visual_embed", vilt.visual_embed):
        yield


def measure(model: nn.Module, schedule: str, inputs: dict[str, Tensor], rounds: int) -> Measured:
    """Compile both, check what they give, and time them in turn."""
    torch._dynamo.reset()
    reduced = pumer.reduce(pumer.capture(model, inputs), published(schedule))
    static = {"fullgraph": True, "dynamic": False}
    variants = {
        "unreduced": torch.compile(model, backend="inductor", **static),
        "reduced": torch.compile(model, backend="pumer", options={"schedule": published(schedule)}, **static),
    }
    expected = {"unreduced": model(**inputs).logits, "reduced": reduced.module(**inputs).logits}
    milliseconds: dict[str, list[float]] = {name: [] for name in variants}
    compile_seconds, differences = {}, {}
    for name, variant in variants.items():
        start = time.perf_counter()
        found = variant(**inputs).logits
        compile_seconds[name] = time.perf_counter() - start
        differences[name] = (found - expected[name]).abs().max().item()
        if differences[name] > 1e-3:
            raise SystemExit(f"The {name} model differs from eager PyTorch by {differences[name]:.1e} in its logits.")
    for turn in range(rounds + 2):
        for name, variant in variants.items():
            start = time.perf_counter()
            variant(**inputs)
            if turn >= 2:  # two rounds of warm-up
                milliseconds[name].append(1e3 * (time.perf_counter() - start))
    return {
        "milliseconds": milliseconds,
        "compile_seconds": compile_seconds,
        "largest_difference_from_eager": differences,
        "multiply_adds": reduced.plan.to_dict()["multiply_adds"],
    }


def row(name: str, batch: int, measured: Measured) -> str:
    """One line of the table: medians, quartiles, speed-up beside the ratio of multiply-adds."""
    cells = []
    for samples in measured["milliseconds"].values():
        low, median, high = statistics.quantiles(samples, n=4)
        cells.append(f"{median:>10.1f}{f'({low:.1f} to {high:.1f})':>20}")
    medians = [statistics.median(samples) for samples in measured["milliseconds"].values()]
    ratio = measured["multiply_adds"]["ratio"]
    return f"{name:<10}{batch:>6}{''.join(cells)}{medians[0] / medians[1]:>9.2f}x{ratio:>14.2f}x"


def main() -> None:
    """Compile, run, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=MODELS, nargs="+", default=list(MODELS))
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--tiny", action="store_true", help="a small model, and no file unless --output is given")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    models = {"tiny": tiny} if arguments.tiny else {name: MODELS[name] for name in arguments.model}
    output = arguments.output or (
        None if arguments.tiny else ROOT / "benchmarks" / "results" / "torch_compile_cpu.json"
    )
    result: dict[str, Any] = {"machine": machine(), "threads": torch.get_num_threads(), "models": {}}
    print(f"{'model':<10}{'batch':>6}{'unreduced ms':>30}{'reduced ms':>30}{'speed-up':>10}{'multiply-adds':>15}")
    with torch.no_grad(), traceable():
        for name, build in models.items():
            model, schedule, text = build()
            batches: dict[int, Measured] = {}
            for batch in arguments.batch:
                inputs = make_inputs(model, batch=batch, text_length=text, padding=False)
                batches[batch] = measure(model, schedule, inputs, arguments.rounds)
                print(row(name, batch, batches[batch]), flush=True)
            entry = {"schedule": published(schedule).model_dump(mode="json"), "text_length": text}
            result["models"][name] = {**entry, "batches": batches}
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(f"Wrote {output}.")


if __name__ == "__main__":
    main()
