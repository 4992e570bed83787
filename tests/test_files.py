import hashlib
import itertools
import multiprocessing
import os
import stat
import time

import pytest

from pumer_compile.errors import UsageError
from pumer_compile.files import atomic_path, check_writable, content_name, publish, sha256_file

pytestmark = pytest.mark.fast


def entries(folder):
    return sorted(path.name for path in folder.iterdir())


def test_the_new_content_replaces_the_old(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_text("old")
    with atomic_path(path) as temporary:
        assert temporary.parent == tmp_path and temporary.suffix == ".onnx"
        temporary.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and entries(tmp_path) == ["model.onnx"]


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, SystemExit])
@pytest.mark.parametrize("existing", [True, False])
def test_an_error_leaves_the_old_file_and_nothing_else(tmp_path, error, existing):
    path = tmp_path / "model.onnx"
    if existing:
        path.write_text("old")
    with pytest.raises(error), atomic_path(path) as temporary:
        temporary.write_text("half")
        raise error
    assert entries(tmp_path) == (["model.onnx"] if existing else [])
    assert not existing or path.read_text() == "old"


def test_permissions_are_those_of_any_new_file(tmp_path):
    plain = tmp_path / "plain"
    plain.write_text("")
    with atomic_path(tmp_path / "atomic") as temporary:
        temporary.write_text("")
    modes = [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("plain", "atomic")]
    assert modes[0] == modes[1]


def test_a_very_long_name_still_works(tmp_path):
    path = tmp_path / ("m" * 240 + ".onnx")
    check_writable(path)
    with atomic_path(path) as temporary:
        temporary.write_text("new")
    assert path.read_text() == "new"


def test_publish_renames_in_order_after_all_are_synced(tmp_path, monkeypatch):
    calls = []
    replace, fsync = os.replace, os.fsync
    monkeypatch.setattr(os, "replace", lambda a, b: (calls.append(os.path.basename(b)), replace(a, b))[1])
    monkeypatch.setattr(os, "fsync", lambda fd: (calls.append("sync"), fsync(fd))[1])
    pairs = []
    for name in ("data", "manifest.json", "model.onnx"):
        (tmp_path / f"{name}.tmp").write_text(name)
        pairs.append((tmp_path / f"{name}.tmp", tmp_path / name))
    publish(pairs)
    assert calls == ["sync", "sync", "sync", "data", "manifest.json", "model.onnx", "sync"]
    assert entries(tmp_path) == ["data", "manifest.json", "model.onnx"]


def test_a_kill_between_renames_leaves_the_old_graph_with_its_own_data(tmp_path, monkeypatch):
    old = tmp_path / content_name(tmp_path / "model.onnx", "a" * 64)
    old.write_text("old data")
    (tmp_path / "model.onnx").write_text(old.name)
    new = tmp_path / content_name(tmp_path / "model.onnx", "b" * 64)
    for name, text in (("new.data", "new data"), ("new.onnx", new.name)):
        (tmp_path / name).write_text(text)
    replace, done = os.replace, []

    def killed(source, target):
        if done:
            raise KeyboardInterrupt
        done.append(replace(source, target))

    monkeypatch.setattr(os, "replace", killed)
    with pytest.raises(KeyboardInterrupt):
        publish([(tmp_path / "new.data", new), (tmp_path / "new.onnx", tmp_path / "model.onnx")])
    assert (tmp_path / (tmp_path / "model.onnx").read_text()).read_text() == "old data"


def write_forever(path, ready):
    ready.set()
    for i in itertools.count():
        with atomic_path(path) as temporary, open(temporary, "w") as file:
            for _ in range(20):
                file.write(f"{i}\n" * 500)
                file.flush()


def test_a_kill_at_any_moment_leaves_a_complete_file(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_text("old\n")
    context = multiprocessing.get_context("fork")
    for delay in (0.0, 0.003, 0.01, 0.017, 0.031, 0.05):
        ready = context.Event()
        process = context.Process(target=write_forever, args=(path, ready))
        process.start()
        assert ready.wait(10)
        time.sleep(delay)
        process.kill()
        process.join()
        lines = path.read_text().splitlines()
        assert lines == ["old"] or (len(lines) == 10000 and len(set(lines)) == 1)
    assert path.read_text() != "old\n"


def test_sha256(tmp_path):
    (tmp_path / "file").write_bytes(b"abc" * 100000)
    assert sha256_file(tmp_path / "file") == hashlib.sha256(b"abc" * 100000).hexdigest()


def test_check_writable_writes_nothing(tmp_path):
    check_writable(tmp_path / "model.onnx")
    (tmp_path / "there").write_text("old")
    check_writable(tmp_path / "there")
    assert entries(tmp_path) == ["there"] and (tmp_path / "there").read_text() == "old"


def test_check_writable_accepts_a_bare_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    check_writable("model.onnx")


def test_what_cannot_be_written_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    for path, message in [
        (tmp_path, "is a directory"),
        (tmp_path / "no" / "model.onnx", "does not exist"),
        (tmp_path / "file" / "model.onnx", "is not a directory"),
        ("/proc/model.onnx", "cannot be written"),
    ]:
        with pytest.raises(UsageError, match=message) as error:
            check_writable(path)
        assert str(path) in str(error.value) and "\n" not in str(error.value)
