"""Small graphs built by hand, one for each operator with a rule, and the axes that must come out.

Inputs are written as sizes, `text:7` where a dimension indexes seven text tokens, with an optional dtype in front:
`"2 text:7 8"`, `"int 2 text:7"`. Sizes collide on purpose: 7 is a number of tokens and a plain size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from pumer_compile.analysis.annotate import Annotation, annotate
from pumer_compile.analysis.axes import Tokens, constraint_dims

aten = torch.ops.aten
DTYPES = {"int": torch.int64, "bool": torch.bool, "half": torch.float16}


class Builder:
    """An fx graph whose values are computed as it is built."""

    def __init__(self) -> None:
        self.graph = fx.Graph()
        self.streams: dict[str, str] = {}

    def placeholder(self, value: Tensor, name: str) -> fx.Node:
        node = self.graph.placeholder(name)
        node.meta["val"] = value
        return node

    def call(self, target: Any, *args: Any, **kwargs: Any) -> fx.Node:
        node = self.graph.call_function(target, args, kwargs)
        values = fx.node.map_arg((args, kwargs), lambda n: n.meta["val"])
        node.meta["val"] = target(*values[0], **values[1])
        return node

    def seeded(self, spec: str, index: int) -> fx.Node:
        """A placeholder, and for each of its token dimensions a seeded one that it is multiplied with."""
        words = spec.split()
        dtype = DTYPES.get("".join(words[:1]), torch.float32)
        parts = [w.split(":") for w in words if w not in DTYPES]
        sizes = [int(p[-1]) for p in parts]
        value = torch.zeros(sizes, dtype=dtype) if dtype != torch.float32 else torch.randn(sizes)
        node = self.placeholder(value, f"x{index}")
        for dim, part in enumerate(parts):
            if len(part) == 2:
                name = f"seed_{part[0]}_{index}_{dim}"
                self.streams[name] = part[0]
                seed = self.placeholder(torch.ones(sizes[dim], 1).to(torch.float32), name)
                flat = self.call(aten.view.default, seed, [-1 if i == dim else 1 for i in range(len(sizes))])
                target = aten.mul.Tensor if dtype in (torch.float32, torch.float16) else aten.logical_and.default
                joined = self.call(target, node, flat)
                if dtype == torch.int64:
                    joined = self.call(aten.to.dtype, joined, torch.int64)
                node = joined
        return node


@dataclass
class Result:
    annotation: Annotation
    node: fx.Node
    inputs: list[fx.Node]

    def axes(self) -> list[list[str]]:
        """Axes of every output."""
        value = self.node.meta["val"]
        outputs = len(value) if isinstance(value, list | tuple) else 1
        return [[str(a) for a in self.annotation.axes(self.node, o)] for o in range(outputs)]

    def said_of_tokens(self) -> set[str]:
        """Names of the constraints, other than Same, that speak of a token dimension of an input."""
        found = set()
        for constraint in self.annotation.constraints[self.node]:
            for dim in constraint_dims(constraint):
                if dim.node in self.inputs and isinstance(self.annotation.axis(dim), Tokens):
                    found.add(type(constraint).__name__)
        return found - {"Same"}


def build(target: Any, specs: list[str], arguments: Callable[..., tuple]) -> Result:
    builder = Builder()
    inputs = [builder.seeded(spec, i) for i, spec in enumerate(specs)]
    args = arguments(*inputs)
    kwargs = args[-1] if args and isinstance(args[-1], dict) else {}
    node = builder.call(target, *(args[:-1] if kwargs else args), **kwargs)
    return finish(builder, node, inputs)


def finish(builder: Builder, node: fx.Node, inputs: list[fx.Node]) -> Result:
    builder.graph.output(node)
    module = fx.GraphModule(torch.nn.Module(), builder.graph)
    return Result(annotate(module, builder.streams), node, inputs)


def _complex(x: fx.Node) -> fx.Node:
    node = x.graph.call_function(aten.view_as_complex.default, (x,))
    node.meta["val"] = torch.view_as_complex(x.meta["val"])
    return node


T, P, B = "[text:7]", "[image:5]", "[text:7 | image:5]"
X = "2 text:7 8"

# name: operator, inputs, arguments, axes of the outputs, what else is said of the token axes
CASES: dict[str, tuple[Any, list[str], Callable[..., tuple], list[str], set[str]]] = {
    # elementwise
    "add": (aten.add.Tensor, [X, "2 7 8"], lambda x, y: (x, y), [f"2 {T} 8"], set()),
    "add a row": (aten.add.Tensor, [X, "8"], lambda x, y: (x, y), [f"2 {T} 8"], set()),
    "add a column": (aten.add.Tensor, [X, "7 1"], lambda x, y: (x, y), [f"2 {T} 8"], set()),
    "add a scalar": (aten.add.Tensor, [X], lambda x: (x, 3), [f"2 {T} 8"], set()),
    "outer sum": (
        aten.add.Tensor,
        ["2 text:7 1", "2 1 image:5"],
        lambda x, y: (x, y),
        [f"2 {T} {P}"],
        set(),
    ),
    "gelu": (aten.gelu.default, [X], lambda x: (x,), [f"2 {T} 8"], set()),
    "log_sigmoid": (aten.log_sigmoid.default, [X], lambda x: (x,), [f"2 {T} 8"], set()),
    "to": (aten.to.dtype, [X], lambda x: (x, torch.float16), [f"2 {T} 8"], set()),
    "floor_divide": (aten.floor_divide.default, [X, "2 7 8"], lambda x, y: (x, y), [f"2 {T} 8"], set()),
    "view_as_complex": (aten.view_as_complex.default, ["2 text:7 4 2"], lambda x: (x,), [f"2 {T} 4"], set()),
    "complex tokens": (aten.view_as_complex.default, ["2 4 text:2"], lambda x: (x,), ["2 4"], {"ByPosition"}),
    "view_as_real": (
        aten.view_as_real.default,
        ["2 text:7 4 2"],
        lambda x: (_complex(x),),
        [f"2 {T} 4 2"],
        set(),
    ),
    "clone": (aten.clone.default, [X], lambda x: (x,), [f"2 {T} 8"], set()),
    "contiguous": (aten.contiguous.default, [X], lambda x: (x,), [f"2 {T} 8"], set()),
    "dropout": (aten.dropout.default, [X], lambda x: (x, 0.1, False), [f"2 {T} 8"], set()),
    "zeros_like": (aten.zeros_like.default, [X], lambda x: (x,), [f"2 {T} 8"], set()),
    "masked_fill": (
        aten.masked_fill.Scalar,
        ["2 4 text:7 image:5", "bool 2 1 1 5"],
        lambda x, m: (x, m, -1.0),
        [f"2 4 {T} {P}"],
        set(),
    ),
    "where": (
        aten.where.self,
        ["bool 2 text:7 1", "2 7 8", "8"],
        lambda m, x, y: (m, x, y),
        [f"2 {T} 8"],
        set(),
    ),
    "expand_as": (aten.expand_as.default, ["2 text:7 1", "2 7 8"], lambda x, y: (x, y), [f"2 {T} 8"], set()),
    # along one axis
    "softmax over features": (aten.softmax.int, [X], lambda x: (x, -1), [f"2 {T} 8"], set()),
    "softmax over tokens": (aten.softmax.int, [X], lambda x: (x, 1), [f"2 {T} 8"], set()),
    "_softmax": (aten._softmax.default, [X], lambda x: (x, 1, False), [f"2 {T} 8"], set()),
    "log_softmax": (aten.log_softmax.int, [X], lambda x: (x, 1), [f"2 {T} 8"], set()),
    "cumsum over tokens": (aten.cumsum.default, [X], lambda x: (x, 1), [f"2 {T} 8"], {"ByPosition"}),
    "cumsum over features": (aten.cumsum.default, [X], lambda x: (x, 2), [f"2 {T} 8"], set()),
    # normalisation
    "layer_norm": (aten.layer_norm.default, [X], lambda x: (x, [8]), [f"2 {T} 8"], set()),
    "layer_norm over tokens": (aten.layer_norm.default, [X], lambda x: (x, [7, 8]), [f"2 {T} 8"], {"ByPosition"}),
    "rms_norm": (aten.rms_norm.default, [X], lambda x: (x, [8]), [f"2 {T} 8"], set()),
    # constants
    "new_zeros": (aten.new_zeros.default, [X], lambda x: (x, [2, 7]), ["2 7"], {"Reduce"}),
    # shapes
    "view to heads": (aten.view.default, [X], lambda x: (x, [2, 7, 4, 2]), [f"2 {T} 4 2"], set()),
    "view to one": (aten.view.default, ["2 text:7 4 2"], lambda x: (x, [2, 7, 8]), [f"2 {T} 8"], set()),
    "view as": (aten.view_as.default, [X, "2 7 4 2"], lambda x, y: (x, y), [f"2 {T} 4 2"], set()),
    "reshape as tokens": (
        aten.reshape_as.default,
        ["2 text:7 8", "2 image:7 4 2"],
        lambda x, y: (x, y),
        [f"2 {T} 4 2"],
        {"Reduce"},
    ),
    "view with -1": (aten.view.default, [X], lambda x: (x, [2, -1, 2, 4]), [f"2 {T} 2 4"], set()),
    "flat batch": (aten.reshape.default, [X], lambda x: (x, [14, 8]), [f"(2 x {T}) 8"], set()),
    "batch times heads": (
        aten.reshape.default,
        ["2 4 text:7 8"],
        lambda x: (x, [8, 7, 8]),
        [f"8 {T} 8"],
        set(),
    ),
    "tokens and features": (aten.reshape.default, [X], lambda x: (x, [2, 56]), [f"2 ({T} x 8)"], set()),
    "ones come and go": (aten.view.default, [X], lambda x: (x, [2, 1, 7, 1, 8]), [f"2 1 {T} 1 8"], set()),
    "_unsafe_view": (aten._unsafe_view.default, [X], lambda x: (x, [2, 7, 2, 4]), [f"2 {T} 2 4"], set()),
    "flatten": (aten.flatten.using_ints, ["2 text:7 4 2"], lambda x: (x, 2), [f"2 {T} 8"], set()),
    "flatten the tokens": (aten.flatten.using_ints, [X], lambda x: (x, 0, 1), [f"(2 x {T}) 8"], set()),
    "unflatten": (aten.unflatten.int, [X], lambda x: (x, 2, [4, 2]), [f"2 {T} 4 2"], set()),
    "matrix transpose": (aten.mT.default, [X], lambda x: (x,), [f"2 8 {T}"], set()),
    "transpose": (aten.transpose.int, [X], lambda x: (x, 1, 2), [f"2 8 {T}"], set()),
    "transpose from the end": (aten.transpose.int, [X], lambda x: (x, -1, 0), [f"8 {T} 2"], set()),
    "permute": (aten.permute.default, ["2 text:7 4 2"], lambda x: (x, [0, 2, 1, 3]), [f"2 4 {T} 2"], set()),
    "permute from the end": (aten.permute.default, [X], lambda x: (x, [-1, 0, -2]), [f"8 2 {T}"], set()),
    "t": (aten.t.default, ["text:7 8"], lambda x: (x,), [f"8 {T}"], set()),
    "numpy_T": (aten.numpy_T.default, ["text:7 8"], lambda x: (x,), [f"8 {T}"], set()),
    "movedim": (aten.movedim.int, [X], lambda x: (x, 1, -1), [f"2 8 {T}"], set()),
    "movedim to the front": (aten.movedim.int, ["2 4 text:7 2"], lambda x: (x, -2, 0), [f"{T} 2 4 2"], set()),
    "unsqueeze": (aten.unsqueeze.default, [X], lambda x: (x, 1), [f"2 1 {T} 8"], set()),
    "unsqueeze at the end": (aten.unsqueeze.default, [X], lambda x: (x, -1), [f"2 {T} 8 1"], set()),
    "squeeze": (aten.squeeze.dim, ["2 1 text:7"], lambda x: (x, 1), [f"2 {T}"], set()),
    "squeeze several": (aten.squeeze.dims, ["1 text:7 1"], lambda x: (x, [0, 2]), [T], set()),
    "squeeze all": (aten.squeeze.default, ["1 text:7 1 2"], lambda x: (x,), [f"{T} 2"], set()),
    "squeeze of no one": (aten.squeeze.dim, [X], lambda x: (x, 1), [f"2 {T} 8"], set()),
    "expand": (aten.expand.default, ["1 text:7 1"], lambda x: (x, [2, 7, 8]), [f"2 {T} 8"], set()),
    "expand by a dimension": (
        aten.expand.default,
        ["text:7 8"],
        lambda x: (x, [2, -1, -1]),
        [f"2 {T} 8"],
        set(),
    ),
    "repeat": (aten.repeat.default, ["1 text:7 8"], lambda x: (x, [2, 1, 3]), [f"2 {T} 24"], set()),
    "repeat with more dimensions": (
        aten.repeat.default,
        ["text:7 8"],
        lambda x: (x, [2, 1, 1]),
        [f"2 {T} 8"],
        set(),
    ),
    "repeat tokens": (aten.repeat.default, [X], lambda x: (x, [1, 2, 1]), [f"2 (2 x {T}) 8"], {"Repeat"}),
    # joining and cutting
    "concat": (aten.concat.default, [X, "2 image:5 8"], lambda x, y: ([x, y], 1), [f"2 {B} 8"], {"Concat"}),
    "concatenate": (aten.concatenate.default, [X, "2 image:5 8"], lambda x, y: ([x, y], 1), [f"2 {B} 8"], {"Concat"}),
    "cat": (aten.cat.default, [X, "2 image:5 8"], lambda x, y: ([x, y], 1), [f"2 {B} 8"], {"Concat"}),
    "cat from the end": (
        aten.cat.default,
        [X, "2 image:5 8"],
        lambda x, y: ([x, y], -2),
        [f"2 {B} 8"],
        {"Concat"},
    ),
    "cat features": (aten.cat.default, [X, "2 7 3"], lambda x, y: ([x, y], 2), [f"2 {T} 11"], set()),
    "cat features behind others": (
        aten.cat.default,
        ["2 7 3", X],
        lambda x, y: ([x, y], 2),
        [f"2 {T} 11"],
        set(),
    ),
    "cat behind an empty vector": (aten.cat.default, ["0", X], lambda x, y: ([x, y], 1), [f"2 {T} 8"], {"Concat"}),
    "cat batches": (aten.cat.default, [X, "2 7 8"], lambda x, y: ([x, y],), [f"4 {T} 8"], set()),
    "stack": (aten.stack.default, [X, "2 7 8"], lambda x, y: ([x, y],), [f"2 2 {T} 8"], set()),
    "stack in the middle": (
        aten.stack.default,
        [X, "2 7 8"],
        lambda x, y: ([x, y], 2),
        [f"2 {T} 2 8"],
        set(),
    ),
    "slice features": (aten.slice.Tensor, [X], lambda x: (x, 2, 1, 4), [f"2 {T} 3"], set()),
    "slice nothing away": (
        aten.slice.Tensor,
        [X],
        lambda x: (x, 1, 0, 9223372036854775807),
        [f"2 {T} 8"],
        set(),
    ),
    "slice tokens": (aten.slice.Tensor, [X], lambda x: (x, 1, 2, 5), ["2 [text:3] 8"], {"Slice"}),
    "slice from the end": (aten.slice.Tensor, [X], lambda x: (x, 1, -3), ["2 [text:3] 8"], {"Slice"}),
    "slice up to": (aten.slice.Tensor, [X], lambda x: (x, 1, None, 2), ["2 [text:2] 8"], {"Slice"}),
    "slice of no token": (aten.slice.Tensor, [X], lambda x: (x, 1, 3, 3), ["2 0 8"], {"Reduce"}),
    "every second token": (aten.slice.Tensor, [X], lambda x: (x, 1, 0, 7, 2), ["2 4 8"], {"ByPosition"}),
    "narrow all": (aten.narrow.default, [X], lambda x: (x, 1, 0, 7), [f"2 {T} 8"], set()),
    "narrow features": (aten.narrow.default, [X], lambda x: (x, 2, 0, 3), [f"2 {T} 3"], set()),
    "narrow tokens": (aten.narrow.default, [X], lambda x: (x, 1, 0, 3), ["2 3 8"], {"ByPosition"}),
    "select a token": (aten.select.int, [X], lambda x: (x, 1, 0), ["2 8"], {"Select"}),
    "select a feature": (aten.select.int, [X], lambda x: (x, 2, -1), [f"2 {T}"], set()),
    "select a sample": (aten.select.int, [X], lambda x: (x, 0, 1), [f"{T} 8"], set()),
    "chunk features": (aten.chunk.default, [X], lambda x: (x, 2, -1), [f"2 {T} 4"] * 2, set()),
    "split features": (
        aten.split.Tensor,
        [X],
        lambda x: (x, 3, 2),
        [f"2 {T} 3", f"2 {T} 3", f"2 {T} 2"],
        set(),
    ),
    "split_with_sizes": (
        aten.split_with_sizes.default,
        [X],
        lambda x: (x, [6, 2], 2),
        [f"2 {T} 6", f"2 {T} 2"],
        set(),
    ),
    "unbind": (aten.unbind.int, ["3 2 text:7"], lambda x: (x,), [f"2 {T}"] * 3, set()),
    "unbind the last": (aten.unbind.int, ["2 text:7 3"], lambda x: (x, -1), [f"2 {T}"] * 3, set()),
    "split tokens": (aten.split.Tensor, [X], lambda x: (x, 4, 1), ["2 4 8", "2 3 8"], {"ByPosition"}),
    # lookups
    "embedding": (aten.embedding.default, ["9 4", "int 2 text:7"], lambda w, i: (w, i), [f"2 {T} 4"], set()),
    "gather over features": (
        aten.gather.default,
        [X, "int 2 7 3"],
        lambda x, i: (x, 2, i),
        [f"2 {T} 3"],
        set(),
    ),
    "gather over tokens": (
        aten.gather.default,
        [X, "int 2 3 8"],
        lambda x, i: (x, 1, i),
        ["2 3 8"],
        {"ByPosition"},
    ),
    "gather over as many tokens": (
        aten.gather.default,
        [X, "int 2 7 8"],
        lambda x, i: (x, 1, i),
        ["2 7 8"],
        {"ByPosition"},
    ),
    "index_select features": (
        aten.index_select.default,
        [X, "int 3"],
        lambda x, i: (x, 2, i),
        [f"2 {T} 3"],
        set(),
    ),
    "index_select tokens": (
        aten.index_select.default,
        [X, "int 3"],
        lambda x, i: (x, 1, i),
        ["2 3 8"],
        {"ByPosition"},
    ),
    "index_select by tokens": (
        aten.index_select.default,
        ["9 8", "int text:7"],
        lambda x, i: (x, 0, i),
        [f"{T} 8"],
        set(),
    ),
    "index_select by a number": (aten.index_select.default, [X, "int"], lambda x, i: (x, 2, i), [f"2 {T} 1"], set()),
    "index features": (
        aten.index.Tensor,
        [X, "int 3"],
        lambda x, i: (x, [None, None, i]),
        [f"2 {T} 3"],
        set(),
    ),
    "index tokens": (aten.index.Tensor, [X, "int 3"], lambda x, i: (x, [None, i]), ["2 3 8"], {"ByPosition"}),
    "index by tokens": (
        aten.index.Tensor,
        ["9 8", "int 2 text:7"],
        lambda x, i: (x, [i]),
        [f"2 {T} 8"],
        set(),
    ),
    "index apart": (
        aten.index.Tensor,
        ["2 8 text:7", "int 2", "int 2"],
        lambda x, i, j: (x, [i, None, j]),
        ["2 8"],
        {"ByPosition"},
    ),
    "index by a mask of tokens": (
        aten.index.Tensor,
        [X, "bool 2 text:7"],
        lambda x, m: (x, [m]),
        ["0 8"],
        {"ByPosition"},
    ),
    "index by a mask of features": (
        aten.index.Tensor,
        ["2 text:7 4 2", "bool 4 2"],
        lambda x, m: (x, [None, None, m]),
        [f"2 {T} 0"],
        set(),
    ),
    "index by a mask before tokens": (
        aten.index.Tensor,
        ["2 4 text:7", "bool 2 4"],
        lambda x, m: (x, [m]),
        [f"0 {T}"],
        set(),
    ),
    "index by a mask and more": (
        aten.index.Tensor,
        [X, "bool 2 7", "int 1"],
        lambda x, m, i: (x, [m, i]),
        ["0"],
        {"ByPosition"},
    ),
    "index around tokens": (
        aten.index.Tensor,
        [X, "int 2", "int 2"],
        lambda x, i, j: (x, [i, None, j]),
        ["2 7"],
        {"ByPosition"},
    ),
    # reductions
    "sum over tokens": (aten.sum.dim_IntList, [X], lambda x: (x, [1]), ["2 8"], {"Summed"}),
    "sum over features": (aten.sum.dim_IntList, [X], lambda x: (x, [-1]), [f"2 {T}"], set()),
    "sum of everything": (aten.sum.default, [X], lambda x: (x,), [""], {"Summed"}),
    "sum over no dimension, which is all": (
        aten.sum.dim_IntList,
        [X],
        lambda x: (x, []),
        [""],
        {"Summed"},
    ),
    "mean keeps the dimension": (aten.mean.dim, [X], lambda x: (x, [1], True), ["2 1 8"], {"Reduce"}),
    "mean over several": (aten.mean.dim, ["2 4 text:7 8"], lambda x: (x, [1, 3]), [f"2 {T}"], set()),
    "amax": (aten.amax.default, [X], lambda x: (x, [2]), [f"2 {T}"], set()),
    "amin": (aten.amin.default, [X], lambda x: (x, [1]), ["2 8"], {"Reduce"}),
    "any": (aten.any.dim, ["bool 2 text:7 8"], lambda x: (x, 2), [f"2 {T}"], set()),
    "all": (aten.all.dim, ["bool 2 text:7 8"], lambda x: (x, 1), ["2 8"], {"Reduce"}),
    "max of everything": (aten.max.default, [X], lambda x: (x,), [""], {"Reduce"}),
    "argmax over tokens": (aten.argmax.default, [X], lambda x: (x, 1), ["2 8"], {"ByPosition"}),
    "argmax over features": (aten.argmax.default, [X], lambda x: (x, -1), [f"2 {T}"], set()),
    "max with positions": (aten.max.dim, [X], lambda x: (x, 1), ["2 8"] * 2, {"ByPosition"}),
    "max with positions over features": (aten.max.dim, [X], lambda x: (x, 2), [f"2 {T}"] * 2, set()),
    "min with positions": (aten.min.dim, [X], lambda x: (x, 1, True), ["2 1 8"] * 2, {"ByPosition"}),
    # products
    "linear to a number": (aten.linear.default, [X, "8"], lambda x, w: (x, w), [f"2 {T}"], set()),
    "linear": (aten.linear.default, [X, "7 8"], lambda x, w: (x, w), [f"2 {T} 7"], set()),
    "linear with bias": (
        aten.linear.default,
        [X, "7 8", "7"],
        lambda x, w, b: (x, w, b),
        [f"2 {T} 7"],
        set(),
    ),
    "matmul of queries and keys": (
        aten.matmul.default,
        ["2 4 text:7 8", "2 4 8 image:5"],
        lambda q, k: (q, k),
        [f"2 4 {T} {P}"],
        set(),
    ),
    "matmul over tokens": (
        aten.matmul.default,
        ["2 4 image:5 text:7", "2 4 7 8"],
        lambda p, v: (p, v),
        [f"2 4 {P} 8"],
        set(),
    ),
    "matmul with a matrix": (aten.matmul.default, [X, "8 3"], lambda x, w: (x, w), [f"2 {T} 3"], set()),
    "matmul with a vector": (aten.matmul.default, [X, "8"], lambda x, w: (x, w), [f"2 {T}"], set()),
    "a vector with matmul": (
        aten.matmul.default,
        ["2", "3 2 text:7"],
        lambda w, x: (w, x),
        [f"3 {T}"],
        set(),
    ),
    "matmul that broadcasts": (
        aten.matmul.default,
        ["1 4 text:7 8", "2 1 8 7"],
        lambda x, y: (x, y),
        [f"2 4 {T} 7"],
        set(),
    ),
    "matmul with tokens as a batch": (
        aten.matmul.default,
        ["text:7 3 8", "2 7 8 5"],
        lambda x, y: (x, y),
        [f"2 {T} 3 5"],
        set(),
    ),
    "bmm": (aten.bmm.default, ["2 text:7 8", "2 8 image:5"], lambda x, y: (x, y), [f"2 {T} {P}"], set()),
    "mm": (aten.mm.default, ["text:7 8", "8 3"], lambda x, y: (x, y), [f"{T} 3"], set()),
    "addmm": (aten.addmm.default, ["3", "text:7 8", "8 3"], lambda b, x, y: (b, x, y), [f"{T} 3"], set()),
    "baddbmm": (
        aten.baddbmm.default,
        ["2 1 image:5", "2 text:7 8", "2 8 5"],
        lambda b, x, y: (b, x, y),
        [f"2 {T} {P}"],
        set(),
    ),
    "einsum": (
        aten.einsum.default,
        ["2 text:7 4 8", "2 image:5 4 8"],
        lambda q, k: ("bnhd,bmhd->bhnm", [q, k]),
        [f"2 4 {T} {P}"],
        set(),
    ),
    "einsum over tokens": (
        aten.einsum.default,
        ["2 4 text:7 image:5", "2 5 4 8"],
        lambda p, v: ("bhnm,bmhd->bnhd", [p, v]),
        [f"2 {T} 4 8"],
        {"Reduce"},
    ),
    "einsum with dots": (
        aten.einsum.default,
        [X, "8 3"],
        lambda x, w: ("...d,de->...e", [x, w]),
        ["2 7 3"],
        {"ByPosition"},
    ),
    "sdpa": (
        aten.scaled_dot_product_attention.default,
        ["2 4 text:7 8", "2 4 image:5 8", "2 4 5 3"],
        lambda q, k, v: (q, k, v),
        [f"2 4 {T} 3"],
        set(),
    ),
    "sdpa with a mask": (
        aten.scaled_dot_product_attention.default,
        ["2 4 text:7 8", "2 4 image:5 8", "2 4 5 8", "2 1 7 5"],
        lambda q, k, v, m: (q, k, v, m),
        [f"2 4 {T} 8"],
        set(),
    ),
    "sdpa that is causal": (
        aten.scaled_dot_product_attention.default,
        ["2 4 text:7 8", "2 4 7 8", "2 4 7 8"],
        lambda q, k, v: (q, k, v, None, 0.0, True),
        [f"2 4 {T} 8"],
        {"ByPosition"},
    ),
    "conv2d over tokens": (
        aten.conv2d.default,
        ["2 3 text:8 8", "4 3 2 2"],
        lambda x, w: (x, w, None, [2, 2]),
        ["2 4 4 4"],
        {"ByPosition"},
    ),
    "conv2d": (
        aten.conv2d.default,
        ["2 3 8 8", "4 3 2 2"],
        lambda x, w: (x, w, None, [2, 2]),
        ["2 4 4 4"],
        set(),
    ),
    # losses
    "cross_entropy of tokens": (
        aten.cross_entropy_loss.default,
        ["text:7 4", "int 7"],
        lambda x, y: (x, y, None, 0),
        [T],
        {"ByPosition"},
    ),
    "cross_entropy": (
        aten.cross_entropy_loss.default,
        ["2 4 text:7", "int 2 7", "4"],
        lambda x, y, w: (x, y, w),
        [""],
        {"ByPosition"},
    ),
    "cross_entropy of classes that are tokens": (
        aten.cross_entropy_loss.default,
        ["2 text:7 8", "int 2 8"],
        lambda x, y: (x, y, None, 0),
        ["2 8"],
        {"ByPosition"},
    ),
    "cross_entropy with probabilities": (
        aten.cross_entropy_loss.default,
        ["2 4 text:7", "2 4 7"],
        lambda x, y: (x, y, None, 0),
        [f"2 {T}"],
        {"ByPosition"},
    ),
    "cross_entropy of one sample": (
        aten.cross_entropy_loss.default,
        ["text:7", "int"],
        lambda x, y: (x, y),
        [""],
        {"ByPosition"},
    ),
    "nll_loss": (aten.nll_loss_nd.default, ["text:7 4", "int 7"], lambda x, y: (x, y, None, 0), [T], {"ByPosition"}),
    # by position: carried along other axes, an error along this one once a reducer has changed it
    "isin": (aten.isin.Tensor_Tensor, [X, "image:5"], lambda x, s: (x, s), [f"2 {T} 8"], {"Reduce"}),
    "sort": (aten.sort.default, [X], lambda x: (x, 1), ["2 7 8", "2 7 8"], {"ByPosition"}),
    "sort features": (aten.sort.default, [X], lambda x: (x, 2), [f"2 {T} 8", f"2 {T} 8"], set()),
    "topk": (aten.topk.default, [X], lambda x: (x, 3, 1), ["2 3 8", "2 3 8"], {"ByPosition"}),
    "topk features": (aten.topk.default, [X], lambda x: (x, 3), [f"2 {T} 3", f"2 {T} 3"], set()),
    "cummax": (aten.cummax.default, [X], lambda x: (x, 1), ["2 7 8", "2 7 8"], {"ByPosition"}),
    "roll": (aten.roll.default, [X], lambda x: (x, [1], [1]), ["2 7 8"], {"ByPosition"}),
    "roll everything in a row": (aten.roll.default, [X], lambda x: (x, [1]), ["2 7 8"], {"ByPosition"}),
    "msort": (aten.msort.default, ["text:7 8"], lambda x: (x,), ["7 8"], {"ByPosition"}),
    "msort of samples": (aten.msort.default, [X], lambda x: (x,), [f"2 {T} 8"], set()),
    "variance of everything": (aten.var.default, [X], lambda x: (x, False), [""], {"ByPosition"}),
    "roll features": (aten.roll.default, [X], lambda x: (x, [1], [-1]), [f"2 {T} 8"], set()),
    "flip": (aten.flip.default, [X], lambda x: (x, [1]), ["2 7 8"], {"ByPosition"}),
    "flip features": (aten.flip.default, [X], lambda x: (x, [2]), [f"2 {T} 8"], set()),
    "tril": (aten.tril.default, ["2 text:7 image:5"], lambda x: (x,), [f"2 {T} {P}"], {"ByPosition"}),
    "tril of features": (aten.tril.default, ["text:7 8 8"], lambda x: (x,), [f"{T} 8 8"], set()),
    "pad tokens": (aten.constant_pad_nd.default, [X], lambda x: (x, [0, 0, 1, 0]), ["2 8 8"], {"ByPosition"}),
    "pad features": (aten.pad.default, [X], lambda x: (x, [0, 4]), [f"2 {T} 12"], set()),
    "avg_pool2d": (aten.avg_pool2d.default, ["text:7 3 8 8"], lambda x: (x, [2, 2]), [f"{T} 3 4 4"], set()),
    "avg_pool1d over tokens": (aten.avg_pool1d.default, ["2 8 text:6"], lambda x: (x, [2]), ["2 8 3"], {"ByPosition"}),
    "conv1d over tokens": (
        aten.conv1d.default,
        ["2 8 text:7", "4 8 3"],
        lambda x, w: (x, w, None, [1], [1]),
        ["2 4 7"],
        {"ByPosition"},
    ),
    "conv1d that looks back": (
        aten.conv1d.default,
        ["2 8 text:7", "8 1 3"],
        lambda x, w: (x, w, None, [1], [2], [1], 8),
        ["2 8 [text:7 | learned:2]"],
        {"Causal"},
    ),
    "conv1d that looks back in strides": (
        aten.conv1d.default,
        ["2 8 text:7", "8 1 3"],
        lambda x, w: (x, w, None, [2], [2], [1], 8),
        ["2 8 5"],
        {"ByPosition"},
    ),
    "group_norm": (aten.group_norm.default, ["2 8 text:7"], lambda x: (x, 2), [f"2 8 {T}"], {"ByPosition"}),
    "grid_sampler": (
        aten.grid_sampler.default,
        ["2 3 8 8", "2 text:7 1 2"],
        lambda x, g: (x, g, 0, 0, False),
        [f"2 3 {T} 1"],
        set(),
    ),
    "scatter over tokens": (
        aten.scatter.value,
        [X, "int 2 1 8"],
        lambda x, i: (x, 1, i, 1.0),
        ["2 7 8"],
        {"ByPosition"},
    ),
    "scatter over features": (
        aten.scatter.value,
        [X, "int 2 7 1"],
        lambda x, i: (x, 2, i, 1.0),
        [f"2 {T} 8"],
        set(),
    ),
    "masked_scatter": (
        aten.masked_scatter.default,
        [X, "bool 2 7 1", "image:5 8"],
        lambda x, m, s: (x, m, s),
        [f"2 {T} 8"],
        {"ByPosition"},
    ),
    "index_put": (
        aten.index_put.default,
        [X, "int 3", "3 7 8"],
        lambda x, i, v: (x, [i], v),
        ["2 7 8"],
        {"ByPosition"},
    ),
    "index_put of one row where a mask is true": (
        aten.index_put.default,
        [X, "bool 2 7", "8"],
        lambda x, m, v: (x, [m], v),
        [f"2 {T} 8"],
        set(),
    ),
    "index_put of a row for each that a mask chooses": (
        aten.index_put.default,
        [X, "bool 2 7", "0 8"],
        lambda x, m, v: (x, [m], v),
        ["2 7 8"],
        {"ByPosition"},
    ),
    "index_put of a number over features": (
        aten.index_put.default,
        [X, "int 3", ""],
        lambda x, i, v: (x, [None, None, i], v),
        [f"2 {T} 8"],
        set(),
    ),
    "index_put of a number over tokens": (
        aten.index_put.default,
        [X, "int 3", ""],
        lambda x, i, v: (x, [None, i], v),
        ["2 7 8"],
        {"ByPosition"},
    ),
    "nonzero": (aten.bincount.default, ["int text:7"], lambda x: (x, None, 3), ["3"], {"ByPosition"}),
    "var over tokens": (aten.var.dim, [X], lambda x: (x, [1]), ["2 8"], {"ByPosition"}),
    "var over features": (aten.var.dim, [X], lambda x: (x, [2]), [f"2 {T}"], set()),
    "norm of features": (
        aten.linalg_vector_norm.default,
        [X],
        lambda x: (x, 2, [-1], True),
        [f"2 {T} 1"],
        set(),
    ),
    "norm over tokens": (aten.linalg_vector_norm.default, [X], lambda x: (x, 2, [1]), ["2 8"], {"ByPosition"}),
    "bucketize": (aten.bucketize.Tensor, [X, "5"], lambda x, b: (x, b), [f"2 {T} 8"], set()),
    "one_hot": (aten.one_hot.default, ["int 2 text:7"], lambda x: (x, 3), [f"2 {T} 3"], set()),
    "repeat_interleave": (
        aten.repeat_interleave.self_int,
        [X],
        lambda x: (x, 2, 1),
        [f"2 ({T} x 2) 8"],
        {"Repeat"},
    ),
    "repeat_interleave of all in a row": (
        aten.repeat_interleave.self_int,
        ["text:7"],
        lambda x: (x, 2),
        ["14"],
        {"ByPosition"},
    ),
}
