"""Choosing: the next token of every prompt, as transformers' `generate` chooses it, and which texts have ended."""

from __future__ import annotations

import inspect
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinNewTokensLengthLogitsProcessor,
    MinPLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SuppressTokensLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
    TypicalLogitsWarper,
)

from ..errors import UsageError

# What a configuration may say, with what is as good as nothing; transformers samples among 50 unless told otherwise.
_NEUTRAL: dict[str, Any] = {
    "repetition_penalty": 1.0,
    "no_repeat_ngram_size": 0,
    "min_new_tokens": 0,
    "suppress_tokens": (),
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": 0.0,
    "typical_p": 1.0,
}
_TOP_K = 50
# What is said elsewhere, or has nothing to do with the choice of a token.
_APART = set(
    "do_sample eos_token_id pad_token_id bos_token_id decoder_start_token_id max_new_tokens max_length use_cache "
    "cache_implementation return_dict_in_generate output_attentions output_hidden_states output_scores output_logits "
    "transformers_version _from_model_config disable_compile".split()
)
# What changes nothing where it is alone.
_ALONE = {"num_beams": 1, "num_return_sequences": 1, "num_beam_groups": 1, "guidance_scale": 1, "min_length": 0}


class Choosing:
    """Chooses tokens one after the other.

    Args:
        prompts: ids of each prompt, without padding; processors look at what was said before.
        config: how: greedy, or sampled with torch's own random numbers (`torch.manual_seed`); ids that end a text, and
            the one that stands behind its end.
        processors: further ones, before those that only sampling has.
        stop: further ids that end a text.

    Raises:
        UsageError: the configuration asks for what is not done here (beams, say).
    """

    def __init__(
        self,
        prompts: Sequence[Tensor],
        config: GenerationConfig | None = None,
        processors: LogitsProcessorList | None = None,
        stop: int | Sequence[int] | None = None,
    ) -> None:
        config = GenerationConfig() if config is None else config
        _check(config)
        stops = [*_ids(stop), *_ids(config.eos_token_id)]
        self._stops = torch.tensor(stops, dtype=torch.int64)
        # As transformers, which takes the first of them where there is no other.
        self._pad = config.pad_token_id if config.pad_token_id is not None else (stops or [0])[0]
        self._samples = bool(config.do_sample)
        longest = max(map(len, prompts))
        padding = torch.tensor([longest - len(prompt) for prompt in prompts])
        self._said = torch.stack(
            [torch.nn.functional.pad(p, (longest - len(p), 0), value=int(self._pad)) for p in prompts]
        )
        self._ended = torch.zeros(len(prompts), dtype=torch.bool)
        self._processors = LogitsProcessorList(
            [*_before(config, stops, longest, padding), *(processors or ()), *_warpers(config)]
        )

    def next(self, logits: Tensor) -> Tensor:
        """The next token of each prompt, `[batch]`, int64.

        Args:
            logits: `[batch, vocabulary]`, any float.
        """
        scores = self._processors(self._said, logits.to(torch.float32, copy=True))  # type: ignore[arg-type]  # int64
        chosen = torch.multinomial(scores.softmax(-1), 1).squeeze(1) if self._samples else scores.argmax(-1)
        chosen = torch.where(self._ended, self._pad, chosen)
        self._said = torch.cat([self._said, chosen[:, None]], 1)
        self._ended = self._ended | torch.isin(chosen, self._stops)
        return chosen

    @property
    def ended(self) -> bool:
        """Whether every text has."""
        return bool(self._ended.all())


def _ids(given: int | Sequence[int] | None) -> list[int]:
    return [] if given is None else [given] if isinstance(given, int) else [*given]


def _check(config: GenerationConfig) -> None:
    for name, value in config.to_diff_dict().items():
        if value is None or value is False or name in _NEUTRAL or name in _APART:
            continue
        if name not in _ALONE or value != _ALONE[name]:
            raise UsageError(
                f"The generation config says {name}={value!r}, which is not done here: tokens are chosen one by one, "
                f"greedy or sampled, by {', '.join(_NEUTRAL)}. Leave it out, or give a processor of your own."
            )


def _said(config: GenerationConfig, name: str) -> Any:
    """What a configuration says, where it changes anything."""
    value = getattr(config, name, None)
    if value is None and name == "top_k":
        value = _TOP_K
    return None if value in (None, _NEUTRAL[name]) else value


def _before(config: GenerationConfig, stops: list[int], prompt: int, padding: Tensor) -> list[Any]:
    """What transformers does with logits in any case, in its order.

    Raises:
        UsageError: a text should not end, and nothing ends it.
    """
    made: list[Any] = []
    if penalty := _said(config, "repetition_penalty"):
        # Versions before 5.23 count padding as something that was said.
        knows = "prompt_ignore_length" in inspect.signature(RepetitionPenaltyLogitsProcessor).parameters
        more = {"prompt_ignore_length": padding} if knows else {}
        made.append(RepetitionPenaltyLogitsProcessor(penalty, **more))
    if size := _said(config, "no_repeat_ngram_size"):
        made.append(NoRepeatNGramLogitsProcessor(size))
    if least := _said(config, "min_new_tokens"):
        if not stops:
            raise UsageError("The generation config has min_new_tokens, and no eos_token_id that would end a text.")
        made.append(MinNewTokensLengthLogitsProcessor(prompt, least, stops))
    if unsaid := _said(config, "suppress_tokens"):
        made.append(SuppressTokensLogitsProcessor(unsaid))
    return made


def _warpers(config: GenerationConfig) -> list[Any]:
    """What it does with them before it draws one, in its order."""
    if not config.do_sample:
        return []
    kinds = {
        "temperature": TemperatureLogitsWarper,
        "top_k": TopKLogitsWarper,
        "top_p": TopPLogitsWarper,
        "min_p": MinPLogitsWarper,
        "typical_p": TypicalLogitsWarper,
    }
    return [kind(value) for name, kind in kinds.items() if (value := _said(config, name)) is not None]
