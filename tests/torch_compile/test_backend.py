"""`torch.compile(backend="pumer")`: equal to the reduced module, one graph, trains, recompiles, and never silent."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import logging
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch._dynamo
import torch._inductor.config
from torch import Tensor, nn
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.exc import BackendCompilerFailed
from torch.testing._internal.two_tensor import TwoTensor
from transformers.models.vilt.modeling_vilt import ViltEmbeddings

import pumer_compile as pumer
from pumer_compile import Schedule
from pumer_compile.capture.loading import load_model
from pumer_compile.errors import UsageError
from pumer_compile.reduce import reduce_graph
from pumer_compile.schedule import PRESETS
from pumer_compile.torch_compile import backend as backend_module
from pumer_compile.torch_compile.backend import Options, default_schedule
from tests.support import vilt_tiny as oracle
from tests.support.compiling import (
    FEW,
    PLAIN,
    SMALL,
    VILT,
    WANTED,
    assert_near,
    compiled,
    every_token,
    expected,
    fresh_dynamo,
    graphs,
    logits,
    loose,
    padded,
    vilt_inputs,
)
from tests.support.models import Config, inputs_for, make, schedule
from tests.support.tiny import image_inputs, text_inputs, tiny_vilt

__all__ = ["fresh_dynamo"]

METER = Path(__file__).parents[1] / "oracle" / "meter-tiny"


# --- the entry point ------------------------------------------------------------------------------------------------


def test_needs_no_import(tmp_path: Path) -> None:
    """A new process that imports torch alone finds the backend by its entry point."""
    code = (
        "import sys, torch, torch._dynamo\n"
        "assert 'pumer' in torch._dynamo.list_backends()\n"
        "assert not any(name.startswith('pumer_compile') for name in sys.modules)\n"
        "torch.compile(torch.nn.Linear(2, 2), backend='pumer')\n"
        "assert 'pumer_compile.torch_compile.backend' in sys.modules\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


# --- equal to the reduced module ------------------------------------------------------------------------------------


FORMS = {
    "unfused, additive mask": ("reference", PLAIN),
    "fused": ("safe", dataclasses.replace(PLAIN, form="sdpa")),
    "fused, published softmax": ("reference", dataclasses.replace(PLAIN, form="sdpa", mask="bool")),
    "fused, no mask": ("paper", dataclasses.replace(PLAIN, form="sdpa", mask="none")),
    "post-norm, boolean mask": ("paper", dataclasses.replace(PLAIN, norm="post", mask="bool")),
    "padded patches": ("safe", dataclasses.replace(PLAIN, patch_mask=True, mask="expanded")),
}


@pytest.mark.parametrize(("semantics", "config"), FORMS.values(), ids=FORMS)
def test_plain_module(semantics: str, config: Config) -> None:
    model, inputs = make(config), inputs_for(config)
    wanted = schedule(semantics)
    assert_near(compiled(model, wanted)(**inputs), expected(model, inputs, wanted))


def test_co_attention() -> None:
    """METER's published vectors; text and image stay apart in it. In float64, see `test_oracle_meter.DTYPES`."""
    model = load_model(METER).model.double()
    arrays = {name: torch.from_numpy(array) for name, array in np.load(METER / "inputs.npz").items()}
    inputs = {"input_ids": arrays["input_ids_padded"], "attention_mask": arrays["attention_mask"]}
    with torch.no_grad():
        fast = compiled(model, "meter-vqa", semantics="reference")
        found = fast(**inputs, pixel_values=arrays["pixel_values"].double()).logits
    assert np.abs(found.numpy() - np.load(METER / "expected.npz")["vqa-0246.padded"]).max() <= 1e-5


def test_published_logits() -> None:
    """Stock ViLT, one graph, no change to the caller's code; the vectors are of the published implementation."""
    name, before = "ve-2468", graphs()
    model = compiled(oracle.model(), oracle.schedule(name))
    for padding in ("padded", "unpadded"):
        with torch.no_grad():
            found = model(**oracle.inputs(padding == "padded")).logits.numpy()
        assert np.abs(found - oracle.EXPECTED[f"{name}.{padding}"]).max() <= 1e-5
    assert graphs() == before + 1
    assert not torch._dynamo.utils.counters["graph_break"]


