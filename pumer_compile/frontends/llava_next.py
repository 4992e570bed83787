"""LLaVA-NeXT's packing of crops, with sizes multiplied as Python integers: Dynamo takes NumPy's product for a
tensor, and cannot branch on it."""

from __future__ import annotations

import math
from collections.abc import Callable
from types import FunctionType, SimpleNamespace
from typing import Any

import numpy as np

TARGET = "transformers.models.llava_next.modeling_llava_next.LlavaNextModel.pack_image_features"


def patch(original: Callable[..., Any]) -> Callable[..., Any]:
    """What `register_patch` asks for: the method's own code, to which `np.prod` is `math.prod`."""
    assert isinstance(original, FunctionType)
    numbers = SimpleNamespace(prod=math.prod, ndarray=np.ndarray)
    rewritten = FunctionType(
        original.__code__,
        {**original.__globals__, "np": numbers},
        original.__name__,
        original.__defaults__,
        original.__closure__,
    )
    rewritten.__kwdefaults__ = original.__kwdefaults__
    return rewritten
