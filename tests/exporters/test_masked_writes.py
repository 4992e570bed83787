"""Writes where a mask is true, in ONNX: the numbers of eager PyTorch, wherever the mask's places are."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import Tensor, nn

import pumer_compile as pumer
from pumer_compile.errors import ExportError
from pumer_compile.exporters.chain import prepare
from pumer_compile.exporters.onnx import OnnxOptions, build_onnx, save_onnx
from tests.support import llava
from tests.support.commands import onnx_outputs
from tests.support.talker import IMAGE, Talker, prompts

Tensors = dict[str, Tensor]
Write = Callable[[Tensor, Tensor, Tensor], Tensor]


def assigned(words: Tensor, chosen: Tensor, rows: Tensor) -> Tensor:
    words = words.clone()
    words[chosen] = rows.flatten(0, 1)
    return words


def assigned_in_one(words: Tensor, chosen: Tensor, rows: Tensor) -> Tensor:
    words = words.clone()
    words[0][chosen[0]] = rows[0]
    return words


def assigned_one_row(words: Tensor, chosen: Tensor, rows: Tensor) -> Tensor:
    words = words.clone()
    words[chosen] = rows[0, :1]
    words[~chosen] = 0.5
    return words


def assigned_by_bytes(words: Tensor, chosen: Tensor, rows: Tensor) -> Tensor:
    """By masks of `uint8`, which PyTorch takes for truth values."""
    words = words.clone()
    words[chosen.to(torch.uint8)] = rows.flatten(0, 1)
    words[(~chosen).to(torch.uint8)] = rows[0, :1]
    return words


WRITES: dict[str, Write] = {
    "assigned by bytes": assigned_by_bytes,
    "a narrow mask": lambda words, chosen, rows: words.masked_scatter(chosen.unsqueeze(-1), rows),
    "a wide mask": lambda words, chosen, rows: words.masked_scatter(chosen.unsqueeze(-1).expand_as(words), rows),
    "a mask of elements": lambda words, chosen, rows: words.masked_scatter(chosen.unsqueeze(-1) & (words > 0), rows),
    "a flat source": lambda words, chosen, rows: words.masked_scatter(chosen.unsqueeze(-1), rows.flatten()),
    "one prompt's mask": lambda words, chosen, rows: words.masked_scatter(chosen[:1].unsqueeze(-1), rows),
    "more rows than places": lambda words, chosen, rows: words.masked_scatter(
        chosen.unsqueeze(-1), torch.cat([rows, rows])
    ),
    "in place": lambda words, chosen, rows: words.clone().masked_scatter_(chosen.unsqueeze(-1), rows),
    "one dimension": lambda words, chosen, rows: words[0, :, 0].masked_scatter(chosen[0], rows),
    "assigned": assigned,
    "assigned in a view": assigned_in_one,
    "assigned one row": assigned_one_row,
}


class Writer(nn.Module):
    def __init__(self, writes: dict[str, Write]) -> None:
        super().__init__()
        self.writes = writes

    def forward(self, words: Tensor, ids: Tensor, rows: Tensor) -> dict[str, Tensor]:
        return {name: write(words, ids == 9, rows) for name, write in self.writes.items()}


def places(first: list[int], second: list[int], seed: int = 0) -> Tensors:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.zeros(2, 6, dtype=torch.int64)
    ids[0, first], ids[1, second] = 9, 9
    words, rows = (torch.randn(2, n, 4, generator=generator) for n in (6, 3))
    return {"words": words, "ids": ids, "rows": rows}


def converted(program: pumer.Program, path: Path, schedule: str | pumer.Schedule | None = None) -> Path:
    save_onnx(build_onnx(program if schedule is None else pumer.reduce(program, schedule), OnnxOptions()).model, path)
    return path


def check(path: Path, model: nn.Module, inputs: Tensors) -> None:
    with torch.no_grad():
        wanted = model(**inputs)
    found = onnx_outputs(path, {name: value.numpy() for name, value in inputs.items()})
    for name, value in wanted.items():
        np.testing.assert_allclose(found[name], value.numpy(), atol=2e-5, rtol=2e-5, err_msg=name)


@pytest.mark.parametrize("batch", [False, True])
def test_the_numbers_of_eager(batch: bool, tmp_path: Path) -> None:
    model = Writer({n: w for n, w in WRITES.items() if not batch or "one" not in n})
    program = pumer.capture(model, places([1, 2, 3], [1, 2, 3]), dynamic_batch=batch)
    path = converted(program, tmp_path / "model.onnx")
    assert not {"ScatterND", "NonZero"} & {node.op_type for node in onnx.load(str(path)).graph.node}
    elsewhere = places([0, 2, 5], [3, 4, 5], seed=1)
    for inputs in (places([1, 2, 3], [1, 2, 3]), elsewhere):
        check(path, model, inputs)
    if batch:
        check(path, model, {name: value[1:] for name, value in elsewhere.items()})


@pytest.mark.parametrize(
    ("write", "found"),
    [
        (lambda w, c, r: w.index_put((c,), r.flatten(0, 1), accumulate=True), "adds to what is there"),
        (lambda w, c, r: w.index_put((torch.arange(2)[:, None], c[0]), r), "where other indices say"),
    ],
)
def test_what_is_refused(write: Write, found: str) -> None:
    program = pumer.capture(Writer({"": write}), places([1, 2, 3], [1, 2, 3]))
    with pytest.raises(ExportError, match=rf"aten.index_put.default \(node index_put.*{found}.*torch.where"):
        build_onnx(program, OnnxOptions())


# --- Prompts ----------------------------------------------------------------------------------------------------------


class Narrow(Talker):
    """A model whose mask is as LLaVA's, and whose tower gives so many tokens whatever it is given."""

    def __init__(self, pooled: int = 0) -> None:
        super().__init__(cls=False)
        self.pooled = pooled

    def forward(self, input_ids: Tensor, attention_mask: Tensor, pixel_values: Tensor) -> dict[str, Tensor]:
        features = self.projector(self.tower(pixel_values))
        if self.pooled:
            features = features.mean(1, keepdim=True) * torch.arange(1.0, self.pooled + 1)[:, None]
        prompt = self.words(input_ids).masked_scatter((input_ids == IMAGE).unsqueeze(-1), features)
        return {"logits": self.read(prompt, attention_mask)[:, -1]}