def test_inductor() -> None:
    model, inputs = make(SMALL), inputs_for(SMALL)
    wanted = schedule(layers=(0,))
    with torch.no_grad():
        assert_near(compiled(model, wanted, inner="inductor")(**inputs), expected(model, inputs, wanted))


def test_two_schedules_of_one_model_do_not_share_a_graph() -> None:
    """Same token counts, other decisions: caches of the inner backend must tell them apart."""
    model, inputs = make(SMALL), inputs_for(SMALL)
    for semantics in ("reference", "safe", "reference"):
        wanted = schedule(semantics, layers=(0,))
        assert_near(compiled(model, wanted, inner="aot_eager")(**inputs), expected(model, inputs, wanted))


def test_another_image_size() -> None:
    """Images of another canvas are compiled for anew."""
    model = compiled(tiny := tiny_vilt(), FEW)
    for canvas in ((96, 96), (64, 80)):
        inputs = {**text_inputs(2), **image_inputs([canvas, (48, 64)], canvas)}
        with torch.no_grad():
            assert_near(model(**inputs), expected(tiny, inputs, FEW))


@pytest.mark.parametrize("outputs", ["reduced", "restored"])
def test_outputs_with_one_entry_for_each_token(outputs: str) -> None:
    model, inputs = make(dataclasses.replace(SMALL, head=every_token)), inputs_for(SMALL)
    wanted = FEW.model_copy(update={"outputs": outputs})
    with torch.no_grad():
        named = reduce_graph(pumer.capture(model, inputs), wanted)(**inputs)
        found = compiled(model, wanted)(**inputs)
    reference = named if isinstance(named, Tensor) else next(iter(named.values()))
    assert found.shape[1] == (SMALL.text + SMALL.image if outputs == "restored" else 24)
    assert_near(found, reference)


# --- options --------------------------------------------------------------------------------------------------------


def test_schedule_as_file_preset_or_mapping(tmp_path: Path) -> None:
    file = tmp_path / "schedule.yaml"
    file.write_text("layers: [0]\nprune: 0.2\n")
    mapping = {"layers": [0], "prune": 0.2}
    for given in (file, str(file), mapping, Schedule(**mapping)):
        assert Options.parse({"schedule": given}).schedule == Schedule(**mapping)
    assert Options.parse({"schedule": "vilt-vqa"}).schedule == Schedule.load("vilt-vqa")
    published = Options.parse({"schedule": "vilt-vqa", "semantics": "reference"}).schedule
    assert published == Schedule.load("vilt-vqa", semantics="reference") != Schedule.load("vilt-vqa")


BAD_OPTIONS = {
    "unknown": ({"scedule": "vilt-vqa"}, r"no option 'scedule'. Its options: schedule, semantics, inner"),
    "inner": ({"inner": "tvm"}, r"'tvm'; it must be one of inductor, aot_eager, eager"),
    "strict": ({"strict": "no"}, r"must be True or False"),
    "text_length": ({"text_length": 0}, r"at least 1"),
    "text_length true": ({"text_length": True}, r"at least 1"),
    "streams": ({"streams": "text"}, r"must map inputs to streams"),
    "no schedule": ({"schedule": None}, r"a file, a preset, a mapping or a Schedule"),
    "semantics alone": ({"semantics": "safe"}, r"goes with options\['schedule'\]"),
    "unknown semantics": (
        {"schedule": "vilt-vqa", "semantics": "exact"},
        r"semantics: expected one of reference, paper, safe",
    ),
    "unknown preset": ({"schedule": "vilt-vqb"}, r"Presets: vilt-vqa"),
    "unknown key": ({"schedule": {"leyers": [1]}}, r"leyers: unknown key"),
}


@pytest.mark.parametrize(("options", "message"), BAD_OPTIONS.values(), ids=BAD_OPTIONS)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(UsageError, match=message):
        Options.parse(options)
    model, inputs = make(PLAIN), inputs_for(PLAIN)
    with pytest.raises(BackendCompilerFailed, match=message):
        torch.compile(model, backend="pumer", options=options)(**inputs)


