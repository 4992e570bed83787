"""`torch.compile(backend="pumer")` with other sizes than those of the first call: recompiled, or one text length."""

from __future__ import annotations

import copy
import dataclasses
import logging

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.exc import BackendCompilerFailed

from tests.support.compiling import (
    FEW,
    PLAIN,
    SMALL,
    assert_near,
    compiled,
    expected,
    fresh_dynamo,
    graphs,
    loose,
    padded,
    shortened,
    vilt_inputs,
)
from tests.support.models import Fusion, inputs_for, make, schedule
from tests.support.tiny import tiny_vilt

__all__ = ["fresh_dynamo"]

# --- recompiling ----------------------------------------------------------------------------------------------------


def test_batches_share_a_graph() -> None:
    """One graph for the first batch size, one for every other but 1, one for 1."""
    model, before, counts = make(SMALL), graphs(), []
    fast = compiled(model, FEW)
    for batch in (2, 3, 4, 2, 1):
        inputs = inputs_for(SMALL, batch=batch)
        with torch.no_grad():
            assert_near(fast(**inputs), expected(model, inputs, FEW))
        counts.append(graphs() - before)
    assert counts == [1, 2, 2, 2, 3]


def test_text_lengths_recompile() -> None:
    model, before, counts = make(SMALL), graphs(), []
    fast = compiled(model, FEW)
    for text in (7, 5, 6, 5):
        inputs = shortened(inputs_for(SMALL), text)
        with torch.no_grad():
            assert_near(fast(**inputs), expected(model, inputs, FEW))
        counts.append(graphs() - before)
    assert counts == [1, 2, 3, 3]


def test_the_last_compile_is_announced(caplog: pytest.LogCaptureFixture) -> None:
    fast = loose(make(SMALL), schedule=FEW)
    with torch._dynamo.config.patch(recompile_limit=2), caplog.at_level(logging.WARNING, logger="pumer_compile"):
        fast(**inputs_for(SMALL))
        assert "for the last time" not in caplog.text
        fast(**shortened(inputs_for(SMALL), 5))
        assert "for the last time" in caplog.text


# --- a fixed budget of text tokens ----------------------------------------------------------------------------------


def test_text_length_serves_every_text_with_one_graph() -> None:
    """Stock ViLT, with every size left open by Dynamo; its own pad token fills the texts."""
    model, before = tiny_vilt(pad_token_id=3), graphs()
    fast = compiled(model, FEW, dynamic=True, text_length=12)
    for batch, text in ((2, 7), (2, 5), (3, 12)):
        inputs = {**vilt_inputs(batch, text), "token_type_ids": torch.arange(batch * text).view(batch, text) % 2}
        with torch.no_grad():
            assert_near(fast(**inputs), expected(model, padded(inputs, 12, token=3), FEW))
    assert graphs() == before + 1


@pytest.mark.parametrize("semantics", ["reference", "safe"])
def test_text_length_after_a_first_call_of_that_length(semantics: str) -> None:
    """Without dynamic=True, a first call at full length is compiled as it is, and the next one opens the length."""
    model, before, wanted = make(SMALL), graphs(), schedule(semantics, layers=(0,))
    fast = compiled(model, wanted, text_length=7)
    for text in (7, 4, 5, 7):
        inputs = shortened(inputs_for(SMALL), text)
        with torch.no_grad():
            assert_near(fast(**inputs), expected(model, padded(inputs, 7), wanted))
    assert graphs() == before + 2


def test_text_length_trains() -> None:
    model, inputs = make(SMALL), shortened(inputs_for(SMALL), 4)
    twin = copy.deepcopy(model)
    compiled(model, FEW, inner="aot_eager", dynamic=True, text_length=7)(**inputs).sum().backward()
    compiled(twin, FEW)(**padded(inputs, 7)).sum().backward()
    for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None
        torch.testing.assert_close(p.grad, q.grad, atol=1e-5, rtol=0, msg=lambda m, n=name: f"{n}: {m}")


def test_text_length_in_a_fixed_graph() -> None:
    with pytest.raises(BackendCompilerFailed, match=r"Dynamo fixed its 7 text tokens.*dynamic=True"):
        compiled(make(SMALL), FEW, text_length=12)(**inputs_for(SMALL))


def test_text_longer_than_text_length() -> None:
    fast = compiled(make(SMALL), FEW, dynamic=True, text_length=5)
    fast(**shortened(inputs_for(SMALL), 4))
    with pytest.raises(BackendCompilerFailed, match=r"The text has 7 tokens, more than text_length=5"):
        fast(**inputs_for(SMALL))


def test_text_length_without_a_mask() -> None:
    config = dataclasses.replace(PLAIN, mask="none")
    with pytest.raises(BackendCompilerFailed, match=r"no integer input .* beside input_ids .* Pass the attention mask"):
        compiled(make(config), text_length=7)(**inputs_for(config))


def test_text_length_without_a_text() -> None:
    class Image(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.softmax(-1)

    with pytest.raises(BackendCompilerFailed, match=r"pads one text.*0 are looked up, of the inputs x \[2, 3\]"):
        compiled(Image(), text_length=7)(torch.randn(2, 3))


def test_text_length_where_batch_and_text_were_one_size() -> None:
    with pytest.raises(BackendCompilerFailed, match=r"Make the first call with sizes that differ"):
        compiled(make(SMALL), FEW, dynamic=True, text_length=7)(**shortened(inputs_for(SMALL, batch=4), 4))


def test_text_length_where_the_model_takes_another_path() -> None:
    class Forked(Fusion):
        def embed(self, input_ids: Tensor, pixel_values: Tensor) -> Tensor:
            x = super().embed(input_ids, pixel_values)
            return 2 * x if input_ids.shape[1] < 6 else x

    model, inputs = make(SMALL, kind=Forked), shortened(inputs_for(SMALL), 4)
    with pytest.raises(BackendCompilerFailed, match=r"another path for 7 text tokens .*< 6 does not hold"):
        compiled(model, FEW, dynamic=True, text_length=7)(**inputs)