@pytest.mark.parametrize(("schedule", "archive"), [(None, True), ("lossless", False), ("tome", True)])
def test_prompts_whose_images_stand_elsewhere(schedule: str | None, archive: bool, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = Narrow(pooled=16 if schedule == "tome" else 0).eval()
    given = prompts(3, 5)
    source = torch.export.export(model, (), given, strict=False) if archive else model
    program = pumer.capture(source, None if archive else given)
    wanted = pumer.Schedule(method="tome", sites=[{"at": "vision.1", "merge": {"image": 4}}])
    path = converted(program, tmp_path / "model.onnx", wanted if schedule == "tome" else schedule)
    eager = pumer.reduce(program, wanted).module if schedule == "tome" else model
    for inputs in (given, prompts(1, 7, seed=3), prompts(8, 0, seed=4)):
        check(path, eager, inputs)


def test_lossless_llava() -> None:
    """Whose writes transformers' own exporter would not see."""
    model, inputs = llava.model(), llava.tensors()
    moved = {**inputs, "input_ids": inputs["input_ids"].roll(3, 1), "pixel_values": inputs["pixel_values"].flip(0)}
    prepared = prepare(pumer.reduce(llava.program(), "lossless"))
    exported, (name,) = prepared.export(), prepared.outputs
    targets = [node.target for node in exported.graph.nodes]
    assert torch.ops.aten.masked_scatter.default not in targets and torch.ops.aten.cumsum.default in targets
    for given in (inputs, moved):
        with torch.no_grad():
            torch.testing.assert_close(exported.module()(**given)[name], model(**given)[name])
