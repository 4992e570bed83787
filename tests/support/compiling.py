"""What the tests of `torch.compile(backend="pumer")` share."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn

import pumer_compile as pumer
from pumer_compile import Schedule
from pumer_compile.reduce import reduce_graph
from pumer_compile.torch_compile import backend as backend_module
from tests.support.models import Config, highest, schedule
from tests.support.tiny import image_inputs, text_inputs

# Its head reads every token, so what a reducer in the last layer does is seen.
PLAIN = Config(layers=2, head=highest)
WANTED = schedule()
# For what compiles often: Dynamo's symbolic sizes make every operator of a reducer slow to trace.
SMALL = Config(layers=2)
FEW = Schedule(semantics="reference", layers=(0,), prune=0.3)


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    backend_module._said.clear()
    yield
    torch._dynamo.reset()


def compiled(
    model: Any, wanted: Any = WANTED, inner: str = "eager", dynamic: bool | None = None, **options: Any
) -> Any:
    """One graph or an error."""
    options = {"inner": inner, **({} if wanted is None else {"schedule": wanted}), **options}
    return torch.compile(model, backend="pumer", options=options, fullgraph=True, dynamic=dynamic)


def expected(model: nn.Module, inputs: dict[str, Tensor], wanted: Schedule = WANTED) -> Tensor:
    """What the reduced module gives; it must differ from what the model gives."""
    reduced = reduce_graph(pumer.capture(model, inputs), wanted)
    with torch.no_grad():
        found, unreduced = logits(reduced(**inputs)), logits(model(**inputs))
    assert (found - unreduced).abs().max() > 1e-3
    return found


def logits(output: Any) -> Tensor:
    return output if isinstance(output, Tensor) else output.logits


def assert_near(found: Any, wanted: Tensor) -> None:
    torch.testing.assert_close(logits(found).detach(), wanted, atol=1e-5, rtol=0)


def graphs() -> int:
    return int(torch._dynamo.utils.counters["stats"]["unique_graphs"])


def vilt_inputs(batch: int, text: int = 7) -> dict[str, Tensor]:
    sizes = [(96, 96), (64, 96), (96, 48), (80, 80)][:batch]
    return {**text_inputs(batch, text), **image_inputs(sizes, (96, 96))}


VILT = Schedule(semantics="reference", layers=(0, 1), prune=0.2, merge={"image": 0.3, "text": 0.2})


def every_token(x: Tensor, text: int) -> Tensor:
    return x


def loose(model: Any, **options: Any) -> Any:
    """Graph breaks allowed."""
    return torch.compile(model, backend="pumer", options={"schedule": WANTED, "inner": "eager", **options})


def shortened(inputs: dict[str, Tensor], length: int) -> dict[str, Tensor]:
    texts = {name: inputs[name][:, :length] for name in ("input_ids", "attention_mask")}
    return {**inputs, **texts}


def padded(inputs: dict[str, Tensor], length: int, token: int = 0) -> dict[str, Tensor]:
    missing = length - inputs["input_ids"].shape[1]
    fill = {"input_ids": token, "attention_mask": 0, "token_type_ids": 0}
    return {n: nn.functional.pad(t, (0, missing), value=fill[n]) if n in fill else t for n, t in inputs.items()}
