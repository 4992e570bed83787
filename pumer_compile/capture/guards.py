"""Guards: what must be true of inputs for a graph that followed its sample (`follow.py`).

What a model asked of integer geometry (grids, sizes, kinds of tokens) fixes these inputs as a whole: they have the
sample's values, or another graph is needed. What it asked of content (pixels, ids that a table is looked up by) fixes
the answer alone: as many placeholders at the same places, no image all black. Such a predicate is written down as the
operators that made it, computed anew from the inputs that an artifact is given, and compared.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..errors import CaptureError, UsageError

# Predicates are small: masks of tokens, a yes or no for each image.
_LARGEST = 1 << 20
# What a predicate may be made of: methods of tensors that a manifest can name and that have no effect.
_REPLAYED = frozenset(
    "eq ne lt le gt ge sum any all view reshape flatten unsqueeze squeeze expand transpose permute contiguous clone to "
    "bool int long float logical_and logical_or logical_not and or xor invert add sub mul rsub cumsum amax amin max min "
    "getitem select numel abs nonzero diff unbind mean prod count_nonzero isin is_all_true ior iand iadd isub setitem part"
    .split()
)
_MOVES = frozenset("view reshape unsqueeze squeeze expand expand_as flatten contiguous clone to detach".split())


_REPLACES = frozenset({"where", "masked_fill", "clamp", "long", "int", "cat", "stack", "getitem", "index_select"})


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


@dataclass(frozen=True)
class Guard:
    """A predicate on inputs.

    Attributes:
        inputs: that it reads.
        expression: JSON: `{"input": name}`, `{"constant": numbers, "dtype": name}`, or `{"call": name, "args": [...],
            "kwargs": {...}}`.
        value: what it must give, as nested lists.
        where: the line of the model's code that asked.
    """

    inputs: tuple[str, ...]
    expression: Any
    value: Any
    where: str = ""

    def to_dict(self) -> dict[str, Any]:
        """For a manifest."""
        return {"inputs": list(self.inputs), "expression": self.expression, "value": self.value, "where": self.where}

    @classmethod
    def from_dict(cls, said: Mapping[str, Any]) -> Guard:
        """From a manifest."""
        return cls(tuple(said["inputs"]), said["expression"], said["value"], str(said.get("where", "")))

    def check(self, inputs: Mapping[str, Tensor]) -> None:
        """Whether it is true of inputs; those that lack one of its own are not looked at.

        Raises:
            UsageError: it is not.
        """
        if any(name not in inputs for name in self.inputs):
            return
        with torch.no_grad():
            found = _evaluate(self.expression, inputs)
        given = found.tolist() if isinstance(found, Tensor) else found
        if given != self.value:
            raise UsageError(self._message(given))

    def _message(self, given: Any) -> str:
        names = " and ".join(self.inputs)
        placeholder = _placeholder(self.expression)
        if placeholder is not None:
            return (
                f"The artifact was compiled for prompts with the placeholders (id {placeholder}) of {names} at "
                f"{_spans(self.value)}, and was given {_spans(given)}. Compile it for prompts of this form."
            )
        return (
            f"The artifact was compiled for inputs of which the model finds {_short(self.value)} where it looks at "
            f"{names}{f' ({self.where})' if self.where else ''}, and finds {_short(given)} in these. Compile it for "
            "inputs of this form."
        )


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
        CaptureError: a model asks something of its content that cannot be checked of other inputs.
    """
    fixed: dict[str, None] = {}
    guards: dict[str, Guard] = {}
    for question in asked:
        read = sorted(question.made.inputs & content)
        fixed.update(dict.fromkeys(sorted(question.made.inputs - content)))
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
    if made.name not in _REPLAYED:
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
        f"{model} decides by the numbers of {names}{what} ({question.where}) what it computes, and whether other inputs "
        "decide the same could not be checked. Let the model compute both ways and choose with a mask."
    )


def _evaluate(said: Any, inputs: Mapping[str, Tensor]) -> Any:
    """The value of an expression.

    Raises:
        UsageError: it names what no guard is made of (a manifest that was changed).
    """
    if isinstance(said, list):
        return [_evaluate(item, inputs) for item in said]
    if not isinstance(said, dict):
        return said
    if "input" in said:
        return inputs[said["input"]].detach().cpu()
    if "constant" in said:
        return torch.tensor(said["constant"], dtype=getattr(torch, said["dtype"]))
    if "dtype" in said:
        return getattr(torch, said["dtype"])
    if "ellipsis" in said:
        return ...
    if "slice" in said:
        return slice(*_evaluate(said["slice"], inputs))
    name = str(said.get("call"))
    if name not in _REPLAYED:
        raise UsageError(f"The artifact's manifest has a guard with {name!r}, which guards are not made of.")
    args, kwargs = _evaluate(said["args"], inputs), {k: _evaluate(v, inputs) for k, v in said["kwargs"].items()}
    if name == "getitem" and isinstance(args[1], list):
        args[1] = tuple(args[1])
    if name == "part":
        return args[0][args[1]]
    if name == "setitem":
        whole = args[0].clone()
        whole[tuple(args[1]) if isinstance(args[1], list) else args[1]] = args[2]
        return whole
    return getattr(Tensor, _METHODS.get(name, name))(*args, **kwargs)


# Where the method of tensors has another name.
_METHODS = {name: f"__{name}__" for name in ("getitem", "and", "or", "xor", "invert", "rsub")}
_METHODS |= {"ior": "__or__", "iand": "__and__", "iadd": "__add__", "isub": "__sub__", "is_all_true": "all"}


def _placeholder(said: Any) -> int | None:
    """The id that an expression compares an input with, where it does no more."""
    if isinstance(said, dict) and said.get("call") == "eq" and len(said["args"]) == 2:
        first, second = said["args"]
        if isinstance(first, dict) and "input" in first and isinstance(second, int):
            return second
    return None


def _spans(mask: Any) -> str:
    """Where a mask `[batch, length]` is true, in words."""
    rows = []
    for row in mask:
        starts = [i for i, one in enumerate(row) if one and not (i and row[i - 1])]
        stops = [i for i, one in enumerate(row) if one and not (i + 1 < len(row) and row[i + 1])]
        spans = [f"{a} to {b}" if b > a else str(a) for a, b in zip(starts, stops, strict=True)]
        rows.append(" and ".join(spans) or "no place")
    return rows[0] if len(set(rows)) == 1 else "; ".join(rows)


def _short(value: Any) -> str:
    text = str(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
