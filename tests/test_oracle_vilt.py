"""ViLT in eager PyTorch: against vectors of the published implementation, and against its own layers run by hand.

`by_hand` runs transformers' `ViltLayer` parts one after the other, with the algorithms of `helpers.py` between
attention and MLP. Under `reference` it must give the published vectors too, so that it can stand in for them on
inputs and schedules that have none.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import ViltForQuestionAnswering

from pumer_compile import Program, Reduced, Schedule, capture, reduce
from pumer_compile.reduce import reduce_graph
from pumer_compile.reducers import reducers_of
from tests.support.helpers import combine, data_dependent, paper_counts, published_counts, reduce_image, reduce_text

FOLDER = Path(__file__).parent / "oracle" / "vilt-tiny"
CASES: dict[str, dict[str, Any]] = json.loads((FOLDER / "cases.json").read_text())
EXPECTED = dict(np.load(FOLDER / "expected.npz"))
TEXT, IMAGE = 40, 145


@functools.cache
def model() -> ViltForQuestionAnswering:
    return ViltForQuestionAnswering.from_pretrained(FOLDER, attn_implementation="eager").eval()


def inputs(padded: bool = True, text: int = TEXT, batch: int = 4) -> dict[str, Tensor]:
    arrays = np.load(FOLDER / "inputs.npz")
    found = {name: torch.from_numpy(arrays[name])[:batch] for name in arrays}
    found["pixel_values"] = found["pixel_values"].float()
    for name in ("input_ids", "attention_mask"):
        found[name] = found[name][:, :text]
    if not padded:
        found["attention_mask"] = torch.ones_like(found["attention_mask"])
    return found


@functools.cache
def program(dynamic: bool = False, text: int = TEXT, batch: int = 4) -> Program:
    return capture(model(), inputs(True, text, batch), dynamic_batch=dynamic)


def schedule(name: str, semantics: str = "reference") -> Schedule:
    case = CASES[name]
    merge = {"image": case["merge_image"], "text": case["merge_text"]}
    return Schedule(semantics=semantics, layers=case["layers"], prune=case["prune"], merge=merge)


@functools.cache
def reduced(name: str, dynamic: bool) -> Reduced:
    return reduce(program(dynamic), schedule(name))


# --- the published implementation -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "symbolic"])
@pytest.mark.parametrize("padded", [True, False], ids=["padded", "unpadded"])
@pytest.mark.parametrize("name", CASES)
def test_logits_of_the_published_code(name: str, padded: bool, dynamic: bool) -> None:
    with torch.no_grad():
        logits = reduced(name, dynamic).module(**inputs(padded)).logits.numpy()
    expected = EXPECTED[f"{name}.{'padded' if padded else 'unpadded'}"]
    assert np.abs(logits - expected).max() <= 1e-5
    unreduced = EXPECTED["unreduced" if padded else "unreduced.unpadded"]
    assert np.abs(unreduced - expected).max() > 1e-3


@pytest.mark.parametrize("name", CASES)
def test_samples_of_a_symbolic_batch_do_not_touch_each_other(name: str) -> None:
    module = reduced(name, True).module
    some = {key: value[[2, 0, 1]] for key, value in inputs().items()}
    with torch.no_grad():
        logits = module(**some).logits.numpy()
    assert np.abs(logits - EXPECTED[f"{name}.padded"][[2, 0, 1]]).max() <= 1e-5


@pytest.mark.parametrize("name", CASES)
def test_token_counts(name: str) -> None:
    layers = reduced(name, False).plan.tokens()
    assert list(layers) == [f"cross_modal.{i}" for i in range(12)]
    found = [[counts["text"], counts["image"]] for counts in layers.values()]
    assert found == CASES[name]["tokens_after_layer"]


def test_the_unreduced_capture_is_the_model() -> None:
    with torch.no_grad():
        assert np.abs(program().module(**inputs()).logits.numpy() - EXPECTED["unreduced"]).max() <= 1e-5


def test_sites_name_the_attention_modules() -> None:
    sites = reduced("vqa-258", False).plan.sites
    assert [s.module for s in sites] == [f"vilt.encoder.layer.{i}.attention.attention" for i in (2, 5, 8)]


def test_reducers_and_their_names() -> None:
    names = set(reducers_of(reduced("vqa-258", False).module))
    assert names == {f"reducer.cross_modal_{i}.{stream}" for i in (2, 5, 8) for stream in ("text", "image")}


def test_no_data_dependent_operators_after_export() -> None:
    module, sample = reduced("vqa-258", True).module, inputs()
    shapes = {name: {0: torch.export.Dim("batch")} for name in sample}
    exported = torch.export.export(module, (), sample, dynamic_shapes=shapes, strict=False)
    # The frontend samples the pixel mask at fixed rows and columns; that is the model's, and before any reducer.
    assert data_dependent(exported.graph_module) <= {"aten.index_select"}
    with torch.no_grad():
        logits = exported.module()(**sample).logits.numpy()
    assert np.abs(logits - EXPECTED["vqa-258.padded"]).max() <= 1e-5


# --- transformers' own layers, by hand ------------------------------------------------------------------------------


def in_order(weights: Tensor, count: int, replacement: bool = False) -> Tensor:
    """`torch.multinomial` without chance: the first `count`."""
    return torch.arange(int(count))


def published_softmax(scores: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """The published masked softmax, `scores [heads, n, n]` and `weights [n]`."""
    n = scores.shape[-1]
    mask = weights[None, :] + (1 - weights[None, :]) * np.eye(n)
    x = np.exp(scores - scores.max(-1, keepdims=True)) * mask
    return (x + 1e-6 / n) / (x.sum(-1, keepdims=True) + 1e-6)


class Sample:
    """One sample on its way: its tokens, how many are text, what is real of each."""

    def __init__(self, x: Tensor, mask: Tensor, text: int) -> None:
        self.x, self.text = x, text
        self.sizes, self.shares = mask.double().tolist(), mask.double().tolist()

    def attend(self, layer: torch.nn.Module, semantics: str) -> tuple[Tensor, np.ndarray, np.ndarray]:
        """Output of the attention module, its probabilities and its keys."""
        attention = layer.attention.attention
        heads, size = attention.num_attention_heads, attention.attention_head_size
        normed = layer.layernorm_before(self.x)
        q, k, v = (
            m(normed).view(-1, heads, size).transpose(0, 1) for m in (attention.query, attention.key, attention.value)
        )
        if semantics == "reference":
            scores = (q @ k.transpose(1, 2) / size**0.5).double().numpy()
            probabilities = torch.from_numpy(published_softmax(scores, np.array(self.sizes))).float()
            context = (probabilities @ v).transpose(0, 1).flatten(1)
        else:
            mask = torch.tensor(self.shares).log().clamp(min=torch.finfo(torch.float32).min).float()
            given = attention(normed.unsqueeze(0), mask.view(1, 1, 1, -1), True)
            context, probabilities = given[0][0], given[1][0]
        return layer.attention.output(context, None), probabilities.double().numpy(), k.double().numpy()

    def reduce(self, probabilities: np.ndarray, keys: np.ndarray, case: dict[str, Any], semantics: str) -> None:
        text, image, safe = self.text, len(self.x) - self.text, semantics == "safe"
        count = paper_counts if semantics == "paper" else published_counts
        keep, merge, words = count(image, text, case["prune"], case["merge_image"], case["merge_text"])
        real = [size > 0 for size in self.sizes]
        kind = "dot" if semantics == "paper" else "cosine"
        members = reduce_text(keys[:, :text], words, similarity=kind, real=real[:text] if safe else None, in_order=safe)
        patches = reduce_image(
            probabilities[:, :text, text:],
            keys[:, text:],
            keep,
            merge,
            similarity=kind,
            votes=real[:text] if safe else None,
            learned=1 if safe else 0,
            real=real[text:] if safe else None,
            in_order=safe,
        )
        self.text = len(members)
        members = members + [[text + i for i in group] for group in patches]
        self.x = combine(self.x, members, self.sizes if safe else None).float()
        sizes, shares = self.sizes, self.shares
        weights = sizes if safe else [1.0] * len(sizes)
        totals = [sum(weights[i] for i in g) for g in members]
        self.shares = [
            sum(weights[i] * shares[i] for i in g) / t if t else 0.0 for g, t in zip(members, totals, strict=True)
        ]
        if safe:
            self.sizes = totals
        else:
            self.sizes = [sum(sizes[i] for i in g) / len(g) for g in members]
            if semantics == "reference":
                self.sizes[self.text :] = [1.0] * len(patches)


def encode(
    vilt: torch.nn.Module, sample: dict[str, Tensor], case: dict[str, Any], semantics: str, kind: int = 1
) -> tuple[Tensor, list[list[int]]]:
    """The pooled output of a `ViltModel`, and `[text, image]` after every layer."""
    size = vilt.config.image_size
    ones, counts = torch.ones(len(sample["input_ids"]), size, size), []
    with torch.no_grad(), mock.patch.object(torch, "multinomial", in_order):
        x, mask = vilt.embeddings(
            sample["input_ids"], sample["attention_mask"], None, sample["pixel_values"], ones, None, None, kind
        )
        samples = [Sample(x[b], mask[b], sample["input_ids"].shape[1]) for b in range(len(x))]
        for index, layer in enumerate(vilt.encoder.layer):
            for s in samples:
                output, probabilities, keys = s.attend(layer, semantics)
                s.x = output + s.x
                if index in case["layers"]:
                    s.reduce(probabilities, keys, case, semantics)
                s.x = layer.output(layer.intermediate(layer.layernorm_after(s.x)), s.x)
            counts.append([samples[0].text, len(samples[0].x) - samples[0].text])
        return vilt.pooler(vilt.layernorm(torch.stack([s.x for s in samples]))), counts


def by_hand(sample: dict[str, Tensor], case: dict[str, Any], semantics: str) -> tuple[np.ndarray, list[list[int]]]:
    """Logits of the oracle's model, and `[text, image]` after every layer."""
    pooled, counts = encode(model().vilt, sample, case, semantics)
    with torch.no_grad():
        return model().classifier(pooled).numpy(), counts


