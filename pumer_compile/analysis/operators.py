"""Families of ATen operators: the one place that says what a softmax, a product, a cast or a view is.

Where the operator's own schema or tags know (in place, pointwise), they are asked.
"""

from __future__ import annotations

from typing import Any

import torch

aten = torch.ops.aten


def overloads(packets: str) -> list[Any]:
    """Every overload of space-separated ATen operators; unknown names are errors."""
    return [getattr(p, o) for name in packets.split() for p in [getattr(aten, name)] for o in p.overloads()]


ATTENTION = aten.scaled_dot_product_attention.default
"""Fused attention."""
SOFTMAX = frozenset({aten.softmax.int, aten._softmax.default})
DROPOUT = frozenset(overloads("dropout feature_dropout"))
PRODUCTS = {
    aten.linear.default: 0,
    aten.matmul.default: 0,
    aten.bmm.default: 0,
    aten.mm.default: 0,
    aten.addmm.default: 1,
    aten.baddbmm.default: 1,
}
"""Matrix products, and which argument's last dimension is summed over."""
PIECES = frozenset(overloads("split split_with_sizes chunk unbind"))
"""What gives several values, each a part of its input."""
MATMULS = frozenset({aten.matmul.default, aten.bmm.default})
WORK = PRODUCTS.keys() | {ATTENTION, aten.einsum.default, *overloads("conv1d conv2d conv3d")}
"""What costs multiply-adds."""
NEW = frozenset(overloads("new_zeros new_ones new_full new_empty"))
"""What takes a dtype and a device of its input, and no numbers."""
SQUEEZE = frozenset(overloads("squeeze"))
VIEWS = frozenset({aten.view.default, aten._unsafe_view.default})
HEAD_VIEWS = frozenset(
    {aten.view.default, aten.reshape.default, aten.transpose.int, aten.permute.default, aten.contiguous.default}
)
"""What stands between a linear layer and the product that reads its heads."""
CASTS = {aten.to.device, aten.to.dtype, aten.to.dtype_layout, aten._to_copy.default, aten.alias.default}
MOVES = CASTS | set(
    overloads(
        "view reshape _unsafe_view permute transpose contiguous clone flatten slice select unsqueeze squeeze expand "
        "cat concat concatenate stack split split_with_sizes chunk unbind"
    )
)
"""What only moves tokens, whole."""
CATS = frozenset({aten.cat.default, aten.concat.default, aten.concatenate.default})
"""One operator by its three names."""
JOINS = CATS | set(overloads("stack"))
ADD = frozenset({aten.add.Tensor, aten.add_.Tensor})
MASKED_FILL = frozenset(overloads("masked_fill masked_fill_"))
WHERE = frozenset({aten.where.self, aten.where.ScalarOther, aten.where.ScalarSelf, aten.where.Scalar})
STRETCHES = frozenset(
    {aten.expand.default, aten.expand_as.default, aten.unsqueeze.default, aten.squeeze.dim, aten.slice.Tensor}
)
KEEPS_VALUES = frozenset(
    {
        aten.to.dtype,
        aten.to.device,
        aten.to.dtype_layout,
        aten.dropout.default,
        aten.contiguous.default,
        aten.clone.default,
        aten.alias.default,
    }
)
RESHAPES = frozenset(
    {
        aten.transpose.int,
        aten.permute.default,
        aten.view.default,
        aten.reshape.default,
        aten.flatten.using_ints,
        aten.contiguous.default,
        aten.clone.default,
    }
)
TAKES_NUMBERS = frozenset(
    overloads(
        "view reshape _unsafe_view flatten unflatten transpose permute t mT numpy_T movedim unsqueeze squeeze expand "
        "broadcast_to repeat slice select narrow index index_select gather flip roll detach detach_ "
        "lift_fresh lift_fresh_copy amax amin upsample_nearest2d"
    )
) | {aten.repeat_interleave.self_int, aten.repeat_interleave.self_Tensor}
"""Operators whose results hold numbers of their first input and no others."""
MAY_ALIAS = {"to", "contiguous", "reshape", "flatten", "dropout", "feature_dropout", "type_as", "_unsafe_view"}
"""Operators that may give their input, or a view of it, though their schema does not say so."""


def is_mutable(target: Any) -> bool:
    """Whether an operator changes numbers of an input in place, which `detach_` does not."""
    return (
        isinstance(target, torch._ops.OpOverload) and target._schema.is_mutable and target is not aten.detach_.default
    )
