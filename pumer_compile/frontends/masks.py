"""Masks of own patterns (images that look both ways), made by broadcasting.

transformers makes them by `vmap`, whose nodes no pass understands; its other exporters broadcast them as well.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any


class Expansion:
    """The mask function on all queries and keys at once."""

    TARGET = "transformers.masking_utils._vmap_expansion_sdpa"

    @staticmethod
    def patch(_original: Callable[..., Any]) -> Callable[..., Any]:
        """What `register_patch` asks for."""
        from transformers import masking_utils

        def by_broadcasting(mask_function: Callable[..., Any]) -> Callable[..., Any]:
            def expanded(batch: Any, head: Any, query: Any, key: Any) -> Any:
                sizes = [numbers.shape[0] for numbers in (batch, head, query, key)]
                made = mask_function(*masking_utils._non_vmap_expansion_sdpa(batch, head, query, key))
                return made.expand(sizes)

            return expanded

        return by_broadcasting


class Indexing:
    """`x[i]` stays what it is: its rewriting is for `vmap`."""

    TARGET = "transformers.masking_utils.TransformGetItemToIndex"

    @staticmethod
    def patch(_original: Callable[..., Any]) -> Callable[..., Any]:
        """What `register_patch` asks for."""
        return contextlib.nullcontext
