"""What single models need: exact, reversible rewrites, and definitions of models that transformers lacks.

Importing this package registers the rewrites of pieces that torch.export cannot trace with transformers' dynamo
exporter, which installs them while it traces and takes them out again. Such a frontend is a module with a
`TARGET` (the dotted path of the method) and a `patch(original)`. `MODELS` holds the definitions, by the class
name that a config.json gives.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from transformers.cache_utils import DynamicLayer, DynamicSlidingWindowLayer
from transformers.exporters import exporter_dynamo
from transformers.exporters.utils import register_patch

from . import llava_next, masks, uneven_segments, vilt
from .meter import MODELS as MODELS

FRONTENDS = (vilt, llava_next)
# What only torch.export needs: Dynamo traces these as they are.
FOR_EXPORT = (masks.Expansion, masks.Indexing, uneven_segments)

# A reload of this package runs its code in the same namespace: what was registered stays registered once.
_registered: set[str] = globals().get("_registered", set())

for _frontend in (*FRONTENDS, *FOR_EXPORT):
    if _frontend.TARGET not in _registered:
        register_patch("dynamo", _frontend.TARGET)(_frontend.patch)
        _registered.add(_frontend.TARGET)


@contextlib.contextmanager
def in_fixed_order() -> Iterator[None]:
    """Within the block models run as they are traced where that gives tokens in another order, or other ones, than the
    models do (ViLT's patches come at random, as many as the largest image of a batch has; the cache of a sliding window
    is traced whole): what a graph is compared with by token."""
    with contextlib.ExitStack() as stack:
        if hasattr(exporter_dynamo, "_patch_sliding_window_layer"):  # 5.17 does not
            for name in ("update", "get_mask_sizes", "get_seq_length"):
                stack.enter_context(mock.patch.object(DynamicSlidingWindowLayer, name, getattr(DynamicLayer, name)))
        for frontend in FRONTENDS:
            if getattr(frontend, "FIXES_ORDER", False):
                path, _, name = frontend.TARGET.rpartition(".")
                module, _, owner = path.rpartition(".")
                target = getattr(importlib.import_module(module), owner)
                stack.enter_context(mock.patch.object(target, name, frontend.patch(getattr(target, name))))
        yield


def install_for_dynamo(active: Callable[[], bool]) -> None:
    """Make Dynamo trace the rewrites wherever `active` says so, and the models' own methods everywhere else.

    The methods are wrapped once and for all, also in models that exist already; eager calls reach the original.

    Args:
        active: asked by Dynamo while it traces.
    """
    for frontend in FRONTENDS:
        path, _, name = frontend.TARGET.rpartition(".")
        module, _, owner = path.rpartition(".")
        target = getattr(importlib.import_module(module), owner)
        original = getattr(target, name)
        if not hasattr(original, "_pumer_original"):
            setattr(target, name, _dispatching(original, frontend.patch(original), active))


def _dispatching(
    original: Callable[..., Any], rewrite: Callable[..., Any], active: Callable[[], bool]
) -> Callable[..., Any]:
    @functools.wraps(original)
    def method(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_dynamo_compiling() and active():
            return rewrite(*args, **kwargs)
        return original(*args, **kwargs)

    method._pumer_original = original  # type: ignore[attr-defined]  # says that it is wrapped already
    return method