def test_by_hand_without_reducers_is_the_model() -> None:
    logits, _ = by_hand(inputs(), {"layers": []}, "paper")
    assert np.abs(logits - EXPECTED["unreduced"]).max() <= 1e-5


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "unpadded"])
def test_by_hand_is_the_published_code(padded: bool) -> None:
    name = "ve-2468"
    logits, counts = by_hand(inputs(padded), CASES[name], "reference")
    assert np.abs(logits - EXPECTED[f"{name}.{'padded' if padded else 'unpadded'}"]).max() <= 1e-5
    assert counts == CASES[name]["tokens_after_layer"]


@pytest.mark.parametrize("padded", [True, False], ids=["padded", "unpadded"])
@pytest.mark.parametrize("semantics", ["paper", "safe"])
def test_other_semantics(semantics: str, padded: bool) -> None:
    expected, counts = by_hand(inputs(padded), CASES["vqa-258"], semantics)
    with torch.no_grad():
        logits = graph(semantics)(**inputs(padded)).logits.numpy()
    assert np.abs(logits - expected).max() <= 1e-5
    assert np.abs(EXPECTED["unreduced" if padded else "unreduced.unpadded"] - expected).max() > 1e-3
    assert counts[-1] == ([21, 36] if semantics == "paper" else [21, 31])


@functools.cache
def graph(semantics: str) -> torch.fx.GraphModule:
    return reduce_graph(program(), schedule("vqa-258", semantics))


# Head size is 8, heads are 4, and the batch may be the same.
COLLISIONS = {
    "text = head size": (8, 2, "reference"),
    "text = heads = batch": (4, 4, "reference"),
    "text = width": (32, 2, "safe"),
}


@pytest.mark.parametrize(("text", "batch", "semantics"), COLLISIONS.values(), ids=COLLISIONS)
def test_text_lengths_that_collide(text: int, batch: int, semantics: str) -> None:
    case = {"layers": [1, 6], "prune": 0.15, "merge_image": 0.25, "merge_text": 0.3}
    merge = {"image": case["merge_image"], "text": case["merge_text"]}
    wanted = Schedule(semantics=semantics, layers=case["layers"], prune=case["prune"], merge=merge)
    module = reduce_graph(program(False, text, batch), wanted)
    sample = inputs(True, text, batch)
    expected, _ = by_hand(sample, case, semantics)
    with torch.no_grad():
        assert np.abs(module(**sample).logits.numpy() - expected).max() <= 1e-5
