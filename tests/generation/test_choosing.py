"""The choice of tokens, against transformers' own `generate` over a small language model."""

from __future__ import annotations

import functools
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    LogitsProcessorList,
    SuppressTokensLogitsProcessor,
)

from pumer_compile.errors import UsageError
from pumer_compile.generation.choosing import Choosing

TOKENS, PAD = 12, 1
# Of different lengths.
PROMPTS = [torch.tensor([5, 9, 9, 4, 7, 8]), torch.tensor([11, 5, 9])]


@functools.cache
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=40,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        eos_token_id=None,
        pad_token_id=PAD,
        bos_token_id=0,
    )
    made = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        made.lm_head.weight.normal_(std=0.6)
    return made


def wanted(config: GenerationConfig, **more: Any) -> Tensor:
    """What transformers makes of the prompts, padded in front."""
    longest = max(map(len, PROMPTS))
    pads = [torch.full((longest - len(prompt),), PAD) for prompt in PROMPTS]
    ids = torch.stack([torch.cat([pad, prompt]) for pad, prompt in zip(pads, PROMPTS, strict=True)])
    torch.manual_seed(3)
    made = model().generate(input_ids=ids, attention_mask=(ids != PAD).long(), generation_config=config, **more)
    assert isinstance(made, Tensor)
    return made[:, longest:]


def found(config: GenerationConfig | None, tokens: int = TOKENS, **more: Any) -> Tensor:
    """What is chosen of the logits of each prompt by itself."""
    torch.manual_seed(3)
    choosing, texts, made = Choosing(PROMPTS, config, **more), list(PROMPTS), []
    while len(made) < tokens and not choosing.ended:
        with torch.no_grad():
            logits = torch.stack([model()(input_ids=text[None]).logits[0, -1] for text in texts])
        made.append(choosing.next(logits))
        texts = [torch.cat([text, token[None]]) for text, token in zip(texts, made[-1], strict=True)]
    return torch.stack(made, 1)


@pytest.mark.parametrize(
    "said",
    [
        {},
        {"repetition_penalty": 1.8},
        {"no_repeat_ngram_size": 2},
        {"suppress_tokens": [22, 33]},
        {"do_sample": True},
        {"do_sample": True, "temperature": 0.4, "top_p": 0.8, "top_k": 0},
        {"do_sample": True, "top_k": 3, "min_p": 0.05, "repetition_penalty": 1.3},
        {"do_sample": True, "typical_p": 0.6},
    ],
    ids=lambda said: " ".join(said) or "greedy",
)
def test_the_tokens_that_transformers_chooses(said: dict[str, Any]) -> None:
    config = GenerationConfig(max_new_tokens=TOKENS, pad_token_id=PAD, **said)
    chosen = found(config)
    assert torch.equal(chosen, wanted(config))
    assert not said or not torch.equal(chosen, found(GenerationConfig(pad_token_id=PAD)))


@pytest.mark.parametrize("least", [None, 4])
def test_texts_that_end(least: int | None) -> None:
    """By any of several ids, at different times; behind an end stands padding."""
    greedy = found(None)
    stops = [int(greedy[0, 1]), int(greedy[1, 4])]
    config = GenerationConfig(max_new_tokens=TOKENS, pad_token_id=PAD, eos_token_id=stops, min_new_tokens=least)
    chosen = found(config)
    assert torch.equal(chosen, wanted(config))
    assert least is not None or (chosen.shape[1] == 5 and bool((chosen[0, 2:] == PAD).all()))
    given = GenerationConfig(pad_token_id=PAD, min_new_tokens=least, eos_token_id=stops[0])
    assert torch.equal(found(given, stop=stops[1]), chosen)


def test_a_processor_of_ones_own() -> None:
    first = [int(token) for token in found(None)[:, 0]]
    processors = LogitsProcessorList([SuppressTokensLogitsProcessor(first)])
    config = GenerationConfig(max_new_tokens=TOKENS, pad_token_id=PAD, do_sample=True, temperature=0.5)
    chosen = found(config, processors=processors)
    assert torch.equal(chosen, wanted(config, logits_processor=processors))
    assert not torch.isin(chosen, torch.tensor(first)).any()


def test_what_is_not_done_is_said() -> None:
    with pytest.raises(UsageError, match=r"num_beams=4, which is not done here"):
        Choosing(PROMPTS, GenerationConfig(num_beams=4))
    with pytest.raises(UsageError, match=r"bad_words_ids=\[\[3\]\]"):
        Choosing(PROMPTS, GenerationConfig(bad_words_ids=[[3]]))
    with pytest.raises(UsageError, match="no eos_token_id"):
        Choosing(PROMPTS, GenerationConfig(min_new_tokens=3))
    Choosing(PROMPTS, GenerationConfig(num_beams=1, output_scores=False))
