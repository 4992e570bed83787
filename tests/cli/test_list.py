"""`pumer-compile list`."""

from __future__ import annotations

import pytest

from pumer_compile.methods import METHODS, PRESETS
from tests.support.commands import done, refused


def test_methods_are_told_with_their_use() -> None:
    said = " ".join(done("list", "methods").out.split())
    for name in METHODS:
        assert name in said


def test_presets_and_formats() -> None:
    said = done("list", "presets").out
    assert all(name in said for name in PRESETS)
    assert ".engine" in done("list", "formats").out


def test_no_such_list() -> None:
    assert "choose one of methods, models, formats, presets" in refused(2, "list", "metods")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_what_it_is_for(name: str) -> None:
    about = METHODS[name].about
    assert about.does and about.reads and about.use and about.held
    assert bool(about.code) <= bool(about.paper)
