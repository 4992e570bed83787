"""Settings for every test."""

from __future__ import annotations

import os
import shutil
import tempfile
from typing import Any

import pytest
import torch
from hypothesis import settings

from tests.support import faster

# The same examples on every run, and no deadline: the machines that run this are shared.
settings.register_profile("fixed", derandomize=True, deadline=None, database=None, max_examples=50)
settings.load_profile("fixed")

torch.manual_seed(0)
faster.collect_garbage_seldom()
faster.share_provenance()
faster.name_frames_once()
faster.write_code_when_called()
faster.read_sources_once()
faster.convert_faster()
faster.trace_nothing()
# Small models: a second thread costs more than it gives.
torch.set_num_threads(1)
os.environ["OMP_NUM_THREADS"] = "1"  # of processes that tests start


def pytest_configure(config: pytest.Config) -> None:
    """A folder for what `tests.support.commands` makes once; processes that pytest-xdist starts inherit its name."""
    if not hasattr(config, "workerinput"):
        folder = tempfile.mkdtemp(prefix="pumer-compile-tests-")
        os.environ["PUMER_COMPILE_TESTS"] = folder
        config.add_cleanup(lambda: shutil.rmtree(folder, ignore_errors=True))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Files that share captures go to one process."""
    if config.getvalue("dist") != "loadfile":
        return None
    from tests.support.scheduling import ByCaptures

    return ByCaptures(config, log)


def pytest_collection_finish(session: pytest.Session) -> None:
    faster.keep_what_is_imported()
