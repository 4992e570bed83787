"""Rules of operators that work by position along an axis: right only while no reducer has touched it.

They stand beside attention: patch merging, pooling, causal triangles, ranking, scatters. Along every other axis they
act on each token alone, and that is what these rules say.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import fx

from .axes import ByPosition, Causal, Constraint, Dim, Reduce, Same, Seed, same_size
from .nodes import values
from .operators import aten, overloads
from .rules import (
    _reduced,
    argument,
    broadcast,
    fills_with_number,
    int_arg,
    keep_dims,
    list_arg,
    node_arg,
    pointwise,
    repeated,
    rule,
    shape,
    tensors,
    wrap,
)


def by_position(node: fx.Node, x: fx.Node, moved: Iterable[int]) -> Iterator[Constraint]:
    """`x` keeps its dimensions in every output but for the `moved` ones, along which it works by position."""
    positions = set(moved)
    for i in range(len(shape(x))):
        if i in positions:
            yield ByPosition(Dim(x, i))
            continue
        for output, value in enumerate(values(node)):
            if same_size(value.shape[i], shape(x)[i]):
                yield Same(Dim(x, i), Dim(node, i, output))


@rule(*overloads("sort argsort topk msort kthvalue cummax cummin logcumsumexp cumprod roll flip"))
def along_axes(node: fx.Node) -> Iterator[Constraint]:
    """Ranks, accumulates, rolls or turns around along some dimensions."""
    x = node_arg(node, 0)
    rank = len(shape(x))
    name = node.target.overloadpacket.__name__  # type: ignore[union-attr]  # an operator, by its registration
    if name == "msort":
        asked: Any = 0
    elif name in ("roll", "flip"):
        asked = argument(node, 2 if name == "roll" else 1, "dims", [])
    else:
        late = name in ("topk", "kthvalue") or "stable" in str(node.target)
        asked = argument(node, 2 if late else 1, "dim", -1)
    # A roll without dimensions moves everything in a row.
    dims = range(rank) if asked == [] else [asked] if isinstance(asked, int) else asked
    yield from by_position(node, x, [wrap(d, rank) for d in dims])


@rule(*overloads("tril triu"))
def triangle(node: fx.Node) -> Iterator[Constraint]:
    """Keeps what is on one side of a diagonal of the last two dimensions."""
    x = node_arg(node, 0)
    rank = len(shape(x))
    yield from (Same(Dim(x, i), Dim(node, i)) for i in range(rank))
    yield from (ByPosition(Dim(x, i)) for i in (rank - 2, rank - 1))


@rule(aten.constant_pad_nd.default, aten.pad.default)
def pad(node: fx.Node) -> Iterator[Constraint]:
    """Adds entries at the ends of the last dimensions."""
    x, amounts = node_arg(node, 0), list_arg(node, 1)
    rank = len(shape(x))
    padded = [rank - 1 - i // 2 for i, amount in enumerate(amounts) if not (isinstance(amount, int) and amount == 0)]
    yield from by_position(node, x, padded)


@rule(
    *overloads("avg_pool2d max_pool2d adaptive_avg_pool2d adaptive_max_pool2d avg_pool1d max_pool1d"),
    *overloads("adaptive_avg_pool1d upsample_bilinear2d upsample_bicubic2d upsample_nearest2d upsample_linear1d"),
    *overloads("upsample_nearest1d _upsample_bilinear2d_aa _upsample_bicubic2d_aa pixel_shuffle pixel_unshuffle"),
)
def spatial(node: fx.Node) -> Iterator[Constraint]:
    """Pools or resizes the dimensions after batch and channels: a new grid, where there are two."""
    x = node_arg(node, 0)
    rank = len(shape(x))
    yield from by_position(node, x, range(2 if rank > 2 else 1, rank))
    if rank == 4:
        yield from (Seed((Dim(node, 2, o), Dim(node, 3, o)), "image") for o in range(len(values(node))))


@rule(*overloads("conv1d conv3d conv_transpose1d conv_transpose2d"))
def neighbours(node: fx.Node) -> Iterator[Constraint]:
    """Mixes channels, and positions with their neighbours."""
    x = node_arg(node, 0)
    yield Same(Dim(x, 0), Dim(node, 0))
    behind = _causal(node)
    if behind:
        yield from (ByPosition(Dim(x, 1)), Causal(Dim(x, 2), Dim(node, 2), behind))
    else:
        yield from (ByPosition(Dim(x, i)) for i in range(1, len(shape(x))))


def _causal(node: fx.Node) -> int:
    """How many positions a convolution adds behind those that look at themselves and back alone: it is padded by its
    whole reach on both sides. 0 where it is of another kind."""
    if node.target is not aten.conv1d.default or len(shape(node_arg(node, 0))) != 3:
        return 0

    def number(position: int, name: str, default: int) -> Any:
        found = argument(node, position, name, default)
        return found[0] if isinstance(found, list | tuple) and len(found) == 1 else found

    reach = (shape(node_arg(node, 1))[-1] - 1) * number(5, "dilation", 1)
    causal = number(3, "stride", 1) == 1 and number(4, "padding", 0) == reach
    return int(reach) if causal else 0


@rule(*overloads("group_norm instance_norm batch_norm native_group_norm"))
def over_channels(node: fx.Node) -> Iterator[Constraint]:
    """Normalises channels, by statistics over positions unless they are fixed; positions stay where they are."""
    x = node_arg(node, 0)
    yield from (Same(Dim(x, i), Dim(node, i)) for i in range(len(shape(x))))
    yield from (ByPosition(Dim(x, i)) for i in range(1, len(shape(x))))


@rule(aten.grid_sampler.default, aten.grid_sampler_2d.default)
def sampled(node: fx.Node) -> Iterator[Constraint]:
    """Reads an image at given places."""
    x, grid = node_arg(node, 0), node_arg(node, 1)
    yield Same(Dim(x, 0), Dim(node, 0))
    yield Same(Dim(x, 1), Dim(node, 1))
    yield Same(Dim(grid, 0), Dim(node, 0))
    yield Same(Dim(grid, 1), Dim(node, 2))
    yield Same(Dim(grid, 2), Dim(node, 3))
    yield from (ByPosition(Dim(x, i)) for i in (2, 3))


@rule(*overloads("scatter scatter_ scatter_add scatter_reduce slice_scatter select_scatter"))
def scattered(node: fx.Node) -> Iterator[Constraint]:
    """Writes into places along one dimension."""
    x = node_arg(node, 0)
    position = 2 if "slice_scatter" in str(node.target) or "select_scatter" in str(node.target) else 1
    dim = wrap(int_arg(node, position, "dim", 0), len(shape(x)))
    yield from by_position(node, x, [dim])
    for other in (n for n in tensors(node) if n is not x):
        same_rank = len(shape(other)) == len(shape(x))
        for i in range(len(shape(other))):
            aligned = same_rank and i != dim and same_size(shape(other)[i], shape(node)[i])
            yield Same(Dim(other, i), Dim(node, i)) if aligned else ByPosition(Dim(other, i))


@rule(aten.masked_scatter.default, aten.masked_scatter_.default)
def masked_scatter(node: fx.Node) -> Iterator[Constraint]:
    """Puts the rows of a source, one after the other, where a mask is true."""
    x, mask, source = (node_arg(node, i) for i in range(3))
    yield from (Same(Dim(x, i), Dim(node, i)) for i in range(len(shape(x))))
    yield from broadcast(mask, node)
    yield from (ByPosition(Dim(source, i)) for i in range(len(shape(source))))


@rule(*overloads("index_put index_put_ index_add index_fill index_copy"))
def written(node: fx.Node) -> Iterator[Constraint]:
    """Writes at given places; one number where a mask is true is written into each element by itself, and one row into
    each row."""
    if node.target not in overloads("index_put index_put_"):
        yield from (ByPosition(Dim(x, i)) for x in tensors(node) for i in range(len(shape(x))))
    elif fills_with_number(node):
        yield from pointwise(node)
    else:
        yield from _written_at(node, node_arg(node, 0), list_arg(node, 1), node_arg(node, 2))


def _written_at(node: fx.Node, x: fx.Node, places: list[Any], value: fx.Node) -> Iterator[Constraint]:
    mask = places[0] if len(places) == 1 and isinstance(places[0], fx.Node) else None
    if (
        mask is not None
        and values(mask)[0].dtype == torch.bool
        and len(shape(value)) <= len(shape(x)) - len(shape(mask))
    ):
        # One value for all rows that a mask chooses.
        yield from keep_dims(x, node, ((i, i) for i in range(len(shape(x)))))
        yield from keep_dims(mask, node, ((i, i) for i in range(len(shape(mask)))))
        yield from broadcast(value, node)
        return
    free = {i for i in range(len(shape(x))) if i >= len(places) or places[i] is None}
    # A number goes to all places of the dimensions without an index; anything else may have a shape of its own there.
    free = free if not shape(value) else set()
    yield from keep_dims(x, node, ((i, i) for i in free))
    yield from (ByPosition(Dim(x, i)) for i in range(len(shape(x))) if i not in free)
    yield from (ByPosition(Dim(n, i)) for n in tensors(node) if n is not x for i in range(len(shape(n))))


@rule(*overloads("nonzero masked_select unique_consecutive bincount histc"))
def counted(node: fx.Node) -> Iterator[Constraint]:
    """Gives as many entries as the data has."""
    yield from (ByPosition(Dim(x, i)) for x in tensors(node) for i in range(len(shape(x))))


@rule(*overloads("var std var_mean std_mean median prod"))
def spread(node: fx.Node) -> Iterator[Constraint]:
    """Statistics that a mean of merged tokens would change."""
    yield from _reduced(node, ByPosition)


@rule(aten.linalg_vector_norm.default, aten.linalg_norm.default, *overloads("norm"))
def norm(node: fx.Node) -> Iterator[Constraint]:
    """A length, over features as a rule."""
    x = node_arg(node, 0)
    rank = len(shape(x))
    asked = argument(node, 2, "dim")
    dims = range(rank) if asked is None or asked == [] else [asked] if isinstance(asked, int) else asked
    gone = {wrap(d, rank) for d in dims}
    keeps = len(shape(node)) == rank
    position = 0
    for i in range(rank):
        if i in gone:
            yield ByPosition(Dim(x, i))
        else:
            yield Same(Dim(x, i), Dim(node, position))
        position += keeps or i not in gone


@rule(*overloads("cross_entropy_loss nll_loss nll_loss_nd nll_loss2d"))
def loss(node: fx.Node) -> Iterator[Constraint]:
    """A loss of class scores `[N, C, ...]` against targets `[N, ...]` (or probabilities `[N, C, ...]`): over fewer
    tokens it would be another loss."""
    scores, target = node_arg(node, 0), node_arg(node, 1)
    rank = len(shape(scores))
    classes = 1 if rank > 1 else 0
    samples = [i for i in range(rank) if i != classes]
    labels = range(rank) if len(shape(target)) == rank else samples
    yield from (ByPosition(Dim(x, i)) for x in tensors(node) for i in range(len(shape(x))))
    yield from (Same(Dim(scores, i), Dim(target, j), aligns=False) for j, i in enumerate(labels))
    if len(shape(node)) == len(samples):  # `reduction="none"`
        yield from keep_dims(scores, node, ((i, j) for j, i in enumerate(samples)))


@rule(*overloads("bucketize searchsorted"))
def looked_up(node: fx.Node) -> Iterator[Constraint]:
    """The place of each element among sorted borders."""
    x, borders = node_arg(node, 0), node_arg(node, 1)
    if "searchsorted" in str(node.target):
        x, borders = borders, x
    yield from broadcast(x, node)
    yield from (Reduce(Dim(borders, i)) for i in range(len(shape(borders))))


@rule(aten.one_hot.default)
def one_hot(node: fx.Node) -> Iterator[Constraint]:
    """A new last dimension of classes."""
    x = node_arg(node, 0)
    yield from (Same(Dim(x, i), Dim(node, i)) for i in range(len(shape(x))))


@rule(aten.repeat_interleave.self_int)
def repeated_in_place(node: fx.Node) -> Iterator[Constraint]:
    """Each entry of a dimension several times, side by side, as with the heads of grouped queries."""
    x, times, asked = node_arg(node, 0), argument(node, 1), argument(node, 2, "dim")
    for i in range(len(shape(x))):
        if not isinstance(asked, int):  # of all numbers in a row
            yield ByPosition(Dim(x, i))
        elif i == wrap(asked, len(shape(x))) and times != 1:
            yield repeated(Dim(x, i), Dim(node, i), times, in_place=True)
        else:
            yield Same(Dim(x, i), Dim(node, i))


@rule(aten.repeat_interleave.Tensor, aten.repeat_interleave.self_Tensor, *overloads("unfold im2col cdist"))
def rearranged(node: fx.Node) -> Iterator[Constraint]:
    """Positions that a reducer would change."""
    yield from (ByPosition(Dim(x, i)) for x in tensors(node) for i in range(len(shape(x))))
