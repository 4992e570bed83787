"""Exact, reversible rewrites of the pieces of a model that torch.export cannot trace.

Importing this package registers them with transformers' dynamo exporter, which installs them while it traces
and takes them out again. A frontend is a module with a `TARGET` (the dotted path of the method) and a
`patch(original)`.
"""

from __future__ import annotations

from transformers.exporters.utils import register_patch

from . import vilt

FRONTENDS = (vilt,)

# A reload of this package runs its code in the same namespace: what was registered stays registered once.
_registered: set[str] = globals().get("_registered", set())

for _frontend in FRONTENDS:
    if _frontend.TARGET not in _registered:
        register_patch("dynamo", _frontend.TARGET)(_frontend.patch)
        _registered.add(_frontend.TARGET)
