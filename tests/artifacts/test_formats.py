"""One record a format: what its suffix means everywhere."""

from __future__ import annotations

from pathlib import Path

import pytest

from pumer_compile.artifacts.formats import FORMATS, Format, check_options, find_format, format_of, suffixes, takers
from pumer_compile.artifacts.runtime import Runtime
from pumer_compile.artifacts.session import open_session
from pumer_compile.errors import UsageError
from pumer_compile.exporters.base import Options, Writer

EACH = pytest.mark.parametrize("known", FORMATS, ids=lambda known: known.suffixes[0])


@EACH
def test_a_record_is_of_a_writer_and_a_runtime(known: Format) -> None:
    writer, runtime = known.load_writer(), known.load_runtime()
    assert issubclass(writer, Writer) and issubclass(writer.options_class, Options)
    assert issubclass(runtime, Runtime) and not runtime.__abstractmethods__


def test_every_suffix_is_of_one_format() -> None:
    every = suffixes(FORMATS)
    assert every == [".onnx", ".engine", ".plan", ".xml"]
    assert [find_format(Path(f"model{suffix}")) for suffix in every] == [f for f in FORMATS for _ in f.suffixes]
    assert find_format(Path("model.pte")) is None
    with pytest.raises(UsageError, match=r"Nothing here runs '\.pte' .*; \.onnx, \.engine, \.plan, \.xml\."):
        format_of(Path("model.pte"))


def test_every_option_of_a_session_is_of_some_format() -> None:
    asked = set(open_session.__kwdefaults__)
    assert {option for known in FORMATS for option in known.options} == asked
    for option in asked:
        assert takers(option)


@EACH
def test_options_of_other_formats_are_refused(known: Format) -> None:
    path = Path(f"model{known.suffixes[-1]}")
    given = {"provider": "cpu", "device": "cpu", "cuda_graph": True, "expose": ("inner",)}
    for option, value in given.items():
        if option in known.options:
            assert check_options(path, **{option: value}) == {option: value}
            continue
        with pytest.raises(UsageError, match=f"^{option} is for .*, and {path} is none"):
            check_options(path, **{option: value})
    assert check_options(path, provider=None, device=None, cuda_graph=False, expose=()) == {}
