"""Outputs by name: which there are, keeping some, and what becomes of those with one entry for each token."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel, ViltModel
from transformers.utils import ModelOutput

import pumer_compile as pumer
from pumer_compile import Program, Schedule, capture, reduce
from pumer_compile.analysis.outputs import output_nodes, select_outputs, set_outputs
from pumer_compile.errors import ScheduleError, UsageError
from tests.support.commands import done, feed, inner_manifest, onnx_outputs, refused
from tests.support.helpers import count_op
from tests.support.models import inputs_for, make
from tests.support.pairs import CoAttention, PairConfig
from tests.support.tiny import tiny_vilt

aten = torch.ops.aten


@dataclass
class Found(ModelOutput):
    """What transformers' models give."""

    logits: Tensor | None = None
    hidden_states: tuple[Tensor, ...] | None = None
    missing: Tensor | None = None


class Giving(nn.Module):
    """Gives what a function makes of two values."""

    def __init__(self, give: Callable[[Tensor, Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.give = nn.Linear(4, 4), give

    def forward(self, x: Tensor) -> Any:
        y = self.linear(x)
        return self.give(y.tanh(), y.sigmoid())


def giving(give: Callable[[Tensor, Tensor], Any], **options: Any) -> Program:
    torch.manual_seed(0)
    return capture(Giving(give).eval(), {"x": torch.ones(2, 4)}, **options)


FORMS: dict[str, tuple[Callable[[Tensor, Tensor], Any], list[str]]] = {
    "one": (lambda a, b: a, ["output"]),
    "tuple": (lambda a, b: (a, b), ["0", "1"]),
    "list": (lambda a, b: [b, a], ["0", "1"]),
    "dictionary": (lambda a, b: {"first": a, "second": b}, ["first", "second"]),
    "not in order": (lambda a, b: {"second": b, "first": a}, ["second", "first"]),
    "nested": (lambda a, b: (a, {"deep": [b, (a + b,)]}), ["0", "1.deep.0", "1.deep.1.0"]),
    "model output": (lambda a, b: Found(logits=a), ["logits"]),
    "model output with a tuple": (
        lambda a, b: Found(a, (b, a * b)),
        ["logits", "hidden_states.0", "hidden_states.1"],
    ),
    "beside other things": (lambda a, b: (a, None, 3, "text", b), ["0", "4"]),
    "twice": (lambda a, b: {"one": a, "other": a}, ["one", "other"]),
}


def named(value: Any, prefix: str = "") -> dict[str, Tensor]:
    """Tensors inside a structure by their path."""
    if isinstance(value, Tensor):
        return {prefix or "output": value}
    found: dict[str, Tensor] = {}
    entries = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else ()
    for key, entry in entries:
        found |= named(entry, f"{prefix}.{key}" if prefix else str(key))
    return found


@pytest.mark.parametrize("name", FORMS)
def test_names(name: str) -> None:
    give, names = FORMS[name]
    program = giving(give)
    found = output_nodes(program.module)
    assert list(found) == names
    x = torch.linspace(-1, 1, 8).view(2, 4)
    with torch.no_grad():
        expected = named(program.model(x))
        assert list(expected) == names
        # Each name stands for the node that gives its tensor.
        set_outputs(program.module, found)
        given = program.module(x=x)
    assert list(given) == names
    for key, value in expected.items():
        assert torch.equal(given[key], value), key


def test_the_names_of_a_graph_without_names() -> None:
    """One made by hand says nothing of its structure."""

    def add(x: Tensor) -> tuple[Tensor, Tensor]:
        return x + 1, x - 1

    assert list(output_nodes(torch.fx.symbolic_trace(add))) == ["0", "1"]


# --- keeping some ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wanted", "kept"),
    [
        (["logits"], ["logits"]),
        (["hidden_states"], ["hidden_states.0", "hidden_states.1"]),
        (["hidden_states.1"], ["hidden_states.1"]),
        (["hidden_states.1", "logits"], ["logits", "hidden_states.1"]),  # in the model's order
        (["hidden_states", "hidden_states.0"], ["hidden_states.0", "hidden_states.1"]),
        (["logits", "hidden_states"], ["logits", "hidden_states.0", "hidden_states.1"]),
    ],
)
def test_selecting(wanted: list[str], kept: list[str]) -> None:
    program = giving(FORMS["model output with a tuple"][0])
    x = torch.linspace(-1, 1, 8).view(2, 4)
    with torch.no_grad():
        expected = named(program.model(x))
        select_outputs(program.module, wanted)
        given = program.module(x=x)
    assert type(given) is dict
    assert list(given) == kept
    assert all(torch.equal(given[name], expected[name]) for name in kept)


def test_what_only_a_dropped_output_needed_goes() -> None:
    program = giving(lambda a, b: {"a": a, "b": b})
    assert count_op(program.module, aten.sigmoid.default) == 1
    select_outputs(program.module, ["a"])
    assert count_op(program.module, aten.sigmoid.default) == 0
    assert count_op(program.module, aten.tanh.default) == 1
    program.module.graph.lint()


def test_a_name_is_not_the_beginning_of_a_longer_one() -> None:
    program = giving(lambda a, b: {"logits": a, "logits_per_image": b})
    select_outputs(program.module, ["logits"])
    assert list(output_nodes(program.module)) == ["logits"]


@pytest.mark.parametrize("wanted", ["logit", "hidden", "hidden_states.2", "", "logits.0", "Logits"])
def test_an_output_that_is_not_there_is_answered_with_those_there_are(wanted: str) -> None:
    program = giving(FORMS["model output with a tuple"][0])
    with pytest.raises(UsageError) as caught:
        select_outputs(program.module, ["logits", wanted])
    message = str(caught.value)
    assert repr(wanted) in message
    assert "logits, hidden_states.0, hidden_states.1" in message
    assert caught.value.exit_code == 2
    # Nothing was changed.
    assert list(output_nodes(program.module)) == ["logits", "hidden_states.0", "hidden_states.1"]


def test_capturing_some_outputs() -> None:
    program = giving(FORMS["model output with a tuple"][0], outputs=["hidden_states.1"])
    assert program.outputs == ("hidden_states.1",)
    assert list(program.module(x=torch.ones(2, 4))) == ["hidden_states.1"]
    whole = giving(FORMS["model output with a tuple"][0])
    assert whole.outputs == ()
    assert isinstance(whole.module(x=torch.ones(2, 4)), Found)
    with pytest.raises(UsageError, match="no output 'itm'"):
        giving(FORMS["dictionary"][0], outputs=["itm"])


def test_some_outputs_of_an_archive() -> None:
    exported = torch.export.export(Giving(FORMS["dictionary"][0]).eval(), (), {"x": torch.ones(2, 4)})
    program = capture(exported, outputs=["second"])
    assert list(program.module(x=torch.ones(2, 4))) == ["second"]


# --- a model with a hidden state --------------------------------------------------------------------------------------

HIDDEN, POOLED = "last_hidden_state", "pooler_output"
BUDGETS: dict[str, Any] = {"layers": [0], "prune": 0.1, "merge": {"image": 0.3, "text": 0.2}}
TEXT = "layers: [0]\nprune: 0.1\nmerge: {image: 0.3, text: 0.2}\n"
LEFT, TOKENS = 32, 49
"""Of 12 words and 37 image tokens, 10 and 22 are left."""


def inputs(batch: int = 2, seed: int = 7) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array) for name, array in feed(batch, seed=seed).items()}


