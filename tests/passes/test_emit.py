"""What stands at a site in half precision: attention that a reducer reads is never rounded to it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import pumer_compile as pumer
from pumer_compile.passes.insert import reducers_of
from tests.models import Config, highest, inputs_for, make
from tests.models import schedule as budgets


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
