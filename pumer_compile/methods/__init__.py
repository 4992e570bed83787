"""Reduction methods, a file each: every module of this folder is read, and every `Method` in it is one."""

from __future__ import annotations

import importlib
import pkgutil
from typing import get_args

from .base import Method


def _found() -> dict[str, type[Method]]:
    """The methods that there are, by name."""
    for module in pkgutil.iter_modules(__path__):
        importlib.import_module(f"{__name__}.{module.name}")
    pending, methods = list(Method.__subclasses__()), dict[str, type[Method]]()
    while pending:
        method = pending.pop(0)
        pending += method.__subclasses__()
        for name in get_args(method.model_fields["method"].annotation):  # none: what methods share
            methods[name] = method
    return dict(sorted(methods.items()))


METHODS: dict[str, type[Method]] = _found()
"""Every method by its name."""

PRESETS: dict[str, Method] = {
    name: Method(**{"method": method, **keys})
    for method, found in METHODS.items()
    for name, keys in found.presets.items()
}
"""Every method's presets by their names."""

__all__ = ["METHODS", "PRESETS", "Method"]
