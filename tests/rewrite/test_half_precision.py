"""What stands at a site in half precision: attention that a reducer reads is never rounded to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import pumer_compile as pumer
from pumer_compile.reduce import reduce_graph
from pumer_compile.reducers import reducers_of
from tests.support.models import Config, Fusion, highest, inputs_for, make
from tests.support.models import schedule as budgets


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("form", ["unfused", "sdpa"])
@pytest.mark.parametrize("semantics", ["reference", "paper", "safe"])
def test_attention_is_single_precision(semantics: str, form: str, dtype: torch.dtype) -> None:
    config = Config(form=form, layers=1, head=highest)
    model = make(config).to(dtype)
    inputs = {n: t.to(dtype) if t.is_floating_point() else t for n, t in inputs_for(config).items()}
    reduced = pumer.reduce(pumer.capture(model, inputs), budgets(layers=(0,), semantics=semantics))
    seen: list[Tensor] = []

    def look(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        seen.extend(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor) and t.dim() == 4)

    image = reducers_of(reduced.module)["reducer.cross_modal_0.image"]
    image.register_forward_pre_hook(look, with_kwargs=True)
    with torch.no_grad():
        output = reduced.module(**inputs)
    attention = [t for t in seen if t.shape[-2:] == (config.text, config.image)]
    assert [t.dtype for t in attention] == [torch.float32]
    torch.testing.assert_close(attention[0].sum(-1) > 0, torch.ones_like(attention[0].sum(-1), dtype=torch.bool))
    # Rounded values would all be representable in half precision.
    assert not torch.equal(attention[0].to(dtype).float(), attention[0])
    logits = output if isinstance(output, Tensor) else next(iter(output.values()))
    assert logits.dtype == dtype and logits.isfinite().all()


class Scaled(Fusion):
    """Attention with a scale of its own, fused or written out."""

    fused, scale = False, 1.0

    def forward(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
        x = self.embed(input_ids, pixel_values)
        for layer in self.layers:
            attention, normed = layer.attention, layer.norm1(x)
            q, k, v = (attention.split(m(normed)) for m in (attention.q, attention.k, attention.v))
            if self.fused:
                context = F.scaled_dot_product_attention(q, k, v, scale=self.scale)
            else:
                context = (q @ k.transpose(-1, -2) * self.scale).softmax(-1) @ v
            x = x + attention.out(context.transpose(1, 2).flatten(2))
            x = x + layer.mlp(layer.norm2(x))
        return self.finish(x, input_ids.shape[1])


@pytest.mark.parametrize("scale", [1, 0.11])
@pytest.mark.parametrize("semantics", ["reference", "safe"])
def test_a_fused_attention_keeps_its_scale(semantics: str, scale: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where its text rows are computed beside it, and where the published softmax stands in its place."""
    config = Config(mask="none", layers=2, head=highest, text=5, grid=(3, 4))
    inputs, found = inputs_for(config), []
    monkeypatch.setattr(Scaled, "scale", scale)
    for fused in (False, True):
        monkeypatch.setattr(Scaled, "fused", fused)
        captured = pumer.capture(make(config, kind=Scaled), inputs)
        module = reduce_graph(captured, budgets(semantics, (0,), prune=4, merge={"image": 3, "text": 1}))
        with torch.no_grad():
            found.append((module(**inputs), captured.module(**inputs)))
    (one, unreduced), (other, _) = found
    torch.testing.assert_close(other, one, atol=1e-5, rtol=0)
    assert (one - unreduced).abs().max() > 1e-3
