"""Arrangement: which token of the vision tower each place of a prompt holds, where tokens only move on the way.

Between projector and prompt, models of LLaVA's kind move tokens: the crops of one image are put together as a picture,
cut to its borders and read row by row, with a learned separator behind each row; the images of a batch are taken apart
and joined. All of it is views, cuts and joins of fixed sizes, so running it once on token numbers says where each goes.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import AxisError
from .nodes import after_attention, describe, values
from .operators import CASTS, MOVES

SEPARATOR = -1


@dataclass(frozen=True)
class Arrangement:
    """Where the image tokens of one prompt come from; the same in every prompt of the batch.

    Attributes:
        projected: the last value before tokens only move, `[rows, tokens, width]`.
        rows: of it in one prompt: images, or crops.
        origin: for each place, row by row of the prompt's own: `row * tokens + token`, or `SEPARATOR`; int64.
    """

    projected: fx.Node
    rows: int
    origin: Tensor

    @property
    def tokens(self) -> int:
        """In each row."""
        return int(values(self.projected)[0].shape[1])

    @property
    def in_place(self) -> bool:
        """Whether each prompt holds all tokens of one row, in their order."""
        return self.rows == 1 and self.origin.tolist() == list(range(self.tokens))


def arrangement(scatter: fx.Node, source: fx.Node, batch: int) -> Arrangement:
    """How the tokens of `source`, which `scatter` puts into `batch` prompts one after the other, are arranged.

    Raises:
        AxisError: more than moving happens to them, a token is there twice, or prompts differ.
    """
    projected = _projected(scatter, source)
    shape = values(projected)[0].shape
    if len(shape) != 3:
        raise AxisError(
            f"{describe(projected)} gives image features {tuple(shape)} on the way to {describe(scatter)}; from "
            "[rows, tokens, width] on, tokens may only be moved (views, cuts, joins)."
        )
    rows, tokens, width = (int(size) for size in shape)
    numbers = torch.arange(rows * tokens, dtype=torch.int32).view(rows, tokens, 1).expand(rows, tokens, width)
    origin = _moved(source, projected, numbers).reshape(-1, width).long()
    if not bool((origin == origin[:, :1]).all()):
        raise AxisError(f"{describe(scatter)} fills in features that are mixed from parts of several tokens.")
    prompts = origin[:, 0].reshape(batch, -1)
    share = rows // batch
    first = torch.where(prompts < 0, 0, torch.arange(batch).unsqueeze(1) * share * tokens)
    alike = prompts - first
    if rows % batch or not bool((alike == alike[0]).all()) or int(alike.max()) >= share * tokens:
        raise AxisError(
            f"{describe(scatter)} arranges image tokens otherwise in another prompt of the batch (images of another "
            "shape, or another number of them). Compile for a batch of one, or for prompts of one form."
        )
    real = alike[0][alike[0] >= 0]
    if real.unique().numel() != real.numel():
        raise AxisError(f"{describe(scatter)} puts one image token at several places, which is not supported.")
    return Arrangement(projected, share, alike[0])


def _projected(scatter: fx.Node, source: fx.Node) -> fx.Node:
    """The one value of a vision tower that everything else in `source` is moved from."""
    found: list[fx.Node] = []
    seen: set[fx.Node] = set()
    stack = [source]
    while stack:
        node = stack.pop()
        if node in seen:
            continue
        seen.add(node)
        if _moves(node):
            stack.extend(node.all_input_nodes)
        elif after_attention(node):
            found.append(node)
    if len(found) != 1:
        listed = "; ".join(describe(node) for node in found)
        raise AxisError(
            f"{describe(scatter)} joins image features of several origins ({listed}); one projector's output, moved "
            "about, is supported."
        )
    return found[0]


def _moves(node: fx.Node) -> bool:
    return node.target in MOVES or node.target is operator.getitem


def _moved(source: fx.Node, projected: fx.Node, numbers: Tensor) -> Tensor:
    """`source`, computed with token numbers in place of features, and `SEPARATOR` for everything else."""
    known: dict[fx.Node, Any] = {projected: numbers}
    order = [source]
    while order:
        node = order[-1]
        missing = [n for n in node.all_input_nodes if n not in known] if _moves(node) else []
        if node in known:
            order.pop()
        elif missing:
            order.extend(missing)
        elif not _moves(node):
            (value,) = values(node)
            known[node] = torch.full([int(size) for size in value.shape], SEPARATOR, dtype=torch.int32)
        elif node.target in CASTS:
            known[node] = known[node.all_input_nodes[0]]
        else:
            args = fx.map_arg(node.args, known.__getitem__)
            known[node] = node.target(*args, **dict(node.kwargs))  # type: ignore[operator]  # an operator that moves
    result = known[source]
    assert isinstance(result, Tensor)
    return result
