"""`torch.compile(backend="pumer")` with transformers' own `generate`: an image in a prompt, reduced at the prefill."""

from __future__ import annotations

import copy
import functools
import inspect
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
import transformers
from packaging.version import parse
from torch import Tensor
from torch._dynamo.exc import BackendCompilerFailed
from torch.torch_version import TorchVersion
from transformers import DynamicCache

import pumer_compile as pumer
from pumer_compile import Schedule
from pumer_compile.errors import AxisError, LocateError, UsageError
from pumer_compile.generation import Generator, export_decode, whole_forward
from pumer_compile.generation.forward import UNCHECKED
from tests.support import llava as oracle
from tests.support.crops import crops_inputs, crops_model
from tests.support.prompt_models import BLOCKS, built, images
from tests.support.prompt_models import by_hand as images_by_hand
from tests.support.tiny import tiny_vilt
from tests.support.visual import logits_by_hand, select, visual_cues

TOKENS = 20
MODELS = ("LLaVA", "PaliGemma")
BUDGET = {"LLaVA": 48, "PaliGemma": 12}
FIRST = {"LLaVA": 0, "PaliGemma": 1}
"""The position of the first token."""


@pytest.fixture(autouse=True)
def fresh_dynamo(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    if TorchVersion(torch.__version__) < "2.13":
        monkeypatch.setenv(UNCHECKED, "1")
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def given(name: str) -> tuple[Any, dict[str, Tensor]]:
    """A model and a batch of two prompts."""
    return (oracle.model(), oracle.tensors()) if name == "LLaVA" else built(name)


def schedule(name: str, positions: str = "original") -> Schedule:
    return Schedule(method="vispruner", budget=BUDGET[name], positions=positions)


def served(name: str, inner: str = "eager", strict: bool = True, **compile: Any) -> Any:
    """The model, whose `generate` reduces; one graph or an error."""
    model = copy.deepcopy(given(name)[0])
    options = {"schedule": schedule(name), "inner": inner, "strict": strict}
    compile = {"fullgraph": True, **compile}
    model.forward = torch.compile(whole_forward(model), backend="pumer", options=options, **compile)
    return model


@dataclass
class Text:
    """New tokens `[batch, tokens]`, and the logits they were chosen from, `[batch, tokens, words]`."""

    ids: Tensor
    logits: Tensor


def generated(model: Any, inputs: dict[str, Tensor], **more: Any) -> Text:
    """What `generate` makes."""
    more = {"max_new_tokens": TOKENS, "min_new_tokens": TOKENS, "do_sample": False, **more}
    found = model.generate(**inputs, output_logits=True, return_dict_in_generate=True, **more)
    return Text(found.sequences[:, inputs["input_ids"].shape[1] :], torch.stack(found.logits, 1))


def continued(model: Any, logits: Tensor, cache: Any, first: int) -> Text:
    """A greedy loop over the unreduced model, behind a prefill; positions go on where the whole prompt ends."""
    seen = [logits[:, -1]]
    for position in range(first, first + TOKENS - 1):
        token = seen[-1].argmax(-1, keepdim=True)
        with torch.no_grad():
            found = model(input_ids=token, past_key_values=cache, position_ids=torch.full_like(token, position))
        seen.append(found.logits[:, -1])
    stacked = torch.stack(seen, 1)
    return Text(stacked.argmax(-1), stacked)


def by_hand(name: str, inputs: dict[str, Tensor]) -> Text:
    """The prompt put together from the kept tokens, each at its old position."""
    model, _ = given(name)
    ids, budget = inputs["input_ids"], BUDGET[name]
    features, votes = visual_cues(model, inputs["pixel_values"])
    kept = select(features, votes, budget, 0.5)
    places = (ids[0] == model.config.image_token_id).nonzero().flatten()
    start, stop, length = int(places[0]), int(places[-1]) + 1, ids.shape[1]
    whole = torch.arange(length).expand(len(ids), -1)
    left = torch.cat([whole[:, :start], kept + start, whole[:, stop:]], 1) + FIRST[name]
    cache = DynamicCache()
    more = {key: inputs[key][:, : left.shape[1]] for key in ("token_type_ids",) if key in inputs}
    logits = logits_by_hand(model, inputs, kept, features, left, past_key_values=cache, use_cache=True, **more)
    assert cache.get_seq_length() == left.shape[1] == length - (stop - start) + budget
    return continued(model, logits, cache, length + FIRST[name])


@functools.cache
def reference(name: str) -> Text:
    return by_hand(name, given(name)[1])


def assert_same(found: Text, wanted: Text) -> None:
    assert found.ids.shape == wanted.ids.shape == (len(wanted.ids), TOKENS)
    torch.testing.assert_close(found.logits, wanted.logits, atol=1e-4, rtol=1e-4)
    assert torch.equal(found.ids, wanted.ids)


def moved(name: str, by: int) -> dict[str, Tensor]:
    """Prompts whose image stands elsewhere."""
    inputs = dict(given(name)[1])
    return {**inputs, "input_ids": inputs["input_ids"].roll(by, 1)}


# --- the same tokens --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "inner"), [("LLaVA", "eager"), ("PaliGemma", "aot_eager")])
def test_generate(name: str, inner: str) -> None:
    model, inputs = served(name, inner), given(name)[1]
    found = generated(model, inputs)
    assert_same(found, reference(name))
    whole = generated(given(name)[0], inputs)
    assert (found.logits[:, 0] - whole.logits[:, 0]).abs().max() > 1e-2


@pytest.mark.parametrize("name", MODELS)
def test_the_reduced_module_in_eager_pytorch(name: str) -> None:
    model, inputs = given(name)
    with torch.no_grad():
        found = pumer.reduce(pumer.capture(model, inputs), schedule(name)).module(**inputs)
    end = inputs["input_ids"].shape[1] + FIRST[name]
    assert_same(continued(model, found["logits"], found["past_key_values"], end), reference(name))


@pytest.mark.skipif(parse(transformers.__version__) < parse("5.23"), reason="its generate always gives a mask")
def test_fastv() -> None:
    """The first layer's cache is longer than those of the others."""
    model, inputs = copy.deepcopy(given("LLaVA")[0]), given("LLaVA")[1]
    wanted = Schedule(method="fastv", budget=12, layer=1)
    with torch.no_grad():
        found = pumer.reduce(pumer.capture(model, inputs), wanted).module(**inputs)
    assert [layer.keys.shape[2] for layer in found["past_key_values"].layers] == [158, 26, 26]
    options = {"schedule": wanted, "inner": "eager"}
    model.forward = torch.compile(whole_forward(model), backend="pumer", options=options, fullgraph=True)
    assert_same(generated(model, inputs), continued(given("LLaVA")[0], found["logits"], found["past_key_values"], 158))


@pytest.mark.skipif(parse(transformers.__version__) < parse("5.23"), reason="torch.export cannot trace its crops")
def test_an_image_in_crops() -> None:
    """Dynamo has to know the size of the picture: as numbers it is a guard, in a tensor it would be data."""
    model = copy.deepcopy(crops_model("LLaVA-OneVision"))
    inputs = crops_inputs(model, (90, 48))
    wanted = Schedule(method="vispruner", budget=6, positions="original")
    with torch.no_grad():
        found = pumer.reduce(pumer.capture(model, inputs), wanted).module(**inputs)
    end = inputs["input_ids"].shape[1]
    assert found["logits"].shape[1] < end
    text = continued(model, found["logits"], found["past_key_values"], end)
    options = {"schedule": wanted, "inner": "aot_eager"}
    model.forward = torch.compile(whole_forward(model), backend="pumer", options=options, fullgraph=True)
    sizes: Any = inputs["image_sizes"].tolist()
    assert_same(generated(model, {**inputs, "image_sizes": sizes}), text)


@pytest.mark.parametrize(("blocks", "rows", "length"), BLOCKS)
def test_several_images(blocks: list[tuple[int, int]], rows: int, length: int) -> None:
    model, inputs = images(blocks, rows, length, batch=2)
    options = {"schedule": Schedule(method="vispruner", budget=6), "inner": "eager"}
    with torch.no_grad():
        found = torch.compile(copy.deepcopy(model), backend="pumer", options=options, fullgraph=True)(**inputs)
    torch.testing.assert_close(found.logits, images_by_hand(model, inputs, blocks, 6), atol=1e-4, rtol=1e-4)


def test_the_pair_under_onnxruntime(tmp_path: Path) -> None:
    """LLaVA's: `test_generation.test_positions_go_on_where_the_prompt_ends`."""
    name = "PaliGemma"
    model, inputs = given(name)
    reduced = pumer.reduce(pumer.capture(model, inputs), schedule(name))
    prefill = pumer.export(reduced, tmp_path / "prefill.onnx", verify=False).path
    decode = export_decode(model, inputs, tmp_path / "decode.onnx")
    assert torch.equal(Generator(prefill, decode).generate(inputs, TOKENS), reference(name).ids)


def test_inductor() -> None:
    """One layer of each tower: a C++ compiler takes its time over every kernel."""
    model, inputs = copy.deepcopy(given("PaliGemma")[0]), given("PaliGemma")[1]
    for tower in (model.model.vision_tower.encoder, model.model.language_model):
        tower.layers = tower.layers[:1]
        tower.config.num_hidden_layers = 1
    with torch.no_grad():
        wanted = pumer.reduce(pumer.capture(model, inputs), schedule("PaliGemma")).module(**inputs).logits
        options = {"schedule": schedule("PaliGemma"), "inner": "inductor"}
        model.forward = torch.compile(whole_forward(model), backend="pumer", options=options, fullgraph=True)
        found = model(**inputs).logits
    torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("case", oracle.CASES)
def test_the_published_vectors(case: str) -> None:
    """Counted anew, as published, where no positions are given."""
    wanted = oracle.schedule(case)
    compiled = torch.compile(
        copy.deepcopy(oracle.model()), backend="pumer", options={"schedule": wanted, "inner": "eager"}, fullgraph=True
    )
    with torch.no_grad():
        found = compiled(**oracle.tensors())
    assert found.logits.shape[1] == oracle.CASES[case]["sequence"]
    assert np.abs(found.logits[:, -1].numpy() - oracle.EXPECTED[f"{case}.logits_last"]).max() <= 1e-4
    features = found.image_hidden_states.reshape(2, oracle.CASES[case]["budget"], -1)
    assert np.abs(features[:, :8].numpy() - oracle.EXPECTED[f"{case}.features"]).max() <= 1e-4


def test_inference_mode() -> None:
    model = served("PaliGemma", "aot_eager")
    with torch.inference_mode():
        assert_same(generated(model, given("PaliGemma")[1]), reference("PaliGemma"))


def test_open_sizes() -> None:
    assert_same(generated(served("LLaVA", dynamic=True), given("LLaVA")[1]), reference("LLaVA"))


def test_it_trains() -> None:
    """Gradients are those of the reduced module."""
    model, inputs = given("LLaVA")
    reduced = pumer.reduce(pumer.capture(model, inputs, outputs=["logits"]), schedule("LLaVA")).module
    wanted = gradients(model, reduced(**inputs)["logits"])
    compiled = served("LLaVA", "aot_eager")
    found = gradients(compiled, compiled(**inputs).logits)
    assert len(wanted) > 40 and any(name.startswith("model.vision_tower") for name in wanted)
    for name, gradient in wanted.items():
        torch.testing.assert_close(found[name], gradient, atol=1e-4, rtol=1e-3)


def gradients(model: Any, logits: Tensor) -> dict[str, Tensor]:
    named = dict(model.named_parameters())
    found = torch.autograd.grad(logits[:, -1].square().mean(), list(named.values()), allow_unused=True)
    return {name: g for name, g in zip(named, found, strict=True) if g is not None}


# --- forms of prompts -------------------------------------------------------------------------------------------------


def test_the_image_elsewhere(caplog: pytest.LogCaptureFixture) -> None:
    """Each place is compiled once."""
    caplog.set_level(logging.INFO, "pumer_compile")
    model = served("LLaVA")
    forms = [moved("LLaVA", by) for by in (0, 3, -4)]
    for form in forms:
        assert_same(generated(model, form), by_hand("LLaVA", form))
    for form in forms:
        assert torch.equal(
            generated(model, form, max_new_tokens=3, min_new_tokens=3).ids, by_hand("LLaVA", form).ids[:, :3]
        )
    assert len([r for r in caplog.records if "144 -> 48 tokens" in r.getMessage()]) == len(forms)


def test_other_sizes() -> None:
    model, inputs = served("LLaVA"), given("LLaVA")[1]
    longer = {**inputs, "input_ids": torch.cat([inputs["input_ids"], inputs["input_ids"][:, -3:]], 1)}
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    alone = {key: tensor[1:] for key, tensor in inputs.items()}
    for form in (inputs, longer, alone):
        assert_same(generated(model, form), by_hand("LLaVA", form))


def test_padding_in_front() -> None:
    """The cache is shorter than the mask that `generate` gives: padding still is what stands in front."""
    model, inputs = served("LLaVA"), dict(given("LLaVA")[1])
    inputs["attention_mask"] = inputs["attention_mask"].clone()
    inputs["attention_mask"][1, :2] = 0
    found = generated(model, inputs)
    short = {key: t[1:, 2:] if t.dim() == 2 else t[1:] for key, t in inputs.items()}
    rows = by_hand("LLaVA", {key: t[:1] for key, t in given("LLaVA")[1].items()}), by_hand("LLaVA", short)
    for row, wanted in enumerate(rows):
        assert_same(Text(found.ids[row : row + 1], found.logits[row : row + 1]), wanted)


def test_images_at_other_places_in_the_batch() -> None:
    model, inputs = served("LLaVA"), moved("LLaVA", 0)
    inputs["input_ids"][1] = inputs["input_ids"][1].roll(2)
    with pytest.raises(AxisError, match="other places in another prompt"):
        model.generate(**inputs, max_new_tokens=1)


@torch._dynamo.config.patch(recompile_limit=2)
def test_one_form_too_many(caplog: pytest.LogCaptureFixture) -> None:
    whole = given("LLaVA")[0]
    for strict in (True, False):
        torch._dynamo.reset()
        caplog.clear()
        model = served("LLaVA", strict=strict)
        with torch.no_grad():
            assert model(**moved("LLaVA", 0)).logits.shape[1] == 62
            assert not any("as many as" in r.getMessage() for r in caplog.records)
            assert model(**moved("LLaVA", 1)).logits.shape[1] == 62
            assert any("as many as" in r.getMessage() for r in caplog.records)
            if strict:
                with pytest.raises(UsageError, match=r"compiled for 2 forms of prompts .*recompile_limit"):
                    model(**moved("LLaVA", 2))
            else:
                found = model(**moved("LLaVA", 2)).logits
                torch.testing.assert_close(found, whole(**moved("LLaVA", 2)).logits, atol=1e-4, rtol=1e-4)
                assert any("uncompiled and unreduced" in r.getMessage() for r in caplog.records)
            assert model(**moved("LLaVA", 1)).logits.shape[1] == 62


# --- text -------------------------------------------------------------------------------------------------------------


def text_alone() -> dict[str, Tensor]:
    ids = given("LLaVA")[1]["input_ids"][:, -9:]
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_text_before_any_image() -> None:
    with pytest.raises(
        BackendCompilerFailed, match=r"Nothing is reduced.*Make the first call with an image"
    ) as refused:
        served("LLaVA").generate(**text_alone(), max_new_tokens=1)
    assert isinstance(refused.value.inner_exception, LocateError)


def test_text_before_any_image_if_not_strict(caplog: pytest.LogCaptureFixture) -> None:
    found = generated(served("LLaVA", strict=False), text_alone())
    assert_same(found, generated(given("LLaVA")[0], text_alone()))
    assert any("Nothing is reduced" in r.getMessage() for r in caplog.records)


def test_text_after_an_image(caplog: pytest.LogCaptureFixture) -> None:
    model = served("LLaVA")
    model.generate(**given("LLaVA")[1], max_new_tokens=1)
    assert_same(generated(model, text_alone()), generated(given("LLaVA")[0], text_alone()))
    assert not [r for r in caplog.records if r.levelno >= logging.WARNING and r.name == "pumer_compile"]


# --- refused ----------------------------------------------------------------------------------------------------------


def test_generate_without_the_tower() -> None:
    model = copy.deepcopy(given("LLaVA")[0])
    if "mm_encoder_outputs" not in inspect.signature(model.forward).parameters:
        pytest.skip("this version of transformers runs the tower in the model's forward")
    model.compile(backend="pumer", options={"schedule": schedule("LLaVA"), "inner": "eager"}, fullgraph=True)
    with pytest.raises(BackendCompilerFailed, match=r"vision tower.*is not there.*whole_forward"):
        model.generate(**given("LLaVA")[1], max_new_tokens=1)


def test_positions_that_are_given_are_not_counted_anew() -> None:
    model, inputs = copy.deepcopy(given("LLaVA")[0]), given("LLaVA")[1]
    options = {"schedule": schedule("LLaVA", positions="compact"), "inner": "eager"}
    model.forward = torch.compile(whole_forward(model), backend="pumer", options=options, fullgraph=True)
    with pytest.raises(UsageError, match=r"position_ids.*positions: original"):
        model.generate(**inputs, max_new_tokens=1)
    positions = torch.arange(158).expand(2, -1)
    captured = pumer.capture(given("LLaVA")[0], {**inputs, "position_ids": positions})
    with pytest.raises(UsageError, match=r"position_ids.*positions: original"):
        pumer.reduce(captured, schedule("LLaVA", positions="compact"))
    assert pumer.reduce(captured, schedule("LLaVA")).plan.sites[0].after == {"prompt_image": 48}


def test_static_caches() -> None:
    with pytest.raises(BackendCompilerFailed, match=r"static cache.*dynamic"):
        served("LLaVA").generate(**given("LLaVA")[1], max_new_tokens=2, cache_implementation="static")


def test_padded_texts() -> None:
    model = copy.deepcopy(given("LLaVA")[0])
    options = {"schedule": schedule("LLaVA"), "text_length": 200}
    model.forward = torch.compile(whole_forward(model), backend="pumer", options=options)
    with pytest.raises(BackendCompilerFailed, match=r"text_length.*Leave it out"):
        model.generate(**given("LLaVA")[1], max_new_tokens=1)


@torch._dynamo.config.patch(capture_scalar_outputs=True)
def test_a_graph_break_behind_the_image() -> None:
    model = served("LLaVA", fullgraph=False)
    model.model.language_model.layers[1].register_forward_hook(lambda *_: torch._dynamo.graph_break())
    with pytest.raises(BackendCompilerFailed, match=r"would count the whole prompt.*fullgraph=True"):
        model(**given("LLaVA")[1])


# --- the forward that is compiled -------------------------------------------------------------------------------------


def test_whole_forward() -> None:
    """The model's own, but for what would take the tower's work away from it; a wrapper that stands there is kept."""
    model, inputs = copy.deepcopy(given("LLaVA")[0]), given("LLaVA")[1]
    parameters = inspect.signature(model.forward).parameters
    found = inspect.signature(whole_forward(model)).parameters
    assert list(found) == [name for name in parameters if name != "mm_encoder_outputs"]
    calls: list[Any] = []
    original = model.forward

    def counting(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return original(*args, **kwargs)

    model.forward = counting
    with torch.no_grad():
        torch.testing.assert_close(whole_forward(model)(**inputs).logits, original(**inputs).logits)
    assert len(calls) == 1


def test_older_versions_of_pytorch(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "__version__", "2.11.0+cpu")
    monkeypatch.setenv(UNCHECKED, "0")
    with pytest.raises(UsageError, match=f"2.11.0.cpu cannot trace .*{UNCHECKED}=1"):
        whole_forward(given("LLaVA")[0])
    monkeypatch.setenv(UNCHECKED, "1")
    assert callable(whole_forward(given("LLaVA")[0]))


def test_whole_forward_of_a_model_that_does_not_generate() -> None:
    with pytest.raises(UsageError, match="does not generate"):
        whole_forward(tiny_vilt())
