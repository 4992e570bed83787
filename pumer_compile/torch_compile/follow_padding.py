"""What a compiled graph may do with the padding behind its texts (`text_length`): nothing that its results show.

The graph is traced twice: with padded texts, and with the shortest that it can be called with. What differs between
the two follows the text's length, whatever spelling it has. From the padded inputs on, every operator that meets such a
dimension must be known: to work token by token, or to leave padding out (attention with its mask, a sum of what padding
makes zero). Which entries are padding is followed exactly; every other operator is refused.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from math import prod
from typing import Any, NoReturn

import torch
from torch import fx

from ..analysis import rules_positional as _positional  # noqa: F401  (importing it registers its rules)
from ..analysis.axes import ByPosition, Concat, Constraint, Dim, Reduce, Reshape, Same, Summed, constraint_dims
from ..analysis.nodes import attribute, constant_value, describe, values
from ..analysis.operators import aten, overloads
from ..analysis.rules import argument, int_arg, list_arg, rule_for, wrap
from ..errors import UsageError
from .lowering import Padding
from .places import (
    CONVERSIONS,
    Content,
    Places,
    are_flags,
    carries,
    codes,
    common_content,
    computed,
    content_of,
    counts_tokens,
    cuts_nothing,
    dims_of,
    entries,
    first_ones,
    flat_leaves,
    in_graph,
    is_fake,
    pieces_of,
    same_pairs,
    was_one,
)

_LATER = "Leave text_length out and pad the texts outside of the model"
_BY_MASK = "let the model leave padding out by the attention mask"
_LOWEST = -1e4  # a maximum of features is above it

_MOVES = {
    *("transpose", "matrix_transpose", "permute", "reverse", "movedim", "unsqueeze", "squeeze", "expand", "stack"),
    *("getitem", "repeat", "view", "view_as", "flatten", "cat"),
}
"""Rules of operators that move entries and compute nothing: what padding holds, it holds after them."""
_BY_TOKEN = _MOVES | {
    *("pointwise", "isin", "filled", "embedding", "normalisation", "linear", "matmul", "addmm", "einsum", "one_hot"),
    *("looked_up", "along_axes", "spatial", "spread", "norm", "repeated_in_place", "reduction", "total"),
    *("arg_reduction", "sym_size"),
}
"""Rules whose `Same` says that an operator works on each entry of a dimension alone."""
_SIZED = {"view", "flatten", "expand", "repeat", "filled"}
"""Rules of operators that are told sizes, which may be the text's length."""
_CUTS = {*overloads("slice narrow select split split_with_sizes chunk unbind")}
_SOFTMAX = {aten.softmax.int, aten._softmax.default, aten.log_softmax.int}
_SUMS, _MEANS = set(overloads("sum")), set(overloads("mean"))
_MAXIMA = {aten.amax.default, aten.max.dim, aten.max.default, *overloads("argmax")}
_LOSSES = set(overloads("cross_entropy_loss nll_loss nll_loss2d nll_loss_nd"))
_INDEXED = {aten.index.Tensor, aten.gather.default, aten.index_select.default}
_WRITES = {*overloads("index_put index_put_")}
_FILLED = {"zeros": 0.0, "ones": 1.0, "zeros_like": 0.0, "ones_like": 1.0, "new_zeros": 0.0, "new_ones": 1.0}


def follow_padding(padded: fx.GraphModule, short: fx.GraphModule, padding: Padding, least: int) -> dict[Dim, Places]:
    """Follow the padding of texts through a graph.

    Args:
        padded: traced with texts of `padding.length` tokens.
        short: the same, traced with `least`.
        padding: of the texts.
        least: tokens of the shortest text.

    Returns:
        Every dimension of `padded` that has padding.

    Raises:
        UsageError: something reads it, or may; the message names the operator, its module and source line.
    """
    ours, theirs = list(padded.graph.nodes), list(short.graph.nodes)
    for a, b in zip(ours, theirs, strict=False):
        if a.op != b.op or (a.op != "get_attr" and a.target != b.target and not cuts_nothing(a, b)):
            raise UsageError(
                f"The model takes another path for a text of {least} tokens than for one of {padding.length}: "
                f"{describe(a)} becomes {describe(b)}. {_LATER}."
            )
    if len(ours) != len(theirs):
        raise UsageError(f"The model takes another path for a text of {least} tokens. {_LATER}.")
    return _Walk(dict(zip(ours, theirs, strict=True)), padding, least).run()


