"""Linear attention by the gated delta rule as one operator, over as many tokens as are left."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import pumer_compile as pumer
from pumer_compile import Schedule
from pumer_compile.frontends.gated_delta_rule import FUNCTION, gated_delta_rule, in_chunks, unit_lower_inverse
from tests.support.fastv_families import BUDGET, by_hand
from tests.support.prompt_families import Tensors, built

WORDS = 50  # more than a chunk of 64 tokens before the reduction, fewer after it


def long_prompt(inputs: Tensors, seed: int) -> Tensors:
    words = torch.randint(3, 90, (1, WORDS), generator=torch.Generator().manual_seed(seed))
    more = {
        "input_ids": words,
        "attention_mask": torch.ones_like(words),
        "mm_token_type_ids": torch.zeros_like(words),
    }
    return {name: torch.cat([value, more[name]], 1) if name in more else value for name, value in inputs.items()}


def test_fewer_chunks_than_the_model_has() -> None:
    model, make = built("qwen3_5")
    program = pumer.capture(model, long_prompt(make(0), 0), outputs=["logits"])
    kept = [node for node in program.module.graph.nodes if node.target is gated_delta_rule]
    assert len(kept) == 2  # one for each of its layers
    reduced = pumer.reduce(program, Schedule(method="fastv", layer=1, budget=BUDGET))
    places = []
    for seed in (0, 1):
        inputs = long_prompt(make(seed), seed)
        wanted, left = by_hand(model, inputs, 2)
        assert left.shape[1] < 64 < inputs["input_ids"].shape[1]
        with torch.no_grad():
            found: Tensor = reduced.module(**inputs)["logits"]
        # Over this many tokens the model's own two forms of attention give logits 7e-5 of the largest apart.
        torch.testing.assert_close(found, wanted, atol=2e-4 * float(wanted.abs().max()), rtol=0.0)
        places.append(left)
    assert not torch.equal(*places)


def test_models_are_left_as_they_were() -> None:
    from transformers.models.qwen3_5 import modeling_qwen3_5

    assert not hasattr(vars(modeling_qwen3_5)[FUNCTION], "original")


# --- in chunks --------------------------------------------------------------------------------------------------------


def token_by_token(query: Tensor, key: Tensor, value: Tensor, decay: Tensor, rate: Tensor) -> tuple[Tensor, Tensor]:
    """The rule as it is written: a state that forgets, and is corrected at a key."""
    batch, tokens, heads, width = value.shape
    times, read = heads // key.shape[2], torch.empty_like(value)
    state = torch.zeros(batch, heads, key.shape[3], width, dtype=value.dtype)
    for b in range(batch):
        for h in range(heads):
            for t in range(tokens):
                k, q = key[b, t, h // times], query[b, t, h // times] / query.shape[3] ** 0.5
                state[b, h] *= decay[b, t, h].exp()
                state[b, h] += rate[b, t, h] * torch.outer(k, value[b, t, h] - k @ state[b, h])
                read[b, t, h] = q @ state[b, h]
    return read, state


def drawn(tokens: int, seed: int = 0) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Two heads of queries and keys, four of values, each key of length 1."""
    generator = torch.Generator().manual_seed(seed)
    query, key = (torch.randn(2, tokens, 2, 8, generator=generator) for _ in range(2))
    value = torch.randn(2, tokens, 4, 6, generator=generator)
    decay, rate = (torch.rand(2, tokens, 4, generator=generator) for _ in range(2))
    return query, key / key.norm(dim=-1, keepdim=True), value, -decay, rate


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted.to(found.dtype), atol=1e-5 * float(wanted.abs().max()), rtol=0.0)


@pytest.mark.parametrize("tokens", [1, 5, 64, 65, 131])
def test_chunks_against_the_rule_token_by_token(tokens: int) -> None:
    for seed in (0, 1):
        given = drawn(tokens, seed)
        wanted = token_by_token(*(tensor.double() for tensor in given))
        for found, expected in zip(in_chunks(*given, False), wanted, strict=True):
            assert found.shape == expected.shape
            close(found, expected)


def test_chunks_against_transformers() -> None:
    from transformers.models.qwen3_5.modeling_qwen3_5 import torch_chunk_gated_delta_rule

    query, key, value, decay, rate = drawn(100)
    wanted = torch_chunk_gated_delta_rule(
        query, 3 * key, value, g=decay, beta=rate, output_final_state=True, use_qk_l2norm_in_kernel=True
    )
    for found, expected in zip(in_chunks(query, 3 * key, value, decay, rate, True), wanted, strict=True):
        close(found, expected)


@pytest.mark.parametrize("size", [1, 2, 3, 50, 64])
def test_an_inverse_in_whole_numbers(size: int) -> None:
    given = torch.randint(-1, 2, (3, size, size), generator=torch.Generator().manual_seed(0)).double()
    whole = given.tril(-1) + torch.eye(size, dtype=torch.float64)
    found = unit_lower_inverse(given)  # what is above its diagonal is not read
    assert torch.equal(found @ whole, torch.eye(size, dtype=torch.float64).expand(3, -1, -1))


def test_an_inverse_of_equal_keys() -> None:
    """Powers of this matrix reach 1e18; a product of them is nothing but rounding in float32."""
    found = unit_lower_inverse(torch.ones(64, 64))
    assert torch.equal(found, torch.eye(64) - torch.diag(torch.ones(63), -1))


class _Rule(nn.Module):
    def forward(self, query: Tensor, key: Tensor, value: Tensor, decay: Tensor, rate: Tensor) -> Tensor:
        return gated_delta_rule(query, key, value, decay, rate, True, "transformers.models.qwen3_5.modeling_qwen3_5")[0]


def test_a_trace_has_steps_and_no_rows() -> None:
    import transformers.models.qwen3_5.modeling_qwen3_5  # noqa: F401  # whose function eager PyTorch calls

    given = drawn(100)
    traced = torch.export.export(_Rule(), given, strict=False)
    assert len(list(traced.graph.nodes)) < 200  # one row after the other takes more than 500
    for seed in (0, 1):
        given = drawn(100, seed)
        close(traced.module()(*given), _Rule()(*given))
