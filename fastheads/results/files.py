"""Write files atomically, and read them once."""

import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path


class UnreadableError(ValueError):
    """The file is not read; the caller adds its name."""


def read_once(path: str | os.PathLike[str], limit: int) -> bytes:
    """Return the content of a file, as a copy that later changes of the file do not affect.

    Raises:
        UnreadableError: it has more than `limit` bytes, or is no regular file.
        OSError: it cannot be read.
    """
    path = Path(path)
    mode = path.stat().st_mode  # before opening, since opening a pipe waits for a writer
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise UnreadableError("it is no regular file")
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        # It may grow meanwhile; and some files report a size of 0.
        content = b"" if size > limit else file.read(limit + 1 if size == 0 else size + 1)
    if max(size, len(content)) > limit:
        raise UnreadableError(f"it has more than {limit:,} bytes")
    return content


def write_atomic(path: str | os.PathLike[str], content: bytes) -> None:
    """Write `content` to `path` atomically, creating its folders: readers see the old file or the new one, never a part.

    Raises:
        OSError: the folder cannot be created or written; it names `path`, which is unchanged.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        # In the same folder, since a rename is atomic only within one file system.
        handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.chmod(temporary, _mode_of(path))
            os.replace(temporary, path)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        # The system names no file if the disk is full, and the temporary one if the folder is read-only.
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    _sync_folder(path.parent)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise OSError if `write_atomic(path, ...)` would; leaves nothing behind.

    It tries to write, since permission bits do not show read-only mounts, quotas or the superuser.
    """
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"{path} is a folder; name a file in it")
    if path.parent.exists() and not path.parent.is_dir():
        raise NotADirectoryError(f"cannot write to the folder {path.parent}: it is a file")
    made = _missing_folders(path.parent)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise type(error)(f"cannot write to the folder {path.parent}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # another process uses the folder by now, or has removed it
            for folder in made:
                folder.rmdir()


def _missing_folders(folder: Path) -> list[Path]:
    """List `folder` and its parents that do not exist, innermost first."""
    missing = []
    while not folder.exists() and folder != folder.parent:
        missing.append(folder)
        folder = folder.parent
    return missing


def _mode_of(path: Path) -> int:
    """Return the mode of `path`, or that of a new file, since mkstemp makes files private to the owner."""
    if path.exists():
        return path.stat().st_mode & 0o777
    umask = os.umask(0)
    os.umask(umask)
    return 0o666 & ~umask


def _sync_folder(folder: Path) -> None:
    """Make the rename survive a power cut, where folders can be opened (not on Windows)."""
    if os.name == "posix":
        with suppress(OSError):  # the file is written; some file systems do not support fsync of folders
            descriptor = os.open(folder, os.O_RDONLY)
            try:
                os.fsync(descriptor)
            finally:
                os.close(descriptor)
