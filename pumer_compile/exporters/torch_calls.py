"""Operators as calls of torch's functions again, so that the patches of transformers' exporters reach them.

transformers' exporters put other forms of some of torch's functions in their place while a model is traced: attention
whose rows of padding give zeros (ONNX), or whose keys are repeated and whose boolean mask is additive (OpenVINO), a
roll as slices, a cumulative sum that counts truth values. A graph that was captured before holds operators, which no
patch reaches. Called by the name of the function, which is looked up while the graph is traced, they are patched as in
a model.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from ..analysis.operators import ATTENTION
from ..reducers import SizeBias

PATCHED: dict[Any, tuple[str, ...]] = {
    torch: (
        "bincount",
        "bucketize",
        "chunk",
        "cummax",
        "cummin",
        "cumsum",
        "exp",
        "full",
        "histc",
        "neg",
        "polar",
        "roll",
        "searchsorted",
        "split",
        "unsqueeze",
        "where",
    ),
    torch.Tensor: ("unfold",),
    torch.nn.functional: ("avg_pool2d", "layer_norm", "scaled_dot_product_attention"),
}
"""Functions that transformers' exporters patch and whose operator has their name, by where they are found."""


def call_torch(module: fx.GraphModule) -> None:
    """Let a graph module call torch's functions where transformers' exporters patch them; in place. The module computes
    the same numbers."""
    for node in module.graph.nodes:
        packet = getattr(node.target, "overloadpacket", None)
        if packet is None or node.target.namespace != "aten":
            continue
        function = _CALLS.get(packet.__name__)
        if function is not None and not _only_sizes(module, node):
            node.target = function
    module.recompile()


def _only_sizes(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether an attention's mask is but the sizes of merged tokens: patches look for rows of padding, and there are
    none."""
    if node.target is not ATTENTION:
        return False
    mask = node.args[3] if len(node.args) > 3 else node.kwargs.get("attn_mask")
    if not isinstance(mask, fx.Node) or mask.op != "call_module":
        return False
    return isinstance(module.get_submodule(str(mask.target)), SizeBias) and mask.args[0] is None


def _call(owner: Any, name: str) -> Callable[..., Any]:
    """A call of `owner.name` as it is when the call is made."""

    def call(*args: Any, **kwargs: Any) -> Any:
        return getattr(owner, name)(*args, **kwargs)

    call.__name__ = call.__qualname__ = f"torch_{name}"
    return call


def _layer_norm(x: Tensor, *args: Any, cudnn_enable: bool = True, **kwargs: Any) -> Tensor:
    """Without the last argument of the operator, which the function lacks."""
    return torch.nn.functional.layer_norm(x, *args[:4], **kwargs)


def _smoothed(mode: str) -> Callable[..., Tensor]:
    """A resampling with `antialias`, of which the operator's name tells the mode."""

    def resample(x: Tensor, size: Any, align_corners: bool = False, *scales: Any, **named: Any) -> Tensor:
        if size is not None:
            return torch.nn.functional.interpolate(x, size, None, mode, align_corners, antialias=True)
        factors = scales[0] if scales else named["scale_factors"]
        return torch.nn.functional.interpolate(x, None, factors, mode, align_corners, antialias=True)

    resample.__name__ = resample.__qualname__ = f"torch_interpolate_{mode}"
    return resample


_CALLS: dict[str, Callable[..., Any]] = {
    **{name: _call(owner, name) for owner, names in PATCHED.items() for name in names},
    "layer_norm": _layer_norm,
    "_upsample_bilinear2d_aa": _smoothed("bilinear"),
    "_upsample_bicubic2d_aa": _smoothed("bicubic"),
}
