"""Autocast and gradient blocks inside a forward, inlined: the values and gradients of eager PyTorch."""

from __future__ import annotations

import operator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

import pumer_compile as pumer
from pumer_compile.capture.blocks import inline_blocks
from pumer_compile.capture.plain_graph import plain_graph_module
from pumer_compile.errors import CaptureError
from tests.support.models import Config, Fusion, inputs_for, make, schedule

aten = torch.ops.aten


class Blocks(nn.Module):
    """Autocast within autocast, casts of lists, composite operators, and parts that do not train."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second, self.third = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        x = self.first(x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = self.norm(self.second(x))
            mixed = torch.cat([y, x], -1)
            attended = F.scaled_dot_product_attention(x[:, None], y[:, None], x[:, None])
            product = torch.einsum("bij,bkj->bik", x, self.second(y))
            with torch.autocast("cpu", enabled=False):
                exact = self.second(x) @ x.transpose(1, 2)
            left, right = (exact + product).cumsum(-1).chunk(2, -1)
            loss = F.mse_loss(y, x.double().float())
        with torch.no_grad():
            frozen, passed = self.third(x), x
            halves = frozen.chunk(2, -1)
            with torch.enable_grad():
                trained = self.third(x) * frozen
        return {
            **{"mixed": mixed, "attended": attended, "product": product, "exact": exact, "left": left, "right": right},
            **{"loss": loss, "frozen": frozen + x, "passed": passed, "half": halves[0] * 2, "trained": trained},
        }


class Frozen(nn.Module):
    """What is frozen gives nothing to train but what it is given."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.trained = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            x = self.frozen(x).relu()
            parts = x.chunk(2, -1)
        return self.trained(x) * torch.cat(parts[::-1], -1)


class Both(nn.Module):
    """Frozen under autocast: casts stand between the parameters and what they make."""

    def __init__(self) -> None:
        super().__init__()
        self.frozen, self.trained = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
            hidden = self.frozen(x)
        return self.trained(hidden.float()) * x


