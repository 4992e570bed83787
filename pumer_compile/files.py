"""Writing files so that a reader, or a kill, never meets half of one."""

from __future__ import annotations

import contextlib
import hashlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path

from .errors import UsageError


def sha256_file(path: str | Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def companion_of(path: Path, name: str) -> Path:
    """A file that belongs to another one: beside it, or beside what its path links to."""
    here = path.with_name(name)
    return here if here.is_file() else path.resolve().with_name(name)


def check_writable(path: str | Path) -> None:
    """Raise UsageError, before any long work, if a file cannot be written at `path`."""
    path = Path(path)
    if path.is_dir():
        raise UsageError(f"The output {path} is a directory. Give the name of a file.")
    parent = path.parent
    if not parent.exists():
        raise UsageError(f"The output {path} cannot be written: the directory {parent} does not exist. Create it.")
    if not parent.is_dir():
        raise UsageError(f"The output {path} cannot be written: {parent} is not a directory.")
    try:
        # The permission bits do not tell of read-only mounts or quotas; only writing does.
        with tempfile.NamedTemporaryFile(dir=parent, prefix=f".{path.name[:80]}.", suffix=".tmp"):
            pass
    except OSError as error:
        raise UsageError(
            f"The output {path} cannot be written: {error.strerror or error} in the directory {parent}. "
            "Choose another place, or change its permissions."
        ) from error


@contextlib.contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary path beside `path`: renamed onto it when the block ends, removed when the block raises.

    The name keeps the suffix of `path`, which some writers read. What is at `path` stays whole until the one
    rename.
    """
    final = Path(path)
    temporary = temporary_sibling(final)
    try:
        yield temporary
        publish([(temporary, final)])
    finally:
        temporary.unlink(missing_ok=True)


def temporary_sibling(path: Path) -> Path:
    """A new, empty file in the directory of `path`, so that a rename onto `path` stays within one file system."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.stem[:80]}.", suffix=f".tmp{path.suffix}")
    os.close(handle)
    # mkstemp makes files that only the owner reads; an artifact gets the permissions of any other new file.
    mask = os.umask(0)
    os.umask(mask)
    os.chmod(name, 0o666 & ~mask)
    return Path(name)


def publish(files: Iterable[tuple[Path, Path]], *, retire: Path | None = None) -> None:
    """Rename every `(temporary, final)` pair, in order, once all of them are on disk.

    For files that belong together the main file comes last, and the names of the others hold a hash of their
    content (`content_name`): until the last rename the old main file still finds its own companions, and
    after it the new one does, so a reader never meets a mixture.

    Where a reader finds companions by a fixed name, that cannot be: `retire` names the old main file, which is removed
    before the first rename. A kill right then leaves none, instead of an old one that reads new companions.
    """
    pairs = list(files)
    for temporary, _ in pairs:
        _sync(temporary)
    if retire is not None:
        retire.unlink(missing_ok=True)
    for temporary, final in pairs:
        os.replace(temporary, final)
    for parent in {final.parent for _, final in pairs}:
        _sync(parent)


def content_name(path: Path, digest: str) -> str:
    """The name of a companion of `path` with a hash in it: `model.onnx` -> `model.onnx.3fd1c2a90b7e.data`."""
    return f"{path.name}.{digest[:12]}.data"


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
