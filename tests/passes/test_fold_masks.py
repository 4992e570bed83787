"""Masks of ones leave the graph, whatever they did; what reads them otherwise reads ones; nothing else changes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import onnx
import pytest
import torch
from torch import Tensor, nn

import pumer_compile as pumer
from pumer_compile import capture, reduce
from pumer_compile.artifacts.manifest import read_manifest
from pumer_compile.errors import UsageError
from pumer_compile.passes.fold_masks import fold_masks
from tests.support import commands
from tests.support.fx_text import fx_text
from tests.support.models import Config, Fusion, highest, inputs_for, make, schedule
from tests.support.narrowing import copy_of
from tests.support.tiny import tiny_vilt

aten = torch.ops.aten


def ones(config: Config, **options: Any) -> dict[str, Tensor]:
    inputs = inputs_for(config, **options)
    return {n: torch.ones_like(t) if n.endswith("mask") else t for n, t in inputs.items()}


def read(module: torch.fx.GraphModule, name: str) -> bool:
    (node,) = (n for n in module.graph.find_nodes(op="placeholder") if n.target == name)
    return bool(node.users)


class Masked(nn.Module):
    def forward(self, q: Tensor, k: Tensor, v: Tensor, attention_mask: Tensor) -> Tensor:
        hidden = (1.0 - attention_mask[:, None, None].float()) * -1e4
        return (q @ k.transpose(-1, -2) + hidden).softmax(-1) @ v


BEFORE = """\
%q -> [2, 4, 6, 8]
%k -> [2, 4, 6, 8]
%v -> [2, 4, 6, 8]
%attention_mask -> [2, 6]
%unsqueeze: unsqueeze(%attention_mask, 1) -> [2, 1, 6]
%unsqueeze_1: unsqueeze(%unsqueeze, 2) -> [2, 1, 1, 6]
%to: to(%unsqueeze_1, torch.float32) -> [2, 1, 1, 6]
%rsub: rsub(%to, 1.0) -> [2, 1, 1, 6]
%mul: mul(%rsub, -10000.0) -> [2, 1, 1, 6]
%transpose: transpose(%k, -1, -2) -> [2, 4, 8, 6]
%matmul: matmul(%q, %transpose) -> [2, 4, 6, 6]
%add: add(%matmul, %mul) -> [2, 4, 6, 6]
%softmax: softmax(%add, -1) -> [2, 4, 6, 6]
%matmul_1: matmul(%softmax, %v) -> [2, 4, 6, 8]
return %matmul_1"""
AFTER = """\
%q -> [2, 4, 6, 8]
%k -> [2, 4, 6, 8]
%v -> [2, 4, 6, 8]
%attention_mask -> [2, 6]
%transpose: transpose(%k, -1, -2) -> [2, 4, 8, 6]
%matmul: matmul(%q, %transpose) -> [2, 4, 6, 6]
%softmax: softmax(%matmul, -1) -> [2, 4, 6, 6]
%matmul_1: matmul(%softmax, %v) -> [2, 4, 6, 8]
return %matmul_1"""


def test_before_and_after() -> None:
    given = {**{name: torch.randn(2, 4, 6, 8) for name in "qkv"}, "attention_mask": torch.ones(2, 6, dtype=torch.int64)}
    module = copy_of(capture(Masked(), given))
    assert fx_text(module) == BEFORE
    assert fold_masks(module, ["attention_mask"], given) == 1
    assert fx_text(module) == AFTER


CONFIGS = [
    Config(mask=mask, form=form, patch_mask=patches, dynamic=dynamic)
    for mask, form, patches, dynamic in [
        ("additive", "unfused", False, False),
        ("additive", "sdpa", True, True),
        ("bool", "unfused", True, False),
        ("bool", "sdpa", False, True),
        ("expanded", "unfused", False, True),
    ]
]
# Text length = head size = heads x batch.
CONFIGS.append(Config(mask="additive", text=8, heads=4, width=32, batch=2))


@pytest.mark.parametrize("config", CONFIGS, ids=str)
def test_masks_leave_the_graph(config: Config) -> None:
    model, inputs = make(config), ones(config)
    plain = capture(model, inputs, dynamic_batch=config.dynamic)
    folded = capture(model, inputs, dynamic_batch=config.dynamic, padding=False)
    masks = [name for name in inputs if name.endswith("mask")]
    assert folded.unpadded == folded.fixed == tuple(masks)
    assert not any(read(folded.module, name) for name in masks) and all(read(plain.module, name) for name in masks)
    kinds = {aten.add.Tensor, aten.masked_fill.Scalar, aten.mul.Tensor, aten.scaled_dot_product_attention.default}
    before, after = ([n for n in p.module.graph.nodes if n.target in kinds] for p in (plain, folded))
    # A residual and an MLP's are left in each layer, and no mask in any attention.
    fused = [n for n in after if n.target is aten.scaled_dot_product_attention.default]
    assert all(n.args[3:4] in ((), (None,)) and n.kwargs.get("attn_mask") is None for n in fused)
    assert len(fused) == (config.layers if config.form == "sdpa" else 0)
    assert len(before) - len(after) >= (0 if config.form == "sdpa" else config.layers)
    for batch in (config.batch, 3) if config.dynamic else (config.batch,):
        other = ones(config, seed=4, batch=batch)
        with torch.no_grad():
            torch.testing.assert_close(folded.module(**other), plain.module(**other), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("semantics", ["reference", "paper", "safe"])
@pytest.mark.parametrize("dynamic", [False, True])
def test_reducers_need_no_weights(semantics: str, dynamic: bool) -> None:
    config = Config(mask="additive", dynamic=dynamic, head=highest)
    model, inputs, budgets = make(config), ones(config), schedule(semantics, (0, 1))
    plain = reduce(capture(model, inputs, dynamic_batch=dynamic), budgets)
    folded = reduce(capture(model, inputs, dynamic_batch=dynamic, padding=False), budgets)
    called = {str(n.target) for n in folded.module.graph.nodes if n.op == "call_module"}
    assert not any(name.startswith(("reducer.weights", "reducer.ones")) for name in called)
    softmaxes = [n for n in folded.module.graph.nodes if "published_softmax" in str(n.target)]
    assert len(softmaxes) == (config.layers if semantics == "reference" else 0)
    assert all(len(node.args) == 1 for node in softmaxes)
    assert folded.plan.multiply_adds_after <= plain.plan.multiply_adds_after
    other = ones(config, seed=4)
    with torch.no_grad():
        torch.testing.assert_close(folded.module(**other), plain.module(**other), atol=1e-5, rtol=1e-5)


class Pooled(Fusion):
    """Reads the last word, which its mask tells, as well."""

    def forward(self, input_ids: Tensor, pixel_values: Tensor, attention_mask: Tensor) -> Any:
        last = attention_mask.sum(1) - 1
        return super().forward(input_ids, pixel_values, attention_mask) + 0.1 * last.unsqueeze(-1)


@pytest.mark.parametrize("dynamic", [False, True])
def test_what_reads_a_mask_otherwise_reads_ones(dynamic: bool) -> None:
    config = Config(dynamic=dynamic)
    torch.manual_seed(0)
    model, inputs = Pooled(config).eval(), ones(config)
    folded = capture(model, inputs, dynamic_batch=dynamic, padding=False)
    assert not read(folded.module, "attention_mask")
    other = ones(config, seed=4, batch=3 if dynamic else None)
    with torch.no_grad():
        torch.testing.assert_close(folded.module(**other), model(**other), atol=1e-6, rtol=1e-6)


class Counts(nn.Module):
    """Its mask is no mask of an attention."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        return self.up(x) * (attention_mask.sum() + 1)


