"""Reading a torch.export archive without running what is in it.

`torch.export.load` trusts its file. It falls back to full pickle for sample inputs, weights and constants,
loads compiled libraries, evaluates the text of symbolic sizes (`sympy.sympify`), and the names of arguments
and parameters become Python source when the graph is run. An archive that `torch.export.save` makes of an
ordinary model needs none of this: it is plain tensors, plain names, and integer arithmetic over a few
symbols. `refuse_unsafe` checks that it is so.
"""

from __future__ import annotations

import ast
import importlib
import io
import json
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram

from ..errors import CaptureError, UsageError

_NAME = re.compile(r"[\w.:/ -]*")
# Text that torch keeps as text: where a node came from, string arguments, guards (which only become code with
# `module(check_guards=True)`, and capture never asks for that).
_FREE_TEXT = frozenset({"metadata", "as_string", "as_strings", "guards_code", "torch_version"})
_SYMBOL = re.compile(r"[a-z]+\d+|int_oo|oo|zoo|[tT]rue|[fF]alse")
# Sizes are written like `Add(Symbol('s77', integer=True), Integer(1))`: with sympy's classes for arithmetic
# and relations, and those that torch's deserialiser adds.
_FUNCTIONS = frozenset(
    "Symbol Integer Float Rational Add Mul Pow Mod Max Min Abs floor ceiling And Or Not Eq Ne Lt Le Gt Ge "
    "Equality Unequality StrictLessThan LessThan StrictGreaterThan GreaterThan FloorDiv ModularIndexing "
    "Where PythonMod CleanDiv CeilToInt FloorToInt CeilDiv LShift RShift PowByNatural FloatPow FloatTrueDiv "
    "IntTrueDiv IsNonOverlappingAndDenseIndicator TruncToFloat TruncToInt RoundToInt RoundDecimal ToFloat "
    "Identity".split()
)
_ARITHMETIC: tuple[type[ast.AST], ...] = (
    *(ast.Expression, ast.expr_context, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare),
    *(ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.keyword),
)


def is_archive(path: Path, names: list[str]) -> bool:
    """Whether the zip file at `path`, with these entries, is a torch.export archive (of any version of the format)."""
    if "serialized_exported_program.json" in names:
        return True
    marker = [name for name in names if name.count("/") == 1 and name.endswith("/archive_format")]
    if not marker:
        return False
    with zipfile.ZipFile(path) as zipped:
        return zipped.read(marker[0]) == b"pt2"


def load(path: Path, allow_pickle: bool = False) -> ExportedProgram:
    """The program in the archive at `path`.

    Raises UsageError if loading it could run code and `allow_pickle` is false, CaptureError if it cannot be
    loaded.
    """
    try:
        if not allow_pickle:
            refuse_unsafe(path)
        _import_output_types(path)
        with path.open("rb") as file:  # given a path, torch warns unless its suffix is .pt2
            return torch.export.load(file)
    except UsageError:
        raise
    except Exception as error:
        line = next(iter(str(error).strip().splitlines()), "").rstrip(".")
        why = (
            "It was written by another version of torch, or is damaged"
            if zipfile.is_zipfile(path)
            else "It is truncated"
        )
        raise CaptureError(
            f"The torch.export archive {path} cannot be loaded by torch {torch.__version__}: "
            f"{type(error).__name__}: {line}. {why}: export it again."
        ) from error


def refuse_unsafe(path: Path) -> None:
    """Raise UsageError if `torch.export.load` could run code from the archive at `path`."""
    with zipfile.ZipFile(path) as zipped:
        reason = next(_unsafe_entries(zipped), None)
    if reason:
        raise UsageError(
            f"The torch.export archive {path} is not plain data: {reason}. Loading it can run whatever code "
            "it contains. Pass --allow-pickle (allow_pickle=True) only if you trust where it comes from."
        )


