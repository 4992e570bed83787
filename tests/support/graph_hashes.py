"""Hashes of graphs and schedules, to show that a change of the code's structure changes neither.

    python -m tests.support.graph_hashes           # compare with tests/golden/graph_hashes.json (minutes)
    python -m tests.support.graph_hashes --write   # take today's

One hash is of the reduced module's code (`fx`), one of its ONNX graph: operators, attributes, shapes, and hashes of the
initializers. `tests/test_graph_hashes.py` compares schedules and some `fx`; the others are for whoever moves code.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnx
import torch

import pumer_compile as pumer
from pumer_compile import OnnxOptions, Program, Schedule
from pumer_compile.capture.loading import load_model
from pumer_compile.capture.make_inputs import load_inputs, make_inputs
from pumer_compile.schedule import PRESETS
from tests.support.crops import crops_inputs, crops_model

GOLDEN = Path(__file__).parents[1] / "golden" / "graph_hashes.json"
ORACLES = Path(__file__).parents[1] / "oracle"
BUDGETS: dict[str, Any] = {"prune": 0.2, "merge": {"image": 0.3, "text": 0.2}}
TOWER = {
    "sites": [
        {"at": "vision.0", "merge": {"image": 0.2}},
        {"at": "cross_modal.0", **BUDGETS},
        {"at": "cross_modal.2", "merge": {"text": 3}},
    ]
}
VISUAL: dict[str, Any] = {"method": "vispruner", "budget": 48}
FAST: dict[str, Any] = {"method": "fastv", "layer": 1, "budget": 48}
TOME: dict[str, Any] = {"method": "tome", "sites": [{"at": f"vision.{i}", "merge": {"image": 8}} for i in range(3)]}


def _folder(name: str, outputs: tuple[str, ...] = (), given: bool = False, batch: int = 2) -> Program:
    torch.manual_seed(0)
    model = load_model(ORACLES / name)
    inputs = load_inputs(ORACLES / name / "inputs.npz", model) if given else make_inputs(model, batch=batch)
    return pumer.capture(model, inputs, outputs=list(outputs))


def _crops(name: str) -> Program:
    model = crops_model(name)
    return pumer.capture(model, crops_inputs(model, (48, 96)), outputs=["logits"])


MODELS: dict[str, Callable[[], Program]] = {
    "vilt": functools.cache(lambda: _folder("vilt-tiny")),
    "meter": functools.cache(lambda: _folder("meter-tiny")),
    "vit": functools.cache(lambda: _folder("tome-tiny")),
    "llava": functools.cache(lambda: _folder("llava-tiny", ("logits",), given=True)),
    "llava-next": functools.cache(lambda: _crops("LLaVA-NeXT")),
    "llava-onevision": functools.cache(lambda: _crops("LLaVA-OneVision")),
}
PAIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "vilt reference": ("vilt", {"semantics": "reference", "layers": [2, 5, 8], **BUDGETS}),
    "vilt safe": ("vilt", {"semantics": "safe", "layers": [2, 5, 8], **BUDGETS}),
    "vilt paper": ("vilt", {"semantics": "paper", "layers": [2, 5], **BUDGETS}),
    "vilt tome": ("vilt", {"method": "tome", "layers": [1, 3], "merge": {"image": 4}}),
    "vilt lossless": ("vilt", {"method": "lossless"}),
    "meter reference": ("meter", {"semantics": "reference", "layers": [0, 2], **BUDGETS}),
    "meter safe": ("meter", {"semantics": "safe", **TOWER}),
    "vit tome": ("vit", TOME),
    "llava vispruner": ("llava", VISUAL),
    "llava vispruner stable": ("llava", {**VISUAL, "semantics": "stable", "positions": "original", "important": 0.25}),
    "llava fastv": ("llava", FAST),
    "llava-next vispruner": ("llava-next", {**VISUAL, "budget": 10}),
    "llava-onevision fastv": ("llava-onevision", {**FAST, "budget": 10}),
}
"""Every method with every semantics, over the models that have their oracles here, and images in crops."""

SCHEDULES: dict[str, dict[str, Any]] = {
    "shares": {"layers": [2, 5, 8], "prune": 0.1, "merge": {"image": 0.3, "text": 0.2}},
    "sites": TOWER,
    "restored": {"layers": [1], "prune": 3, "outputs": "restored"},
    **{name: keys for name, (_, keys) in PAIRS.items()},
}


def schedules() -> dict[str, str]:
    """SHA-256 of schedules and presets, which manifests hold."""
    found = {f"preset {name}": preset.sha256 for name, preset in PRESETS.items()}
    return {**found, **{name: Schedule(**keys).sha256 for name, keys in SCHEDULES.items()}}


def fx_hash(pair: str) -> str:
    """Of the code of a reduced module."""
    name, keys = PAIRS[pair]
    module = pumer.reduce(MODELS[name](), Schedule(**keys)).module
    return _sha256(module.code)


def onnx_hash(pair: str) -> str:
    """Of the ONNX graph of a reduced program: nodes in order, shapes, and initializers."""
    name, keys = PAIRS[pair]
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.onnx"
        pumer.export(pumer.reduce(MODELS[name](), Schedule(**keys)), path, options=OnnxOptions(), verify=False)
        graph = onnx.load(str(path)).graph
    values = [*graph.input, *graph.output]
    lines = [f"{v.name} {onnx.helper.printable_type(v.type)}" for v in values]
    lines += [f"{t.name} {list(t.dims)} {_sha256(onnx.numpy_helper.to_array(t).tobytes())}" for t in graph.initializer]
    lines += [re.sub(r"doc_string.*", "", onnx.helper.printable_node(node)) for node in graph.node]
    return _sha256("\n".join(lines))


def _sha256(data: str | bytes) -> str:
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def main() -> int:
    """Compare, or write."""
    golden = json.loads(GOLDEN.read_text(encoding="utf-8")) if GOLDEN.is_file() else {}
    found: dict[str, Any] = {"schedules": schedules(), "fx": {}, "onnx": {}}
    for pair in PAIRS:
        for kind, of in (("fx", fx_hash), ("onnx", onnx_hash)):
            found[kind][pair] = of(pair)
            same = found[kind][pair] == golden.get(kind, {}).get(pair)
            print(f"{pair:<28} {kind:<5} {'same' if same else 'CHANGED'}", flush=True)
    changed = [name for name, value in found["schedules"].items() if golden.get("schedules", {}).get(name) != value]
    print(f"schedules: {', '.join(changed) or 'all the same'}")
    if "--write" in sys.argv[1:]:
        GOLDEN.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        return 0
    return int(found != golden)


if __name__ == "__main__":
    raise SystemExit(main())
