"""A model's forward for `torch.compile`, as transformers' own `generate` calls it."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch.torch_version import TorchVersion
from transformers import PreTrainedModel

from ..errors import UsageError

UNCHECKED = "TRANSFORMERS_DISABLE_TORCH_CHECK"


def whole_forward(model: PreTrainedModel) -> Callable[..., Any]:
    """The model's forward, for `torch.compile`, such that its `generate` calls it with pixels.

    Newer versions of transformers let `generate` run the vision tower before the model, where the model's forward takes
    what the tower gives (`mm_encoder_outputs`); then the tower is not in the compiled graph. This one does not take it.

    ```python
    model.forward = torch.compile(whole_forward(model), backend="pumer", options={"schedule": schedule}, fullgraph=True)
    model.generate(**inputs)
    ```

    Args:
        model: that generates.

    Returns:
        A bound method; it calls `model`'s forward as that was when this was called.

    Raises:
        UsageError: the model does not generate, or this PyTorch cannot trace what transformers checks.
    """
    if not getattr(model, "can_generate", lambda: False)():
        raise UsageError(f"{type(model).__name__} does not generate text; compile it with torch.compile(model).")
    if TorchVersion(torch.__version__) < "2.13" and os.getenv(UNCHECKED, "0") != "1":
        raise UsageError(
            f"PyTorch {torch.__version__} cannot trace transformers' comparison of placeholders and image features. "
            f"Set the environment variable {UNCHECKED}=1, which leaves it out (they are compared when the prompt is "
            "reduced), or use PyTorch 2.13 or newer."
        )
    original = vars(model).get("forward")
    signature = inspect.signature(model.forward)

    def forward(self: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
        return type(self).forward(self, *args, **kwargs) if original is None else original(*args, **kwargs)

    forward.__signature__ = without_encoder_outputs(signature)  # type: ignore[attr-defined]
    return MethodType(forward, model)


def without_encoder_outputs(signature: inspect.Signature) -> inspect.Signature:
    """The signature of what takes the place of a model's forward; it takes no output of its tower."""
    itself = inspect.Parameter("self", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    taken = [p for name, p in signature.parameters.items() if name != "mm_encoder_outputs"]
    return signature.replace(parameters=[itself, *taken])