class Changed(nn.Module):
    """What is changed in place without gradients keeps those it had."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.first(x)
        with torch.no_grad():
            hidden.mul_(2.0)
            hidden[..., :2] *= 3
            frozen = self.second(x)
            frozen.relu_()
        return (self.second(hidden) + frozen) * hidden


def exported(model: nn.Module, x: Tensor, batch: bool = False) -> fx.GraphModule:
    shapes = ({0: torch.export.Dim("batch")},) if batch else None
    return plain_graph_module(torch.export.export(model, (x,), dynamic_shapes=shapes, strict=False))


def assert_plain(module: fx.GraphModule) -> None:
    calls = [n.target for n in module.graph.nodes if n.op == "call_function"]
    assert aten._assert_tensor_metadata.default not in calls
    assert all(isinstance(target, torch._ops.OpOverload) or target is operator.getitem for target in calls), calls


def gradients(module: nn.Module, model: nn.Module, x: Tensor) -> dict[str, Tensor | None]:
    model.zero_grad(set_to_none=True)
    given = x.clone().requires_grad_()
    result = module(given)
    outputs = result.values() if isinstance(result, dict) else [result]
    sum(value.float().square().sum() for value in outputs if value.requires_grad).backward()  # type: ignore[union-attr]
    return {"x": given.grad, **{name: p.grad for name, p in model.named_parameters()}}


@pytest.mark.parametrize("batch", [False, True])
@pytest.mark.parametrize("model", [Blocks, Frozen, Both, Changed])
def test_values_and_gradients(model: type[nn.Module], batch: bool) -> None:
    torch.manual_seed(0)
    eager = model().eval()
    module = exported(eager, torch.randn(2, 5, 8), batch)
    assert_plain(module)
    for size in (2, 3) if batch else (2,):
        x = torch.randn(size, 5, 8)
        found, wanted = (r if isinstance(r, dict) else {"": r} for r in (module(x), eager(x)))
        for name, value in wanted.items():
            assert found[name].dtype == value.dtype and torch.equal(found[name], value), name
            assert found[name].requires_grad == value.requires_grad, name
        mine, theirs = (gradients(m, eager, x) for m in (module, eager))
        assert [n for n, g in mine.items() if g is None] == [n for n, g in theirs.items() if g is None]
        torch.testing.assert_close(
            [g for g in mine.values() if g is not None], [g for g in theirs.values() if g is not None]
        )


def test_the_archive_of_such_a_model() -> None:
    torch.manual_seed(0)
    eager, x = Blocks().eval(), torch.randn(2, 5, 8)
    program = pumer.capture(torch.export.export(eager, (), {"x": x}, strict=False))
    assert_plain(program.module)
    assert torch.equal(program.module(x=x)["mixed"], eager(x)["mixed"])


def test_blocks_that_are_entered_and_left_by_operators() -> None:
    """As `make_fx` and Dynamo write them."""
    weight, x = torch.randn(8, 8), torch.randn(2, 5, 8)

    def run(x: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y = x @ weight
            with torch.autocast("cpu", enabled=False):
                z = x @ weight
        with torch.no_grad():
            frozen = x @ weight
        return y + frozen, z @ weight

    module = make_fx(run, tracing_mode="fake", pre_dispatch=True)(x, weight)
    inline_blocks(module)
    assert_plain(module)
    assert [n.target for n in module.graph.nodes].count(aten.to.dtype) == 2
    given = (x.requires_grad_(), weight.requires_grad_())
    (found, wanted) = (f(*given) for f in (module, run))
    assert torch.equal(found[0], wanted[0]) and torch.equal(found[1], wanted[1])
    torch.testing.assert_close(torch.autograd.grad(found[0].sum(), given), torch.autograd.grad(wanted[0].sum(), given))


def test_what_is_not_learned_needs_no_detach() -> None:
    """Tables of positions, which language models make without gradients, are as without the block."""

    class Positions(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(8, 8)
            self.register_buffer("frequencies", torch.randn(8))

        def forward(self, x: Tensor) -> Tensor:
            with torch.no_grad():
                table = torch.arange(x.shape[1])[:, None].float() * self.frequencies
            return self.layer(x) * table.cos()

    module = exported(Positions(), torch.randn(2, 5, 8))
    assert_plain(module)
    assert aten.detach.default not in [n.target for n in module.graph.nodes]


def test_a_graph_without_blocks_is_left_alone() -> None:
    module = torch.export.export(nn.Linear(8, 8), (torch.randn(2, 8),)).module()
    graph = module.graph
    inline_blocks(module)
    assert module.graph is graph


def test_what_casts_do_not_describe_is_refused() -> None:
    library = torch.library.Library("pumer_blocks", "DEF")
    library.define("both(Tensor x, Tensor weight) -> Tensor")
    library.impl("both", lambda x, weight: x @ weight + x, "CompositeImplicitAutograd")

    class Both(nn.Module):
        def forward(self, x: Tensor, weight: Tensor) -> Tensor:
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return torch.ops.pumer_blocks.both(x, weight)

    program = torch.export.export(Both(), (torch.randn(8, 8), torch.randn(8, 8)), strict=False)
    with pytest.raises(CaptureError, match=r"pumer_blocks.both.default \(node both.*outside of the autocast block"):
        plain_graph_module(program)


# --- Reduction --------------------------------------------------------------------------------------------------------


class Under(Fusion):
    """A model whose whole forward is under autocast."""

    enabled = True

    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=self.enabled):
            return super().forward(*args, **kwargs)


class NotUnder(Under):
    """Or under one that is switched off."""

    enabled = False


class Cast(nn.Module):
    """A layer whose casts are written out."""

    def __init__(self, layer: nn.Linear | nn.Conv2d) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        weight, bias = (p.bfloat16() for p in self.layer.parameters())
        if isinstance(self.layer, nn.Linear):
            return F.linear(x.bfloat16(), weight, bias)
        return F.conv2d(x.bfloat16(), weight, bias, self.layer.stride)


def cast_by_hand(model: nn.Module) -> nn.Module:
    for name, child in model.named_children():
        if isinstance(child, nn.Linear | nn.Conv2d):
            setattr(model, name, Cast(child))
        else:
            cast_by_hand(child)
    return model


@pytest.mark.parametrize("form", ["sdpa", "unfused"])
@pytest.mark.parametrize("kind", [Under, NotUnder])
def test_it_is_reduced_as_the_model_with_casts_written_out(kind: type[Under], form: str) -> None:
    config = Config(form=form, mask="none", layers=2)
    by_hand = make(config)
    if kind.enabled:
        cast_by_hand(by_hand)
    inputs = inputs_for(config)
    found, wanted = (
        pumer.reduce(pumer.capture(model, inputs), schedule("safe")) for model in (make(config, kind=kind), by_hand)
    )
    assert found.plan == wanted.plan
    for seed in (1, 2):
        given = inputs_for(config, seed)
        with torch.no_grad():
            mine, theirs = found.module(**given), wanted.module(**given)
        assert mine.dtype == theirs.dtype and torch.equal(mine, theirs)
