"""Positions of prompts with images in three dimensions (M-RoPE), with padding in front left open.

Models count these positions in Python (`get_rope_index`), over the tokens that the mask leaves, which would fix the
mask. While only text in front of the image is padded, each position is that of the whole prompt less the padding before
it, because a token of text counts one: the whole prompt's positions are constants then, and the mask stays data.

Others find images among the ids themselves (Qwen Omni), all of which Python reads, which would fix every word. They are
given one id for all words.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

METHOD = "get_rope_index"
_SEEN_OR_HEARD = ("image", "video", "vision", "audio")


@contextmanager
def open_padding(model: nn.Module, keep_open: Callable[[Tensor], None]) -> Iterator[None]:
    """Within the block the model's modules count positions so.

    Args:
        model: any; one without such a method stays as it is.
        keep_open: is told of each mask that is data.
    """
    owners = [module for module in model.modules() if hasattr(type(module), METHOD)]
    for module in owners:
        setattr(module, METHOD, _rewritten(getattr(module, METHOD), keep_open, _special(module)))
    try:
        yield
    finally:
        for module in owners:
            delattr(module, METHOD)


def _special(module: nn.Module) -> list[int]:
    """The ids that say where a model of a configuration has what it sees or hears."""
    config: Any = getattr(module, "config", None)
    said = config.to_dict() if hasattr(config, "to_dict") else {}
    tokens = {name: value for name, value in said.items() if name.endswith(("_token_id", "_token_index"))}
    return sorted({v for n, v in tokens.items() if isinstance(v, int) and any(part in n for part in _SEEN_OR_HEARD)})


def _one_word(ids: Tensor, special: list[int]) -> Tensor:
    """Ids with one number for all that are not special."""
    word = next(number for number in range(len(special) + 1) if number not in special)
    kept = [(ids == number) * (number - word) for number in special]
    return sum(kept[1:], kept[0]) + word


def _rewritten(
    original: Callable[..., Any], keep_open: Callable[[Tensor], None], special: list[int]
) -> Callable[..., Any]:
    signature = inspect.signature(original)

    def positions(*args: Any, **kwargs: Any) -> Any:
        given = signature.bind(*args, **kwargs).arguments
        mask, kinds, ids = (given.get(name) for name in ("attention_mask", "mm_token_type_ids", "input_ids"))
        if "mm_token_type_ids" not in signature.parameters and isinstance(ids, Tensor) and special:
            return original(**{**given, "input_ids": _one_word(ids, special)})
        if not isinstance(mask, Tensor) or mask.dim() != 2 or not isinstance(kinds, Tensor):
            return original(*args, **kwargs)
        keep_open(mask)
        # Padding among the tokens of an image would take positions away from the middle of it.
        torch._check(bool((mask.bool() | (kinds == 0)).all()), lambda: "image tokens are masked")
        whole, delta = original(*args, **{**kwargs, "attention_mask": None})
        before = (1 - mask.long()).cumsum(-1)
        return torch.where(mask.bool(), whole - before, 0), delta

    return positions
