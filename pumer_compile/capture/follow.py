"""Follow the sample: where a model asks for data while it is traced, the sample's numbers answer.

Some models read their inputs as Python numbers: grids of patches (`image_grid_thw.tolist()`), placeholders of a prompt
(`nonzero`), masks that choose rows (`x[mask]`). For one compiled form of inputs these are fixed. Every traced tensor
that is computed from inputs and constants without a learned parameter has a *shadow*, the real tensor that the sample
gives; where Python or a shape asks for data, the shadow answers. **Places, sizes and integer geometry become constants;
pixels, ids, features and masks stay what they are**: `x[mask]` becomes `x` at constant places. What was asked is
recorded (`asked.py`): the graph is right for inputs of which the same is true.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, unset_fake_temporarily
from torch.fx.experimental.proxy_tensor import disable_proxy_modes_tracing
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves, tree_map_only

from ..analysis.nodes import give_numbers
from .asked import Asked, Made

LARGEST = 1 << 24
"""Numbers that a shadow may hold; larger values are features."""

# What is known of a result of which nothing is.
_NOTHING = object()

# What gives Python numbers.
_NUMBERS = {"tolist", "item", "__bool__", "__int__", "__float__", "__index__", "__contains__", "equal", "is_nonzero"}
# What gives a tensor whose size depends on data.
_SIZED_BY_DATA = {
    "nonzero",
    "argwhere",
    "unique",
    "unique_consecutive",
    "repeat_interleave",
    "masked_select",
    "bincount",
}
# What takes sizes or values as numbers, given as tensors.
_TAKES_NUMBERS = {"arange", "linspace", "full", "zeros", "ones"}
_MAKES_TENSORS = {"tensor", "as_tensor"}
# What takes sizes after the tensor that it is about.
_TAKES_SIZES = set(
    "view reshape split split_with_sizes expand repeat narrow unflatten new_zeros new_ones new_full interpolate".split()
)
# Questions about a tensor that are answered without its data.
_ABOUT = {"__get__", "__set__", "size", "dim", "stride", "numel", "__len__", "is_floating_point", "is_contiguous"}
_IN_PLACE = {"__setitem__", "__iadd__", "__isub__", "__imul__", "__ior__", "__iand__", "__itruediv__"}


class Shadow:
    """What the sample gives for a traced tensor.

    Attributes:
        real: the tensor.
        made: how, from which inputs.
        stale: whether `made` does not tell what it holds: it was written through another name.
        lost: whether `real` does not either: what was written is not known.
    """

    __slots__ = ("__weakref__", "lost", "made", "real", "stale")

    def __init__(self, real: Tensor, made: Made, stale: bool = False) -> None:
        self.real, self.made, self.stale, self.lost = real, made, stale, False


def shadow(value: object) -> Shadow | None:
    """The shadow of a traced tensor; None where it has none."""
    found = vars(value).get("_pumer_shadow") if isinstance(value, Tensor) else None
    return found if isinstance(found, Shadow) and not found.lost else None


class FollowSample(TorchFunctionMode):
    """Answers a traced model from the sample.

    Args:
        sample: real inputs by name; those on the meta device have no numbers, and cannot answer.
        words: the model's table of words, where it has one; ids that are looked up in others (of places, of kinds) are
            geometry.
        as_expanded: also follow masks that are expanded to the shape of features. Then it is known which features such
            a mask chooses, and the graph is for these places alone; most models only count them.

    Attributes:
        names: of the inputs.
        asked: what was asked, in order.
        lifted: results of the sample that became constants of the trace.
        content: inputs that stay data: their numbers are rows of a learned table, or they were kept open.
        opened: those that were kept open.
    """

    def __init__(
        self, sample: Mapping[str, Tensor], words: nn.Embedding | None = None, *, as_expanded: bool = False
    ) -> None:
        super().__init__()
        self.as_expanded = as_expanded
        self.words = None if words is None else words.weight.shape
        self.names = tuple(sample)
        self.sample = {name: t.detach().cpu().clone() for name, t in sample.items() if not t.is_meta}
        self.asked: list[Asked] = []
        self.lifted: list[Tensor] = []
        self.content: set[str] = set()
        self.opened: set[str] = set()
        self.memory = _Memory()

    def enter(self, inputs: Mapping[str, Any]) -> None:
        """Give traced inputs their shadows."""
        for name, tensor in inputs.items():
            if isinstance(tensor, FakeTensor) and name in self.sample and tensor.shape == self.sample[name].shape:
                self._attach(tensor, Shadow(self.sample[name], Made.input(name)))

    def keep_open(self, tensor: Tensor) -> None:
        """Let what a tensor comes from stay data, and not be fixed by what is asked of it."""
        found = shadow(tensor)
        if found is not None:
            self.content |= found.made.inputs
            self.opened |= found.made.inputs

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name in _ABOUT or torch._C._functorch.peek_interpreter_stack() is not None:  # inside a vmap (masks)
            return func(*args, **kwargs)
        if name == "__iter__":
            return iter(self.__torch_function__(torch.unbind, types, args))
        tensors = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        known = bool(tensors) and all(map(_known, tensors))
        if known and any(shadow(t) for t in tensors):
            if name in _NUMBERS:
                return self._numbers(func, args, kwargs)
            if name in _SIZED_BY_DATA or name in _MAKES_TENSORS:
                return self._constants(Tensor.nonzero if name == "argwhere" else func, args, kwargs)
            if name == "where" and len(args) + len(kwargs) == 1:
                return self._constants(Tensor.nonzero, tuple(tensors), {"as_tuple": True})
            if name in _TAKES_NUMBERS:
                args, kwargs = self._as_numbers(args, kwargs)
                return self.__torch_function__(func, types, args, kwargs)
        if name == "expand_as" and self.as_expanded and shadow(args[0]) is not None:
            return self.__torch_function__(Tensor.expand, types, (args[0], *args[1].shape))
        if name in _TAKES_SIZES:
            args = (args[0], *tree_map_only(Tensor, self._number, args[1:]))
            kwargs |= {"size": tree_map_only(Tensor, self._number, kwargs["size"])} if "size" in kwargs else {}
        if name in ("__getitem__", "__setitem__"):
            args = (args[0], self._index(args[1]), *args[2:])
            if self._masks(args):
                if name == "__getitem__" and self._everything(args):
                    return self.__torch_function__(Tensor.clone, types, (args[0],))
                if name == "__getitem__" or (isinstance(args[2], Tensor) and args[2].dim() > 0):
                    args = (args[0], self._places(args[1]), *args[2:])
        if name == "embedding":
            self._look_up(args, kwargs)
        return self._traced(func, name, args, kwargs, tensors)

    # --- answers ------------------------------------------------------------------------------------------------------

    def _numbers(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self._ask(func, args, kwargs)
        with _outside():
            return func(*_real(args), **_real(kwargs))

    def _constants(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        made = self._ask(func, args, kwargs)
        with _outside():
            found = func(*_real(args), **_real(kwargs))
        device = next(t.device for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor) and shadow(t))
        if isinstance(found, Tensor):
            return self._lift(found, made, device)
        return type(found)(self._lift(t, made.part(i), device) for i, t in enumerate(found))

    def _as_numbers(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        for tensor in (t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)):
            self._ask(Tensor.item, (tensor,), {})
        with _outside():
            numbers: tuple[tuple[Any, ...], dict[str, Any]] = tree_map_only(
                Tensor, lambda t: _real(t).item(), (args, kwargs)
            )
        return numbers

    def _index(self, index: Any) -> Any:
        """An index with numbers in place of tensors that hold one each."""

        def number(value: Any) -> Any:
            if isinstance(value, slice):
                return slice(number(value.start), number(value.stop), number(value.step))
            return self._number(value)

        return tuple(map(number, index)) if isinstance(index, tuple) else number(index)

    def _number(self, value: Any) -> Any:
        """The number that a tensor holds, where it holds one and that is known; anything else as it is."""
        found = shadow(value)
        if found is None or found.real.dim() or found.real.dtype == torch.bool:
            return value
        self._ask(Tensor.item, (value,), {})
        with _outside():
            return int(found.real)

    def _masks(self, args: tuple[Any, ...]) -> list[Tensor]:
        """Masks among indices whose numbers are known, if all are."""
        masks = [i for i in _items(args[1]) if isinstance(i, Tensor) and i.dtype == torch.bool]
        return masks if masks and all(shadow(mask) for mask in masks) else []

    def _everything(self, args: tuple[Any, ...]) -> bool:
        """Whether a mask of whole rows chooses all of them; then nothing moves."""
        items = _items(args[1])
        found = shadow(items[0])
        if len(items) != 1 or found is None or found.real.dim() != 1:
            return False
        with _outside():
            everything = bool(found.real.all())
        if everything:
            self._ask(Tensor.nonzero, (items[0],), {})
        return everything

    def _places(self, index: Any) -> Any:
        """Indices with the places where a mask is true, as constants, in place of each mask."""
        items: list[Any] = []
        for item in _items(index):
            found = shadow(item)
            if found is None or found.real.dtype != torch.bool:
                items.append(item)
                continue
            made = self._ask(Tensor.nonzero, (item,), {"as_tuple": True})
            with _outside():
                places = found.real.nonzero(as_tuple=True)
            items += [self._lift(place, made.part(i), item.device) for i, place in enumerate(places)]
        return tuple(items) if len(items) > 1 else items[0]

    def _ask(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Made:
        """Record what is asked: of what, and what the sample gives."""
        for tensor in (t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)):
            found = shadow(tensor)
            if found is not None and found.made.inputs:
                with _outside():
                    self.asked.append(Asked(found.made, found.real.clone(), _caller(), found.stale))
        return Made.call(func, _made(args), _made(kwargs))

    def _lift(self, real: Tensor, made: Made, device: torch.device) -> Tensor:
        """A real tensor as a constant of the trace, on the device of what it is made of."""
        with _outside():
            constant = real.to(device)
        if constant.is_meta:
            give_numbers(constant, real)
        self.lifted.append(real if constant.is_meta else constant)
        traced: Tensor = torch.ops.aten.lift_fresh_copy.default(constant)
        self._attach(traced, Shadow(real, made))
        return traced

    def _look_up(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        ids = args[0] if args else kwargs.get("input")
        table = args[1] if len(args) > 1 else kwargs.get("weight")
        if self.words is not None and isinstance(table, Tensor) and table.shape != self.words:
            return
        found = shadow(ids)
        if found is not None:
            self.content |= found.made.carried()

    # --- the trace, with shadows beside -------------------------------------------------------------------------------

    def _traced(
        self, func: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any], tensors: list[Tensor]
    ) -> Any:
        result = func(*args, **kwargs)
        made_here = not tensors and any(isinstance(t, Tensor) and _traceable(t) for t in tree_leaves(result))
        changes = bool(tensors) and (name in _IN_PLACE or (name.endswith("_") and not name.endswith("__")))
        if (all(map(_known, tensors)) and tensors) or (made_here and not name.startswith("rand")):
            real = self._computed(func, args, kwargs, result)
            if real is not _NOTHING:
                target = shadow(tensors[0]) if changes else None
                if target is not None and name == "__setitem__":
                    self.memory.written_back(target, args[1], shadow(args[2]))
                made = Made.call(func, _made(args), _made(kwargs))
                stale = any(found.stale for t in tensors if (found := shadow(t)) is not None)
                if target is not None:
                    target.made, target.stale = made, stale
                    self.memory.written(target)
                self._attach_all(result, real, made, stale)
                return result
        if changes:
            self._lose(tensors[0])
        return result

    def _lose(self, written: Tensor) -> None:
        found = shadow(written)
        if found is not None:
            self.memory.lose(found)

    def _attach(self, traced: Tensor, found: Shadow) -> None:
        traced._pumer_shadow = found  # type: ignore[attr-defined]
        self.memory.add(found)
        if not isinstance(traced, FakeTensor):
            give_numbers(traced, found.real)

    def _attach_all(self, result: Any, real: Any, made: Made, stale: bool) -> None:
        traced, reals = tree_leaves(result), tree_leaves(real)
        if len(traced) != len(reals):
            return
        for number, (one, value) in enumerate(zip(traced, reals, strict=True)):
            if isinstance(one, Tensor) and _traceable(one) and isinstance(value, Tensor) and one.shape == value.shape:
                known = shadow(one)
                if known is None or known.real is not value:
                    own = made if isinstance(result, Tensor) else made.part(number)
                    self._attach(one, Shadow(value, own, stale))

    @staticmethod
    def _computed(func: Any, args: Any, kwargs: Any, result: Any) -> Any:
        if any(isinstance(t, Tensor) and not _small(t) for t in tree_leaves(result)):
            return _NOTHING
        try:
            with _outside():
                return func(*_real(args), **_real(kwargs))
        except Exception:  # a size that is a symbol, say: then nothing is known of the result
            return _NOTHING


class _Memory:
    """Shadows by what they share memory with: what is written through one name changes what the others hold."""

    def __init__(self) -> None:
        self.owners: dict[int, WeakSet[Shadow]] = {}
        # Through which the last write went, and which others it made stale, with how they were made.
        self.last: tuple[Shadow, dict[Shadow, Made]] | None = None

    def add(self, found: Shadow) -> None:
        """A new one."""
        self.owners.setdefault(_storage(found), WeakSet()).add(found)

    def written(self, target: Shadow) -> None:
        """Something known was written through `target`: how the others were made does not tell what they hold."""
        others = self._others(target)
        self.last = (target, {other: other.made for other in others if not other.stale})
        for other in others:
            other.stale = True
            other.made = replace(other.made, inputs=other.made.inputs | target.made.inputs)

    def written_back(self, whole: Shadow, index: Any, part: Shadow | None) -> None:
        """`x[i] |= y` writes through `x[i]`, and then writes that into `x`, which says how `x` was made."""
        if part is None or self.last is None or self.last[0] is not part or whole not in self.last[1]:
            return
        with _outside():
            own = whole.real[_real(index)]
        if _region(own) == _region(part.real):
            whole.stale, whole.made = False, self.last[1][whole]

    def lose(self, target: Shadow) -> None:
        """Something was written through `target` that is not known."""
        for other in (target, *self._others(target)):
            other.lost = True

    def _others(self, target: Shadow) -> list[Shadow]:
        return [other for other in self.owners.get(_storage(target), ()) if other is not target]


def _storage(found: Shadow) -> int:
    return found.real.untyped_storage().data_ptr()


def _region(tensor: Tensor) -> tuple[Any, ...]:
    return tensor.data_ptr(), tensor.shape, tensor.stride()


def _traceable(tensor: Tensor) -> bool:
    """Whether it has no numbers of its own: it is traced, or a constant on the meta device."""
    return isinstance(tensor, FakeTensor) or tensor.is_meta


def _known(tensor: Tensor) -> bool:
    """Whether its numbers are: it has a shadow, or is real and not learned."""
    plain = not isinstance(tensor, FakeTensor | nn.Parameter) and not tensor.is_meta
    return shadow(tensor) is not None or plain


def _small(tensor: Tensor) -> bool:
    return all(isinstance(size, int) for size in tensor.shape) and tensor.numel() <= LARGEST


def _items(index: Any) -> Sequence[Any]:
    return index if isinstance(index, tuple | list) else (index,)


def _real(value: Any) -> Any:
    """What the sample gives for arguments. Everything is computed on the CPU, wherever the model is (a plan is made on
    the meta device, where there are no numbers)."""
    if isinstance(value, dict) and "device" in value:
        value = {**value, "device": torch.device("cpu")}
    value = tree_map_only(torch.device, lambda _: torch.device("cpu"), value)
    return tree_map_only(Tensor, lambda t: t.cpu() if (found := shadow(t)) is None else found.real, value)


def _made(value: Any) -> Any:
    return tree_map_only(Tensor, lambda t: Made.constant(t) if (found := shadow(t)) is None else found.made, value)


@contextmanager
def _outside() -> Iterator[None]:
    """Compute for real within a trace, recording nothing."""
    with (
        torch._C.DisableTorchFunction(),
        unset_fake_temporarily(),
        disable_proxy_modes_tracing(),
        _disable_current_modes(),
        torch.no_grad(),
    ):
        yield


def _caller() -> str:
    """The line of the model's code that asks."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if not {"torch", "pumer_compile"} & {*path.split("/")} and not path.startswith("<"):
            return f"{path}:{frame.f_lineno}"
        frame = frame.f_back  # type: ignore[assignment]
    return ""


@contextmanager
def following(model: nn.Module, follow: FollowSample) -> Iterator[None]:
    """Within the block a trace of `model` follows the sample."""
    original: Callable[..., Any] = model.forward

    def forward(**kwargs: Any) -> Any:
        follow.enter(kwargs)
        with follow:
            return original(**kwargs)

    with forward_of(model, forward, follow.names):
        yield


@contextmanager
def forward_of(model: nn.Module, forward: Callable[..., Any], names: Iterable[str]) -> Iterator[None]:
    """Within the block a model's forward is another function, which takes inputs by these names."""
    original, own = model.forward, "forward" in vars(model)
    kind = inspect.Parameter.KEYWORD_ONLY
    # torch.export reads the signature of a function here.
    forward.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])  # type: ignore[attr-defined]
    model.forward = forward
    try:
        yield
    finally:
        if own:
            model.forward = original
        else:
            del model.forward
