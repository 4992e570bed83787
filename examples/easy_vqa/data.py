"""Easy-VQA as tensors: 64x64 images of one coloured shape, short questions, thirteen answers.

The data is read from the installed `easy-vqa` package (`pip install easy-vqa`); nothing of it is kept here.
"""

from collections import Counter, defaultdict
from dataclasses import dataclass, replace

import numpy as np
import torch
from easy_vqa import (
    get_answers,
    get_test_image_paths,
    get_test_questions,
    get_train_image_paths,
    get_train_questions,
)
from PIL import Image
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer
from tokenizers.processors import TemplateProcessing
from torch import Tensor
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

TEXT_LENGTH = 16
"""Text tokens per sample, [CLS] and [SEP] included; the longest question needs twelve."""

IMAGE_SIZE = 64
SPECIAL_TOKENS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]

_READERS = {
    "train": (get_train_questions, get_train_image_paths),
    "test": (get_test_questions, get_test_image_paths),
}


def answers() -> list[str]:
    """The thirteen answers in a fixed order; an answer's position is its label."""
    return sorted(get_answers())


@dataclass(frozen=True)
class Split:
    """One split of the data set, whole in memory (50 MB for the training images)."""

    images: Tensor
    """uint8 [images, 3, 64, 64]"""
    image_index: Tensor
    """int64 [questions]: which image each question asks about."""
    input_ids: Tensor
    """int64 [questions, TEXT_LENGTH], padded with 0"""
    attention_mask: Tensor
    """int64 [questions, TEXT_LENGTH]: 1 at words, 0 at padding"""
    labels: Tensor
    """int64 [questions]"""

    def __len__(self) -> int:
        return len(self.labels)

    def subset(self, chosen: Tensor) -> "Split":
        """The questions where `chosen`, bool [questions], is true; the images are shared."""
        return replace(
            self,
            image_index=self.image_index[chosen],
            input_ids=self.input_ids[chosen],
            attention_mask=self.attention_mask[chosen],
            labels=self.labels[chosen],
        )

    def batch(self, rows: Tensor) -> dict[str, Tensor]:
        """ViLT's inputs for the questions `rows`, by forward argument.

        `pixel_values` is float32 [batch, 3, 64, 64] in [-1, 1]; `pixel_mask`, int64 [batch, 64, 64], is all
        ones.
        """
        pixels = self.images[self.image_index[rows]]
        return {
            "input_ids": self.input_ids[rows],
            "attention_mask": self.attention_mask[rows],
            "pixel_values": normalise(pixels),
            "pixel_mask": torch.ones(len(rows), IMAGE_SIZE, IMAGE_SIZE, dtype=torch.int64),
        }


def normalise(pixels: Tensor) -> Tensor:
    """uint8 pixels to float32 in [-1, 1], as ViLT's image processor does (mean and deviation 0.5)."""
    return (pixels.float() / 255 - 0.5) / 0.5


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A word-level tokenizer over the words of the training questions."""
    split_words = BertPreTokenizer()
    words = {
        word for question in get_train_questions()[0] for word, _ in split_words.pre_tokenize_str(question.lower())
    }
    vocabulary = {word: index for index, word in enumerate(SPECIAL_TOKENS + sorted(words))}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.normalizer = BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = split_words
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        special_tokens=[(token, vocabulary[token]) for token in ("[CLS]", "[SEP]")],
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


def load_split(name: str, tokenizer: PreTrainedTokenizerBase) -> Split:
    """Read the split `name` ("train" or "test")."""
    read_questions, read_image_paths = _READERS[name]
    questions, answer_texts, image_ids = read_questions()
    paths = read_image_paths()
    row_of_image = {image_id: row for row, image_id in enumerate(sorted(paths))}
    images = torch.stack([_read_image(paths[image_id]) for image_id in sorted(paths)])
    text = tokenizer(questions, padding="max_length", max_length=TEXT_LENGTH, return_tensors="pt")
    label_of = {answer: label for label, answer in enumerate(answers())}
    return Split(
        images=images,
        image_index=torch.tensor([row_of_image[image_id] for image_id in image_ids]),
        input_ids=text["input_ids"],
        attention_mask=text["attention_mask"],
        labels=torch.tensor([label_of[answer] for answer in answer_texts]),
    )


def question_only_correct() -> tuple[int, int]:
    """Correct and total test answers of a baseline that never looks at the image.

    It answers each test question with the most frequent training answer to the same text; a text that
    training never asked gets the most frequent training answer overall.
    """
    questions, answer_texts, _ = get_train_questions()
    per_question: dict[str, Counter[str]] = defaultdict(Counter)
    for question, answer in zip(questions, answer_texts, strict=True):
        per_question[question][answer] += 1
    overall = Counter(answer_texts)
    test_questions, test_answers, _ = get_test_questions()
    guesses = [per_question.get(question, overall).most_common(1)[0][0] for question in test_questions]
    return sum(guess == answer for guess, answer in zip(guesses, test_answers, strict=True)), len(test_answers)


def _read_image(path: str) -> Tensor:
    """The image at `path` as uint8 [3, 64, 64]."""
    with Image.open(path) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)
