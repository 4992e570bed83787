"""Dead tokens of whole models: what goes, and that artifacts, commands and torch.compile leave it out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, fx, nn
from transformers import BertConfig, BertForSequenceClassification, CLIPVisionConfig, CLIPVisionModel

import pumer_compile as pumer
from pumer_compile import Program, Schedule, capture, reduce
from pumer_compile.errors import PlanError
from tests.support import commands
from tests.support.helpers import count_op
from tests.support.meter import meter_inputs, tiny_meter
from tests.support.models import Config, highest, inputs_for, make
from tests.support.narrowing import compared, last_layer, rows
from tests.support.tiny import image_inputs, text_inputs, tiny_vilt

aten = torch.ops.aten


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "symbolic"])
def test_vilt(dynamic: bool) -> None:
    inputs = {**text_inputs(2), **image_inputs([(96, 96), (64, 96)], (96, 96))}
    plan = compared(capture(tiny_vilt(), inputs, dynamic_batch=dynamic), batch=3 if dynamic else None).plan
    n, width, inner = 7 + 37, 24, 32
    saved = (n - 1) * (2 * width**2 + 2 * n * width + 2 * width * inner)
    assert plan.multiply_adds_before - plan.multiply_adds_after == saved


def test_meter() -> None:
    """The last layers of both sides, of which the poolers read one token each."""
    captured = capture(tiny_meter(), meter_inputs(2))
    plan = compared(captured).plan
    assert plan.ratio > 1.1


def test_bert() -> None:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
    model = BertForSequenceClassification(BertConfig(vocab_size=60, max_position_embeddings=16, **sizes)).eval()
    captured = capture(model, text_inputs(2, 9), dynamic_batch=True)
    plan = compared(captured, batch=3).plan
    n, width = 9, 32
    assert plan.multiply_adds_before - plan.multiply_adds_after == last_layer(n, n, width) - last_layer(n, 1, width)


def clip(**options: Any) -> Program:
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 3, "num_attention_heads": 4, "intermediate_size": 64}
    model = CLIPVisionModel(CLIPVisionConfig(image_size=32, patch_size=8, projection_dim=16, **sizes)).eval()
    return capture(model, {"pixel_values": torch.randn(2, 3, 32, 32)}, **options)


def test_a_tower_whose_class_token_is_read() -> None:
    plan = compared(clip(outputs=["pooler_output"])).plan
    n, width = 17, 32
    assert plan.multiply_adds_before - plan.multiply_adds_after == last_layer(n, n, width) - last_layer(n, 1, width)


def test_a_tower_whose_tokens_are_all_read() -> None:
    with pytest.raises(PlanError, match="Keep fewer outputs"):
        reduce(clip(), "lossless")


def test_dead_layers() -> None:
    """A prompt's features come from the last layer but one, as in LLaVA: the last one's attention was left by fx."""

    class LastButOne(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stack = make(Config(layers=2, mask="none", form="sdpa"))

        def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
            x = self.stack.embed(input_ids, pixel_values)
            x = self.stack.layers[0](x, None)
            self.stack.layers[1](x, None)
            return x

    captured = capture(LastButOne(), inputs_for(Config(mask="none")))
    result = compared(captured)
    module = result.module
    assert result.plan.ratio == 1  # other runtimes leave it out by themselves: no gain to boast of
    assert count_op(module, aten.scaled_dot_product_attention.default) == 1
    assert count_op(captured.module, aten.scaled_dot_product_attention.default) == 2
    assert count_op(module, aten.linear.default) == 6


# --- artifacts and commands -----------------------------------------------------------------------------------------


def test_onnx(tmp_path: Path) -> None:
    inputs = {**text_inputs(2), **image_inputs([(96, 96), (64, 96)], (96, 96))}
    captured = capture(tiny_vilt(), inputs, dynamic_batch=True)
    done = pumer.export(reduce(captured, "lossless"), tmp_path / "lossless.onnx")
    pumer.export(captured, tmp_path / "none.onnx", verify=False)
    assert done.report is not None
    assert done.report.passed
    assert done.manifest["decisions"] == []
    assert done.manifest["plan"]["multiply_adds"]["ratio"] > 1.1
    feed = {name: tensor[[0, 1, 0]].numpy() for name, tensor in inputs.items()}
    found, expected = (commands.onnx_outputs(tmp_path / f"{n}.onnx", feed) for n in ("lossless", "none"))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert pumer.parity(tmp_path / "lossless.onnx", tiny_vilt()).passed


def test_plan_command() -> None:
    out = commands.done("plan", commands.folder(), "-s", "lossless").out
    assert "1.30x fewer" in out
    assert "site" not in out


def test_plan_of_a_model_that_needs_everything(tmp_path: Path) -> None:
    model = CLIPVisionModel(
        CLIPVisionConfig(
            image_size=32,
            patch_size=8,
            hidden_size=32,
            num_hidden_layers=1,
            num_attention_heads=4,
            intermediate_size=64,
        )
    )
    model.save_pretrained(tmp_path / "clip")
    message = commands.refused(2, "plan", tmp_path / "clip", "-s", "lossless")
    assert "found nothing to leave out" in message


def test_under_torch_compile() -> None:
    config = Config(layers=2)
    model, inputs = make(config), inputs_for(config)
    expected = model(**inputs)
    expected.square().sum().backward()
    gradients = {name: p.grad for name, p in model.named_parameters()}
    model.zero_grad(set_to_none=True)
    seen: list[fx.GraphModule] = []

    def inner(module: fx.GraphModule, arguments: Any, **options: Any) -> Any:
        seen.append(module)
        return module

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("pumer_compile.torch_compile.backend.lookup_backend", lambda name: inner)
        torch._dynamo.reset()
        compiled = torch.compile(model, backend="pumer", options={"schedule": "lossless", "inner": "eager"})
        found = compiled(**inputs)
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-6)
    found.square().sum().backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.grad, gradients[name], atol=1e-6, rtol=1e-5, msg=name)
    (module,) = seen
    assert rows(module, aten.gelu.default) == [32, 1]


def test_under_torch_compile_nothing_is_an_error() -> None:
    config = Config(layers=1, head=highest)
    model, inputs = make(config), inputs_for(config)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="pumer", options={"schedule": "lossless", "inner": "eager"})
    with pytest.raises(Exception, match="found nothing to leave out"):
        compiled(**inputs)


def test_schedule() -> None:
    lossless = Schedule.load("lossless")
    assert Schedule.from_yaml("method: lossless\n") == lossless
    assert Schedule.from_manifest(lossless.model_dump(mode="json", exclude_none=True)) == lossless
    assert lossless.sha256 != Schedule.load("vilt-vqa").sha256


@pytest.mark.parametrize(
    ("keys", "named"),
    [
        ("layers: [0]", "layers"),
        ("prune: 0.1", "prune"),
        ("budget: 3", "budget"),
        ("semantics: safe", "semantics"),
        ("outputs: reduced", "outputs"),
        ("sites: [{at: vision.0, merge: {image: 1}}]", "sites"),
    ],
)
def test_schedule_has_no_other_key(keys: str, named: str) -> None:
    with pytest.raises(pumer.errors.ScheduleError, match=f"leave out `{named}`"):
        Schedule.from_yaml(f"method: lossless\n{keys}\n")
