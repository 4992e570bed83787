"""Exit codes: one rule, by class, over every refusal in the package."""

from __future__ import annotations

import ast
import inspect
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
import typer

import pumer_compile
from pumer_compile import errors
from pumer_compile.cli import shell
from pumer_compile.errors import OutputsError, ParityError, PumerError, UsageError, exit_code_of

PACKAGE = Path(pumer_compile.__file__).parent
CLASSES = {name: kind for name, kind in inspect.getmembers(errors, inspect.isclass) if issubclass(kind, PumerError)}
# Raised inside a validator or an operator of torch and caught there, or a defect of the caller's own code.
PLAIN = {
    "AttributeError",
    "ValueError",
    "KeyError",
    "ConstructorError",
    "AxisConflict",
    "_NothingReduced",
    "Exit",
    "SystemExit",
    "Hopeless",
    "TypeError",
}


def raised() -> Iterator[tuple[str, str, str]]:
    """Place, class and message of every error that the package raises; of a function that makes one, its class."""
    trees = {file: ast.parse(file.read_text(encoding="utf-8")) for file in sorted(PACKAGE.rglob("*.py"))}
    functions = [node for tree in trees.values() for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
    returns = {f.name: ast.unparse(f.returns) for f in functions if f.returns is not None}
    for file, tree in trees.items():
        own = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef)]
        makes = {**returns, **{f.name: ast.unparse(f.returns) for f in own if f.returns is not None}}
        for node in ast.walk(tree):
            if isinstance(node, ast.Raise) and isinstance(node.exc, ast.Call):
                name = ast.unparse(node.exc.func).rpartition(".")[2]
                parts = [
                    n.value for n in ast.walk(node.exc) if isinstance(n, ast.Constant) and isinstance(n.value, str)
                ]
                yield f"{file.relative_to(PACKAGE)}:{node.lineno}", makes.get(name, name), " ".join(parts)


def test_every_error_has_a_class_of_the_rule() -> None:
    found = list(raised())
    assert len(found) > 250
    again = "type(error)"  # another message for an error that was caught
    unknown = [f for f in found if f[1] not in CLASSES.keys() | PLAIN and f[1] != again]
    assert unknown == []


def test_who_is_told_to_change_the_command_is_told_it_was_bad_usage() -> None:
    """Whatever another option would mend exits with 2, whichever module refuses it."""
    remedy = re.compile(
        r"[Ll]eave (it|them|[a-z-]+) out|leave out|leave --|[Cc]hoose|Pass --|give --|(?<!raise )--[a-z]+ needs|"
        r"[Mm]ove the site"
    )
    told = [f for f in raised() if f[1] in CLASSES and f[1] != "ParityError" and remedy.search(f[2])]
    assert len(told) > 45
    wrong = [f for f in told if not issubclass(CLASSES[f[1]], UsageError)]
    assert wrong == []


def test_the_codes_are_set_in_one_place() -> None:
    own = {name for name, kind in CLASSES.items() if "exit_code" in vars(kind)}
    assert own == {"PumerError", "UsageError", "ParityError"}
    for file in PACKAGE.rglob("*.py"):
        text = file.read_text(encoding="utf-8")
        assert file.name == "errors.py" or not re.search(r"\.exit_code\b|typer\.Exit\(\d", text), file
    codes = {name: exit_code_of(kind("what happened")) for name, kind in CLASSES.items()}
    assert {name for name, code in codes.items() if code == 3} == {"ParityError"}
    assert {name for name, code in codes.items() if code == 2} == {
        *("UsageError", "ScheduleError", "LocateError", "PlanError", "OutputsError", "SiteError"),
    }
    assert (
        codes["PumerError"] == exit_code_of(MemoryError()) == exit_code_of(OSError()) == exit_code_of(KeyError()) == 1
    )
    assert issubclass(OutputsError, errors.VerifyError)


@pytest.mark.parametrize("kind", [*CLASSES.values(), OSError, MemoryError, KeyError], ids=lambda kind: kind.__name__)
def test_a_command_exits_with_the_code(kind: type[Exception], capsys: pytest.CaptureFixture[str]) -> None:
    @shell.readable_errors
    def command() -> None:
        raise kind("what happened")

    with pytest.raises(typer.Exit) as stopped:
        command()
    assert stopped.value.exit_code == exit_code_of(kind("what happened"))
    assert capsys.readouterr().err.count("error: ") == 1


def test_a_report_goes_with_a_failed_parity() -> None:
    assert ParityError("no", report=1).report == 1 and ParityError("no").report is None
