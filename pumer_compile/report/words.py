"""Words for ids and answers for logits, where the folder of a model says what they mean."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from .data import Answer, Ranked

log = logging.getLogger("pumer_compile")
BEST = 3
"""How many answers of each side are shown."""


def tokenizer_of(processor: object) -> Any:
    """The tokenizer of a processor, or of a model's folder; None where there is none. No code of a folder runs."""
    if processor is None:
        return None
    if not isinstance(processor, str | Path):
        found = getattr(processor, "tokenizer", processor)
        return found if hasattr(found, "convert_ids_to_tokens") else None
    if not any((Path(processor) / name).is_file() for name in ("tokenizer.json", "tokenizer_config.json", "vocab.txt")):
        return None
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(processor, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # a tokenizer may lack a library of its own; the report then shows ids
        log.warning("The tokenizer of %s could not be loaded (%s); the report shows ids.", processor, error)
        return None


def words_of(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """A word, or a piece of one, for each id; the id itself without a tokenizer."""
    if tokenizer is None:
        return [str(i) for i in ids]
    return [str(tokenizer.decode([i])).strip() or str(tokenizer.convert_ids_to_tokens(i)) for i in ids]


def text_of(ids: Sequence[int], mask: Sequence[int] | None, placeholders: set[int], tokenizer: Any) -> str:
    """A prompt to read: without padding, each run of an image's placeholders as `[image]`."""
    parts: list[str] = []
    for i, word in enumerate(words_of(ids, tokenizer)):
        if mask is not None and not mask[i]:
            continue
        if ids[i] in placeholders:
            if not parts or parts[-1] != "[image]":
                parts.append("[image]")
        else:
            parts.append(word)
    return " ".join(parts)


class Answers:
    """What outputs say.

    Args:
        config: of the model, whose `id2label` names the answers of a classifier; None.
        tokenizer: names those of a language model; None.
    """

    def __init__(self, config: Any, tokenizer: Any) -> None:
        labels = getattr(config, "id2label", None)
        named = isinstance(labels, Mapping) and not all(str(v) == f"LABEL_{k}" for k, v in labels.items())
        self.labels = {int(k): str(v) for k, v in labels.items()} if named and labels is not None else {}
        self.tokenizer = tokenizer

    def of(self, sides: Mapping[str, Mapping[str, Tensor]], row: int, batch: int, last: int) -> tuple[Answer, ...]:
        """Of one sample.

        Args:
            sides: outputs by name, of `unreduced`, `reduced` and so on.
            row: of the sample.
            batch: how many samples.
            last: its last word, counted from the end (-1).
        """
        names = [name for name, value in sides["reduced"].items() if value.ndim and value.shape[0] == batch]
        return tuple(
            self._of(name, {s: out[name] for s, out in sides.items() if name in out}, row, last) for name in names
        )

    def _of(self, name: str, sides: Mapping[str, Tensor], row: int, last: int) -> Answer:
        given = {side: value[row] for side, value in sides.items()}
        ranked: list[Ranked] = []
        if "logits" in name and all(value.is_floating_point() for value in given.values()):
            for side, value in given.items():
                value = value[last] if value.ndim == 2 and value.shape[0] >= -last else value
                if value.ndim == 1 and value.numel() > 1:
                    ranked.append(self._ranked(side, value, words=given[side].ndim == 2))
        return Answer(name, tuple(ranked), _difference(given.get("unreduced"), given.get("reduced")))

    def _ranked(self, side: str, logits: Tensor, *, words: bool) -> Ranked:
        logits = logits.float()
        top = logits.topk(min(BEST, logits.numel()))
        shares = logits.softmax(-1)[top.indices]
        names = [self._name(int(i), logits.numel(), words) for i in top.indices]
        margin = float(top.values[0] - top.values[1])
        return Ranked(side, tuple(zip(names, shares.tolist(), strict=True)), margin)

    def _name(self, number: int, of: int, words: bool) -> str:
        if words:
            return words_of([number], self.tokenizer)[0]
        return self.labels.get(number, str(number)) if len(self.labels) == of else str(number)


def _difference(before: Tensor | None, after: Tensor | None) -> float | None:
    """Of an output, relative to it in the Euclidean norm."""
    if before is None or after is None or before.shape != after.shape or not before.is_floating_point():
        return None
    size = torch.linalg.vector_norm(before.double())
    return float(torch.linalg.vector_norm(after.double() - before.double()) / size.clamp(min=1e-30))
