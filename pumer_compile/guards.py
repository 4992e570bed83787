"""Guards: what must be true of inputs for a graph that followed its sample (`follow.py`).

What a model asked of integer geometry (grids, sizes, kinds of tokens) fixes these inputs as a whole: they have the
sample's values, or another graph is needed. What it asked of content (pixels, ids that a table is looked up by) fixes
the answer alone: as many placeholders at the same places, no image all black. Such a predicate is written down as the
operators that made it, computed anew from the inputs that an artifact is given, and compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .errors import UsageError

# What a predicate may be made of: methods of tensors that a manifest can name and that have no effect.
REPLAYED = frozenset(
    "eq ne lt le gt ge sum any all view reshape flatten unsqueeze squeeze expand transpose permute contiguous clone "
    "to bool int long float logical_and logical_or logical_not and or xor invert add sub mul rsub cumsum amax amin max "
    "min getitem select numel abs nonzero diff unbind mean prod count_nonzero isin is_all_true ior iand iadd isub "
    "setitem part div floordiv truediv pow sqrt floor ceil round remainder mod neg square".split()
)


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
        given = self.found(inputs).tolist()
        if given != self.value:
            raise UsageError(self._message(given))

    def found(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """What its expression gives of inputs."""
        with torch.no_grad():
            return torch.as_tensor(_evaluate(self.expression, inputs))

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


def check_prompts(manifest: Mapping[str, Any], inputs: Mapping[str, Tensor]) -> None:
    """Whether images stand in these prompts where the artifact has them compiled in, and are cut as it has them.

    Raises:
        UsageError: elsewhere, in another number of places, or an input has other values than it was compiled for.
    """
    for name, values in (manifest.get("fixed_inputs") or {}).items():
        if name in inputs and inputs[name].tolist() != values:
            raise UsageError(
                f"The artifact was compiled for {name} {values}, which is written into it (images of another shape are "
                f"cut otherwise), and was given {inputs[name].tolist()}. Compile it for this shape."
            )
    for name in manifest.get("unpadded_inputs") or ():
        if name in inputs and not bool((inputs[name] == 1).all()):
            raise UsageError(
                f"The artifact was compiled with --no-padding, and {name} has padding (zeros). Compile it without, or "
                "give it samples of full length."
            )
    for name, value in (manifest.get("constant_inputs") or {}).items():
        if name in inputs and not bool((inputs[name] == value).all()):
            raise UsageError(
                f"The artifact was compiled without {name}, which is as good as {value} in every place, and was given "
                f"other values. Compile it with {name} among its inputs (--inputs)."
            )
    written = {name: torch.tensor(values) for name, values in (manifest.get("fixed_inputs") or {}).items()}
    for said in manifest.get("guards") or ():
        Guard.from_dict(said).check({**written, **inputs})
    blocks: dict[tuple[str, int], list[tuple[int, int]]] = {}
    for place in (manifest.get("plan") or {}).get("prompts", ()):
        blocks.setdefault((place["input"], place["placeholder"]), []).append((place["start"], place["stop"]))
    for (name, placeholder), places in blocks.items():
        if name in inputs:
            _check_places(name, inputs[name], placeholder, places)


def without_constants(manifest: Mapping[str, Any], inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Inputs without those that `check_prompts` found to say nothing."""
    return {name: tensor for name, tensor in inputs.items() if name not in (manifest.get("constant_inputs") or {})}


def _check_places(name: str, ids: Tensor, placeholder: int, places: list[tuple[int, int]]) -> None:
    found = ids == placeholder
    total = sum(stop - start for start, stop in places)
    there = all(bool(found[:, start:stop].all()) for start, stop in places)
    if not there or int(found.sum()) != total * ids.shape[0]:
        positions = " and ".join(f"{start} to {stop - 1}" for start, stop in places)
        raise UsageError(
            f"The artifact has the image (or sound) at positions {positions} of every prompt, and these {name} do not "
            f"have its placeholders (id {placeholder}) just there. Compile it for prompts of this form."
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
    if name not in REPLAYED:
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
_METHODS = {name: f"__{name}__" for name in "getitem and or xor invert rsub floordiv truediv mod".split()}
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