def _unsafe_entries(zipped: zipfile.ZipFile) -> Iterator[str]:
    names = zipped.namelist()
    if "serialized_exported_program.json" in names:
        yield "it has the format of torch 2.7 and older, which is pickled"
    if len(set(names)) < len(names) or len({name.partition("/")[0] for name in names}) > 1:
        yield "its entries are ambiguous (two roots, or two of one name)"
    for name in names:
        inner = name.partition("/")[2]
        if inner.startswith("data/aotinductor/"):
            yield f"it holds a compiled library ({inner})"
        elif inner.startswith("data/") and inner.endswith(".pt"):
            yield from _unless_tensors(inner, zipped.read(name))
        elif inner.startswith("data/") and inner.endswith("_config.json"):
            yield from _unsafe_payloads(inner, json.loads(zipped.read(name)))
        elif inner.startswith("models/"):
            yield from _unsafe_values(json.loads(zipped.read(name)), "")


def _unless_tensors(entry: str, content: bytes) -> Iterator[str]:
    """Nothing if torch's weights-only unpickler takes the entry: torch.export.load then goes no further either."""
    try:
        torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except Exception:
        yield f"{entry} pickles Python objects besides tensors"


def _unsafe_payloads(entry: str, config: dict[str, Any]) -> Iterator[str]:
    for name, payload in config["config"].items():
        if payload["use_pickle"] or not re.fullmatch(r"(weight|tensor)_\d+", payload["path_name"]):
            yield f"{name} in {entry} is a pickled Python object"
    yield from _unsafe_values(config, "")


def _unsafe_values(value: Any, key: str) -> Iterator[str]:
    """Everything below `value` (found under `key`) that is more than a plain name, number or known expression."""
    if isinstance(value, dict):
        if "__enum__" in value:
            yield f"it names a class to import ({value.get('fqn')})"
        for inner, content in value.items():
            yield from _unsafe_values(inner, "")
            free = key in _FREE_TEXT and isinstance(content, str)
            yield from [] if free else _unsafe_values(content, inner)
    elif isinstance(value, list):
        for content in value:
            free = key in _FREE_TEXT and isinstance(content, str)
            yield from [] if free else _unsafe_values(content, key)
    elif isinstance(value, str) and key not in _FREE_TEXT:
        if key == "expr_str":
            plain = _is_arithmetic(value)
        elif key in ("in_spec", "out_spec", "context") and _NAME.fullmatch(value) is None:  # JSON inside JSON
            yield from _unsafe_values(json.loads(value), "")
            plain = True
        else:
            plain = _NAME.fullmatch(value) is not None
        if not plain:
            yield f"where a name or a size is expected it has the text {value[:60]!r}"


def _is_arithmetic(text: str) -> bool:
    """Whether evaluating `text` computes with symbols and numbers, and nothing else."""
    try:
        nodes = list(ast.walk(ast.parse(text.strip(), mode="eval")))
    except (SyntaxError, ValueError, RecursionError):
        return False
    called = {id(node.func) for node in nodes if isinstance(node, ast.Call)}
    for node in nodes:
        if isinstance(node, ast.Name):
            allowed = node.id in _FUNCTIONS if id(node) in called else _SYMBOL.fullmatch(node.id) is not None
        elif isinstance(node, ast.Constant):
            # A symbol's name, or a float's digits: sympy evaluates other strings.
            plain_text = isinstance(node.value, str) and re.fullmatch(r"[\w.+-]*", node.value) is not None
            allowed = isinstance(node.value, int | float) or plain_text
        elif isinstance(node, ast.Call):
            allowed = isinstance(node.func, ast.Name) and all(keyword.arg for keyword in node.keywords)
        else:
            allowed = isinstance(node, _ARITHMETIC)
        if not allowed:
            return False
    return True


def _import_output_types(path: Path) -> None:
    """Import the transformers modules whose output classes the archive names: that makes them known to torch."""
    with zipfile.ZipFile(path) as zipped:
        for name in zipped.namelist():
            if name.partition("/")[2].startswith("models/"):
                text = zipped.read(name).decode(errors="replace")
                for module in set(re.findall(r"\b(transformers(?:\.\w+)+)\.\w+Output\w*\b", text)):
                    importlib.import_module(module)
