"""Where the queries of an attention stand among its keys."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pumer_compile import capture
from pumer_compile.analysis.attention import attention_parts, tower_attention
from pumer_compile.analysis.own_keys import own_keys

pytestmark = pytest.mark.fast


class Reads(nn.Module):
    """Attention of latents: to themselves, to a picture, to a picture and themselves; as many latents as patches."""

    def __init__(self, kind: str, written_out: bool = False) -> None:
        super().__init__()
        self.kind, self.written_out = kind, written_out
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, latents: Tensor, picture: Tensor) -> Tensor:
        normed = F.layer_norm(latents, (8,))
        joined = {"self": [normed], "cross": [picture], "behind": [picture, normed], "before": [normed, picture]}
        read = torch.cat(joined[self.kind], 1) if len(joined[self.kind]) > 1 else joined[self.kind][0]
        heads = (t.unflatten(2, (2, 4)).transpose(1, 2) for t in (self.query(normed), self.key(read), self.value(read)))
        return self.attention(*heads).transpose(1, 2).flatten(2) + picture

    def attention(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        if self.written_out:
            return (query @ key.transpose(-1, -2)).softmax(-1) @ value
        return F.scaled_dot_product_attention(query, key, value)


@pytest.mark.parametrize(("kind", "first"), [("self", 0), ("cross", None), ("behind", 5), ("before", 0)])
def test_own_keys(kind: str, first: int | None) -> None:
    program = capture(Reads(kind), {"latents": torch.randn(2, 5, 8), "picture": torch.randn(2, 5, 8)})
    (output,) = program.module.graph.find_nodes(op="output")
    (parts,) = attention_parts(output.all_input_nodes[0])
    assert own_keys(parts) == first


@pytest.mark.parametrize("written_out", [False, True])
@pytest.mark.parametrize(("kind", "keys"), [("self", 5), ("behind", 10)])
def test_as_many_keys_as_there_are(kind: str, keys: int, written_out: bool) -> None:
    model = Reads(kind, written_out)
    program = capture(model, {"latents": torch.randn(2, 5, 8), "picture": torch.randn(2, 5, 8)})
    (output,) = program.module.graph.find_nodes(op="output")
    (parts,) = attention_parts(output.all_input_nodes[0])
    attention = tower_attention(parts, 0)
    assert (attention.query_axis.size, attention.key_axis.size) == (5, keys) and own_keys(parts) == keys - 5
