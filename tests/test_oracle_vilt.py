"""ViLT in eager PyTorch: against vectors of the published implementation, and against its own layers run by hand.

`by_hand` runs transformers' `ViltLayer` parts one after the other (`support/vilt_layers.py`), with the algorithms of
`helpers.py` between attention and MLP. Under `reference` it must give the published vectors too, so that it can stand
in for them on inputs and schedules that have none.
"""

from __future__ import annotations

import functools
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from pumer_compile import Program, Reduced, Schedule, capture, reduce
from pumer_compile.reduce import reduce_graph
from pumer_compile.reducers import reducers_of
from tests.support.helpers import data_dependent
from tests.support.vilt_layers import encode
from tests.support.vilt_tiny import CASES, EXPECTED, TEXT, inputs, model, schedule


@functools.cache
def program(dynamic: bool = False, text: int = TEXT, batch: int = 4) -> Program:
    return capture(model(), inputs(True, text, batch), dynamic_batch=dynamic)


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
