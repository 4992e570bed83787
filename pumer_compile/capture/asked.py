"""Asked: what a traced model asked of its inputs, and what must be true of other inputs for the same answers."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CaptureError
from ..guards import REPLAYED, Guard

# Predicates are small: masks of tokens, a yes or no for each image.
_LARGEST = 1 << 20
_MOVES = frozenset("view reshape unsqueeze squeeze expand expand_as flatten contiguous clone to detach".split())


_REPLACES = frozenset(
    {"where", "masked_fill", "clamp", "long", "int", "cat", "stack", "getitem", "setitem", "index_select"}
)


@dataclass(eq=False)
class Made:
    """How a value was computed.

    Attributes:
        name: of the method of tensors that made it; of the input, where `args` is empty.
        args, kwargs: with `Made` for tensors.
        value: of a constant.
        inputs: that it comes from.
    """

    name: str
    args: tuple[Any, ...] = ()
    kwargs: tuple[tuple[str, Any], ...] = ()
    value: Tensor | None = None
    inputs: frozenset[str] = frozenset()

    @classmethod
    def input(cls, name: str) -> Made:
        """An input."""
        return cls(name, inputs=frozenset([name]))

    @classmethod
    def constant(cls, value: Tensor) -> Made:
        """A tensor that comes from no input."""
        return cls("constant", value=value)

    @classmethod
    def call(cls, func: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Made:
        """The result of a function."""
        parts = list(_parts((args, tuple(kwargs.values()))))
        name = getattr(func, "__name__", str(func)).strip("_")
        inputs = frozenset().union(*(part.inputs for part in parts))
        return cls(name, args, tuple(kwargs.items()), inputs=inputs)

    def part(self, number: int) -> Made:
        """One of several results."""
        return Made("part", (self, number), inputs=self.inputs)

    def carried(self) -> frozenset[str]:
        """Inputs whose own numbers it holds, moved or with some replaced."""
        if self.is_input:
            return self.inputs
        if self.name not in _MOVES | _REPLACES:
            return frozenset()
        return frozenset().union(*(part.carried() for part in _parts(self.args)))

    @property
    def is_input(self) -> bool:
        """Whether it is an input itself."""
        return self.inputs == {self.name} and not self.args


def _parts(value: Any) -> Iterator[Made]:
    if isinstance(value, Made):
        yield value
    elif isinstance(value, tuple | list):
        for item in value:
            yield from _parts(item)
    elif isinstance(value, slice):
        yield from _parts((value.start, value.stop, value.step))


@dataclass
class Asked:
    """A question that a traced model asked of its inputs.

    Attributes:
        made: what was asked about.
        value: what the sample gives.
        where: the line of the model's code.
        stale: whether how it was made does not tell what it holds.
    """

    made: Made
    value: Tensor
    where: str
    stale: bool = False


def guards_of(
    asked: list[Asked], content: frozenset[str], sample: Mapping[str, Tensor], model: str
) -> tuple[tuple[str, ...], tuple[Guard, ...]]:
    """Inputs that are fixed by what was asked, and predicates on the others.

    Args:
        asked: while the model was traced.
        content: inputs that may hold anything: pixels, and ids that a table is looked up by.
        sample: real inputs by name.
        model: its name, for messages.

    Raises:
        CaptureError: a model asks something of its content that cannot be checked of other inputs, or that says more of
            it than a yes, a count or a place.
    """
    fixed: dict[str, None] = {}
    guards: dict[str, Guard] = {}
    for question in asked:
        read = sorted(question.made.inputs & content)
        fixed.update(dict.fromkeys(sorted(question.made.inputs - content)))
        if read and question.value.is_floating_point():
            raise _cannot(question, model)
        if read:
            made, value = _without_moves(question.made, question.value)
            expression = _written(made, question, model)
            guard = Guard(tuple(sorted(made.inputs)), expression, value.tolist(), question.where)
            _check_replay(guard, question, sample, model)
            guards.setdefault(str(expression), guard)
    return tuple(fixed), tuple(guards.values())


def _check_replay(guard: Guard, question: Asked, sample: Mapping[str, Tensor], model: str) -> None:
    """A predicate that is not true of its own sample would say nothing."""
    try:
        guard.check(sample)
    except Exception as error:  # operators of any kind, on anything
        raise _cannot(question, model) from error


def _without_moves(made: Made, value: Tensor) -> tuple[Made, Tensor]:
    """What is only moved or repeated says no more than what it is made of."""
    while made.name in _MOVES and made.args and isinstance(made.args[0], Made):
        below = made.args[0]
        if below.inputs != made.inputs or below.value is not None:
            break
        made = below
    return made, value


def _written(made: Made, question: Asked, model: str) -> Any:
    """An expression as JSON."""
    if question.value.numel() > _LARGEST or question.stale:
        raise _cannot(question, model)
    if made.is_input:
        return {"input": made.name}
    if made.value is not None:
        return {"constant": made.value.tolist(), "dtype": str(made.value.dtype).removeprefix("torch.")}
    if made.name not in REPLAYED:
        raise _cannot(question, model, made.name)

    def write(value: Any) -> Any:
        if isinstance(value, Made):
            return _written(value, question, model)
        if isinstance(value, tuple | list | torch.Size):
            return [write(item) for item in value]
        if isinstance(value, torch.dtype):
            return {"dtype": str(value).removeprefix("torch.")}
        if isinstance(value, torch.device):
            return None
        if isinstance(value, slice):
            return {"slice": [write(value.start), write(value.stop), write(value.step)]}
        if value is ...:
            return {"ellipsis": True}
        if value is None or isinstance(value, bool | int | float | str):
            return value
        raise _cannot(question, model, made.name)

    return {"call": made.name, "args": write(made.args), "kwargs": {k: write(v) for k, v in made.kwargs}}


def _cannot(question: Asked, model: str, operator: str = "") -> CaptureError:
    names = " and ".join(sorted(question.made.inputs))
    what = f" through {operator}" if operator else ""
    return CaptureError(
        f"{model} decides by the numbers of {names}{what} ({question.where}) what it computes, and whether other "
        "inputs decide the same could not be checked. Let the model compute both ways and choose with a mask."
    )
