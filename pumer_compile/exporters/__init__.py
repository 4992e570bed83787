"""Write artifacts that a deployment runtime loads, and publish only what was proved (`publish.py`)."""

from __future__ import annotations

import importlib.util

from ..artifacts.options import EngineOptions, OnnxOptions, OpenVinoOptions, Options
from ..artifacts.profile import Profile
from ..runtimes.ort import OnnxSession
from .publish import Exported, check_exporter, export, exporter_options

__all__ = [
    "EngineOptions",
    "Exported",
    "OnnxOptions",
    "OnnxSession",
    "OpenVinoOptions",
    "Options",
    "Profile",
    "check_exporter",
    "export",
    "exporter_options",
]

# transformers 5.17 exports, but does not run what it exported.
if importlib.util.find_spec("transformers.exporters.runners") is not None:
    from . import transformers_backend  # noqa: F401  (importing it registers the backend)
