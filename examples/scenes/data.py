"""What `generate` wrote, as tensors."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from .draw import NOBODY
from .questions import ANSWERS, PLURALS, SHARES
from .scene import MOST, SIDE, VALUES

TEXT_LENGTH = 16
"""Text tokens of a question, [CLS] and [SEP] included; the longest needs all of them."""
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
KINDS = tuple(SHARES)
NOT = -100
"""In a label: nothing to learn, as cross_entropy has it."""

_OTHER_WORDS = (
    "is there any how many are what colour shape texture size the thing things larger than more left right of above "
    "below where from do and have same"
)


def words() -> list[str]:
    """Every word of every question."""
    values = [value for values in VALUES.values() for value in values]
    return sorted({*_OTHER_WORDS.split(), *values, *PLURALS.values()})


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over `words`."""
    vocabulary = {word: index for index, word in enumerate(SPECIAL_TOKENS + words())}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_max_length=TEXT_LENGTH,
        model_input_names=["input_ids", "attention_mask"],
        pad_token="[PAD]",
        unk_token="[UNK]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
    )


@dataclass(frozen=True)
class Split:
    """One split: P pictures with Q questions each. Pictures stay on disk; the rest is in memory."""

    shards: list[np.ndarray[Any, Any]]
    """uint8 [pictures of a shard, 112, 112, 3] each, all but the last of one size"""
    input_ids: Tensor
    """int64 [P, Q, TEXT_LENGTH], padded with 0"""
    labels: Tensor
    """int64 [P, Q], places in `ANSWERS`"""
    kinds: Tensor
    """int64 [P, Q], places in `KINDS`"""
    mentions: Tensor
    """int64 [P, Q, 2, 2]: token and object of the two phrases; -1 where there is none"""
    owners: Tensor
    """uint8 [P, 196]: which object each cell shows, or NOBODY"""
    attributes: Tensor
    """int64 [P, MOST, 4]: values of the objects, places in `VALUES`; NOT where there is none"""
    centres: Tensor
    """float32 [P, MOST, 2]: x and y as shares of the side"""

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def attention_mask(self) -> Tensor:
        """int64 [P, Q, TEXT_LENGTH]: 1 at words, 0 at padding."""
        return (self.input_ids != 0).long()

    def pixels(self, pictures: Tensor) -> Tensor:
        """float32 [pictures, 3, 112, 112] in [-1, 1], as ViLT's image processor does (mean and deviation 0.5)."""
        size = len(self.shards[0])
        raw = np.stack([self.shards[number // size][number % size] for number in pictures.tolist()])
        return torch.from_numpy(raw).permute(0, 3, 1, 2).float().div_(127.5).sub_(1)

    def batch(self, questions: Tensor) -> dict[str, Tensor]:
        """ViLT's inputs for questions, int64 `[batch]`, counted through all pictures, by forward argument."""
        per_picture = self.labels.shape[1]
        ids = self.input_ids.flatten(0, 1)[questions]
        return {
            "input_ids": ids,
            "attention_mask": (ids != 0).long(),
            "pixel_values": self.pixels(questions // per_picture),
            "pixel_mask": torch.ones(len(questions), SIDE, SIDE, dtype=torch.int64),
        }


def load_split(folder: Path, name: str, tokenizer: PreTrainedTokenizerBase) -> Split:
    """Read a split that `generate` wrote: the shards that are whole, up to the first that is not.

    Raises:
        FileNotFoundError: there is none.
    """
    shards, told = [], []
    while (path := folder / f"{name}-{len(shards):04d}.json").exists():
        shards.append(np.load(path.with_suffix(".npy"), mmap_mode="r"))
        told.extend(json.loads(path.read_text(encoding="utf-8")))
    if not shards:
        raise FileNotFoundError(f"{folder} has no {name}-0000.json: run `python -m examples.scenes.generate {folder}`")
    asked = [question for picture in told for question in picture["questions"]]
    shape = len(told), len(told[0]["questions"])
    ids = tokenizer(
        [question["text"] for question in asked], padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt"
    )["input_ids"]
    return Split(
        shards=shards,
        input_ids=ids.view(*shape, TEXT_LENGTH),
        labels=torch.tensor([ANSWERS.index(question["answer"]) for question in asked]).view(shape),
        kinds=torch.tensor([KINDS.index(question["kind"]) for question in asked]).view(shape),
        mentions=_mentions(asked).view(*shape, 2, 2),
        owners=torch.tensor([list(bytes.fromhex(picture["owners"])) for picture in told], dtype=torch.uint8),
        attributes=_attributes(told),
        centres=_centres(told),
    )


def _mentions(asked: list[dict[str, Any]]) -> Tensor:
    """See `Split.mentions`; a word's token is one further on, behind [CLS]."""
    found = torch.full((len(asked), 2, 2), -1)
    for row, question in enumerate(asked):
        for i, (word, thing) in enumerate(question["mentions"]):
            found[row, i] = torch.tensor([word + 1, thing])
    return found


def _attributes(told: list[dict[str, Any]]) -> Tensor:
    found = torch.full((len(told), MOST, len(VALUES)), NOT)
    for row, picture in enumerate(told):
        for number, thing in enumerate(picture["scene"]):
            found[row, number] = torch.tensor([values.index(thing[name]) for name, values in VALUES.items()])
    return found


def _centres(told: list[dict[str, Any]]) -> Tensor:
    found = torch.zeros(len(told), MOST, 2)
    for row, picture in enumerate(told):
        for number, thing in enumerate(picture["scene"]):
            found[row, number] = torch.tensor([thing["x"] / SIDE, thing["y"] / SIDE])
    return found


def owned(owners: Tensor) -> Tensor:
    """Where cells show an object, bool like `owners`."""
    return owners != NOBODY