def test_mode_goes_to_inductor(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, dict[str, Any]]] = []

    def lookup(name: str) -> Callable[..., Any]:
        def inner(module: Any, inputs: Any, **settings: Any) -> Any:
            calls.append((name, settings))
            return module.forward

        return inner

    monkeypatch.setattr(backend_module, "lookup_backend", lookup)
    torch.compile(make(PLAIN), backend="pumer", mode="reduce-overhead")(**inputs_for(PLAIN))
    assert calls == [("inductor", {"config_patches": torch._inductor.list_mode_options("reduce-overhead")})]
    assert calls[0][1]["config_patches"]["triton.cudagraphs"] is True


def test_unknown_stream_input() -> None:
    with pytest.raises(BackendCompilerFailed, match=r"names the input 'pixels', but there are input_ids, pixel_values"):
        compiled(make(PLAIN), streams={"pixels": "image"})(**inputs_for(PLAIN))


# --- schedules that are not given -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("layers", "chosen"), [(12, (2, 5, 8)), (6, (1, 2, 4)), (24, (4, 10, 16)), (2, (0, 1)), (1, (0,))]
)
def test_default_schedule(layers: int, chosen: tuple[int, ...]) -> None:
    found = default_schedule(range(layers))
    assert found == Schedule(semantics="safe", layers=chosen, prune=0.1, merge={"image": 0.3, "text": 0.2})


