"""Atomic writes, what a kill or an error at any step of them leaves, and the locks of outputs."""

import errno
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from fastheads.errors import FileInUseError
from fastheads.results import files
from fastheads.results.files import check_writable, write_atomic
from fastheads.results.locks import locked


@pytest.mark.parametrize("make", [os.mkfifo, os.mkdir, lambda path: path.symlink_to("/dev/null")])
@pytest.mark.parametrize("write", [check_writable, lambda path: write_atomic(path, b"new")])
def test_a_pipe_a_folder_or_a_device_is_refused_and_stays(make, write, tmp_path):
    path = tmp_path / "p"
    make(path)
    before = os.lstat(path)
    with pytest.raises(OSError, match="regular file|is a folder"):
        write(path)
    assert os.path.samestat(os.lstat(path), before)
    assert os.listdir(tmp_path) == ["p"]


def test_the_file_that_a_link_names_is_replaced_and_not_the_link(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    target, link = tmp_path / "elsewhere" / "t", tmp_path / "link"
    link.symlink_to(target)
    for content in (b"one", b"two"):  # first of a link to no file
        check_writable(link)
        write_atomic(link, content)
        assert link.is_symlink()
        assert target.read_bytes() == content
    assert os.listdir(tmp_path / "elsewhere") == ["t"]
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    for write in (check_writable, lambda path: write_atomic(path, b"")):
        with pytest.raises(OSError) as caught:
            write(loop)
        assert caught.value.errno == errno.ELOOP


@pytest.mark.parametrize("length", [200, 201, 242, 243, 255])
def test_a_name_that_the_file_system_takes_can_be_written(length, tmp_path):
    path = tmp_path / ("é" * ((length - 1) // 2) + "x" * (1 + (length - 1) % 2))
    assert len(os.fsencode(path.name)) == length
    check_writable(path)
    with locked(path):
        write_atomic(path, b"content")
    assert path.read_bytes() == b"content"
    assert os.listdir(tmp_path) == [path.name]


def test_a_longer_name_is_refused_before_and_after(tmp_path):
    for write in (check_writable, lambda path: write_atomic(path, b"")):
        with pytest.raises(OSError) as caught:
            write(tmp_path / ("x" * 256))
        assert caught.value.errno == errno.ENAMETOOLONG
    assert os.listdir(tmp_path) == []


def test_folders_that_were_made_are_synced_with_the_file(tmp_path, monkeypatch):
    synced, sync = [], os.fsync

    def fsync(descriptor):
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        sync(descriptor)

    if not os.path.isdir("/proc/self/fd"):
        pytest.skip("no /proc")
    monkeypatch.setattr(os, "fsync", fsync)
    write_atomic(tmp_path / "a" / "b" / "c", b"content")
    # the entry of each new folder is in its parent
    assert synced[1:] == [tmp_path / "a" / "b", tmp_path / "a", tmp_path]
    synced.clear()
    write_atomic(tmp_path / "a" / "b" / "d", b"content")
    assert synced[1:] == [tmp_path / "a" / "b"]


STEPS = {"mkstemp": files.tempfile, "fsync": os, "chmod": os, "replace": os}


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "No space left on device"), KeyboardInterrupt()])
@pytest.mark.parametrize("step", [*STEPS, "write"])
def test_an_error_at_any_step_keeps_the_file_before_and_leaves_nothing(step, error, tmp_path, monkeypatch):
    path = tmp_path / "f"
    write_atomic(path, b"before")

    def fail(*_, **__):
        raise error

    if step == "write":
        fdopen = os.fdopen

        class Failing:
            def __init__(self, *arguments):
                self._file = fdopen(*arguments)

            def __enter__(self):
                return self

            def __exit__(self, *_):
                self._file.close()

            write = fail

        monkeypatch.setattr(os, "fdopen", Failing)
    else:
        monkeypatch.setattr(STEPS[step], step, fail)
    with pytest.raises(type(error)) as caught:
        write_atomic(path, b"after")
    if isinstance(error, OSError):
        assert (caught.value.errno, caught.value.filename) == (errno.ENOSPC, str(path))
    monkeypatch.undo()
    assert path.read_bytes() == b"before"
    assert os.listdir(tmp_path) == ["f"]


KILLED = """
import os, sys
from fastheads.results import files
from fastheads.results.locks import locked
step, path = sys.argv[1:]
def die(*_, **__):
    os._exit(9)
if step != "after":
    setattr(os, step, die)
with locked(path):
    files.write_atomic(path, b"after" * 1000)
    die()
"""


@pytest.mark.parametrize("step", ["fsync", "chmod", "replace", "after"])
def test_a_process_killed_at_any_step_leaves_the_old_file_or_the_new_and_the_next_save_sweeps_up(
    step, tmp_path
):
    path = tmp_path / "f"
    write_atomic(path, b"before")
    assert subprocess.run([sys.executable, "-c", KILLED, step, str(path)], check=False).returncode == 9
    assert path.read_bytes() == (b"after" * 1000 if step == "after" else b"before")
    assert len(os.listdir(tmp_path)) == (2 if step == "after" else 3)  # the lock, the temporary file
    with locked(path):  # that a killed process held
        write_atomic(path, b"again")
    assert path.read_bytes() == b"again"
    assert os.listdir(tmp_path) == ["f"]


def test_what_another_process_is_writing_is_not_swept_up(tmp_path, monkeypatch):
    path, replace = tmp_path / "f", os.replace

    def meanwhile(source, target):
        monkeypatch.setattr(os, "replace", replace)
        write_atomic(path, b"of the other")  # which sweeps up
        replace(source, target)

    monkeypatch.setattr(os, "replace", meanwhile)
    write_atomic(path, b"of the one")
    assert path.read_bytes() == b"of the one"
    assert os.listdir(tmp_path) == ["f"]


def test_an_output_is_locked_against_others_and_not_against_oneself(tmp_path):
    path, errors = tmp_path / "new" / "f", []
    link = tmp_path / "link"
    link.symlink_to(path)

    def other():
        for name in (path, link):
            try:
                with locked(name):
                    errors.append(None)
            except FileInUseError as error:
                errors.append(str(error))

    def run_other():
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()

    with locked(path):
        with locked(path), locked(link):
            pass
        run_other()
    assert [str(path) in errors[0], str(link) in errors[1]] == [True, True]
    assert os.listdir(tmp_path) == ["link"]  # nothing was written: the folder that was made for it is gone
    errors.clear()
    run_other()
    assert errors == [None, None]


def test_two_processes_that_want_a_lock_get_it_one_after_the_other(tmp_path):
    """Many times, since each removes the file that the other may be opening."""
    counter = tmp_path / "counter"
    counter.write_text("0")
    script = f"""
from pathlib import Path
from fastheads.results.locks import locked
from fastheads.errors import FileInUseError
counter, done = Path({str(counter)!r}), 0
while done < 300:
    try:
        with locked({str(tmp_path / "f")!r}):
            counter.write_text(str(int(counter.read_text()) + 1))
            done += 1
    except FileInUseError:
        pass
"""
    processes = [subprocess.Popen([sys.executable, "-c", script]) for _ in range(2)]
    assert [process.wait(60) for process in processes] == [0, 0]
    assert counter.read_text() == "600"
    assert os.listdir(tmp_path) == ["counter"]
