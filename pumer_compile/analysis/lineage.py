"""Lineage: which tokens of a vision tower each row is made of that enters a prompt.

Between a tower's last attention and the prompt, models work on each token alone (projectors, norms), move tokens
(views, permutations, constant indices) and mix a fixed few of them (average pools, pixel shuffles that fold neighbours
into the width, patch mergers). Computing that part of the graph once on *sets of token numbers*, in place of features,
says which tokens each row is made of, whatever the arrangement. An operator that is not known here is an error.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from ..errors import AxisError
from .attention import Parts, attention_parts
from .masks import HIDES
from .nodes import ancestors, constant_value, content_inputs, depends_on_parameter, describe, values
from .operators import ATTENTION, CASTS, DROPOUT, JOINS, MATMULS, MOVES, PRODUCTS, SOFTMAX, VIEWS, aten, overloads
from .own_keys import own_keys
from .rules import argument, is_pointwise, wrap

_MOVES = (
    MOVES
    | set(overloads("index_select t repeat flip roll movedim detach unflatten pixel_shuffle pixel_unshuffle"))
    | {operator.getitem, aten.index.Tensor, aten.pad.default, aten.constant_pad_nd.default, aten.detach_.default}
)
_PADS = {aten.pad.default, aten.constant_pad_nd.default}
_NORMS = frozenset(overloads("layer_norm rms_norm"))
_OVER = frozenset(overloads("mean sum amax amin var std argmin argmax"))
_POOLS = frozenset(overloads("avg_pool2d max_pool2d"))
_ADAPTIVE = frozenset(overloads("adaptive_avg_pool2d adaptive_avg_pool1d"))
_RESIZES = frozenset(overloads("upsample_bilinear2d upsample_bicubic2d upsample_nearest2d _upsample_bilinear2d_aa"))
_CONVOLUTIONS = frozenset(overloads("conv3d conv2d conv1d"))
EMPTY = 0


@dataclass(frozen=True)
class Lineage:
    """What the rows of a prompt are made of.

    Attributes:
        deciding: the last attentions before the rows that tell places apart, in order; several where images or windows
            are attended to one by one.
        members: of each row of the prompt, the numbers of its tokens, ascending: `row * tokens + token` in the first
            attention, then those of the next.
        own: for each of these attentions, the number of the key that belongs to its first token.
    """

    deciding: tuple[Parts, ...]
    members: tuple[tuple[int, ...], ...]
    own: tuple[int, ...]

    def tells_apart(self) -> bool:
        """Whether rows of one image are made of other tokens each, not all of all; separators are made of none."""
        owners = self.owners()
        sets: dict[frozenset[int], list[tuple[int, ...]]] = {}
        for row in filter(None, self.members):
            sets.setdefault(frozenset(owners[token] for token in row), []).append(row)
        return all(len(rows) == 1 or len(set(rows)) > 1 for rows in sets.values())

    def owners(self) -> list[int]:
        """Of every token, the number of its image, tile or frame: what attends to one another in the attention, in one
        row of its batch and one block of its mask, where that is constant."""
        found: list[int] = []
        for parts in self.deciding:
            batch, tokens = _tokens(parts)
            for row in _together(parts, batch, tokens):
                first = max(found, default=-1) + 1
                found += [first + number for number in row]
        return found

    def places(self) -> list[int]:
        """Of every token, its place in that row."""
        return [i for parts in self.deciding for _ in range(_tokens(parts)[0]) for i in range(_tokens(parts)[1])]


def _together(parts: Parts, batch: int, tokens: int) -> list[list[int]]:
    """Of every token of each row of the batch, which block it attends within."""
    for mask in parts.added.masks:
        value = constant_value(mask.node) if _constant(mask.node) else None
        if value is None or value.shape[-2:] != (tokens, tokens):
            continue
        seen = value if value.dtype == torch.bool else value > HIDES
        seen = ~seen if mask.kind == "drop" else seen
        blocks = [_blocks(row) for row in seen.reshape(-1, tokens, tokens)]
        return [blocks[i % len(blocks)] for i in range(batch)]
    return [[0] * tokens for _ in range(batch)]


def _blocks(seen: Tensor) -> list[int]:
    """Numbers of the blocks of a block-diagonal matrix, `[tokens, tokens]`, in order of their first token."""
    first = (seen | seen.T).float().argmax(1).tolist()
    number = {start: i for i, start in enumerate(dict.fromkeys(first))}
    return [number[start] for start in first]


def _tokens(parts: Parts) -> tuple[int, int]:
    """Rows of the batch, and queries in each, of an attention."""
    shape = values(parts.context)[0].shape
    return math.prod(int(n) for n in shape[:-3]), int(shape[-2])


def lineage(source: fx.Node, width: int) -> Lineage | None:
    """What the rows of a value are made of; None where no attention comes before it, or none tells its rows apart.

    Args:
        source: any shape; a row is `width` numbers in a row of it.
        width: of the prompt.

    Raises:
        AxisError: an operator on the way is not known, or moves tokens by data.
    """
    candidates = attention_parts(source)
    while candidates:
        earlier = set().union(*(ancestors(parts.context) for parts in candidates))
        last = [parts for parts in candidates if parts.context not in earlier]
        for parts in last:
            if len(values(parts.context)[0].shape) < 4:
                raise AxisError(
                    f"{describe(parts.context)} is attention with queries {tuple(values(parts.query)[0].shape)}; "
                    "which of its dimensions are images and which heads is open. [images, heads, tokens, head size] is "
                    "expected."
                )
        own = [first for parts in last if (first := own_keys(parts)) is not None]
        if len(own) == len(last):
            found = Lineage(tuple(last), _Run(last).rows(source, width), tuple(own))
            if found.tells_apart():
                return found
        # It mixes everything into every row (attention over channels, say), or its tokens get no attention: the one
        # before it decides.
        candidates = [parts for parts in candidates if parts not in last]
    return None


class _Sets:
    """Sets of token numbers, by number; `EMPTY` is the empty one."""

    def __init__(self) -> None:
        self.all: list[frozenset[int]] = [frozenset()]
        self.numbers: dict[frozenset[int], int] = {frozenset(): EMPTY}

    def number(self, tokens: frozenset[int]) -> int:
        if tokens not in self.numbers:
            self.numbers[tokens] = len(self.all)
            self.all.append(tokens)
        return self.numbers[tokens]

    def union(self, ids: Tensor, dims: Sequence[int]) -> Tensor:
        """The union over some dimensions, which stay with size 1."""
        over = sorted({wrap(dim, ids.dim()) for dim in dims})
        rest = [dim for dim in range(ids.dim()) if dim not in over]
        shape = [1 if dim in over else ids.shape[dim] for dim in range(ids.dim())]
        alike = ids
        for dim in over:
            alike = alike.narrow(dim, 0, 1)
        if bool((ids == alike).all()):
            return alike
        count = math.prod(ids.shape[dim] for dim in rest)
        return self._rows(ids.permute(*rest, *over).reshape(count, -1)).reshape(shape)

    def _rows(self, flat: Tensor) -> Tensor:
        """The union of each row, `[rows, ids]` to `[rows]`."""
        ordered = flat.sort(1).values
        fresh = torch.ones_like(ordered, dtype=torch.bool)
        fresh[:, 1:] = ordered[:, 1:] != ordered[:, :-1]
        counts = fresh.sum(1).tolist()
        parts = torch.split(ordered[fresh], counts)
        return torch.tensor([self._united(part.tolist()) for part in parts], dtype=torch.int32)

    def _united(self, ids: list[int]) -> int:
        return ids[0] if len(ids) == 1 else self.number(frozenset().union(*(self.all[i] for i in ids)))

    def join(self, many: Sequence[Tensor]) -> Tensor:
        """The union, number by number, of values that are broadcast."""
        together: list[Tensor] = list(torch.broadcast_tensors(*many))
        most = together[0]
        for ids in together[1:]:
            most = torch.maximum(most, ids)
        if all(bool(((ids == most) | (ids == EMPTY)).all()) for ids in together):
            return most
        return self._rows(torch.stack([ids.reshape(-1) for ids in together], 1)).reshape(most.shape)


class _Run:
    """The graph behind some attentions, computed on sets of their tokens."""

    def __init__(self, starts: Sequence[Parts]) -> None:
        self.sets = _Sets()
        self.known: dict[fx.Node, Any] = {}
        first = 0
        for parts in starts:
            shape = [int(n) for n in values(parts.context)[0].shape]
            batch, tokens = _tokens(parts)
            numbers = [self.sets.number(frozenset((first + i,))) for i in range(batch * tokens)]
            own = torch.tensor(numbers, dtype=torch.int32).view(*shape[:-3], 1, tokens, 1)
            self.known[parts.context] = own.expand(shape)
            first += batch * tokens

    def rows(self, source: fx.Node, width: int) -> tuple[tuple[int, ...], ...]:
        """The tokens of each `width` numbers of a value."""
        before = ancestors(source) | {source}
        for node in source.graph.nodes:
            if node in before and node not in self.known and any(n in self.known for n in node.all_input_nodes):
                self.known[node] = self._step(node)
        ids = self.sets.union(self.known[source].reshape(-1, width), [1]).reshape(-1)
        return tuple(tuple(sorted(self.sets.all[i])) for i in ids.tolist())

    def _given(self, node: fx.Node) -> Tensor:
        """What goes into an operator; what comes from no token of these attentions is made of none."""
        if node in self.known:
            found: Tensor = self.known[node]
            return found
        empty: Tensor = torch.zeros(1, dtype=torch.int32)
        return empty.expand(_size(node))

    def _step(self, node: fx.Node) -> Any:
        if node.target in _MOVES:
            return self._moved(node)
        handler = _STEPS.get(node.target)
        if handler is not None:
            return handler(self, node)
        if is_pointwise(node) or node.target in DROPOUT or node.target in overloads("type_as"):
            return self._pointwise(node)
        raise AxisError(
            f"{describe(node)} stands between the vision tower's last attention and the prompt, and which tokens go "
            "into which of its results is not known. `method: fastv` reduces the rows of the prompt without knowing "
            "that; the operators known are in pumer_compile/analysis/lineage.py."
        )

    # --- what moves tokens --------------------------------------------------------------------------------------------

    def _moved(self, node: fx.Node) -> Any:
        source = node.args[0]
        if node.target in CASTS or node.target is aten.detach_.default:
            return self._given(node.all_input_nodes[0])
        if node.target in VIEWS:
            return self._given(source).reshape(node.args[1])  # type: ignore[arg-type]  # sizes
        if node.target in _PADS:
            return torch.nn.functional.pad(self._given(source), list(node.args[1]))  # type: ignore[arg-type]
        if node.target is aten.index.Tensor and source not in self.known:
            return self._numbers(node)
        # What is joined to tokens is none of them; integers are places otherwise.
        moved = self._given if node.target in JOINS else partial(self._moved_with, node)
        args = fx.map_arg(node.args, moved)
        options = {k: v for k, v in node.kwargs.items() if k not in ("dtype", "memory_format")}
        return node.target(*args, **options)  # type: ignore[operator]  # an operator that moves

    def _numbers(self, node: fx.Node) -> Tensor:
        """Numbers of a table that tokens say (`table[ids]`)."""
        places = [n for n in node.args[1] if isinstance(n, fx.Node)]  # type: ignore[union-attr]  # a list
        if len(places) != 1 or values(node)[0].shape != values(places[0])[0].shape:
            raise AxisError(
                f"{describe(node)} looks up in a table of several dimensions what image tokens say, which is not "
                "supported."
            )
        return self._given(places[0])

    def _moved_with(self, node: fx.Node, given: fx.Node) -> Any:
        if given in self.known:
            return self.known[given]
        found = values(given)
        if not found or found[0].is_floating_point():
            return self._given(given)
        index = constant_value(given) if _constant(given) else None
        if index is None:
            raise AxisError(
                f"{describe(node)} moves image tokens to places that depend on data ({given.name}); the rows of a "
                "prompt have fixed places."
            )
        return index

    # --- what works on them -------------------------------------------------------------------------------------------

    def _pointwise(self, node: fx.Node) -> Tensor:
        given = [self._given(n) for n in content_inputs(node) if values(n)]
        return self.sets.join(given).expand(_size(node))

    def _product(self, node: fx.Node) -> Tensor:
        """Each of one operand's tokens by itself; or of the other's all together (an attention's values)."""
        first = PRODUCTS[node.target]  # type: ignore[index]
        left, right = node.args[first], node.args[first + 1]
        assert isinstance(left, fx.Node) and isinstance(right, fx.Node)
        made = []
        if left in self.known:
            made.append(self.sets.union(self.known[left], [-1]))
        if right in self.known and left not in self.known and node.target in MATMULS and _shares_out(left):
            made.append(self._shared_out(left, right))
        elif right in self.known:
            # What decides how much of each is in the result is not what it is made of.
            if node.target in MATMULS and left in self.known and self._routes(left):
                made.clear()
            made.append(self.sets.union(self.known[right], [-2]))
        if not made:
            raise AxisError(f"{describe(node)} adds image tokens to a product of something else.")
        return self.sets.join([ids.expand(_size(node)) for ids in made])

    def _shared_out(self, left: fx.Node, right: fx.Node) -> Tensor:
        """Of a product with a constant matrix (means over given places): the tokens that each row takes."""
        shares = constant_value(left)
        assert shares is not None
        tokens = self.sets.union(self.known[right], [-1]).transpose(-1, -2)
        return self.sets.union(torch.where(shares != 0, tokens, EMPTY), [-1])

    @staticmethod
    def _routes(left: fx.Node) -> bool:
        while left.target in CASTS or left.target in DROPOUT:
            left = left.all_input_nodes[0]
        return left.target in SOFTMAX

    def _attended(self, node: fx.Node) -> Tensor:
        value = node.args[2]
        assert isinstance(value, fx.Node)
        return self.sets.union(self._given(value), [-2]).expand(_size(node))

    def _normed(self, node: fx.Node) -> Tensor:
        (ids,) = (self._given(n) for n in node.all_input_nodes[:1])
        shape = node.args[1]
        assert isinstance(shape, Sequence)
        return self.sets.union(ids, range(ids.dim() - len(shape), ids.dim())).expand(_size(node))

    def _along(self, node: fx.Node) -> Tensor:
        dim = argument(node, 1, "dim")
        return self.sets.union(self._given(node.all_input_nodes[0]), [dim]).expand(_size(node))

    def _over(self, node: fx.Node) -> Tensor:
        ids, dims = self._given(node.all_input_nodes[0]), argument(node, 1, "dim")
        dims = [dims] if isinstance(dims, int) else list(dims or range(ids.dim()))
        return self.sets.union(ids, dims).reshape(_size(node))

    def _pooled(self, node: fx.Node) -> Tensor:
        ids = self._given(node.all_input_nodes[0])
        kernel = _pair(argument(node, 1, "kernel_size"))
        stride = _pair(argument(node, 2, "stride") or kernel)
        return self._windows(node, ids, kernel, stride, _pair(argument(node, 3, "padding") or 0))

    def _unfolded(self, node: fx.Node) -> Tensor:
        # For floating-point numbers alone; token numbers are small integers, exact in these.
        ids = self._given(node.all_input_nodes[0]).double()
        found: Tensor = torch.ops.aten.im2col.default(ids, *node.args[1:])
        return found.int()

    def _resized(self, node: fx.Node) -> Tensor:
        ids, out = self._given(node.all_input_nodes[0]), _size(node)
        flat = ids.dim() - len(out[-2:]) if node.target in overloads("adaptive_avg_pool2d") else None
        if flat is None:
            ids, out = ids.unsqueeze(-2), [*out[:-1], 1, out[-1]]
        kernel = [have // want for have, want in zip(ids.shape[-2:], out[-2:], strict=True)]
        if any(have % want for have, want in zip(ids.shape[-2:], out[-2:], strict=True)):
            raise AxisError(f"{describe(node)} pools image tokens in windows of several sizes, which is not supported.")
        return self._windows(node, ids, kernel, kernel, [0, 0]).reshape(_size(node))

    def _interpolated(self, node: fx.Node) -> Tensor:
        """Each place takes the tokens that have a share in it, along the height and along the width."""
        ids, rest = self._given(node.all_input_nodes[0]), node.args[1:]
        for dim in (-1, -2):
            size = ids.shape[dim]
            # Of rows (or columns) that are one of them each: what the operator makes is each one's share.
            apart = torch.eye(size)[None, :, :, None] if dim == -2 else torch.eye(size)[None, :, None]
            apart = apart.expand(1, size, *(size if d == dim else ids.shape[d] for d in (-2, -1)))
            shares = node.target(apart, *rest, **node.kwargs)[0]  # type: ignore[operator]  # [size, height, width]
            shares = (shares[:, :, 0] if dim == -2 else shares[:, 0]).T
            tokens = ids.movedim(dim, -1).unsqueeze(-2)
            taken = torch.where(shares.abs() > 1e-6, tokens, EMPTY)
            ids = self.sets.union(taken, [-1]).squeeze(-1).movedim(-1, dim)
        return ids

    def _windows(
        self, node: fx.Node, ids: Tensor, kernel: Sequence[int], stride: Sequence[int], padding: Sequence[int]
    ) -> Tensor:
        ids = torch.nn.functional.pad(ids, (padding[1], padding[1], padding[0], padding[0]))
        windows = ids.unfold(-2, kernel[0], stride[0]).unfold(-2, kernel[1], stride[1])
        found = self.sets.union(windows, [-1, -2]).squeeze(-1).squeeze(-1)
        out = _size(node)
        if list(found.shape[-2:]) != out[-2:] and node.target in _POOLS:
            raise AxisError(
                f"{describe(node)} pools image tokens in windows beyond their border, which is not supported."
            )
        return found

    def _convolved(self, node: fx.Node) -> Tensor:
        """In strides, the tokens of each window. Without, it looks at neighbours: a place stays made of its own."""
        ids, out, weight = self._given(node.all_input_nodes[0]), _size(node), node.args[1]
        assert isinstance(weight, fx.Node)
        grouped = argument(node, 6, "groups") or 1
        if not isinstance(grouped, int) or grouped == 1:
            ids = self.sets.union(ids, [1])
        if list(ids.shape[2:]) == out[2:]:
            return ids.expand(out)
        kernel, dims = list(values(weight)[0].shape[2:]), len(out) - 2
        strides, pads = (
            _each(given or default, dims)
            for given, default in ((argument(node, 3, "stride"), 1), (argument(node, 4, "padding"), 0))
        )
        for dim, (size, stride, pad) in enumerate(zip(map(int, kernel), strides, pads, strict=True), 2):
            # As much in front as the model's own padding leaves; 0 is the empty set.
            ids = torch.nn.functional.pad(ids, [0, 0] * (len(out) - 1 - dim) + [pad, pad])
            if stride == 1 and out[dim] > 1:
                ids = ids.narrow(dim, size // 2, out[dim])
            else:
                ids = self.sets.union(ids.unfold(dim, size, stride), [-1]).squeeze(-1)
        return ids.expand(out)

    def _looked_up(self, node: fx.Node) -> Tensor:
        """Rows of a table that tokens say (those of a quantizer)."""
        table, ids = node.args[:2]
        if table in self.known or not isinstance(ids, fx.Node):
            raise AxisError(f"{describe(node)} looks something up in image tokens, which is not supported.")
        return self._given(ids).unsqueeze(-1).expand(_size(node))

    def _grouped(self, node: fx.Node) -> Tensor:
        """A norm over places and channels: as a convolution, it keeps the grid."""
        return self.sets.union(self._given(node.all_input_nodes[0]), [1]).expand(_size(node))


_STEPS: dict[Any, Callable[[_Run, fx.Node], Tensor]] = {
    **dict.fromkeys(PRODUCTS, _Run._product),
    ATTENTION: _Run._attended,
    **dict.fromkeys(_NORMS, _Run._normed),
    **dict.fromkeys({*SOFTMAX, *overloads("log_softmax"), *overloads("cumsum")}, _Run._along),
    **dict.fromkeys(_OVER, _Run._over),
    **dict.fromkeys(_POOLS, _Run._pooled),
    **dict.fromkeys(_ADAPTIVE, _Run._resized),
    aten.im2col.default: _Run._unfolded,
    **dict.fromkeys(_RESIZES, _Run._interpolated),
    **dict.fromkeys(_CONVOLUTIONS, _Run._convolved),
    aten.embedding.default: _Run._looked_up,
    aten.group_norm.default: _Run._grouped,
    aten.batch_norm.default: lambda run, node: run._given(node.all_input_nodes[0]),  # by what was learned
}


def _size(node: fx.Node) -> list[int]:
    return [int(n) for n in values(node)[0].shape]


def _constant(node: fx.Node) -> bool:
    """Whether a value comes from no input's numbers."""
    return not any(n.op == "placeholder" for n in ancestors(node) | {node})


def _shares_out(left: fx.Node) -> bool:
    """Whether a matrix is a constant that was not learned."""
    return _constant(left) and not depends_on_parameter(left)


def _each(value: Any, dims: int) -> list[int]:
    """A number for each dimension."""
    numbers = [int(n) for n in value] if isinstance(value, Sequence) and not isinstance(value, str) else [int(value)]
    return numbers * dims if len(numbers) == 1 else numbers


def _pair(value: Any) -> list[int]:
    numbers = list(value) if isinstance(value, Sequence) else [value]
    return [int(n) for n in numbers * 2][:2] if len(numbers) == 1 else [int(n) for n in numbers]
