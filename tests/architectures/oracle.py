"""Reducing a model by hand: its own forward, with some layers run by functions that reduce in between.

Nothing here comes from the package: an `Oracle` holds two streams and what was done to them so far, with the loops and
lists of `helpers.py`. A test replaces the `forward` of the layers that hold cross-modal attention, which tell the
oracle what they attend to, and bring to the reduced tokens what comes from elsewhere.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from tests.support.helpers import combine, paper_counts, published_counts, published_softmax, reduce_image, reduce_text

PRUNE, MERGE_IMAGE, MERGE_TEXT = 0.1, 0.3, 0.2

Groups = list[list[int]]
"""The old tokens of each new one, of one sample."""


@dataclass(eq=False)
class Stream:
    """The tokens of one modality in one forward pass.

    Attributes:
        weights: what every token counts for, `[batch][token]`: 0 is padding, and more than 1 a merged token.
        learned: leading tokens that no semantics but `safe` knows of.
        steps: for every reduction so far the groups of each sample, and the sizes they were averaged by.
        counts: tokens before the first reduction, and after each.
    """

    weights: list[list[float]]
    learned: int = 0
    steps: list[tuple[list[Groups], list[list[float]] | None]] = field(default_factory=list)
    counts: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.counts = [len(self.weights[0])]

    def bring(self, value: Tensor) -> Tensor:
        """`[batch, tokens, width]` from whatever epoch to the newest. No two epochs have the same length."""
        assert len(set(self.counts)) == len(self.counts) and value.shape[1] in self.counts
        for groups, sizes in self.steps[self.counts.index(value.shape[1]) :]:
            rows = [
                combine(sample, members, None if sizes is None else sizes[b])
                for b, (sample, members) in enumerate(zip(value, groups, strict=True))
            ]
            value = torch.stack(rows).to(value.dtype)
        return value

    def bring_mask(self, mask: Tensor) -> Tensor:
        """An additive mask over keys, `[batch, 1, 1, tokens]`: the logarithm of the mean of its exponentials."""
        shares = self.bring(mask[:, 0, 0].exp().unsqueeze(-1)).squeeze(-1)
        return shares.log().clamp(min=torch.finfo(mask.dtype).min).unsqueeze(1).unsqueeze(1)


class Attended(NamedTuple):
    """What an attention gives: its output before the projection, its keys `[batch, heads, keys, size]` and its
    probabilities `[batch, heads, queries, keys]`."""

    output: Tensor
    keys: Tensor
    probabilities: Tensor


class Oracle:
    """Two streams and their reducers under one semantics.

    Args:
        semantics: `reference`, `paper` or `safe`.
        mask: padding of the text, `[batch, tokens]`.
        image: image tokens.
        learned: class tokens that lead the image.
        wrong: in the reduction of this number, counted from 1, a pruned image token takes the place of a kept group.
    """

    def __init__(self, semantics: str, mask: Tensor, image: int, learned: int = 0, wrong: int | None = None) -> None:
        self.semantics, self.wrong = semantics, wrong
        self.text = Stream(mask.double().tolist())
        self.image = Stream([[1.0] * image for _ in mask], learned)

    # --- attention --------------------------------------------------------------------------------------------------

    def attend(
        self,
        attention: Any,
        queries: Tensor,
        context: Tensor,
        over: Sequence[Stream | int],
        mask: Tensor | None = None,
    ) -> Attended:
        """An attention with layers `query`, `key` and `value`, in a layer that is reduced.

        Args:
            attention: the module.
            queries, context: what it asks and what it looks at, at the newest tokens.
            over: the streams along the keys in order; an integer is a number of tokens of no stream.
            mask: additive, `[batch, 1, 1 or all alike, keys]`, as it was before any reduction.
        """
        size = attention.attention_head_size
        query, keys, values = (
            layer(x).unflatten(-1, (-1, size)).transpose(1, 2)
            for layer, x in ((attention.query, queries), (attention.key, context), (attention.value, context))
        )
        scores = query @ keys.transpose(-1, -2) / math.sqrt(size)
        if self.semantics == "reference":
            probabilities = _published(scores, None if mask is None else self._key_weights(over))
        else:
            probabilities = (scores if mask is None else scores + self._key_mask(over, mask)).softmax(-1)
        return Attended((probabilities @ values).transpose(1, 2).flatten(2), keys, probabilities)

    def _key_weights(self, over: Sequence[Stream | int]) -> list[list[float]]:
        batch = range(len(self.text.weights))
        parts = [[[1.0] * part for _ in batch] if isinstance(part, int) else part.weights for part in over]
        return [[w for part in parts for w in part[b]] for b in batch]

    def _key_mask(self, over: Sequence[Stream | int], mask: Tensor) -> Tensor:
        lengths = [part if isinstance(part, int) else part.counts[0] for part in over]
        pieces = mask[:, :, :1].split(lengths, -1)
        return torch.cat(
            [p if isinstance(part, int) else part.bring_mask(p) for p, part in zip(pieces, over, strict=True)], -1
        )

    # --- reducing ---------------------------------------------------------------------------------------------------

    def reduce(self, attention: Tensor, image_keys: Tensor, text_keys: Tensor) -> None:
        """Reduce both streams from now on.

        Args:
            attention: from text to image, after softmax, `[batch, heads, text, image]`.
            image_keys: `[batch, heads, image, size]`.
            text_keys: `[batch, heads, text, size]`.
        """
        image, text, safe = self.image.counts[-1], self.text.counts[-1], self.semantics == "safe"
        count = paper_counts if self.semantics == "paper" else published_counts
        keep, merge, merge_text = count(image, text, PRUNE, MERGE_IMAGE, MERGE_TEXT)
        similarity = "dot" if self.semantics == "paper" else "cosine"
        samples = zip(attention.double().numpy(), image_keys.double().numpy(), text_keys.double().numpy(), strict=True)
        image_groups, text_groups = [], []
        for b, (seen, own_keys, word_keys) in enumerate(samples):
            words = [w > 0 for w in self.text.weights[b]] if safe else None
            pixels = [w > 0 for w in self.image.weights[b]] if safe else None
            learned = self.image.learned if safe else 0
            image_groups.append(
                reduce_image(
                    seen,
                    own_keys,
                    keep,
                    merge,
                    similarity=similarity,
                    votes=words,
                    learned=learned,
                    real=pixels,
                    in_order=safe,
                )
            )
            text_groups.append(reduce_text(word_keys, merge_text, similarity=similarity, real=words, in_order=safe))
        if self.wrong == len(self.image.steps) + 1:
            image_groups = [[*groups[:-1], _missing(groups, image)] for groups in image_groups]
        self._step(self.image, image_groups)
        self._step(self.text, text_groups)

    def reduce_joint(
        self, carrier: Tensor, attended: Attended, over: Sequence[Stream | int], reduces: bool = True
    ) -> Tensor:
        """The carrier of an attention over both streams side by side, reduced.

        Args:
            carrier: `[batch, tokens, width]`.
            attended: what the attention gave.
            over: as in `attend`; queries and keys are the same.
            reduces: whether it is a site.
        """
        if not reduces:
            return carrier
        lengths = [part if isinstance(part, int) else part.counts[-1] for part in over]
        text, image = over.index(self.text), over.index(self.image)
        keys, rows = attended.keys.split(lengths, 2), attended.probabilities.split(lengths, 2)
        pieces = carrier.split(lengths, 1)
        self.reduce(rows[text].split(lengths, 3)[image], keys[image], keys[text])
        return torch.cat([p if isinstance(x, int) else x.bring(p) for p, x in zip(pieces, over, strict=True)], 1)

    def _step(self, stream: Stream, groups: list[Groups]) -> None:
        stream.steps.append((groups, stream.weights if self.semantics == "safe" else None))
        stream.counts.append(len(groups[0]))
        totals = [[[w[i] for i in group] for group in sample] for w, sample in zip(stream.weights, groups, strict=True)]
        if self.semantics == "reference" and stream is self.image:
            stream.weights = [[1.0] * len(sample) for sample in groups]
        elif self.semantics == "safe":
            stream.weights = [[sum(group) for group in sample] for sample in totals]
        else:
            stream.weights = [[sum(group) / len(group) for group in sample] for sample in totals]


def _missing(groups: Groups, tokens: int) -> list[int]:
    """The first token of no group, alone."""
    there = {i for group in groups for i in group}
    return [next(i for i in range(tokens) if i not in there)]


def _published(scores: Tensor, weights: Iterable[list[float]] | None) -> Tensor:
    """The published masked softmax, one head of one sample after the other."""
    rows = [None] * len(scores) if weights is None else [torch.tensor(w).numpy() for w in weights]
    found = [
        torch.stack([torch.from_numpy(published_softmax(head.double().numpy(), row)) for head in sample])
        for sample, row in zip(scores, rows, strict=True)
    ]
    return torch.stack(found).to(scores.dtype)
