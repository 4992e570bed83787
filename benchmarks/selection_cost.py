"""What a selection costs beside the model, at LLaVA-1.5's shape, under onnxruntime.

    python -m benchmarks.selection_cost              # a budget of 64 of 576, about five minutes
    python -m benchmarks.selection_cost --crops 4 --budget 256

The selection of each method, one layer of the tower (CLIP-L/14 at 336: 577 tokens of 1024) and one of the language
model (Llama-7B: 4096, over the prompt that is left) are ONNX graphs of their own, and take turns in one process; the
least of several runs counts, since others only add to it. A tower has 24 layers, the language model 32. What a method
reads (a row of attention, keys) is given: a row is 1 of 577 of an attention that is computed anyway. Written to
benchmarks/results/selection_cost.json.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping
from math import isqrt
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from torch import Tensor, nn
from transformers import CLIPVisionConfig, LlamaConfig
from transformers.models.clip.modeling_clip import CLIPEncoderLayer
from transformers.models.llama.modeling_llama import LlamaDecoderLayer, LlamaRotaryEmbedding

from benchmarks.common import machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks/results/selection_cost.json"
TOKENS, TEXT, TOWER, WIDTH, HEADS, SIZE = 576, 64, 1024, 4096, 32, 128
# For the methods that choose among the tokens of a film: as many tokens, in so many frames.
FRAMES = 12
Made = tuple[nn.Module, dict[str, Tensor]]


class Selection(nn.Module):
    """A reducer whose tokens and signals come by name; gives the tokens that are left."""

    def __init__(self, reducer: nn.Module, names: list[str]) -> None:
        super().__init__()
        self.reducer, self.names = reducer, names

    def forward(self, tokens: Tensor, *signals: Tensor) -> Tensor:
        """`[1, after, width]`."""
        left: Tensor = self.reducer(tokens, **dict(zip(self.names, signals, strict=True))).tokens
        return left


def selections(tokens: int, budget: int) -> dict[str, Made]:
    """The reducer of each method, with what it reads."""
    from pumer_compile import reducers
    from pumer_compile.reducers.divprune import DiverseReducer
    from pumer_compile.reducers.fixed import FixedReducer, cells, even_places, random_places
    from pumer_compile.reducers.relevant import RelevantReducer
    from pumer_compile.reducers.sparsevlm import RatedReducer
    from pumer_compile.reducers.video import ChangeReducer, UniqueReducer

    whole = [tuple(range(tokens))]
    generator = torch.Generator().manual_seed(0)

    def random(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    votes, keys = random(1, tokens).softmax(-1), random(1, HEADS, tokens, SIZE)
    row = random(1, HEADS, 1, tokens).softmax(-1)
    behind = {"behind_to_image": random(1, HEADS, TEXT, tokens).softmax(-1), "text_rating": random(1, TEXT).softmax(-1)}
    film = [list(range(start, start + tokens // FRAMES)) for start in range(0, tokens, tokens // FRAMES)]
    side, to = isqrt(tokens), isqrt(budget)
    text = {"text_keys": random(1, HEADS, TEXT, SIZE), "text_normed": random(1, TEXT, WIDTH)}
    dominant = budget * 54 // 64
    tower, prompt = random(1, tokens, TOWER), random(1, tokens, WIDTH)
    made: dict[str, tuple[nn.Module, Tensor, dict[str, Tensor]]] = {
        "random": (FixedReducer(tokens, [[place] for place in random_places(tokens, budget, 0, 0)]), prompt, {}),
        "downsample": (FixedReducer(tokens, cells(side, side, (to, to))), prompt, {}),
        "uniform": (FixedReducer(tokens, [[place] for place in even_places(tokens, budget)]), prompt, {}),
        "fastervlm": (reducers.VotesReducer(whole, budget), tower, {"class_token": votes}),
        "vispruner": (reducers.VisualReducer(whole, budget, 0.5), tower, {"class_token": votes}),
        "vispruner stable": (
            reducers.VisualReducer(whole, budget, 0.5, order="stable"),
            tower,
            {"class_token": votes},
        ),
        "visionzip": (
            reducers.VisionZipReducer(whole, dominant, budget - dominant, class_tokens=False),
            tower,
            {"class_token": votes, "tower_keys": random(1, tokens, 64)},
        ),
        "divprune": (DiverseReducer(whole, budget), prompt, {}),
        "cdpruner": (RelevantReducer(whole, budget, 0.5), prompt, {"text_embedding": random(1, WIDTH)}),
        "holov": (reducers.HoloVReducer(whole, budget, 16), prompt, {"class_token": votes}),
        "fastv": (reducers.LastQueryReducer(tokens, budget), prompt, {"last_query": row}),
        "pyramiddrop": (reducers.NextQueryReducer(tokens, budget), prompt, {"next_query": row}),
        "sparsevlm": (RatedReducer(tokens, budget), prompt, behind),
        "evs": (ChangeReducer(film, max(budget, tokens // FRAMES)), prompt, {}),
        "vidcom2": (UniqueReducer(film, budget), prompt, {}),
        "dart": (reducers.DartReducer(tokens, budget), prompt, {"keys": keys, "normed": prompt, **text}),
    }
    found: dict[str, Made] = {}
    for name, (reducer, own, signals) in made.items():
        order = [signal.value for signal in reducer.reads]
        found[name] = (Selection(reducer, order), {"tokens": own, **{key: signals[key] for key in order}})
    return found


def layers(left: int) -> dict[str, Made]:
    """One layer of the tower, and one of the language model over what is left of the prompt."""
    vision = CLIPVisionConfig(hidden_size=TOWER, intermediate_size=4096, num_attention_heads=16)
    language = LlamaConfig(hidden_size=WIDTH, intermediate_size=11008, num_attention_heads=HEADS)
    vision._attn_implementation = language._attn_implementation = "sdpa"
    tower, llama = CLIPEncoderLayer(vision), LlamaDecoderLayer(language, 0)
    cos, sin = LlamaRotaryEmbedding(language)(torch.zeros(1), torch.arange(left + TEXT)[None])

    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = tower

        def forward(self, tokens: Tensor) -> Tensor:
            given = self.layer(tokens, None)
            return given if isinstance(given, Tensor) else given[0]

    class Language(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = llama
            self.register_buffer("cos", cos)
            self.register_buffer("sin", sin)

        def forward(self, tokens: Tensor) -> Tensor:
            given = self.layer(tokens, position_embeddings=(self.cos, self.sin))
            return given if isinstance(given, Tensor) else given[0]

    return {
        "tower layer": (Tower(), {"tokens": torch.randn(1, TOKENS + 1, TOWER)}),
        "language layer": (Language(), {"tokens": torch.randn(1, left + TEXT, WIDTH)}),
    }


def session(name: str, made: Made, folder: Path) -> tuple[onnxruntime.InferenceSession, dict[str, np.ndarray], int]:
    """As an ONNX graph under onnxruntime, with its inputs and its number of nodes."""
    import onnx

    module, inputs = made
    path = folder / f"{name}.onnx".replace(" ", "_")
    with torch.no_grad():
        torch.onnx.export(module.eval(), tuple(inputs.values()), path, input_names=list(inputs), verbose=False)
    graph = onnx.load(path, load_external_data=False).graph
    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    opened = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    taken = [value.name for value in opened.get_inputs()]
    return opened, {key: value.numpy() for key, value in inputs.items() if key in taken}, len(graph.node)


def measure(made: Mapping[str, Made], rounds: int) -> dict[str, dict[str, float]]:
    """Least milliseconds of each, all taking turns."""
    with tempfile.TemporaryDirectory() as folder:
        opened = {name: session(name, one, Path(folder)) for name, one in made.items()}
        times: dict[str, list[float]] = {name: [] for name in made}
        for _ in range(rounds):
            for name, (runs, inputs, _) in opened.items():
                start = time.perf_counter()
                runs.run(None, inputs)
                times[name].append(1e3 * (time.perf_counter() - start))
        return {name: {"ms": min(times[name][1:]), "nodes": nodes} for name, (_, _, nodes) in opened.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--crops", type=int, default=1, help="times 576 tokens that are chosen among")
    parser.add_argument("--budget", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=7)
    asked = parser.parse_args()
    torch.manual_seed(0)
    tokens = TOKENS * asked.crops
    found = measure({**selections(tokens, asked.budget), **layers(asked.budget)}, asked.rounds)
    tower = 24 * asked.crops * found.pop("tower layer")["ms"]
    prefill = tower + 32 * found.pop("language layer")["ms"]
    for name, row in found.items():
        row |= {"of_tower": row["ms"] / tower, "of_prefill": row["ms"] / prefill}
        print(f"{name:18} {row['ms']:8.2f} ms  {row['nodes']:5} nodes  {row['of_tower']:7.2%} of the tower")
    results: dict[str, Any] = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    results[f"{asked.budget} of {tokens}"] = {"machine": machine(), "tower_ms": tower, "prefill_ms": prefill, **found}
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
