"""Greedy choices: each step picks the best token and changes what the others are worth.

A step needs the one before it, so no product of matrices gives all picks at once. Written out, a choice of 256 tokens
is thousands of nodes. In an exported graph, the steps are one `while_loop`: ONNX's Loop, of the size of a single step,
which onnxruntime, TensorRT and OpenVINO take. At 64 of 576 tokens that is 42 nodes for 959, and a TensorRT-RTX engine
in 0.25 s for 5.6 s; under onnxruntime on one core 0.7% to 0.8% of a CLIP-L tower's time (24 times one layer), and 1.9%
to 2.6% of four at 256 of 2,304, nearly all of it the cosines. Eagerly, and under `torch.compile` (whose Inductor fails
on a `while_loop` with open sizes in 2.13), they are a loop of Python with the same arithmetic. ONNX's Scan does the
same, but OpenVINO's front end has none; an operator of our own would be written anew for every converter.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch._higher_order_ops.while_loop import while_loop_op

Step = Callable[..., Sequence[Tensor]]

MANY = 1024
"""Rows from which on a product of rows with themselves is taken apart."""


def repeated(step: Step, times: int, state: Sequence[Tensor], *fixed: Tensor) -> tuple[Tensor, ...]:
    """The state after `times` steps.

    Args:
        step: `step(number, *state, *fixed)` gives the next state, of the same shapes, contiguous; `number` is int64
            without a dimension, from 0. It must read no tensor but these.
        times: how many.
        state: before the first.
        fixed: what every step reads.
    """
    state = [value.contiguous() for value in state]
    if times < 1 or torch.compiler.is_dynamo_compiling() or not torch.compiler.is_exporting():
        for number in range(times):
            state = list(step(torch.tensor(number), *state, *fixed))
        return tuple(state)

    def more(number: Tensor, *_: Tensor) -> Tensor:
        return number < times

    def body(number: Tensor, *given: Tensor) -> tuple[Tensor, ...]:
        return (number + 1, *step(number, *given))

    first = torch.zeros((), dtype=torch.int64)
    _, *after = while_loop_op(more, body, (first, *state), fixed)  # type: ignore[arg-type]  # any number of tensors
    return tuple(after)


def pick(scores: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The largest score of each row, ties to the lowest index.

    Args:
        scores: `[n, tokens]`, float32.

    Returns:
        The score `[n, 1]`, where it stands (`[n]`, int64), and true there alone (`[n, tokens]`, bool).
    """
    best = scores.amax(-1, keepdim=True)
    index = torch.arange(scores.shape[-1], device=scores.device, dtype=torch.float32)
    place = torch.where(scores == best, index, scores.shape[-1] - 1.0).amin(-1, keepdim=True)
    return best, place.squeeze(-1).long(), place == index


def row_at(table: Tensor, place: Tensor) -> Tensor:
    """One row of each table: `[n, rows, columns]` and `[n]` to `[n, columns]`."""
    first = torch.arange(table.shape[0], device=table.device) * table.shape[1]
    return table.reshape(-1, table.shape[2]).index_select(0, first + place)


def cosines(features: Tensor, epsilon: float = 0.0) -> Tensor:
    """Cosine of every pair, `[n, tokens, tokens]`; a token of zeros is like nothing.

    Args:
        features: `[n, tokens, width]`, float32.
        epsilon: what is added to the square of a norm.
    """
    square = (features * features).sum(-1, keepdim=True) + epsilon
    return _with_itself(features / square.sqrt().clamp(min=1e-30))


def _with_itself(rows: Tensor) -> Tensor:
    """Products of all pairs of rows. Of many rows most of a selection's time: what is left of the diagonal is what is
    right of it, and is not computed twice."""
    tokens = rows.shape[1]
    if tokens < MANY:
        return rows @ rows.transpose(-1, -2)
    first, second = rows[:, : tokens // 2], rows[:, tokens // 2 :]
    across = first @ second.transpose(-1, -2)
    upper = torch.cat([_with_itself(first), across], 2)
    return torch.cat([upper, torch.cat([across.transpose(-1, -2), _with_itself(second)], 2)], 1)
