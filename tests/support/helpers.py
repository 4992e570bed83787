"""The algorithms a second time, with loops and lists: what the tests hold the package against.

Nothing here is shared with the package. Everything works on one sample, with Python lists of indices and NumPy in
float64 for decisions; only `combine` touches torch tensors, so that gradients can be compared too.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from decimal import ROUND_HALF_EVEN, Decimal
from typing import Any

import numpy as np
import torch
from torch import Tensor


def half_even(value: float) -> int:
    """Nearest integer, ties to even, of a float as it is stored."""
    return int(Decimal(value).quantize(Decimal(1), rounding=ROUND_HALF_EVEN))


def published_counts(
    image: int, text: int, prune: float, merge_image: float, merge_text: float
) -> tuple[int, int, int]:
    """Image tokens kept and merged away, and text tokens merged away, as the published code counts them."""
    keep = image - half_even(prune * image)
    return (
        keep,
        min(half_even(merge_image * image), (keep - 1) // 2),
        min(half_even(merge_text * text), (text - 1) // 2),
    )


def paper_counts(image: int, text: int, prune: float, merge_image: float, merge_text: float) -> tuple[int, int, int]:
    """The same by Algorithm 1: k' = (1 - k)|V|, r' = r|V_p|, t' = t|T|."""
    keep = half_even((1 - prune) * image)
    return (
        keep,
        min(half_even(merge_image * keep), (keep - 1) // 2),
        min(half_even(merge_text * text), (text - 1) // 2),
    )


def order(scores: Sequence[float], count: int) -> list[int]:
    """Indices of the `count` largest scores, largest first, the first of equals first."""
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))[:count]


def saliency(attention: np.ndarray, votes: Sequence[bool] | None = None) -> list[float]:
    """Attention an image token receives: mean over heads, sum over the text rows that vote.

    `attention` is `[heads, text, image]`.
    """
    heads, text, image = attention.shape
    scores = []
    for v in range(image):
        total = 0.0
        for t in range(text):
            if votes is None or votes[t]:
                total += sum(float(attention[h, t, v]) for h in range(heads)) / heads
        scores.append(total)
    return scores


def match(
    keys: np.ndarray,
    merge: int,
    similarity: str = "cosine",
    *,
    protected: int = 1,
    real: Sequence[bool] | None = None,
) -> list[tuple[int, int]]:
    """Pairs `(token that merges away, token it merges into)`, most similar first.

    `keys` is `[tokens, size]`, mean over heads. With `real`, a pair of a real token and padding comes after every
    other pair. Token 0 and the other `protected` ones stay.
    """
    n = len(keys)
    pairs = []
    for a in range(0, n, 2):
        if a < protected:
            continue
        best = None
        for b in range(1, n, 2):
            if b < protected:
                continue
            score = float(np.dot(keys[a], keys[b]))
            if similarity == "cosine":
                score /= float(np.linalg.norm(keys[a]) * np.linalg.norm(keys[b]))
            apart = real is not None and real[a] != real[b]
            rank = (not apart, score if not apart else 0.0)
            if best is None or rank > best[0]:
                best = (rank, b)
        if best is not None:
            pairs.append((best[0], a, best[1]))
    pairs.sort(key=lambda p: (not p[0][0], -p[0][1], p[1]))
    return [(a, b) for _, a, b in pairs[:merge]]


def margin(keys: np.ndarray, merge: int, *, protected: int = 1) -> float:
    """How far (in cosine) the decisions of `match` are from flipping."""
    unit = keys / np.linalg.norm(keys, axis=-1, keepdims=True)
    best, gap = [], math.inf
    for a in range(2, len(keys), 2):
        scores = sorted((float(unit[a] @ unit[b]) for b in range(1, len(keys), 2)), reverse=True)
        if scores:
            best.append(scores[0])
        if len(scores) > 1:
            gap = min(gap, scores[0] - scores[1])
    best.sort(reverse=True)
    return min([gap, *(x - y for x, y in list(itertools.pairwise(best))[:merge])])


def groups(tokens: int, pairs: Sequence[tuple[int, int]], in_order: bool = False) -> list[list[int]]:
    """Old tokens of each new one: unmerged even positions in order, then the odd ones with what joined them; or all by
    the place of the first in each list.

    Where nothing merges, the order stays.
    """
    if not pairs:
        return [[i] for i in range(tokens)]
    gone = {a for a, _ in pairs}
    stay = [[a] for a in range(0, tokens, 2) if a not in gone]
    odd = [[b, *(a for a, target in pairs if target == b)] for b in range(1, tokens, 2)]
    return sorted(stay + odd) if in_order else stay + odd


