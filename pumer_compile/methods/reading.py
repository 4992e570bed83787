"""Schedules as users write them: strict YAML, and what is wrong with one in their words."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_args

import yaml

from ..errors import ScheduleError
from .yaml_errors import explain_yaml

if TYPE_CHECKING:
    from pydantic import BaseModel, ValidationError
    from pydantic_core import ErrorDetails

    from .base import Method


def read_yaml(text: str, name: str) -> dict[str, Any]:
    """The keys of a schedule; `name` appears in error messages.

    Raises:
        ScheduleError: not YAML, or not a mapping.
    """
    try:
        data = yaml.load(text, Loader=_UniqueKeyLoader)
    except (yaml.YAMLError, ValueError) as error:  # ValueError: a date such as 2026-13-01
        raise ScheduleError(explain_yaml(error, name)) from error
    if not isinstance(data, dict):
        raise ScheduleError(f"{name} must hold a mapping such as `layers: [2, 5, 8]`, found {type(data).__name__}.")
    return {str(key): value for key, value in data.items()}


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key given twice; plain YAML keeps the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = []
        for place, _ in node.value:
            key = self.construct_object(place, deep=True)
            if key in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key!r} appears twice", place.start_mark)
            seen.append(key)
        return super().construct_mapping(node, deep=deep)


def class_of(keys: Mapping[str, Any], name: str) -> type[Method]:
    """The class of the method that a schedule names; `name` appears in error messages.

    Raises:
        ScheduleError: there is no such method.
    """
    from .base import METHODS

    # A list of stages says what it is.
    given = keys.get("method", "stages" if isinstance(keys.get("stages"), list | tuple) else "pumer")
    found = METHODS.get(given) if isinstance(given, str) else None
    if found is None:
        raise ScheduleError(f"{name} is not valid: method: expected one of {', '.join(METHODS)}, got {given!r}.")
    return found


def explain(error: ValidationError, name: str, method: type[Method]) -> str:
    """One paragraph from pydantic's list of problems."""
    problems = []
    for item in error.errors():
        where = ".".join(str(part) for part in item["loc"] if part not in ("int", "float"))
        text = f"{where}: {_in_words(item, method)}" if where else _in_words(item, method)
        if text not in problems:
            problems.append(text)
    return f"{name} is not valid: {'; '.join(problems)}."


_FORMS: dict[str, str] = {
    "layers": "a list of layers, such as [2, 5, 8]",
    "sites": "a list of sites, such as [{at: cross_modal.2, prune: 0.1}]",
    "merge": "a mapping, such as {image: 0.3, text: 0.2}",
    "at": "the address of an attention, such as cross_modal.2",
}
_KINDS: dict[str, str] = {
    "int_type": "an integer",
    "float_type": "a number",
    "float_parsing": "a number",
    "string_type": "text",
}
_LIMITS: dict[str, tuple[str, str]] = {
    "greater_than_equal": ("ge", "at least"),
    "less_than_equal": ("le", "at most"),
    "finite_number": ("", "a finite number"),
}


def _in_words(item: ErrorDetails, method: type[Method]) -> str:
    """A problem as the user would say it: what is expected there, and what was given."""
    kind, place = item["type"], item["loc"]
    key = next((str(part) for part in reversed(place) if isinstance(part, str)), "")
    if kind == "extra_forbidden":
        return _unknown_key(place, method)
    if kind == "value_error":
        return item["msg"].removeprefix("Value error, ")
    if kind == "missing":
        return _missing(place, method)
    if kind in _LIMITS:
        limit, words = _LIMITS[kind]
        expected = f"{words} {item.get('ctx', {}).get(limit, '')}".strip()
    elif kind == "literal_error":
        return _other_choice(key, item["input"], method)
    elif key == "layer" and isinstance(item["input"], list | tuple):
        expected = "an integer, such as 2 (lists are for `layers`)"
    elif kind in _KINDS and key != "at":
        expected = _KINDS[kind]
    elif place and isinstance(place[-1], int):
        expected = "a mapping, such as {at: cross_modal.2, prune: 0.1}"
    else:
        expected = _FORMS.get(key, "another kind of value")
    return f"expected {expected}, got {item['input']!r}"


def _name(method: type[Method]) -> str:
    return f"`method: {method.model_fields['method'].default}`"


def _missing(place: tuple[int | str, ...], method: type[Method]) -> str:
    field = method.model_fields.get(str(place[0])) if len(place) == 1 else None
    if field is None or not field.description:
        return "is required, and is not there"
    return f"{_name(method)} needs a `{place[0]}`, {field.description}"


def _other_choice(key: str, given: object, method: type[Method]) -> str:
    """A value that is none of a key's choices: whose it is, if it is another method's, and what there are here."""
    from .base import METHODS

    choices = _choices(method, key)
    if len(choices) == 1:
        return f"{_name(method)} has one meaning: leave out `{key}`, got {given!r}"
    others = [_name(m) for m in METHODS.values() if key in m.model_fields and given in _choices(m, key)]
    whose = f"`{key}: {given}` is for {' and '.join(others)}; " if others else ""
    return f"{whose}expected one of {', '.join(choices)} ({_name(method)}), got {given!r}"


def _choices(method: type[Method], key: str) -> tuple[str, ...]:
    return tuple(map(str, get_args(method.model_fields[key].annotation)))


def _unknown_key(place: tuple[int | str, ...], method: type[Method]) -> str:
    """A key that there is not, or that another method has."""
    from .base import METHODS
    from .budgets import Merge, SiteBudget

    *outer, key = place
    owner: type[BaseModel] = Merge if "merge" in outer else SiteBudget if "sites" in outer else method
    others = [] if outer else [_name(other) for other in METHODS.values() if key in other.model_fields]
    if others:
        known = ", ".join(method.model_fields)
        return f"`{key}` is for {' and '.join(others)}; leave out `{key}` ({_name(method)} has the keys {known})"
    near = difflib.get_close_matches(str(key), owner.model_fields, n=1)
    meant = f"did you mean {near[0]}? " if near else ""
    return f"unknown key; {meant}known keys: {', '.join(owner.model_fields)}"
