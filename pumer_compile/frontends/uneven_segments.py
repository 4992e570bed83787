"""Attention within segments of several lengths (windows at the border of an image, images of several sizes).

transformers' exporter attends to segments of one length at once, as a batch, and refuses others. Here those of each
length are a batch of their own: as many attentions as there are lengths, and not one for each segment.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

TARGET = "transformers.exporters.exporter_dynamo._reshaped_vision_attention_forward"


def patch(original: Callable[..., Any]) -> Callable[..., Any]:
    """What `register_patch` asks for."""

    def forward(self: Any, hidden_states: Tensor, cu_seqlens: Tensor, *args: Any, **kwargs: Any) -> Any:
        if not hasattr(cu_seqlens, "_pumer_shadow"):  # the trace follows no sample (`capture/follow.py`)
            return original(self, hidden_states, cu_seqlens, *args, **kwargs)
        starts = cu_seqlens.tolist()
        lengths = [stop - start for start, stop in itertools.pairwise(starts)]
        if len(set(lengths)) == 1:
            return original(self, hidden_states, cu_seqlens, *args, **kwargs)
        dim = hidden_states.dim() - 2
        order, results = [], []
        for length in sorted(set(lengths)):
            segments = [s for s, n in zip(starts, lengths, strict=False) if n == length]
            rows = torch.tensor([start + i for start in segments for i in range(length)], device=hidden_states.device)
            bounds = torch.tensor([length * i for i in range(len(segments) + 1)], dtype=cu_seqlens.dtype)

            def own(value: Any, rows: Tensor = rows) -> Any:
                return _rows(value, rows, starts[-1])

            results.append(
                original(
                    self,
                    hidden_states.index_select(dim, rows),
                    bounds.to(cu_seqlens.device),
                    *map(own, args),
                    **{name: own(value) for name, value in kwargs.items()},
                )
            )
            order += [start + i for start in segments for i in range(length)]
        back = torch.tensor(sorted(range(len(order)), key=order.__getitem__), device=hidden_states.device)
        outputs = [result[0] if isinstance(result, tuple) else result for result in results]
        whole = torch.cat(outputs, dim).index_select(dim, back)
        return (whole, *results[0][1:]) if isinstance(results[0], tuple) else whole

    return forward


def _rows(value: Any, rows: Tensor, total: int) -> Any:
    """The rows of what has one for each token (angles of rotary positions), anything else as it is."""
    if isinstance(value, tuple | list):
        return type(value)(_rows(item, rows, total) for item in value)
    if not isinstance(value, Tensor) or total not in value.shape:
        return value
    return value.index_select(list(value.shape).index(total), rows)
