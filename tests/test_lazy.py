"""What is cheap stays cheap: help, the version and a typo load neither torch nor what stands on it."""

from __future__ import annotations

import importlib.util
import json
import pkgutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

import pumer_compile
from pumer_compile.errors import BAD_USAGE

HEAVY = ("numpy", "onnx", "onnx_ir", "onnxruntime", "onnxscript", "openvino", "safetensors", "torch", "transformers")
REPORT = "import sys, json\nprint(json.dumps(sorted({name.partition('.')[0] for name in sys.modules})))\n"
COMMAND = """
from pumer_compile.cli.commands import main
try:
    main(sys.argv[1:])
except SystemExit as stop:
    code = stop.code
"""


def python(code: str, *arguments: str) -> str:
    """What a fresh interpreter prints."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def loaded(code: str, *arguments: str) -> tuple[int, list[str]]:
    """The exit code of a command in a fresh interpreter, and which heavy packages it loaded."""
    out = python(f"import sys\ncode = 0\n{code}{REPORT}print(code)", *arguments)
    *_, modules, exit_code = out.splitlines()
    return int(exit_code), [name for name in json.loads(modules) if name in HEAVY]


@pytest.mark.parametrize(
    ("arguments", "code"),
    [
        (("--help",), 0),
        (("--version",), 0),
        (("compile", "--help"), 0),
        (("plan", "--help"), 0),
        (("parity", "--help"), 0),
        (("bench", "--help"), 0),
        (("report", "--help"), 0),
        (("triton", "--help"), 0),
        (("pariti", "model.onnx"), BAD_USAGE),
        (("model", "--schedule", "vilt-vqaa", "-o", "m.onnx"), BAD_USAGE),
        (("plan", "model", "--schedule", "typo.yaml"), BAD_USAGE),
        (("compile", "model", "--schedule", "typo.yaml", "-o", "m.onnx"), BAD_USAGE),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else None,
)
def test_commands_that_load_nothing_heavy(
    arguments: tuple[str, ...], code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "typo.yaml").write_text("layers: [2]\nprun: 0.1\n", encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert loaded(COMMAND, *arguments) == (code, [])


def test_what_is_heavy_is_named_as_it_is_imported() -> None:
    """Another name in the list above would never be found."""
    there = [name for name in HEAVY if importlib.util.find_spec(name)]
    assert set(HEAVY) - set(there) <= {"onnxruntime", "openvino"}  # which need not be installed


def test_the_package_as_a_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pumer_compile", "--version"], capture_output=True, text=True, timeout=120
    )
    assert (done.returncode, done.stdout.strip()) == (0, f"pumer-compile {pumer_compile.__version__}")


def test_what_the_package_installs_is_there() -> None:
    """The command and the backend are found by these names alone; a file that moves takes them along."""
    text = (Path(__file__).parent.parent / "pyproject.toml").read_text(encoding="utf-8")
    project = tomllib.loads(text)["project"]
    doors = {**project["scripts"], **project["entry-points"]["torch_dynamo_backends"]}
    assert set(doors) == {"pumer-compile", "pumer"}
    assert all(callable(pkgutil.resolve_name(place)) for place in doors.values())


# --- names of the package ---------------------------------------------------------------------------------------------


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded("import pumer_compile\npumer_compile.Schedule\n") == (0, [])


def test_an_artifact_runs_without_what_compiles() -> None:
    there = loaded("import pumer_compile\npumer_compile.Engine\nimport pumer_compile.runtimes.ort\n")[1]
    assert "torch" in there and not {"transformers", "onnxscript"} & set(there)


def test_every_public_name_is_there() -> None:
    assert set(pumer_compile.__all__) <= set(dir(pumer_compile))
    for name in pumer_compile.__all__:
        value = getattr(pumer_compile, name)
        assert callable(value) and value.__module__.startswith("pumer_compile.")


def test_a_name_that_there_is_not() -> None:
    with pytest.raises(AttributeError, match="module 'pumer_compile' has no attribute 'captuer'"):
        pumer_compile.captuer  # noqa: B018


def test_a_function_is_not_its_module() -> None:
    """Three functions have the names of the modules that they come from, which importing a module must not take. Two
    submodules have always been there without an import of their own."""
    functions = ("capture", "parity", "reduce")
    first = "import pumer_compile.parity.artifact\nfrom pumer_compile.capture.capture import Program\n"
    calls = "".join(f"assert pumer_compile.{name}.__name__ == '{name}'\n" for name in functions)
    imports = f"from pumer_compile import {', '.join(functions)}\nassert callable(capture) and callable(reduce)\n"
    submodules = "pumer_compile.errors.UsageError\npumer_compile.exporters.EngineOptions\n"
    python(f"{first}{calls}{imports}{calls}{submodules}")
