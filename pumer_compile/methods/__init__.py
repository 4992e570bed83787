"""Reduction methods, a file each: every module of this folder is read, and every `Method` in it is one."""

from __future__ import annotations

import importlib
import pkgutil

from .base import METHODS, PRESETS, Method

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

# Those of the paper first, as its schedules are the ones that are asked for.
for _name in sorted(PRESETS, key=lambda name: PRESETS[name].method != "pumer"):
    PRESETS[_name] = PRESETS.pop(_name)

__all__ = ["METHODS", "PRESETS", "Method"]
