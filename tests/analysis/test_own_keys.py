"""Where the queries of an attention stand among its keys."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pumer_compile import capture
from pumer_compile.analysis.attention import attention_parts
from pumer_compile.analysis.own_keys import own_keys

pytestmark = pytest.mark.fast


class Reads(nn.Module):
    """Attention of latents: to themselves, to a picture, to a picture and themselves; as many latents as patches."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.query, self.key, self.value = (nn.Linear(8, 8) for _ in range(3))

    def forward(self, latents: Tensor, picture: Tensor) -> Tensor:
        normed = F.layer_norm(latents, (8,))
        joined = {"self": [normed], "cross": [picture], "behind": [picture, normed], "before": [normed, picture]}
        read = torch.cat(joined[self.kind], 1) if len(joined[self.kind]) > 1 else joined[self.kind][0]
        heads = (t.unflatten(2, (2, 4)).transpose(1, 2) for t in (self.query(normed), self.key(read), self.value(read)))
        return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2) + picture


@pytest.mark.parametrize(("kind", "first"), [("self", 0), ("cross", None), ("behind", 5), ("before", 0)])
def test_own_keys(kind: str, first: int | None) -> None:
    program = capture(Reads(kind), {"latents": torch.randn(2, 5, 8), "picture": torch.randn(2, 5, 8)})
    (output,) = program.module.graph.find_nodes(op="output")
    (parts,) = attention_parts(output.all_input_nodes[0])
    assert own_keys(parts) == first