def test_what_does_not_fire_is_an_error() -> None:
    x, mask = torch.randn(2, 3, 4), torch.ones(2, 3, dtype=torch.int64)
    with pytest.raises(UsageError, match=r"found nothing to leave out.*attention_mask of ones"):
        capture(Counts(), {"x": x, "attention_mask": mask}, padding=False)
    with pytest.raises(UsageError, match=r"no input is a mask: input_ids, pixel_values"):
        config = Config(mask="none")
        capture(make(config), inputs_for(config), padding=False)
    with pytest.raises(UsageError, match=r"attention_mask of the sample inputs has padding"):
        capture(make(Config()), inputs_for(Config()), padding=False)


class Written(nn.Module):
    """Its mask is made in place: ones when it begins, and then not."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(4, 4)

    def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
        weights = attention_mask.float().unsqueeze(-1).repeat(1, 1, 4)
        first = weights[:, 0]
        first.mul_(3.0)
        return self.up(x) * weights + (1 - attention_mask.unsqueeze(-1))


def test_what_is_changed_in_place_stays() -> None:
    inputs = {"x": torch.randn(2, 3, 4), "attention_mask": torch.ones(2, 3, dtype=torch.int64)}
    model = Written()
    folded = capture(model, inputs, padding=False)
    targets = [node.target for node in folded.module.graph.nodes]
    assert aten.mul.Tensor in targets and aten.add.Tensor not in targets
    torch.testing.assert_close(folded.module(**inputs), model(**inputs))


def test_a_mask_that_falls_the_other_way_stays() -> None:
    """`where` takes its second value everywhere, and a mask that is ones adds them."""

    class Odd(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.Linear(4, 4)

        def forward(self, x: Tensor, attention_mask: Tensor) -> Tensor:
            real = attention_mask.unsqueeze(-1)
            y = torch.where(real == 0, x, self.up(x))
            return y + real

    x, mask = torch.randn(2, 3, 4), torch.ones(2, 3, dtype=torch.int64)
    model = Odd()
    folded = capture(model, {"x": x, "attention_mask": mask}, padding=False)
    targets = [n.target for n in folded.module.graph.nodes]
    assert aten.where.self not in targets and aten.add.Tensor in targets
    torch.testing.assert_close(folded.module(x=x, attention_mask=mask), model(x, mask))


def test_the_command_line(tmp_path: Path) -> None:
    tiny_vilt(num_hidden_layers=2).save_pretrained(tmp_path / "model")
    artifact = tmp_path / "model.onnx"
    budgets = commands.schedule()
    given = ("--schedule", budgets, "--no-padding", "--batch", 2)
    commands.done("compile", tmp_path / "model", "-o", artifact, *given)
    names = {value.name for value in onnx.load(str(artifact), load_external_data=False).graph.input}
    manifest = read_manifest(artifact)
    assert "attention_mask" not in names and "attention_mask" in manifest["unpadded_inputs"]
    assert manifest["parity"]["passed"] and not manifest["fixed_inputs"]
    commands.done("parity", artifact, "--model", tmp_path / "model")
    feed = {name: torch.from_numpy(array) for name, array in commands.feed(2).items()}
    feed |= {name: torch.ones_like(t) for name, t in feed.items() if name.endswith("mask")}
    engine = pumer.Engine(artifact)
    assert set(engine(**feed)) == {"logits"}
    feed["attention_mask"][1, -1] = 0
    with pytest.raises(UsageError, match=r"--no-padding, and attention_mask has padding"):
        engine(**feed)


def test_nothing_reduced_and_no_padding(tmp_path: Path) -> None:
    """`--schedule none` through transformers' chain, too, and `plan`."""
    tiny_vilt(num_hidden_layers=2).save_pretrained(tmp_path / "model")
    given = ("--schedule", "none", "--no-padding", "-v", "--dump-graph", tmp_path / "graphs")
    assert "fold_masks" in commands.done("compile", tmp_path / "model", "-o", tmp_path / "m.onnx", *given).err
    assert [path.name for path in (tmp_path / "graphs").iterdir()] == ["1_fold_masks.py"]
    graph = onnx.load(str(tmp_path / "m.onnx"), load_external_data=False).graph
    assert "attention_mask" not in {value.name for value in graph.input}
    softmaxes = {node.input[0] for node in graph.node if node.op_type == "Softmax"}
    assert not [n for n in graph.node if n.op_type == "Add" and n.output[0] in softmaxes]
    commands.done("plan", tmp_path / "model", "--schedule", commands.schedule(), "--no-padding")


def test_it_is_recorded_and_its_graph_written(tmp_path: Path) -> None:
    config = Config(mask="additive", layers=2)
    plain, folded = (capture(make(config), ones(config), padding=padding) for padding in (True, False))
    assert plain.history.records == []
    (record,) = folded.history.records
    # In each layer a mask is added to the scores.
    assert record.name == "fold_masks" and record.matches >= config.layers and record.nodes_after < record.nodes_before
    reduced = reduce(folded, schedule("paper", (0,)), dump_graph=tmp_path / "graphs")
    names = [record.name for record in reduced.history.records]
    assert names[:2] == ["fold_masks", "annotate"] and len(folded.history.records) == 1
    files = {path.name: path.read_text(encoding="utf-8") for path in (tmp_path / "graphs").iterdir()}
    assert sorted(files) == sorted(f"{number}_{name}.py" for number, name in enumerate(names, start=1))
    assert "attention_mask" in files["1_fold_masks.py"] and "masked_fill" not in files["1_fold_masks.py"]
    assert files["1_fold_masks.py"].strip() == folded.module.print_readable(print_output=False).strip()