class _Walk:
    """One walk along a padded graph beside the unpadded one."""

    def __init__(self, short: dict[fx.Node, fx.Node], padding: Padding, least: int) -> None:
        self.short, self.padding, self.least = short, padding, least
        self.places: dict[Dim, Places] = {}
        self.constant: set[fx.Node] = set()
        self.base: dict[fx.Node, fx.Node] = {}

    def run(self) -> dict[Dim, Places]:
        for node in self.short:
            if node.op == "placeholder" and node.target in self.padding.fill:
                last = values(node)[0].dim() - 1
                fill = Content(float(self.padding.fill[str(node.target)]))
                self.places[Dim(node, last)] = Places(first_ones(self.least, self.padding.length), fill)
            elif node.op == "get_attr" and not isinstance(attribute(node), torch.nn.Parameter):
                self.constant.add(node)
            elif node.op == "call_function":
                self._call(node)
                self._note_writes(node)
        return self.places

    def _call(self, node: fx.Node) -> None:
        mutable = isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable
        random = torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
        if all(x in self.constant for x in node.all_input_nodes) and not (mutable or random) and values(node):
            self.constant.add(node)
        theirs = self.short[node]
        if len(values(node)) != len(values(theirs)):
            self._refuse(node, "cuts the text into as many pieces as its length says")
        following = [d for d in dims_of(node) if entries(d) != entries(in_graph(d, theirs))]
        met = [d for x in dict.fromkeys(node.all_input_nodes) for d in dims_of(x) if d in self.places]
        if not met and not following and self._literals_agree(node):
            return
        if any((entries(d) - entries(in_graph(d, theirs))) % (self.padding.length - self.least) for d in following):
            self._refuse(node, "follows the text's length in another way than token by token")
        if node in self.constant and self._evaluated(node, following):
            return
        if node.target is aten._assert_tensor_metadata.default:
            return
        if not values(node) and node.target is not aten.sym_size.int:
            self._refuse(node, "reads the text's tokens")
        if not self._literals_agree(node) and not self._takes_sizes(node):
            self._refuse(node, "computes with the text's length")
        handler = next((h for targets, h in _HANDLERS if theirs.target in targets), _Walk._by_rule)
        handler(self, node)
        for dim in following:
            if dim not in self.places:
                self._refuse(node, f"gives a dimension ({dim.index}) that follows the text's length")
        for dim in dims_of(node):
            if dim in self.places and dim not in following:
                self._refuse(node, "puts padding among other entries")

    def _refuse(self, node: fx.Node, what: str, instead: str = _BY_MASK) -> NoReturn:
        raise UsageError(
            f"{describe(node)} {what}, where text_length={self.padding.length} puts padding. {_LATER}, or {instead}."
        )

    # --- numbers --------------------------------------------------------------------------------------------------

    def _literals_agree(self, node: fx.Node) -> bool:
        theirs = self.short[node]
        mine = fx.map_arg((node.args, node.kwargs), lambda x: self.short[x])
        return flat_leaves(mine) == flat_leaves((theirs.args, theirs.kwargs))

    def _takes_sizes(self, node: fx.Node) -> bool:
        """Whether the numbers that an operator is given are sizes or places, which are followed."""
        if self.short[node].target in _CUTS:
            return True
        rule = rule_for(node)
        if rule is None or rule.__name__ not in _SIZED:
            return False
        behind = 1 + ("new_" in str(node.target))
        if rule.__name__ != "filled":
            return True
        other = [flat_leaves((x.args[behind:], x.kwargs)) for x in (node, self.short[node])]
        return other[0] == other[1]

    def _evaluated(self, node: fx.Node, following: Sequence[Dim]) -> bool:
        """Whether a value that no input and no parameter enters is, but for entries behind, that of a shorter text."""
        if len(values(node)) != 1:
            return False
        long, short = constant_value(node), constant_value(self.short[node])
        if long is None or short is None or any(x.is_meta or is_fake(x) for x in (long, short)):
            return False
        if not torch.equal(long[tuple(slice(n) for n in short.shape)], short):
            return False
        alike = bool((long == long.flatten()[0]).all()) if long.numel() else False
        for dim in following:
            kept = short.shape[dim.index]
            behind = long.narrow(dim.index, kept, long.shape[dim.index] - kept)
            self.places[dim] = Places(first_ones(kept, long.shape[dim.index]), content_of(behind), alike)
        return True

    def _known(self, value: Any, dim: int) -> Content | None:
        """What an operand holds at the padding of a dimension (counted from the right)."""
        if isinstance(value, bool | int | float):
            return Content(float(value))
        if not isinstance(value, fx.Node) or not values(value):
            return None
        rank = values(value)[0].dim()
        found = self.places.get(Dim(value, rank - dim)) if dim <= rank else None
        if found is not None:
            return found.content
        if value in self.constant and (constant := constant_value(value)) is not None and not is_fake(constant):
            return None if constant.is_meta else content_of(constant)
        return None

    # --- operators by their rules -----------------------------------------------------------------------------------

    def _by_rule(self, node: fx.Node) -> None:
        """An operator whose rule says how it carries dimensions, each entry alone."""
        rule = rule_for(node)
        per_sample = rule is not None and rule.__name__ == "over_channels" and "batch_norm" not in str(node.target)
        if rule is None or (rule.__name__ not in _BY_TOKEN and not per_sample):
            self._refuse(node, "is not known to work on each of the text's tokens alone")
        constraints = list(rule(node))
        self._carry(node, constraints)
        self._stretched(node, rule.__name__)
        for dim in self._spent(node, constraints):
            if dim in self.places:
                self._removed(node, dim, rule.__name__, constraints)
        for dim in dims_of(node):
            if dim in self.places:
                found = self._content(node, dim, rule.__name__)
                self.places[dim] = replace(self.places[dim], content=found)

    def _carry(self, node: fx.Node, constraints: Iterable[Constraint]) -> None:
        """Give the node's dimensions the places of those that they are the same as, joined from or reshaped from."""
        for constraint in constraints:
            match constraint:
                case Same(a, b) if (a.node is node) != (b.node is node):
                    source, result = (b, a) if a.node is node else (a, b)
                    if source in self.places:
                        self._put(node, result, self.places[source])
                case Concat(result, parts) if any(p in self.places for p in parts):
                    self._put(node, result, self._joined(parts))
                case Reshape(sources, results):
                    for dim, found in self._reshaped(node, sources, results):
                        self._put(node, dim, found)

    def _put(self, node: fx.Node, dim: Dim, found: Places) -> None:
        old = self.places.get(dim, found)
        if old.numbers != found.numbers and not old.alike and not found.alike:
            self._refuse(node, "brings tokens together that stand at other places in a text of its own length")
        content = common_content([old.content, found.content])
        self.places[dim] = replace(found if old.alike else old, content=content, alike=old.alike and found.alike)

    def _joined(self, parts: Sequence[Dim]) -> Places:
        numbers: list[int] = []
        offset, contents = 0, []
        for part in parts:
            found = self._at(part)
            numbers += [n if n < 0 else n + offset for n in found.numbers]
            offset += found.kept
            contents += [found.content] if -1 in found.numbers else []
        return Places(tuple(numbers), common_content(contents))

    def _at(self, dim: Dim) -> Places:
        """The places of a dimension, with or without padding."""
        return self.places.get(dim, Places(tuple(range(entries(dim)))))

    def _reshaped(self, node: fx.Node, sources: Sequence[Dim], results: Sequence[Dim]) -> Iterator[tuple[Dim, Places]]:
        """Places of the dimensions that others are reshaped to.

        Entries are numbered as in the reshaped value of the unpadded text; each result dimension must have its own
        padding, whatever the others' entries are.
        """
        theirs = self.short[node]
        if not any(d in self.places for d in sources):
            return
        given = [self._at(d) for d in sources]
        kept = [p.kept for p in given]
        code = codes([p.numbers for p in given], kept).reshape([entries(d) for d in results])
        sizes = [entries(in_graph(d, theirs)) for d in results]
        if prod(sizes) != prod(kept):
            self._refuse(node, "reshapes the text's tokens")
        own = code.clone()
        numbers: list[tuple[int, ...]] = []
        for index in range(len(results)):
            step = prod(sizes[index + 1 :])
            place = torch.where(code >= 0, own // step % sizes[index], -1)
            others = [i for i in range(len(results)) if i != index]
            numbers.append(tuple((place.amax(others) if others else place).tolist()))
        if not torch.equal(codes(numbers, sizes).reshape(code.shape), code):
            self._refuse(node, "reshapes the text's tokens so that they no longer stand in a dimension of their own")
        content = common_content([p.content for p in given if -1 in p.numbers])
        for dim, found in zip(results, numbers, strict=True):
            if -1 in found:
                yield dim, Places(found, content)

    def _stretched(self, node: fx.Node, rule: str) -> None:
        """Dimensions that are made as long as the text: filled with a number, or with one entry again and again."""
        theirs = self.short[node]
        for dim in dims_of(node):
            long, kept = entries(dim), entries(in_graph(dim, theirs))
            if long == kept or dim in self.places:
                continue
            if rule == "filled" or (rule in ("expand", "repeat") and was_one(node, dim)):
                self.places[dim] = Places(first_ones(kept, long), alike=True)

    def _spent(self, node: fx.Node, constraints: Sequence[Constraint]) -> list[Dim]:
        """Dimensions of inputs that the node's own do not carry, or along which it works by position."""
        carried = {d for c in constraints for d in constraint_dims(c) if carries(c, node)}
        opaque = {c.source for c in constraints if isinstance(c, ByPosition | Reduce | Summed)}
        opaque |= {d for pair in same_pairs(constraints) if all(d.node is not node for d in pair) for d in pair}
        inputs = [d for x in dict.fromkeys(node.all_input_nodes) for d in dims_of(x)]
        outputs = 0 if node.target is not operator.getitem else int_arg(node, 1)
        inputs = [d for d in inputs if node.target is not operator.getitem or d.output == outputs]
        return [d for d in inputs if d not in carried or d in opaque]

    def _removed(self, node: fx.Node, dim: Dim, rule: str, constraints: Sequence[Constraint]) -> None:
        """A dimension with padding that is summed over, say; refused where padding would count."""
        content = self.places[dim].content
        exact = content.value if content is not None and content.exact else None
        if node.target in _MEANS:
            self._refuse_mean(node)
        if node.target in _SUMS and exact == 0:
            return
        if node.target in overloads("any") and exact == 0:
            return
        if node.target in overloads("all") and exact not in (None, 0):
            return
        if node.target in _MAXIMA and self._below(node, dim):
            return
        if node.target in overloads("amin") and exact is not None and exact >= -_LOWEST:
            return
        if rule == "filled" or (rule == "view_as" and dim.node is node.args[1]):
            return  # it gives its shape alone
        if rule == "sym_size" and wrap(int_arg(node, 1), values(dim.node)[0].dim()) != dim.index:
            return
        if rule in ("matmul", "addmm", "einsum") and self._sums_nothing(node, dim, constraints):
            return
        self._refuse(node, "computes one thing of all of the text's tokens")

    def _refuse_mean(self, node: fx.Node) -> NoReturn:
        raise UsageError(
            f"{describe(node)} averages over the text's tokens, and text_length={self.padding.length} would add "
            f"padding to them. {_LATER}, or let the model leave padding out of the mean by the attention mask."
        )

    def _below(self, node: fx.Node, dim: Dim) -> bool:
        """Whether padding is never the maximum; where its place is asked for, that padding does not move it."""
        found = self.places[dim]
        flags = found.content == Content(0.0) and node.target is not aten.max.dim
        flags = flags and (are_flags(dim.node) or self._are_ids(dim.node))
        low = flags or (found.content is not None and found.content.value <= _LOWEST)
        return low and (node.target is aten.amax.default or node.target is aten.max.default or found.at_end)

    def _are_ids(self, node: fx.Node) -> bool:
        """Whether a value is token ids, which are never negative."""
        while node.target in CONVERSIONS:
            node = node.all_input_nodes[0]
        return node.op == "placeholder" and node.target in self.padding.ids

    def _sums_nothing(self, node: fx.Node, dim: Dim, constraints: Sequence[Constraint]) -> bool:
        """Whether what is summed over a dimension is zero in padding: a factor is."""
        factors, pairs = {dim}, [p for p in same_pairs(constraints) if all(d.node is not node for d in p)]
        for _ in pairs:
            factors |= {d for pair in pairs if not factors.isdisjoint(pair) for d in pair}
        found = [self.places[d] for d in factors if d in self.places]
        same = len({p.numbers for p in found if not p.alike}) <= 1
        return same and len(found) == len(factors) and any(p.content == Content(0.0) for p in found)

    # --- what padding holds ---------------------------------------------------------------------------------------

    def _content(self, node: fx.Node, dim: Dim, rule: str) -> Content | None:
        if rule in _MOVES:
            return self.places[dim].content
        name = str(getattr(getattr(node.target, "overloadpacket", node.target), "__name__", node.target))
        if name in _FILLED or name in ("full", "new_full", "full_like"):
            fill = _FILLED.get(
                name, argument(node, {"full": 1, "new_full": 2, "full_like": 1}.get(name, 0), "fill_value")
            )
            return Content(float(fill)) if isinstance(fill, bool | int | float) else None
        if rule != "pointwise" or name.startswith("empty"):
            return None
        right = values(node)[dim.output].dim() - dim.index
        if name in ("expand_as", "type_as", "copy_"):
            return self._known(node.args[name == "copy_"], right)
        if name in (
            "masked_fill",
            "masked_fill_",
            "where",
            "__and__",
            "logical_and",
            "bitwise_and",
            "__or__",
            "logical_or",
        ):
            return self._chosen(node, name, right)
        return self._calculated(node, name, right)

    def _chosen(self, node: fx.Node, name: str, right: int) -> Content | None:
        """What padding holds where a mask chooses it."""
        if name.startswith("masked_fill"):
            x, mask, fill = (self._known(a, right) for a in node.args[:3])
            chosen, other = fill, x
        elif name == "where":
            mask, chosen, other = (self._known(a, right) for a in node.args[:3])
        else:
            a, b = (self._known(a, right) for a in node.args[:2])
            stops = Content(0.0) if "and" in name else Content(1.0)
            boolean = all(values(x)[0].dtype == torch.bool for x in node.all_input_nodes)
            if boolean and stops in (a, b):
                return stops
            return self._calculated(node, name, right)
        if mask is not None and mask.exact:
            return chosen if mask.value else other
        if chosen is not None and other is not None:
            if chosen == other:
                return chosen
            if chosen.hides and other.hides:
                return Content(max(chosen.value, other.value), exact=False)
        return None

    def _calculated(self, node: fx.Node, name: str, right: int) -> Content | None:
        """What an operator makes of padding."""
        operands = [a for a in node.args if isinstance(a, fx.Node) and values(a)]
        known = {a: self._known(a, right) for a in operands}
        if known and all(c is not None and c.exact for c in known.values()):
            return computed(node, {a: c.value for a, c in known.items() if c is not None})
        given = [self._known(a, right) for a in node.args[:2]]
        first, second = [*given, None, None][:2]
        zero = Content(0.0)
        if name in ("mul", "mul_") and zero in (first, second):
            return zero
        if name in ("div", "div_", "dropout", "to", "_to_copy") and first == zero:
            return zero
        low = next((c for c in (first, second) if c is not None and c.hides), None)
        if low is None:
            return None
        if name in ("add", "add_") and argument(node, 2, "alpha", 1) == 1:
            return Content(low.value, exact=False)
        if name in ("sub", "sub_") and low is first:
            return Content(low.value, exact=False)
        if name in ("mul", "div", "mul_", "div_") and low is first and second is not None and second.exact:
            factor = second.value if name.startswith("mul") else 1 / second.value if second.value else 0
            return Content(low.value * factor, exact=False) if factor > 0 else None
        if name in ("maximum", "max") and first is not None and second is not None:
            return Content(max(first.value, second.value), exact=False)
        return low if name in _KEEPS_LOW else None

    # --- operators of their own -----------------------------------------------------------------------------------

    def _cut(self, node: fx.Node) -> None:
        """Part of a dimension is taken; the same tokens must be taken of a text of its own length."""
        x, theirs = node.args[0], self.short[node]
        assert isinstance(x, fx.Node)
        rank = values(x)[0].dim()
        name = theirs.target.overloadpacket.__name__  # type: ignore[union-attr]  # an operator
        late = name in ("split", "split_with_sizes", "chunk")
        dim = wrap(int_arg(theirs, 2 if late else 1, "dim", 0), rank)
        for d in (d for d in dims_of(x) if d.index != dim and d in self.places):
            for output in range(len(values(node))):
                moved = d.index - (name in ("select", "unbind") and d.index > dim)
                self._put(node, Dim(node, moved, output), self.places[d])
        source = Dim(x, dim)
        if source not in self.places and self._literals_agree(node):
            return
        if any(isinstance(a, fx.Node) for a in node.args[1:]):
            self._refuse(node, "takes tokens by a number that is computed")
        found = self._at(source)
        taken = pieces_of(node, dim, late, found.numbers)
        wanted = pieces_of(theirs, dim, late, range(entries(Dim(self.short[x], dim))))
        for output, (mine, other) in enumerate(zip(taken, wanted, strict=True)):
            numbers = tuple(other.index(n) if n in other else -1 for n in mine)
            if [n for n in numbers if n >= 0] != list(range(len(other))):
                self._refuse_end(node)
            if name not in ("select", "unbind") and -1 in numbers:
                same = [n < 0 for n in mine] == [n < 0 for n in numbers]
                result = Places(numbers, found.content if same else None, found.alike)
                self._put(node, Dim(node, dim, output), result)

    def _refuse_end(self, node: fx.Node) -> NoReturn:
        raise UsageError(
            f"{describe(node)} takes tokens counted from the end of the text, where text_length="
            f"{self.padding.length} puts padding. {_LATER}, or take the last token by the attention mask."
        )

    def _softmax(self, node: fx.Node) -> None:
        x = node.args[0]
        assert isinstance(x, fx.Node)
        along = wrap(int_arg(node, 1), values(x)[0].dim())
        for dim in (d for d in dims_of(x) if d in self.places):
            found = self.places[dim]
            if dim.index == along and not (found.content is not None and found.content.hides):
                self._refuse(node, "weighs the text's tokens without a mask that hides them")
            zero = dim.index == along and node.target is not aten.log_softmax.int
            self.places[Dim(node, dim.index)] = replace(found, content=Content(0.0) if zero else None, alike=False)

    def _cumsum(self, node: fx.Node) -> None:
        x = node.args[0]
        assert isinstance(x, fx.Node)
        along = wrap(int_arg(node, 1), values(x)[0].dim())
        for dim in (d for d in dims_of(x) if d in self.places):
            found = self.places[dim]
            if dim.index == along and not found.at_end and found.content != Content(0.0):
                self._refuse(node, "adds up tokens behind the text's")
            self.places[Dim(node, dim.index)] = replace(found, content=None, alike=False)

    def _triangle(self, node: fx.Node) -> None:
        x = node.args[0]
        assert isinstance(x, fx.Node)
        rank = values(x)[0].dim()
        for dim in (d for d in dims_of(x) if d in self.places):
            found = self.places[dim]
            if dim.index >= rank - 2 and not found.at_end:
                self._refuse(node, "counts places behind the text's")
            content = found.content if found.content == Content(0.0) else None
            self.places[Dim(node, dim.index)] = replace(found, content=content, alike=False)

    def _attention(self, node: fx.Node) -> None:
        """Fused attention: padded keys and values must be hidden by its mask, or come after every query."""
        query, key, value = node.args[:3]
        assert isinstance(query, fx.Node) and isinstance(key, fx.Node) and isinstance(value, fx.Node)
        mask, rank = argument(node, 3, "attn_mask"), values(query)[0].dim()
        causal = bool(argument(node, 5, "is_causal", False))
        rows, columns, others = Dim(query, rank - 2), Dim(key, rank - 2), Dim(value, rank - 2)
        if any(Dim(x, rank - 1) in self.places for x in (query, key, value)):
            self._refuse(node, "takes the text's tokens for features")
        for x in (query, key, value, *([mask] if isinstance(mask, fx.Node) else [])):
            offset = rank - values(x)[0].dim()
            for dim in (d for d in dims_of(x) if d in self.places and d.index + offset < rank - 2):
                self._put(node, Dim(node, dim.index + offset), replace(self.places[dim], content=None, alike=False))
        if rows in self.places:
            self._put(node, Dim(node, rank - 2), replace(self.places[rows], content=None, alike=False))
        if columns in self.places or others in self.places:
            a, b = self._at(columns), self._at(others)
            if a.numbers != b.numbers or not (self._masked(node, mask, a) or (causal and self._behind(rows, a))):
                self._refuse(node, "attends to the text's tokens without a mask that hides them")
        elif causal and rows in self.places and not self.places[rows].at_end:
            self._refuse(node, "counts places behind the text's")
        if isinstance(mask, fx.Node) and Dim(mask, values(mask)[0].dim() - 2) in self.places:
            own = self.places[Dim(mask, values(mask)[0].dim() - 2)]
            if not own.alike and own.numbers != self._at(rows).numbers:
                self._refuse(node, "masks other queries than a text of its own length would")

    def _masked(self, node: fx.Node, mask: Any, keys: Places) -> bool:
        if not isinstance(mask, fx.Node):
            return False
        found = self.places.get(Dim(mask, values(mask)[0].dim() - 1))
        if found is None or found.content is None or (found.numbers != keys.numbers and not found.alike):
            return False
        return found.content == Content(0.0) if values(mask)[0].dtype == torch.bool else found.content.hides

    def _behind(self, rows: Dim, keys: Places) -> bool:
        """Whether no query that is a token comes after a key that is padding, in a causal attention."""
        queries = self._at(rows)
        return keys.at_end and queries.at_end and queries.kept <= keys.kept

    def _loss(self, node: fx.Node) -> None:
        """A loss whose target ignores padding."""
        scores, target = node.args[:2]
        assert isinstance(scores, fx.Node) and isinstance(target, fx.Node)
        rank, ignored = values(scores)[0].dim(), argument(node, 4, "ignore_index", -100)
        samples = [i for i in range(rank) if i != (1 if rank > 1 else 0)]
        if values(target)[0].dim() != len(samples):
            self._refuse(node, "has a probability for each class as its target")
        own = {Dim(scores, i): Dim(target, j) for j, i in enumerate(samples)}
        rest = [d for x in node.all_input_nodes for d in dims_of(x) if d not in own and d not in own.values()]
        if any(d in self.places for d in rest):
            self._refuse(node, "takes the text's tokens for classes")
        for j, (a, b) in enumerate(own.items()):
            if a not in self.places and b not in self.places:
                continue
            labels = self._at(b)
            if labels.content != Content(float(ignored)) or self._at(a).numbers != labels.numbers:
                self._refuse(node, "has labels that are not ignored", "give the labels as an input")
            if values(node)[0].dim() == len(samples):
                self.places[Dim(node, j)] = replace(labels, content=Content(0.0), alike=False)

    def _indexed(self, node: fx.Node) -> None:
        """Tokens are taken by numbers that are computed: from the front of the text, and none of padding."""
        x = node.args[0]
        assert isinstance(x, fx.Node)
        rule = rule_for(node)
        assert rule is not None
        constraints = self._without_counting(node, list(rule(node)), list(rule(self.short[node])))
        self._carry(node, constraints)
        spent = [d for d in self._spent(node, constraints) if d in self.places]
        for dim in (d for d in spent if d.node is x or not self._only_counts(node, d)):
            index = self._index_of(node, dim)
            if dim.node is not x or index is None or not self.places[dim].at_end or not self._in_text(index):
                self._refuse_end(node)
        for dim in (d for d in dims_of(node) if d in self.places):
            self.places[dim] = replace(self.places[dim], content=self._looked_up(node, dim, constraints), alike=False)

    def _without_counting(self, node: fx.Node, long: list[Constraint], short: Sequence[Constraint]) -> list[Constraint]:
        """What a rule says, without the places of numbers that count a dimension from its first entry to its last: what
        is taken by them stays where it is."""
        theirs = [(a.index, b.index) for a, b in same_pairs(short) if a.node is self.short[node].args[0]]
        pairs = [(a, b) for a, b in same_pairs(long) if a.node is node.args[0] and (a.index, b.index) in theirs]
        whole = {b for a, b in pairs if self._index_of(node, a) is not None}
        return [c for c in long if not (isinstance(c, Same) and c.b in whole and c.a.node is not node.args[0])]

    def _only_counts(self, node: fx.Node, dim: Dim) -> bool:
        """Whether a dimension is of an index that is a constant: what it takes is checked where it is taken."""
        return (
            dim.node in self.constant and dim.node in list_arg(node, 1) if node.target is aten.index.Tensor else False
        )

    def _index_of(self, node: fx.Node, dim: Dim) -> fx.Node | None:
        if node.target is not aten.index.Tensor:
            along = wrap(int_arg(node, 1), values(dim.node)[0].dim())
            return argument(node, 2) if dim.index == along else None
        indices = list_arg(node, 1)
        found = indices[dim.index] if dim.index < len(indices) else None
        if found is None or values(found)[0].dtype in (torch.bool, torch.uint8):
            return None
        return found  # type: ignore[no-any-return]  # a value of the graph

    def _looked_up(self, node: fx.Node, dim: Dim, constraints: Sequence[Constraint]) -> Content | None:
        """What padding holds that is taken at its own places."""
        sources = [a if b == dim else b for a, b in same_pairs(constraints) if dim in (a, b)]
        found = [self.places[d].content for d in sources if d.node is node.args[0] and d in self.places]
        return common_content(found) if found else None

    def _in_text(self, index: fx.Node) -> bool:
        """Whether a computed number counts tokens from the front: it is never negative, or a count less a number."""
        if index in self.constant:
            found = constant_value(index)
            if found is not None and not found.is_meta and not is_fake(found):
                return bool(((found >= 0) & (found < self.least)).all())
        return counts_tokens(index)

    def _pad(self, node: fx.Node) -> None:
        x, amounts = node.args[0], list_arg(node, 1)
        assert isinstance(x, fx.Node)
        late = node.target is aten.pad.default
        constant = not late or argument(node, 2, "mode", "constant") == "constant"
        value = argument(node, 3 if late else 2, "value", 0) or 0
        rank = values(x)[0].dim()
        for dim in (d for d in dims_of(x) if d in self.places):
            at = 2 * (rank - 1 - dim.index)
            before, behind = (amounts[at], amounts[at + 1]) if at < len(amounts) else (0, 0)
            if (before or behind) and not (constant and self._literals_agree(node) and min(before, behind) >= 0):
                self._refuse(node, "adds entries at the ends of the text")
            found = self.places[dim]
            kept, holes = found.kept, len(found.numbers) - found.kept
            numbers = [n if n < 0 else n + before for n in found.numbers]
            added = [before + kept + i for i in range(behind)]
            if found.at_end and found.content == Content(float(value)):
                numbers = numbers[:kept] + added + [-1] * holes  # padding is what is added
            else:
                numbers += added
            self.places[Dim(node, dim.index)] = Places((*range(before), *numbers), found.content)

    def _written(self, node: fx.Node) -> None:
        """One number written where a mask chooses."""
        x, indices, written = node.args[0], list_arg(node, 1), node.args[2]
        assert isinstance(x, fx.Node) and isinstance(written, fx.Node)
        mask = indices[0] if len(indices) == 1 else None
        one = prod(values(written)[0].shape) == 1 and not argument(node, 3, "accumulate", False)
        if not isinstance(mask, fx.Node) or values(mask)[0].dtype != torch.bool or not one:
            self._refuse(node, "writes at places of the text that are computed")
        for dim in dims_of(x):
            own = Dim(mask, dim.index) if dim.index < values(mask)[0].dim() else None
            found, chosen = self.places.get(dim), self.places.get(own) if own else None
            if found is None and chosen is None:
                continue
            if found is None or (own is not None and (chosen is None or chosen.numbers != found.numbers)):
                self._refuse(node, "writes at places of the text that are computed")
            keeps = chosen is not None and chosen.content == Content(0.0)
            self.places[Dim(node, dim.index)] = replace(found, content=found.content if keeps else None, alike=False)

    # --- values that are written over -----------------------------------------------------------------------------

    def _note_writes(self, node: fx.Node) -> None:
        """What padding holds is no longer known of a value that an operator works on in place, nor of its views."""
        schema = getattr(node.target, "_schema", None)
        first = node.args[0] if node.args and isinstance(node.args[0], fx.Node) else None
        shares = schema is not None and any(r.alias_info is not None for r in schema.returns)
        views = shares or node.target is operator.getitem or node.target in _MAY_VIEW
        self.base[node] = self.base.get(first, first) if views and first is not None else node
        if schema is None or not schema.is_mutable or first is None:
            return
        base = self.base[node]
        for other in [n for n, b in self.base.items() if b is base] + [base]:
            self.constant.discard(other)
            for dim in dims_of(other) if other is not node else ():
                if dim in self.places:
                    self.places[dim] = replace(self.places[dim], content=None, alike=False)


_HANDLERS: list[tuple[set[Any], Callable[[_Walk, fx.Node], None]]] = [
    (_CUTS, _Walk._cut),
    (_SOFTMAX, _Walk._softmax),
    ({aten.cumsum.default}, _Walk._cumsum),
    (set(overloads("tril triu")), _Walk._triangle),
    ({aten.scaled_dot_product_attention.default}, _Walk._attention),
    (_LOSSES, _Walk._loss),
    (_INDEXED, _Walk._indexed),
    ({aten.constant_pad_nd.default, aten.pad.default}, _Walk._pad),
    (_WRITES, _Walk._written),
]
_KEEPS_LOW = {"to", "_to_copy", "clone", "contiguous", "alias", "detach", "dropout", "type_as"}
_MAY_VIEW = {*overloads("reshape flatten contiguous to type_as dropout unflatten")}