@functools.cache
def vilt(layers: int = 2) -> ViltModel:
    return tiny_vilt(ViltModel, num_hidden_layers=layers)


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("vilt") / "model"
    vilt().save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def saved_layer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One layer, for what reads every token behind its reducers."""
    path = tmp_path_factory.mktemp("vilt") / "model"
    vilt(1).save_pretrained(path)
    return path


def write(path: Path, outputs: str | None) -> Path:
    path.write_text(TEXT + (f"outputs: {outputs}\n" if outputs else ""), encoding="utf-8")
    return path


def test_kept_outputs_are_those_of_the_whole_model() -> None:
    """The same reduction, whatever else is given beside."""
    some = reduce(capture(vilt(), inputs(), outputs=[POOLED]), Schedule(**BUDGETS))
    every = reduce(capture(vilt(), inputs()), Schedule(outputs="reduced", **BUDGETS))
    with torch.no_grad():
        a, b = some.module(**inputs()), every.module(**inputs())
    assert set(a) == {POOLED}
    # Where only token 0 is read, the last layer has one query: other products, rounded otherwise.
    torch.testing.assert_close(a[POOLED], b[POOLED], atol=1e-6, rtol=1e-6)
    assert b[HIDDEN].shape == (2, LEFT, 24)


def test_the_command_keeps_outputs(saved: Path, tmp_path: Path) -> None:
    path, schedule = tmp_path / "model.onnx", write(tmp_path / "schedule.yaml", None)
    done(saved, "--schedule", schedule, "--outputs", POOLED, "--batch", 2, "-o", path)
    manifest = inner_manifest(path)
    assert manifest["kept_outputs"] == [POOLED]
    assert manifest["outputs"] == [POOLED]
    with torch.no_grad():
        expected = reduce(capture(vilt(), inputs(), outputs=[POOLED]), Schedule(**BUDGETS)).module(**inputs())
    found = onnx_outputs(path, feed())
    assert list(found) == [POOLED]
    assert np.abs(found[POOLED] - expected[POOLED].numpy()).max() <= 1e-4
    # Such an artifact can be proved again, by the command and from Python.
    report = tmp_path / "report.json"
    done("parity", path, "--model", saved, "--report", report)
    rows = json.loads(report.read_text(encoding="utf-8"))["outputs"]
    assert [(row["name"], row["against"]) for row in rows] == [
        (POOLED, "forced"),
        (POOLED, "end_to_end"),
        (POOLED, "unreduced"),
        (POOLED, "model"),
    ]
    assert pumer.parity(path, vilt(), inputs(seed=8)).passed


def test_the_command_without_kept_outputs_says_which_to_keep(saved: Path, tmp_path: Path) -> None:
    schedule = write(tmp_path / "schedule.yaml", None)
    message = refused(2, saved, "--schedule", schedule, "--batch", 2, "-o", tmp_path / "model.onnx")
    assert f"The output {HIDDEN}," in message
    assert f"--outputs {POOLED}" in message
    assert not (tmp_path / "model.onnx").exists()


def test_the_command_refuses_outputs_that_are_not_there(saved: Path, tmp_path: Path) -> None:
    schedule = write(tmp_path / "schedule.yaml", None)
    options = ("--schedule", schedule, "--batch", 2, "-o", tmp_path / "model.onnx")
    message = refused(2, saved, *options, "--outputs", f"{POOLED},logits")
    assert "'logits'" in message
    assert f"{HIDDEN}, {POOLED}" in message


def test_the_plan_of_kept_outputs(saved: Path, tmp_path: Path) -> None:
    """What only other outputs need is not counted; spaces around names do not matter."""
    schedule = write(tmp_path / "schedule.yaml", None)
    plan = json.loads(done("plan", saved, "--schedule", schedule, "--outputs", f" {POOLED} , ", "--json").out)
    assert plan["sites"][0]["after"] == {"text": 10, "image": 22}


def test_keeping_outputs_without_reducing(saved_layer: Path, tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    done(saved_layer, "--schedule", "none", "--outputs", HIDDEN, "--batch", 2, "-o", path, "--no-verify")
    found = onnx_outputs(path, feed())
    assert list(found) == [HIDDEN]
    with torch.no_grad():
        expected = capture(vilt(1), inputs()).module(**inputs())[HIDDEN].numpy()
    assert np.abs(found[HIDDEN] - expected).max() <= 1e-4
    assert inner_manifest(path)["kept_outputs"] == [HIDDEN]
    done("parity", path, "--model", saved_layer)


@pytest.mark.parametrize("mode", ["reduced", "restored"])
def test_token_outputs_as_an_artifact(saved_layer: Path, tmp_path: Path, mode: str) -> None:
    path, schedule = tmp_path / "model.onnx", write(tmp_path / "schedule.yaml", mode)
    # One with an open batch size, the other with a fixed one.
    options = ("--dynamic-batch",) if mode == "restored" else ("--batch", 2)
    done(saved_layer, "--schedule", schedule, "-o", path, *options, "--no-verify")
    manifest = inner_manifest(path)
    flags = [f"{HIDDEN}.kept"] if mode == "restored" else []
    assert manifest["outputs"] == [HIDDEN, POOLED, *flags]
    assert manifest["schedule"]["outputs"] == mode

    found = onnx_outputs(path, feed())
    eager = reduce(capture(vilt(1), inputs()), Schedule(outputs=mode, **BUDGETS)).module
    with torch.no_grad():
        expected = eager(**inputs())
    assert list(found) == [HIDDEN, POOLED, *flags]
    assert found[HIDDEN].shape == (2, TOKENS if mode == "restored" else LEFT, 24)
    for name in (HIDDEN, POOLED):
        assert np.abs(found[name] - expected[name].numpy()).max() <= 1e-4
    if flags:
        assert found[flags[0]].dtype == np.bool_ and found[flags[0]].shape == (2, TOKENS)
        assert (found[flags[0]] == expected[flags[0]].numpy()).all()
        assert (found[flags[0]].sum(1) == TOKENS - 4).all()  # round(3.7) pruned; the others are in some token
        assert not found[HIDDEN][~found[flags[0]]].any()
    done("parity", path, "--model", saved_layer)


def test_restored_hidden_states_of_every_layer_as_an_artifact(tmp_path: Path) -> None:
    """Several outputs of one length, before and after the site."""
    model = tiny_vilt(ViltModel)
    model.config.output_hidden_states = True
    program = capture(model, inputs())
    names = [name for name in output_nodes(program.module) if name.startswith("hidden_states.")]
    assert len(names) == 3
    reduced = reduce(program, Schedule(outputs="restored", **BUDGETS))
    pumer.export(reduced, tmp_path / "model.onnx", verify=False)
    report = pumer.parity(tmp_path / "model.onnx", model, inputs())
    assert report.passed, report.failures()
    found = onnx_outputs(tmp_path / "model.onnx", feed())
    assert {name for name in found if name.endswith(".kept")} == {
        f"{name}.kept" for name in (HIDDEN, "hidden_states.1", "hidden_states.2")
    }
    assert all(found[name].shape == (2, TOKENS, 24) for name in (HIDDEN, *names))
    with torch.no_grad():
        unreduced = program.module(**inputs())
    np.testing.assert_allclose(found["hidden_states.0"], unreduced.hidden_states[0].numpy(), atol=1e-4)


class Streams(CoAttention):
    """Gives both streams and an answer."""

    def conclude(self, text: Tensor, image: Tensor) -> Any:
        return {"answer": super().conclude(text, image), "text": text, "image": image, "long": image.mean(-1) > 0}


def test_a_plain_module_with_two_streams_as_an_artifact(tmp_path: Path) -> None:
    """Of co-attention, with an open batch, and through torch's own exporter."""
    config = PairConfig(layers=1, dynamic=True)
    model = make(config, kind=Streams)
    given = inputs_for(config)
    reduced = reduce(capture(model, given, dynamic_batch=True), Schedule(outputs="restored", **BUDGETS))
    pumer.export(reduced, tmp_path / "model.onnx", verify=False)
    report = pumer.parity(tmp_path / "model.onnx", model, inputs_for(config, seed=8))
    assert report.passed, report.failures()
    assert {row.name for row in report.outputs if row.against == "forced"} == {
        "answer",
        "text",
        "image",
        "long",
        "text.kept",
        "image.kept",
        "long.kept",
    }
    batch = inputs_for(config, seed=9, batch=3)
    found = onnx_outputs(tmp_path / "model.onnx", {name: tensor.numpy() for name, tensor in batch.items()})
    with torch.no_grad():
        expected = reduced.module(**batch)
    assert list(found) == list(expected)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value.numpy(), atol=1e-4, err_msg=name)
    assert found["text"].shape[1:] == (7, 32) and found["image"].shape[1:] == (25, 32)


