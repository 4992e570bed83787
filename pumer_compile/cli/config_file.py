"""`--config-file compile.yaml`: every option of `compile` by its name, so that a compilation can be repeated."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import PumerError, UsageError, exit_code_of
from .options import SCREEN
from .shell import say_error

# What a file cannot ask for.
_NOT_IN_A_FILE = ("config-file", "help")


def _read(context: typer.Context, path: Path | None) -> Path | None:
    """Take a file's values for defaults: what stands on the command line counts more."""
    if path is not None:
        try:
            context.default_map = {**(context.default_map or {}), **defaults(context, path)}
        except PumerError as error:
            say_error(str(error))
            raise typer.Exit(exit_code_of(error)) from error
    return path


ConfigFile = Annotated[
    Path | None,
    typer.Option(
        "--config-file",
        metavar="FILE.yaml",
        help="Options by their names, such as `text-length: 20`, and `model`. Options on the command line count more.",
        show_default=False,
        rich_help_panel=SCREEN,
        is_eager=True,
        callback=_read,
    ),
]


def defaults(context: typer.Context, path: Path) -> dict[str, Any]:
    """Values by the names of a command's parameters.

    Args:
        context: of the command.
        path: a YAML mapping: options by their names without dashes in front, arguments by theirs.

    Raises:
        UsageError: no such file, no mapping, an unknown key, or a value that no option takes.
    """
    from ..methods.reading import read_yaml

    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageError(f"--config-file {path} cannot be read: {error.strerror}.") from error
    known = _names(context)
    given: dict[str, Any] = {}
    for key, value in read_yaml(text, str(path)).items():
        parameter = known.get(key.replace("_", "-"))
        if parameter is None:
            near = difflib.get_close_matches(key.replace("_", "-"), known, n=3)
            meant = f"Did you mean {' or '.join(near)}? " if near else ""
            raise UsageError(
                f"{path} has the key {key!r}, and {context.command_path} no option --{key}. {meant}Keys are the "
                f"options that `{context.command_path} --help` shows, without the dashes in front, and `model`."
            )
        if parameter.name in given:
            raise UsageError(f"{path} says {key!r} twice, under two names of one option. Leave one out.")
        given[str(parameter.name)] = _value(parameter, key, value, path)
    return given


def _names(context: typer.Context) -> dict[str, Any]:
    """Parameters by what a file calls them."""
    found = {}
    for parameter in context.command.params:
        options = [name.removeprefix("--") for name in parameter.opts if name.startswith("--")]
        for name in options or [str(parameter.name)]:
            if name not in _NOT_IN_A_FILE:
                found[name] = parameter
    return found


def _value(parameter: Any, key: str, value: Any, path: Path) -> Any:
    """A value as the command line's parser takes one."""
    flag = bool(getattr(parameter, "is_flag", False))
    if flag != isinstance(value, bool):
        raise UsageError(f"{path} says `{key}: {value}`; it takes {'true or false' if flag else 'a value'}.")
    if flag:
        return value
    several = bool(getattr(parameter, "multiple", False))
    values = value if several and isinstance(value, list) else [value]
    for one in values:
        if not isinstance(one, str | int | float) or isinstance(one, bool):
            what = "a value, or a list of them" if several else "one value"
            raise UsageError(f"{path} says `{key}: {value}`; it takes {what}: numbers or words, in quotes if need be.")
    texts = [str(one) for one in values]
    return texts if several else texts[0]