def test_default_is_said_once(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = make(PLAIN), inputs_for(PLAIN)
    with caplog.at_level(logging.WARNING, logger="pumer_compile"):
        assert_near(compiled(model, None)(**inputs), expected(model, inputs, default_schedule(range(2))))
        compiled(make(PLAIN, seed=1), None)(**inputs)
    (record,) = [r for r in caplog.records if "No schedule was given" in r.getMessage()]
    assert "layers 0, 1 of 0, 1" in record.getMessage()


@pytest.mark.parametrize("wrapped", [False, True], ids=["model", "inside a function"])
def test_schedule_of_the_configuration(wrapped: bool, caplog: pytest.LogCaptureFixture) -> None:
    model = tiny_vilt(pumer_schedule={"layers": [0], "prune": 0.3})
    inputs = vilt_inputs(2)

    def call(**given: Tensor) -> Tensor:
        return model(**given).logits

    with torch.no_grad(), caplog.at_level(logging.WARNING, logger="pumer_compile"):
        found = compiled(call if wrapped else model, None)(**inputs)
    assert_near(found, expected(model, inputs, Schedule(layers=(0,), prune=0.3)))
    assert "No schedule was given" not in caplog.text


def test_semantics_of_the_configuration(caplog: pytest.LogCaptureFixture) -> None:
    """A schedule that names none takes those that the model was fine-tuned with; one that does keeps them."""
    trained = {"layers": [1], "prune": 0.1, "semantics": "reference"}
    model, inputs, mapping = tiny_vilt(pumer_schedule=trained), vilt_inputs(2), {"layers": [0], "prune": 0.3}
    published = Schedule(semantics="reference", **mapping)
    with torch.no_grad(), caplog.at_level(logging.WARNING, logger="pumer_compile"):
        for _ in range(2):
            assert_near(compiled(model, mapping)(**inputs), expected(model, inputs, published))
            torch._dynamo.reset()
        (record,) = caplog.records
        assert "taking reference, which the model was fine-tuned with" in record.getMessage()
        safe = compiled(model, mapping, semantics="safe")(**inputs)
    assert_near(safe, expected(model, inputs, Schedule(semantics="safe", **mapping)))
    assert (safe.logits - expected(model, inputs, published)).abs().max() > 1e-4


def test_bad_schedule_of_the_configuration() -> None:
    with pytest.raises(BackendCompilerFailed, match="No schedule 'fast'"):
        compiled(tiny_vilt(pumer_schedule="fast"), None)(**vilt_inputs(2))


def test_option_before_configuration() -> None:
    model, inputs = tiny_vilt(pumer_schedule="fast"), vilt_inputs(2)
    with torch.no_grad():
        assert_near(compiled(model, VILT)(**inputs), expected(model, inputs, VILT))


# --- training -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("training", "inner"), [(False, "eager"), (True, "aot_eager")], ids=["eval", "train"])
def test_gradients(training: bool, inner: str) -> None:
    model = tiny_vilt(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).train(training)
    inputs, target = vilt_inputs(2), torch.tensor([1, 3])
    reduced = pumer.reduce(pumer.capture(copy.deepcopy(model), inputs), VILT).module.train(training)

    def gradients(forward: Callable[..., Any], owner: nn.Module) -> dict[str, Tensor]:
        nn.functional.cross_entropy(logits(forward(**inputs)), target).backward()
        return {name: p.grad for name, p in owner.named_parameters() if p.grad is not None}

    found = gradients(compiled(model, VILT, inner=inner), model)
    wanted = gradients(reduced, reduced)
    assert found.keys() == wanted.keys() and len(found) > 30
    for name in found:
        torch.testing.assert_close(found[name], wanted[name], atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_dropout_is_drawn_anew_and_only_while_training() -> None:
    model = tiny_vilt(hidden_dropout_prob=0.5)
    fast, inputs = compiled(model, VILT), vilt_inputs(2)
    with torch.no_grad():
        assert torch.equal(fast(**inputs).logits, fast(**inputs).logits)
        model.train()
        assert not torch.equal(fast(**inputs).logits, fast(**inputs).logits)


def test_a_training_step_lowers_the_loss() -> None:
    model, inputs, target = make(PLAIN), inputs_for(PLAIN), torch.tensor([1, 3])
    fast, optimizer = compiled(model), torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for _ in range(5):
        loss = nn.functional.cross_entropy(fast(**inputs), target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] - 0.1
    assert_near(fast(**inputs), expected(model, inputs))


@pytest.mark.parametrize("inside", [False, True], ids=["around the call", "inside the function"])
def test_autocast(inside: bool) -> None:
    """The model's products run in bfloat16, the reducers' decisions in float32, as in the reduced module."""
    model, inputs = make(PLAIN), inputs_for(PLAIN)
    reduced = pumer.reduce(pumer.capture(model, inputs), WANTED).module

    def call(**given: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=inside):
            return model(**given)

    with torch.no_grad():
        with torch.autocast("cpu", dtype=torch.bfloat16):
            wanted = reduced(**inputs)
            outside = None if inside else compiled(model)(**inputs)
        found = compiled(call)(**inputs) if inside else outside
    assert found.dtype == wanted.dtype == torch.bfloat16
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


# --- nothing to reduce ----------------------------------------------------------------------------------------------


class Unrelated(nn.Module):
    """No attention in it."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x).relu()


class Broken(nn.Module):
    """A model that Dynamo has to split, after its embeddings or after its head."""

    def __init__(self, after_embedding: bool) -> None:
        super().__init__()
        self.model, self.after_embedding = make(PLAIN), after_embedding

    def forward(self, **inputs: Tensor) -> Tensor:
        if self.after_embedding:
            x = self.model.embed(inputs["input_ids"], inputs["pixel_values"])
            torch._dynamo.graph_break()
            mask = self.model.mask(x, inputs["attention_mask"], None)
            for layer in self.model.layers:
                x = layer(x, mask)
            return self.model.finish(x, inputs["input_ids"].shape[1])
        out = self.model(**inputs)
        torch._dynamo.graph_break()
        return out * 2


def test_no_attention_is_an_error() -> None:
    with pytest.raises(BackendCompilerFailed, match=r"Nothing is reduced in this graph, forward at .*no attention"):
        compiled(Unrelated())(torch.randn(2, 4))


def test_no_attention_is_a_warning_for_each_graph(caplog: pytest.LogCaptureFixture) -> None:
    model, x, before = Unrelated(), torch.randn(2, 4), graphs()
    fast = compiled(model, strict=False)
    with caplog.at_level(logging.WARNING, logger="pumer_compile"):
        assert_near(fast(x), model(x).detach())
        fast(x)
        fast(x[0])
    assert caplog.text.count("Nothing is reduced in this graph") == graphs() - before == 2


def test_no_such_site(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs, wanted = make(PLAIN), inputs_for(PLAIN), schedule(layers=(7,))
    with pytest.raises(BackendCompilerFailed, match=r"Nothing is reduced.*names cross_modal.7.*cross_modal.0 to"):
        compiled(model, wanted)(**inputs)
    torch._dynamo.reset()
    with torch.no_grad(), caplog.at_level(logging.WARNING, logger="pumer_compile"):
        torch.testing.assert_close(compiled(model, wanted, strict=False)(**inputs), model(**inputs))
    assert "names cross_modal.7" in caplog.text


def test_a_budget_that_cannot_be_met_is_an_error_even_if_not_strict() -> None:
    with pytest.raises(BackendCompilerFailed, match=r"at most 24 can go"):
        compiled(make(PLAIN), schedule(prune=25, merge={"image": 0}), strict=False)(**inputs_for(PLAIN))


def test_a_break_before_the_attention_is_an_error_that_names_it() -> None:
    with pytest.raises(BackendCompilerFailed, match=r"no attention. Dynamo splits.*fullgraph=True"):
        loose(Broken(after_embedding=True))(**inputs_for(PLAIN))


def test_a_break_before_the_attention_is_two_warnings(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = Broken(after_embedding=True), inputs_for(PLAIN)
    with torch.no_grad(), caplog.at_level(logging.WARNING, logger="pumer_compile"):
        torch.testing.assert_close(loose(model, strict=False)(**inputs), model(**inputs))
    assert caplog.text.count("Nothing is reduced") == 2
    assert "what is left of forward after the graph break at" in caplog.text


def test_a_break_after_a_reduced_graph_is_a_warning(caplog: pytest.LogCaptureFixture) -> None:
    model, inputs = Broken(after_embedding=False), inputs_for(PLAIN)
    with torch.no_grad(), caplog.at_level(logging.WARNING, logger="pumer_compile"):
        assert_near(loose(model)(**inputs), 2 * expected(model.model, inputs))
    assert caplog.text.count("Nothing is reduced") == 1


def test_a_break_that_hands_tokens_on_is_named() -> None:
    class Split(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = make(dataclasses.replace(SMALL, head=every_token))

        def forward(self, **inputs: Tensor) -> Tensor:
            tokens = self.model(**inputs)
            torch._dynamo.graph_break()
            return tokens[:, 0]

    with pytest.raises(BackendCompilerFailed, match=r"for each token.*Dynamo splits the function behind it at"):
        loose(Split(), schedule=FEW)(**inputs_for(SMALL))


def test_a_training_step_as_one_function(caplog: pytest.LogCaptureFixture) -> None:
    """The optimizer's graph has no attention, beside the model's that has."""
    model, inputs, target = make(PLAIN), inputs_for(PLAIN), torch.tensor([1, 3])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)

    def step() -> Tensor:
        loss = nn.functional.cross_entropy(model(**inputs), target)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return loss

    fast = loose(step)
    with caplog.at_level(logging.WARNING, logger="pumer_compile"):
        losses = [fast().item() for _ in range(4)]
    assert losses[-1] < losses[0] - 0.05
    assert "Nothing is reduced" in caplog.text


# --- errors ---------------------------------------------------------------------------------------------------------


def test_errors_are_readable_and_keep_their_type() -> None:
    with pytest.raises(BackendCompilerFailed) as caught:
        compiled(make(PLAIN), schedule(layers=(7,)))(**inputs_for(PLAIN))
    lines = str(caught.value).splitlines()
    assert lines[0] == "backend='pumer' raised:"
    assert lines[1].startswith("LocateError: Nothing is reduced in this graph")
    assert isinstance(caught.value.inner_exception, UsageError)


def test_suppressed_errors_are_still_logged(caplog: pytest.LogCaptureFixture) -> None:
    """Dynamo's own switch, which runs the model uncompiled; its warning shows our message."""
    model, inputs = make(PLAIN), inputs_for(PLAIN)
    with torch._dynamo.config.patch(suppress_errors=True), torch.no_grad():
        found = loose(model, schedule=schedule(layers=(7,)))(**inputs)
    torch.testing.assert_close(found, model(**inputs))
    assert "names cross_modal.7" in caplog.text


def test_checkpointing_is_refused_in_words() -> None:
    from torch.utils.checkpoint import checkpoint

    model, inputs = make(PLAIN), inputs_for(PLAIN)

    def call(**given: Tensor) -> Tensor:
        return checkpoint(lambda: model(**given), use_reentrant=False)

    with pytest.raises(BackendCompilerFailed, match="gradient checkpointing"):
        compiled(call)(**inputs)


def test_special_tensors_are_refused_in_words() -> None:
    inputs = inputs_for(SMALL)
    inputs["pixel_values"] = TwoTensor(inputs["pixel_values"], inputs["pixel_values"])
    with pytest.raises(BackendCompilerFailed, match="pixel_values is a TwoTensor, and only models of plain tensors"):
        compiled(make(SMALL), FEW)(**inputs)


def test_frozen_parameters_are_refused_in_words() -> None:
    with torch._inductor.config.patch(freezing=True), torch.no_grad():
        with pytest.raises(BackendCompilerFailed, match="Turn freezing off"):
            compiled(make(SMALL), FEW)(**inputs_for(SMALL))


# --- the page in docs/ ----------------------------------------------------------------------------------------------


def test_the_page_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its code as printed, but for the inner backend and the layers, which a small model has fewer of."""
    page = (Path(__file__).parents[2] / "docs" / "torch-compile.md").read_text(encoding="utf-8")
    usage, training, budget = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.setattr(backend_module, "lookup_backend", lambda name: lookup_backend("eager"))
    monkeypatch.setitem(PRESETS, "vilt-vqa", VILT)
    model, inputs = tiny_vilt(max_position_embeddings=40), vilt_inputs(2)
    names: dict[str, Any] = {"model": model, "inputs": inputs}
    exec(usage, names)
    assert_near(names["logits"], expected(model, inputs, VILT))
    weight = model.classifier[0].weight.clone()
    exec(training, {**names, "batches": [(inputs, torch.rand(2, 5))]})
    assert not torch.equal(model.classifier[0].weight, weight)
    model.eval()
    exec(budget, names)
    with torch.no_grad():
        assert_near(names["fast"](**inputs), expected(model, padded(inputs, 40), VILT))


@pytest.mark.parametrize("option", [f.name for f in dataclasses.fields(Options)])
def test_the_page_names_every_option(option: str) -> None:
    assert f"| `{option}` |" in (Path(__file__).parents[2] / "docs" / "torch-compile.md").read_text(encoding="utf-8")


# --- eager behaviour and other backends -----------------------------------------------------------------------------


def test_eager_and_other_backends_run_the_stock_method(monkeypatch: pytest.MonkeyPatch) -> None:
    """Only what is compiled with this backend sees the rewrite."""
    method = ViltEmbeddings.visual_embed
    original = inspect.unwrap(method)
    assert "multinomial" in inspect.getsource(original)
    model, inputs = tiny_vilt(), vilt_inputs(2)
    with torch.no_grad():
        torch.manual_seed(3)
        found = model(**inputs).logits
        monkeypatch.setattr(ViltEmbeddings, "visual_embed", original)
        torch.manual_seed(3)
        assert torch.equal(found, model(**inputs).logits)
    monkeypatch.undo()
    with pytest.raises(torch._dynamo.exc.TorchDynamoException, match="data-dependent"):
        torch.compile(model, backend="eager", fullgraph=True)(**inputs)
    compiled(model, VILT)(**inputs)


def test_the_exporter_still_finds_its_patch() -> None:
    model, inputs = tiny_vilt(), vilt_inputs(2)
    method = ViltEmbeddings.visual_embed
    with torch.no_grad():
        torch.testing.assert_close(pumer.capture(model, inputs).module(**inputs).logits, model(**inputs).logits)
    assert ViltEmbeddings.visual_embed is method