def test_outputs_of_a_schedule() -> None:
    assert Schedule(**BUDGETS).outputs == "refused"
    assert Schedule.from_yaml(TEXT + "outputs: restored\n").outputs == "restored"
    with pytest.raises(ScheduleError, match="outputs"):
        Schedule.from_yaml(TEXT + "outputs: kept\n")
    # The default is no part of the hash, so that artifacts of older schedules keep theirs.
    hashes = {mode: Schedule(outputs=mode, **BUDGETS).sha256 for mode in ("refused", "reduced", "restored")}
    assert len(set(hashes.values())) == 3
    assert hashes["refused"] == Schedule(**BUDGETS).sha256


# --- inputs, values and constants as outputs, in artifacts ------------------------------------------------------------


def give_again(mask: Tensor, y: Tensor) -> dict[str, Tensor]:
    """Inputs and values, once and again, as they are and in forms that converters leave out."""
    total = y.sum((1, 2))[0]
    given = {"mask": mask, "again": mask.detach(), "y": y, "other": y, "cast": y.to(torch.float32), "whole": y.clone()}
    return given | {"scalar": total, "the_scalar": total, "table": torch.ones(3)}


class Plain(nn.Module):
    """Gives what it takes."""

    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, mask: Tensor, x: Tensor) -> dict[str, Tensor]:
        return give_again(mask, self.linear(x))


