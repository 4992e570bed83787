"""Operators of a captured graph as calls that transformers' exporters patch."""

from __future__ import annotations

import importlib.util
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import Tensor, nn
from transformers.exporters import utils

import pumer_compile as pumer
from pumer_compile.exporters.chain import prepare
from pumer_compile.exporters.onnx import GraphOnnxExporter  # noqa: F401  (importing transformers' registers its patches)
from pumer_compile.exporters.torch_calls import PATCHED, call_torch

OWNERS = {"torch": torch, "torch.Tensor": torch.Tensor, "torch.nn.functional": F}
NOT_CALLED = {
    "__neg__": "operators are called by their function",
    "bernoulli": "random",
    "rand": "random",
    "randn": "random",
    "randn_like": "random",
    "randint": "random",
    "randperm": "random",
    "interpolate": "its operators are called, which have other names",
    "embedding_bag": "no model of tokens has it",
    "masked_scatter": "`lower_masked_writes` counts what is chosen",
    "reshape": "a reshape in the graph copies where it must",
    "view": "a view in the graph is of what lies in one piece",
    "scatter_reduce": "refused in an artifact of a reduced model",
    "scatter_reduce_": "as above",
}


@pytest.mark.parametrize("backend", ["onnx", "openvino"])
def test_every_patch_of_a_function_reaches_a_graph(backend: str) -> None:
    """Of the version at hand: a newer one may patch more, of which somebody has to think."""
    if importlib.util.find_spec(f"transformers.exporters.exporter_{backend}") is None:
        pytest.skip(f"transformers has no exporter for {backend}")
    importlib.import_module(f"transformers.exporters.exporter_{backend}")
    patched = {name for owner, name, _ in utils._PATCHES[backend] if owner in OWNERS}
    called = {name for names in PATCHED.values() for name in names}
    assert len(patched) > 10 and not patched - called - set(NOT_CALLED)


class Everything(nn.Module):
    """A model with the functions."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        first, second = x.split(4, -1)
        numbers = torch.arange(4)
        return {
            "exp": torch.exp(-x),
            "roll": torch.roll(first, 1, 1) + second.chunk(2, 1)[0].repeat(1, 2, 1),
            "where": torch.where(x > 0, x, 0.0).unsqueeze(1),
            "full": torch.full((2, 4), 3) + numbers.cumsum(0),
            "norm": F.layer_norm(x, (8,)),
            "attention": F.scaled_dot_product_attention(first, second, second, scale=0.3),
            "pool": F.avg_pool2d(x[:, None], 2),
            "smooth": F.interpolate(x[:, None], (3, 5), mode="bilinear", antialias=True),
            "smoother": F.interpolate(x[:, None], (3, 5), mode="bicubic", antialias=True),
            "found": torch.searchsorted(numbers, numbers.flip(0)) + torch.bucketize(numbers, numbers, right=True),
            "highest": torch.cummax(first, 1).values + torch.cummin(second, 1).values,
            "windows": x.unfold(1, 2, 1).reshape(2, -1),
        }


def test_it_computes_the_same() -> None:
    x = torch.randn(2, 4, 8, generator=torch.Generator().manual_seed(0))
    model = Everything()
    prepared = prepare(pumer.capture(model, {"x": x}))
    called = {node.target.__name__ for node in prepared.module.graph.nodes if _of_us(node.target)}
    assert {"torch_roll", "torch_where", "torch_scaled_dot_product_attention", "torch_interpolate_bicubic"} < called
    assert {"torch_exp", "torch_neg", "torch_split", "torch_chunk", "_layer_norm", "torch_searchsorted"} < called
    exported = prepared.export().module()
    for found in (prepared.module(x=x), exported(x=x)):
        torch.testing.assert_close(found, model(x))


def _of_us(target: object) -> bool:
    return getattr(target, "__module__", "") == call_torch.__module__


def test_a_patch_reaches_the_graph() -> None:
    prepared = prepare(pumer.capture(Everything(), {"x": torch.randn(2, 4, 8)}))
    with mock.patch.object(torch, "roll", lambda x, *shifts: x.sin()):
        targets = [node.target for node in prepared.export().graph.nodes]
    assert torch.ops.aten.sin.default in targets and torch.ops.aten.roll.default not in targets


SIZES = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.mark.parametrize(("kind", "called"), [("CLIPVision", []), ("ViT", [0, 1])])
def test_sizes_of_merged_tokens_are_no_padding(kind: str, called: list[int]) -> None:
    """An attention whose mask is but their logarithm (CLIP has no other, ViT has) stays the operator: patches look for
    rows of padding."""
    config = getattr(transformers, f"{kind}Config")(**SIZES, image_size=32, patch_size=8)
    model = getattr(transformers, f"{kind}Model")(config)
    program = pumer.capture(model, {"pixel_values": torch.randn(2, 3, 32, 32)}, outputs=["pooler_output"])
    schedule = pumer.Schedule(method="tome", sites=[{"at": "vision.0", "merge": {"image": 4}}])
    attentions = [
        node
        for node in prepare(pumer.reduce(program, schedule)).module.graph.nodes
        if "scaled_dot_product_attention" in node.name
    ]
    assert len(attentions) == 2
    masked = [index for index, node in enumerate(attentions) if node.args[3:] or node.kwargs.get("attn_mask")]
    assert [index for index in masked if _of_us(attentions[index].target)] == called
