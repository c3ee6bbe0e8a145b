"""Lock files that a run will write, so that of two runs on one output the second is refused instead of losing one's results.

The lock is on an empty file beside the output, and ends with the process, however that ends: what a killed one leaves is taken
over by the next. Systems without `flock` (Windows, some network file systems) have no locks.
"""

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from fastheads.errors import FileInUseError
from fastheads.results.files import hidden_name, make_folders, target_of

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

_held = (
    threading.local()
)  # paths that this thread holds: who calls a function that locks may hold the lock already


@contextmanager
def locked(path: str | os.PathLike[str], *, required: bool = True) -> Iterator[None]:
    """Hold the lock of `path` within the context. The file itself need not exist; its folder is made, and removed if left empty.

    Raises:
        FileInUseError: another run, or another thread, holds it.
        OSError: the lock cannot be written; with `required=False` there is none then.
    """
    target = Path(os.path.realpath(target_of(path)))
    mine: set[Path] = _held.__dict__.setdefault("paths", set())
    if fcntl is None or target in mine:
        yield
        return
    made: list[Path] = []
    lock = target.with_name(hidden_name(target, "lock"))
    try:
        made = make_folders(target.parent)
        descriptor = _acquire(lock, path)
    except FileInUseError:
        raise
    except OSError:
        if required:
            raise
        yield
        return
    mine.add(target)
    try:
        yield
    finally:
        mine.discard(target)
        if descriptor is not None:
            with suppress(OSError):  # while it is held: nobody can have taken it over
                os.unlink(lock)
            os.close(descriptor)
        with suppress(OSError):  # not empty: as it should be
            for folder in made:
                folder.rmdir()


def _acquire(lock: Path, path: str | os.PathLike[str]) -> int | None:
    """Return the descriptor of the lock's file; None if the file system has no locks."""
    while True:
        descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o666)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(descriptor)
            raise FileInUseError(
                f"another run is writing {os.fspath(path)}: wait for its end, or choose another name"
            ) from None
        except OSError:
            os.close(descriptor)
            with suppress(OSError):
                os.unlink(lock)
            return None
        with suppress(FileNotFoundError):
            # Who held it before may have removed the file between the two calls above: then this lock is of no name.
            if os.path.samestat(os.fstat(descriptor), os.stat(lock)):
                return descriptor
        os.close(descriptor)
