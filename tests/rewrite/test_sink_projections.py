"""Output projections behind reducers: the same numbers as before them, from fewer tokens.

Every graph is compared with the one in which nothing is postponed.
"""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import Phase, given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import pumer_compile as pumer
from pumer_compile import Program, Schedule, capture, reduce
from pumer_compile.analysis.nodes import values
from pumer_compile.errors import LocateError
from pumer_compile.passes.manager import State
from pumer_compile.reduce import with_decisions
from pumer_compile.reducers import ApplyMap
from pumer_compile.rewrite import sink_projections
from tests.support.compiling import compiled
from tests.support.fx_text import fx_text
from tests.support.helpers import count_op
from tests.support.meter import meter_inputs, tiny_meter
from tests.support.models import Config, Fusion, Layer, describe, highest, inputs_for, make, passed, schedule
from tests.support.models import program as fusion
from tests.support.pairs import CoAttention, PairConfig
from tests.support.tiny import image_inputs, text_inputs, tiny_vilt
from tests.support.towers import Images
from tests.support.towers import given as of_tower
from tests.support.two_images import OwnPlaces, TextOnce, two_images

aten = torch.ops.aten
SEMANTICS = ("reference", "paper", "safe")
BOTH = Config(layers=2, head=highest)


@pytest.fixture
def cheap(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is too small to pay is postponed too."""
    monkeypatch.setattr(sink_projections, "pays", lambda saved, *_: saved > 0)


BEFORE = """\
%reshape: reshape(%transpose_5, [2, 25, 32]) -> [2, 25, 32]
%linear_3: linear(%reshape, layers.0.attention.out.weight, layers.0.attention.out.bias) -> [2, 25, 32]
%add_1: add(%add, %linear_3) -> [2, 25, 32]
%StreamReducer: StreamReducer(%add_1, %transpose_6, None) -> ?
%getitem: getitem(%StreamReducer, 0) -> [2, 21, 32]"""
AFTER = """\
%reshape: reshape(%transpose_5, [2, 25, 32]) -> [2, 25, 32]
%StreamReducer: StreamReducer(None, %transpose_6, None) -> ?
%getitem: getitem(%StreamReducer, 2) -> [2, 21, 25]
%ApplyMap: ApplyMap(%add, %getitem) -> [2, 21, 32]
%ApplyMap_1: ApplyMap(%reshape, %getitem) -> [2, 21, 32]
%linear_3: linear(%ApplyMap_1, layers.0.attention.out.weight, layers.0.attention.out.bias) -> [2, 21, 32]
%add_1: add(%ApplyMap, %linear_3) -> [2, 21, 32]"""


def test_before_and_after(cheap: None) -> None:
    """From the context of the attention to the norm behind the reducer."""
    config = Config(layers=1, head=highest)
    captured = capture(make(config, kind=Images), of_tower(config, Images))
    wanted = Schedule(method="tome", sites=[{"at": "vision.0", "merge": {"image": 4}}])

    def between(state: State) -> list[str]:
        text = fx_text(state.reduced).splitlines()
        first, last = (
            [line.startswith(f"%{name}:") for line in text].index(True) for name in ("reshape", "layer_norm_1")
        )
        return [line for line in text[first:last] if "slice" not in line]

    assert between(unpostponed(captured, wanted)) == BEFORE.splitlines()
    assert between(passed(captured, wanted, verified=True)) == AFTER.splitlines()


def unpostponed(captured: Program, wanted: Schedule) -> State:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sink_projections, "projections", lambda *_: {})
        return passed(captured, wanted, verified=True)


def maps_of(module: fx.GraphModule) -> dict[str, int]:
    """How often each map is applied to a value."""
    found: dict[str, int] = {}
    for node in module.graph.nodes:
        if node.op == "call_module" and isinstance(module.get_submodule(node.target), ApplyMap):
            found[node.target] = found.get(node.target, 0) + 1
    return found


def compared(
    captured: Program, wanted: Schedule, inputs: dict[str, Tensor] | None = None, atol: float = 1e-5
) -> dict[str, int]:
    """The maps that are applied, after outputs, decisions, and gradients were compared with those of the other form."""
    states = [passed(captured, wanted, verified=True), unpostponed(captured, wanted)]
    results: list[Any] = []
    for state in states:
        module, _ = with_decisions(state.reduced)
        found = module(**(inputs or captured.inputs))
        loss = sum(o.square().sum() for o in found.values() if o.is_floating_point())
        parameters = list(captured.module.parameters())
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        results.append(({n: o.detach() for n, o in found.items()}, grads))
    torch.testing.assert_close(results[0][0], results[1][0], atol=atol, rtol=0)
    scale = max(float(g.abs().max()) for g in results[1][1] if g is not None)
    for new, old in zip(results[0][1], results[1][1], strict=True):
        assert (new is None) == (old is None)
        if new is not None:
            torch.testing.assert_close(new, old, atol=10 * atol * max(1, scale), rtol=0)
    assert not maps_of(states[1].reduced)
    for target in (aten.linear.default, aten.layer_norm.default, aten.softmax.int):
        assert count_op(states[0].reduced, target) == count_op(states[1].reduced, target)
    return maps_of(states[0].reduced)


def out_rows(captured: Program, wanted: Schedule, name: str = "layers.0.attention.out.weight") -> list[int]:
    """Tokens that an output projection works on."""
    module = passed(captured, wanted, verified=True).reduced
    linears = (n for n in module.graph.nodes if n.target is aten.linear.default)
    return [int(values(n)[0].shape[1]) for n in linears if n.args[1].target == name]


def test_a_projection_of_tokens_from_before_a_reducer_stays() -> None:
    """A tower whose second attention asks for what came before its first: its output is aligned, and the map of the
    second reducer is of the tokens that are left."""

    class Beside(Images):
        def forward(self, pixel_values: Tensor) -> Tensor:
            before = self.start(pixel_values)
            x = before + self.layers[0].attention(before, None)
            x = x + self.layers[1].attention(before, None, x)
            return self.conclude(x)

    config = Config(mask="none", layers=2)
    captured = capture(make(config, kind=Beside), {"pixel_values": inputs_for(config)["pixel_values"]})
    wanted = Schedule(method="tome", sites=[{"at": f"vision.{i}", "merge": {"image": 4}} for i in (0, 1)])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sink_projections, "pays", lambda saved, *_: saved > 0)
        maps = compared(captured, wanted)
    assert set(maps) == {"reducer.vision_0.image_map"}


def test_keys_from_before_a_reducer_say_nothing_of_the_tokens_behind_it() -> None:
    class Behind(Images):
        def forward(self, pixel_values: Tensor) -> Tensor:
            before = self.start(pixel_values)
            x = before + self.layers[0].attention(before, None)
            return self.conclude(x + self.layers[1].attention(x, None, before))

    config = Config(mask="none", layers=2)
    captured = capture(make(config, kind=Behind), {"pixel_values": inputs_for(config)["pixel_values"]})
    wanted = Schedule(method="tome", sites=[{"at": f"vision.{i}", "merge": {"image": 4}} for i in (0, 1)])
    with pytest.raises(LocateError, match="no self-attention over the image before it whose keys tell"):
        passed(captured, wanted)


# --- what is postponed ----------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("form", ["unfused", "sdpa"])
@pytest.mark.parametrize("semantics", SEMANTICS)
def test_the_projection_works_on_the_tokens_that_are_left(semantics: str, form: str) -> None:
    """The same tokens that the reducers leave; their own decisions are what they were."""
    captured, wanted = fusion(dataclasses.replace(BOTH, form=form)), schedule(semantics, (0,))
    maps = compared(captured, wanted, inputs_for(BOTH, seed=5))
    assert maps == {f"reducer.cross_modal_0.{stream}_map": 2 for stream in ("text", "image")}
    left = 19 if semantics == "paper" else 17
    assert out_rows(captured, wanted) == [left]


CONFIGS = [
    Config(layers=2, mask="none", form="sdpa", dynamic=True),
    Config(layers=2, mask="additive", dynamic=True, patch_mask=True),
    Config(layers=2, mask="bool", patch_mask=True),
    Config(layers=2, mask="expanded"),
    Config(layers=2, text=8),  # text = head size = heads x batch
    Config(layers=2, text=8, grid=(2, 4), cls=False, form="sdpa", mask="bool"),  # and image = text
    Config(layers=2, text=25, heads=5, width=25, batch=5),  # text = image = width
    Config(layers=2, batch=1),
]


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("number", range(len(CONFIGS)), ids=[describe(c) for c in CONFIGS])
def test_every_kind_of_encoder(number: int) -> None:
    config, semantics = dataclasses.replace(CONFIGS[number], head=highest), SEMANTICS[number % 3]
    inputs = inputs_for(config, seed=5, batch=3 if config.dynamic else None)
    maps = compared(fusion(config), schedule(semantics, (0, 1)), inputs)
    assert {name.split(".")[1] for name in maps} == {"cross_modal_0", "cross_modal_1"}


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("semantics", SEMANTICS)
def test_everything_is_four(semantics: str) -> None:
    config = Config(layers=1, text=4, grid=(2, 2), cls=False, heads=4, width=16, batch=4, head=highest)
    assert len(compared(fusion(config), schedule(semantics, (0,)))) == 2


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("bias", [True, False])
def test_in_float64(bias: bool) -> None:
    """Rows of maps are float32, and of three tokens sum to 1 but for its rounding, which a bias then shows."""

    class Double(Fusion):
        def __init__(self, config: Config) -> None:
            super().__init__(config)
            if not bias:
                for layer in self.layers:
                    layer.attention.out = nn.Linear(config.width, config.width, bias=False)

    model = make(BOTH, kind=Double).double()
    inputs = {n: t.double() if t.is_floating_point() else t for n, t in inputs_for(BOTH).items()}
    assert compared(capture(model, inputs), schedule("safe", (0,)), atol=1e-6 if bias else 1e-10)


@pytest.mark.usefixtures("cheap")
def test_a_stream_that_is_not_reduced_is_left_as_it_is() -> None:
    assert compared(fusion(BOTH), schedule("safe", (0,), prune=5)) == {"reducer.cross_modal_0.image_map": 2}
    assert compared(fusion(BOTH), schedule("safe", (0,), merge={"text": 2})) == {"reducer.cross_modal_0.text_map": 2}
    assert out_rows(fusion(BOTH), schedule("safe", (0,), merge={"text": 2})) == [30]


@pytest.mark.parametrize("semantics", SEMANTICS)
@pytest.mark.parametrize("sees", ["old", "updated"])
def test_pairs_with_their_norm_before(sees: str, semantics: str) -> None:
    """The text is the carrier alone, so nothing is copied; the image is reduced elsewhere."""
    config = PairConfig(sees=sees)
    captured = capture(make(config, kind=CoAttention), inputs_for(config))
    sites = [{"at": f"cross_modal.{2 * i}", "prune": 0.2, "merge": {"image": 0.3, "text": 0.25}} for i in range(2)]
    maps = compared(captured, Schedule(semantics=semantics, sites=sites), inputs_for(config, seed=5))
    assert maps == {f"reducer.cross_modal_{2 * i}.text_map": 2 for i in range(2)}


def tome(count: int, *layers: int) -> Schedule:
    return Schedule(method="tome", sites=[{"at": f"vision.{i}", "merge": {"image": count}} for i in layers])


@pytest.mark.usefixtures("cheap")
def test_a_tower_of_one_stream() -> None:
    config = Config(mask="bool", patch_mask=True)
    captured = capture(make(config, kind=Images), of_tower(config, Images))
    maps = compared(captured, tome(8, 0, 1), of_tower(config, Images, seed=5))
    assert maps == {f"reducer.vision_{i}.image_map": 2 for i in range(2)}
    assert out_rows(captured, tome(8, 0)) == [17]


class TokensFirst(Images):
    """A tower whose values are `[tokens, batch, width]`."""

    def run(self, x: Tensor, opened: Tensor | None) -> Tensor:
        x = x.transpose(0, 1)
        for layer in self.layers:
            x = x + layer.attention.out(self.context(layer, layer.norm1(x)))
            x = x + layer.mlp(layer.norm2(x))
        return self.conclude(self.last(x).transpose(0, 1))

    def context(self, layer: Layer, x: Tensor) -> Tensor:
        n, batch, width = x.shape
        part = layer.attention
        q, k, v = (m(x).view(n, batch, part.heads, -1).permute(1, 2, 0, 3) for m in (part.q, part.k, part.v))
        return F.scaled_dot_product_attention(q, k, v).permute(2, 0, 1, 3).reshape(n, batch, width)


@pytest.mark.usefixtures("cheap")
def test_tokens_in_front() -> None:
    config = Config(mask="none", layers=2)
    captured = capture(make(config, kind=TokensFirst), of_tower(config, Images))
    assert compared(captured, tome(8, 0, 1)) == {f"reducer.vision_{i}.image_map": 2 for i in range(2)}
    module = passed(captured, tome(8, 0), verified=True).reduced
    linears = [n for n in module.graph.nodes if n.target is aten.linear.default]
    (out,) = (n for n in linears if n.args[1].target == "layers.0.attention.out.weight")
    assert tuple(values(out)[0].shape) == (17, config.batch, config.width)


class Branch(Fusion):
    """Something between the projection and the residual."""

    kind = ""

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        x, beside = self.embed(input_ids, pixel_values), 0
        for layer in self.layers:
            y = layer.attention(layer.norm1(x), None)
            match self.kind:
                case "dropout at rest":
                    y = F.dropout(y, 0.3, training=False)
                case "dropout of nothing":
                    y = F.dropout(y, 0.0, training=True)
                case "the same dtype":
                    y = y.to(torch.float32).contiguous()
                case "read twice":
                    beside = y.tanh()
                case "scaled":
                    y = y * 2
                case "another dtype":
                    y = y.double()
            x = torch.add(x, y, alpha=2) if self.kind == "alpha" else x + y if self.kind != "branch first" else y + x
            x = x.float() + beside
            x = x + layer.mlp(layer.norm2(x))
        return self.finish(x, input_ids.shape[1])


def branch(kind: str) -> dict[str, int]:
    config = dataclasses.replace(BOTH, mask="none")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Branch, "kind", kind)
        captured = capture(make(config, kind=Branch), inputs_for(config))
    return compared(captured, schedule("safe", (0,)))


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("kind", ["", "dropout at rest", "dropout of nothing", "the same dtype", "branch first"])
def test_what_changes_nothing_may_stand_between(kind: str) -> None:
    assert len(branch(kind)) == 2


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("kind", ["read twice", "scaled", "another dtype", "alpha"])
def test_whatever_else_stands_between_keeps_the_projection(kind: str) -> None:
    assert branch(kind) == {}


@pytest.mark.usefixtures("cheap")
def test_a_projection_on_both_sides() -> None:
    class Twice(Fusion):
        def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
            x, (layer, *_) = self.embed(input_ids, pixel_values), self.layers
            x = layer.norm2(x) @ layer.up.weight.T[:, : self.config.width] * 0 + x
            x = layer.attention(layer.norm1(x), None) + self.layers[1].attention.q(x)
            return self.finish(x + layer.mlp(x), input_ids.shape[1])

    config = dataclasses.replace(BOTH, mask="none")
    captured = capture(make(config, kind=Twice), inputs_for(config))
    assert compared(captured, schedule("safe", (0,))) == {
        f"reducer.cross_modal_0.{stream}_map": 2 for stream in ("text", "image")
    }
    # It reads tokens that are mapped already: the other side's residual is not needed.
    assert out_rows(captured, schedule("safe", (0,)), "layers.1.attention.q.weight") == [17]


# --- what is not ----------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("cheap")
def test_norms_behind_the_sum() -> None:
    assert compared(fusion(dataclasses.replace(BOTH, norm="post")), schedule("safe", (0, 1))) == {}
    meter = capture(tiny_meter(), meter_inputs(2))
    sites = [{"at": "cross_modal.0", "prune": 0.2, "merge": {"image": 0.3, "text": 0.25}}]
    assert compared(meter, Schedule(semantics="reference", sites=sites)) == {}


def test_what_does_not_pay() -> None:
    """Both streams are copied for the product with the map; a map of many tokens costs more than a few projected."""
    assert compared(fusion(BOTH), schedule("safe", (0,))) == {}
    wide = dataclasses.replace(BOTH, width=256)
    assert len(compared(fusion(wide), schedule("safe", (0,)))) == 2
    assert compared(fusion(wide), schedule("safe", (0,), prune=1)) == {}
    config = Config(mask="none", layers=2)
    captured = capture(make(config, kind=Images), of_tower(config, Images))
    assert compared(captured, tome(9, 0)) == {}  # 9 x 32 numbers of the projection for 16 x 25 of the map
    assert compared(captured, tome(11, 0)) == {"reducer.vision_0.image_map": 2}  # 11 x 32 for 14 x 25


@pytest.mark.usefixtures("cheap")
def test_what_is_changed_in_between() -> None:
    """The projection would read it changed."""

    class Changed(Fusion):
        kind = ""

        def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
            x, layer = self.embed(input_ids, pixel_values), self.layers[0]
            residual = self.layers[1].attention.q(x)
            if self.kind == "changed":
                x.add_(1)
            x = residual + layer.attention(layer.norm1(x), None).relu()
            return self.finish(x + layer.mlp(x), input_ids.shape[1])

    config = dataclasses.replace(BOTH, mask="none")
    wanted = schedule("safe", (0,))
    assert len(compared(capture(make(config, kind=Changed), inputs_for(config)), wanted)) == 2
    Changed.kind = "changed"
    captured = capture(make(config, kind=Changed), inputs_for(config))
    assert count_op(captured.module, aten.add_.Tensor) == 1
    states = passed(captured, wanted, verified=True), unpostponed(captured, wanted)
    assert maps_of(states[0].reduced) == {}
    with torch.no_grad():
        found, expected = (s.reduced(**captured.inputs) for s in states)
    torch.testing.assert_close(found, expected)


def test_a_sum_that_is_broadcast() -> None:
    graph = fx.Graph()
    x, row, number = (graph.placeholder(name) for name in ("x", "row", "number"))
    x.meta["val"], row.meta["val"] = torch.empty(2, 3, 4), torch.empty(1, 3, 4)
    for args, options in (((x, row), {}), ((x, 2), {}), ((x, x), {}), ((x, number), {"alpha": 2})):
        node = graph.call_function(aten.add.Tensor, args, options)
        node.meta["val"] = torch.empty(2, 3, 4)
        assert sink_projections._addends(node) == []
    other = graph.call_function(aten.tanh.default, (x,))
    other.meta["val"] = torch.empty(2, 3, 4)
    node = graph.call_function(aten.add.Tensor, (x, other))
    node.meta["val"] = torch.empty(2, 3, 4)
    assert sink_projections._addends(node) == [x, other]


# --- beside the rest ------------------------------------------------------------------------------------------------


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("kind", [OwnPlaces, TextOnce])
def test_a_pass_for_each_image(kind: type[Fusion]) -> None:
    """The same layer twice: each pass has maps of its own."""
    config = Config(layers=2, head=highest)
    captured = capture(make(config, kind=kind), two_images(config))
    maps = compared(captured, schedule("safe", (1,)), two_images(config, seed=5))
    sites = ("cross_modal_1", "cross_modal_1.call_1")
    expected = [*(f"reducer.{sites[0]}.{s}_map" for s in ("text", "image"))]
    expected += [f"reducer.{sites[1]}.{s}_map" for s in ("text", "image_1")]
    assert maps == dict.fromkeys(expected, 2)


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("outputs", ["reduced", "restored"])
def test_outputs_with_one_entry_for_each_token(outputs: str) -> None:
    class Every(Fusion):
        def finish(self, x: Tensor, text: int) -> Tensor:
            return self.last(x)

    captured = capture(make(BOTH, kind=Every), inputs_for(BOTH))
    wanted = Schedule(semantics="safe", layers=(0, 1), prune=0.2, merge={"image": 0.3, "text": 0.25}, outputs=outputs)
    assert len(compared(captured, wanted)) == 4


@pytest.mark.usefixtures("cheap")
def test_a_last_layer_of_one_query() -> None:
    """Its site's image is read by nothing: neither are its maps."""
    captured = fusion(Config(layers=2, mask="none"))
    assert set(compared(captured, schedule("safe", (0, 1), prune=0.3))) == {"reducer.cross_modal_0.image_map"}
    maps = compared(captured, schedule("safe", (0, 1)))
    assert {name for name in maps if "cross_modal_1" in name} == {"reducer.cross_modal_1.text_map"}


@pytest.mark.usefixtures("cheap")
def test_new_operators_know_their_values_and_where_they_come_from() -> None:
    module = passed(fusion(BOTH), schedule("safe", (0,)), verified=True).reduced
    calls = [n for n in module.graph.nodes if n.op == "call_module" and n.target.endswith("_map")]
    assert {tuple(n.meta["val"].shape) for n in calls} == {(2, 5, 32), (2, 12, 32)}
    assert all("stack_trace" in n.meta for n in calls)
    linear = next(
        n for n in module.graph.nodes if n.target is aten.linear.default and "0.attention.out" in str(n.args[1].target)
    )
    (total,) = linear.users
    for node in (linear, total):
        assert values(node)[0].shape == (2, 17, 32) and node.meta["nn_module_stack"] and node.meta["stack_trace"]


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(dtype: torch.dtype) -> None:
    """In the model's dtype, as reducers work on their own tokens: no product of float32."""
    model = make(BOTH).to(dtype)
    inputs = {n: t.to(dtype) if t.is_floating_point() else t for n, t in inputs_for(BOTH).items()}
    captured, wanted = capture(model, inputs), schedule("safe", (0,))
    states = passed(captured, wanted, verified=True), unpostponed(captured, wanted)
    calls = [n for n in states[0].reduced.graph.nodes if n.op == "call_module" and n.target.endswith("_map")]
    assert {n.meta["val"].dtype for n in calls} == {dtype}
    with torch.no_grad():
        found, expected = (s.reduced(**inputs) for s in states)
    torch.testing.assert_close(found, expected, atol=30 * torch.finfo(dtype).eps, rtol=0)


def test_a_map_under_autocast() -> None:
    """Residual values stay what they are: a token that is kept is kept to the last bit."""
    tokens, map_ = torch.randn(2, 5, 8), torch.eye(5)[[3, 1]].expand(2, -1, -1)
    with torch.autocast("cpu", torch.bfloat16):
        found = ApplyMap()(tokens, map_)
    assert torch.equal(found, tokens[:, [3, 1]])


@pytest.mark.usefixtures("cheap")
def test_autocast_in_a_model() -> None:
    captured, wanted = fusion(BOTH), schedule("safe", (0,))
    states = passed(captured, wanted, verified=True), unpostponed(captured, wanted)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        found, expected = (s.reduced(**captured.inputs) for s in states)
    torch.testing.assert_close(found.float(), expected.float(), atol=0.05, rtol=0)


@pytest.mark.usefixtures("cheap")
@pytest.mark.parametrize("dynamic", [False, True])
def test_under_torch_compile(dynamic: bool) -> None:
    model, inputs, wanted = make(BOTH), inputs_for(BOTH), schedule("safe", (0,))
    expected = passed(fusion(BOTH), wanted, verified=True).reduced
    assert maps_of(expected)
    torch._dynamo.reset()
    with torch.no_grad():
        found = compiled(model, wanted, dynamic=dynamic)(**inputs)
        torch.testing.assert_close(found, expected(**inputs), atol=1e-5, rtol=0)
    torch._dynamo.reset()


@pytest.mark.usefixtures("cheap")
def test_onnx(tmp_path: Path) -> None:
    """Decisions first, then outputs with these forced on eager PyTorch."""
    inputs = {**text_inputs(2), **image_inputs([(96, 96), (64, 96)], (96, 96))}
    captured = capture(tiny_vilt(), inputs, dynamic_batch=True)
    wanted = Schedule(semantics="reference", layers=(0, 1), prune=0.2, merge={"image": 0.3, "text": 0.2})
    assert compared(captured, wanted)
    done = pumer.export(reduce(captured, wanted), tmp_path / "vilt.onnx", with_decisions=True)
    assert done.report is not None and done.report.passed and done.report.decisions_compared
    assert pumer.parity(tmp_path / "vilt.onnx", tiny_vilt()).passed


def test_onnx_of_pairs(tmp_path: Path) -> None:
    config = PairConfig()
    captured = capture(make(config, kind=CoAttention), inputs_for(config))
    sites = [{"at": "cross_modal.0", "prune": 0.2, "merge": {"image": 0.3, "text": 0.25}}]
    result = reduce(captured, Schedule(semantics="reference", sites=sites))
    assert maps_of(result.module)
    done = pumer.export(result, tmp_path / "pairs.onnx")
    assert done.report is not None and done.report.passed


@functools.cache
def _random(config: Config) -> Program:
    return capture(make(config), inputs_for(config), dynamic_batch=config.dynamic)


@st.composite
def encoders(draw: st.DrawFn) -> tuple[Config, str, tuple[int, ...]]:
    heads = draw(st.integers(1, 4))
    mask = draw(st.sampled_from(("none", "additive", "bool", "expanded")))
    config = Config(
        form=draw(st.sampled_from(("unfused", "sdpa"))),
        mask=mask,
        patch_mask=mask != "none" and draw(st.booleans()),
        text=draw(st.integers(5, 9)),
        grid=(3, draw(st.integers(3, 5))),
        cls=draw(st.booleans()),
        heads=heads,
        width=heads * draw(st.integers(2, 8)),
        layers=2,
        batch=draw(st.integers(1, 3)),
        dynamic=draw(st.booleans()),
        head=highest,
    )
    return config, draw(st.sampled_from(SEMANTICS)), draw(st.sampled_from(((0,), (1,), (0, 1))))


@given(encoders())
@settings(max_examples=10, phases=(Phase.explicit, Phase.generate), deadline=None)
def test_random_encoders(drawn: tuple[Config, str, tuple[int, ...]]) -> None:
    config, semantics, layers = drawn
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sink_projections, "pays", lambda saved, *_: saved > 0)
        compared(_random(config), schedule(semantics, layers, prune=1, merge={"image": 1, "text": 1}))