class OfTransformers(PreTrainedModel):
    """The same, by way of transformers' exporters."""

    config_class = PretrainedConfig

    def __init__(self) -> None:
        super().__init__(PretrainedConfig())
        self.linear = nn.Linear(4, 4)
        self.post_init()

    def forward(self, mask: Tensor, x: Tensor) -> dict[str, Tensor]:
        return give_again(mask, self.linear(x))


@pytest.mark.parametrize("suffix", [".onnx", ".xml"])
@pytest.mark.parametrize("model", [Plain, OfTransformers])
def test_an_output_that_is_an_input_or_given_twice(model: type[nn.Module], suffix: str, tmp_path: Path) -> None:
    if suffix == ".xml":
        pytest.importorskip("openvino")
    torch.manual_seed(0)
    inputs = {"mask": torch.tensor([[1, 1, 0], [1, 0, 0]]), "x": torch.randn(2, 3, 4)}
    # Without a schedule transformers converts its models alone; names of outputs bring our own graph in.
    names = ("mask", "again", "y", "other", "cast", "whole", "scalar", "the_scalar", "table")
    for outputs in ((), names) if model is OfTransformers else ((),):
        module = model().eval()
        program = capture(module, inputs, outputs=outputs)
        exported = pumer.export(program, tmp_path / f"model{suffix}")
        with torch.no_grad():
            expected = module(**inputs)
        engine = pumer.Engine(exported.path)
        assert engine.inputs == ["mask", "x"]
        given = engine.run(inputs)
        engine.close()
        assert list(given) == ["output.mask", *names[1:]]
        for name in names:
            found = np.asarray(given["output.mask" if name == "mask" else name])
            assert found.shape == expected[name].shape and np.allclose(found, expected[name].numpy(), atol=1e-6), name