def combine(tokens: Tensor, members: Sequence[Sequence[int]], sizes: Sequence[float] | None = None) -> Tensor:
    """Mean of each group of `tokens [n, width]`, weighted by `sizes`; a group of size 0 is its plain mean."""
    rows = []
    for group in members:
        weights = [1.0] * len(group) if sizes is None else [float(sizes[i]) for i in group]
        if sum(weights) == 0:
            weights = [1.0] * len(group)
        total = sum((w * tokens[i].double() for w, i in zip(weights, group, strict=True)), torch.zeros(()))
        rows.append(total / sum(weights))
    return torch.stack(rows)


def reduce_image(
    attention: np.ndarray,
    keys: np.ndarray,
    keep: int,
    merge: int,
    *,
    similarity: str = "cosine",
    votes: Sequence[bool] | None = None,
    learned: int = 0,
    real: Sequence[bool] | None = None,
    sort: bool = True,
    first_stays: bool = True,
    in_order: bool = False,
) -> list[list[int]]:
    """Groups of old image tokens of one sample after pruning and merging.

    `attention` is `[heads, text, image]`, `keys` `[heads, image, size]`; `learned` leading tokens stay and lead. Token
    0 never merges away, unless it is not said to stay. `in_order`: tokens stay in their old order.
    """
    scores = saliency(attention, votes)
    kept = list(range(learned)) + [i for i in order(scores, len(scores)) if i >= learned]
    kept = kept[:keep] if sort else list(range(keep))
    kept = sorted(kept) if in_order else kept
    mean = keys.astype(np.float64).mean(0)[kept]
    alive = None if real is None else [real[i] for i in kept]
    pairs = match(mean, merge, similarity, protected=max(int(first_stays), learned), real=alive)
    return [[kept[i] for i in group] for group in groups(keep, pairs, in_order)]


def reduce_text(
    keys: np.ndarray,
    merge: int,
    *,
    similarity: str = "cosine",
    real: Sequence[bool] | None = None,
    first_stays: bool = True,
    in_order: bool = False,
) -> list[list[int]]:
    """Groups of old text tokens of one sample after merging; `keys` is `[heads, text, size]`."""
    mean = keys.astype(np.float64).mean(0)
    return groups(len(mean), match(mean, merge, similarity, protected=int(first_stays), real=real), in_order)


def published_softmax(scores: np.ndarray, weights: np.ndarray | None) -> np.ndarray:
    """The published masked softmax of one head of one sample: `scores [queries, keys]`, `weights [keys]`.

    Query i sees key i whatever its weight, also in cross-attention.
    """
    eps = 1e-6
    queries, keys = scores.shape
    out = np.zeros((queries, keys))
    for q in range(queries):
        highest = max(float(scores[q, k]) for k in range(keys))
        row = []
        for k in range(keys):
            x = math.exp(float(scores[q, k]) - highest)
            if weights is not None:
                x *= 1.0 if q == k else float(weights[k])
            row.append(x)
        for k in range(keys):
            out[q, k] = (row[k] + eps / keys) / (sum(row) + eps)
    return out


def op_names(module: torch.fx.GraphModule) -> set[str]:
    """Names of the operators in a graph, without overload: `{"aten.linear", ...}`."""
    found: set[str] = set()
    for node in module.graph.nodes:
        if isinstance(node.target, torch._ops.OpOverload):
            found.add(str(node.target.overloadpacket))
    return found


def count_op(module: torch.fx.GraphModule, target: Any) -> int:
    """How many nodes call `target`."""
    return sum(node.target is target for node in module.graph.nodes)


DATA_DEPENDENT = (
    "scatter",
    "topk",
    "sort",
    "nonzero",
    "gather",
    "masked_select",
    "unique",
    "index_put",
    "index_select",
    "argmax",
    "argmin",
    "kthvalue",
    "multinomial",
)
"""Parts of operator names that no reducer may bring into an exported graph."""


def data_dependent(module: torch.fx.GraphModule) -> set[str]:
    """Operators of a graph that pick elements by value in a way that runtimes disagree on."""
    return {name for name in op_names(module) if any(word in name for word in DATA_DEPENDENT)}
