"""Write files atomically, and read them once."""

import errno
import glob
import hashlib
import os
import stat
import tempfile
from contextlib import suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

LONGEST_NAME = 200  # bytes of a file's name in that of a file beside it: file systems allow 255 in all


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

    The file that a symbolic link names is replaced, not the link. Temporary files that killed processes left are removed.

    Raises:
        OSError: the folder cannot be created or written, or `path` is no regular file; it names `path`, which is unchanged.
    """
    target = target_of(path)
    made = make_folders(target.parent)
    try:
        # In the same folder, since a rename is atomic only within one file system.
        handle, temporary = _new_temporary(target)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
                os.chmod(temporary, _mode_of(target))
                os.replace(temporary, target)
        except BaseException:
            Path(temporary).unlink(missing_ok=True)
            raise
    except OSError as error:
        # The system names no file if the disk is full, and the temporary one if the folder is read-only.
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(path)) from error
    for folder in (target.parent, *(folder.parent for folder in made)):
        _sync_folder(folder)
    with suppress(OSError):
        remove_temporaries(target)


def target_of(path: str | os.PathLike[str]) -> Path:
    """Return the file that writing to `path` creates or replaces: that which symbolic links name.

    Raises:
        OSError: it is there and no regular file: a folder, a pipe, a device; or its name is too long.
    """
    path = Path(path)
    target = Path(os.path.realpath(path)) if path.is_symlink() else path
    try:
        mode = os.lstat(target).st_mode
    except (FileNotFoundError, NotADirectoryError):
        return target
    if stat.S_ISDIR(mode):
        raise IsADirectoryError(errno.EISDIR, "it is a folder; name a file in it", os.fspath(path))
    if stat.S_ISLNK(mode):
        raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), os.fspath(path))
    if not stat.S_ISREG(mode):
        raise OSError(errno.EINVAL, "it is a pipe or a device, not a regular file", os.fspath(path))
    return target


def hidden_name(path: Path, *suffixes: str) -> str:
    """Return the name of a hidden file that belongs to `path`, `.NAME.SUFFIX`; a long name is shortened, with its digest."""
    name = path.name
    if len(os.fsencode(name)) > LONGEST_NAME:
        digest = hashlib.sha256(os.fsencode(name)).hexdigest()[:16]
        name = os.fsencode(name)[:LONGEST_NAME].decode(errors="ignore") + digest
    return ".".join(("", name, *suffixes))


def remove_temporaries(path: str | os.PathLike[str]) -> None:
    """Delete the temporary files of `write_atomic(path, ...)` that processes left which were killed. Others are locked."""
    path = Path(path)
    for rest in path.parent.glob(f"{glob.escape(hidden_name(path))}.*.tmp"):
        with suppress(OSError):
            descriptor = os.open(rest, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0))
            try:
                if _lock(descriptor, wait=False):
                    rest.unlink(missing_ok=True)
            finally:
                os.close(descriptor)


def check_writable(path: str | os.PathLike[str]) -> None:
    """Raise OSError if `write_atomic(path, ...)` would; leaves nothing behind.

    It tries to write, since permission bits do not show read-only mounts, quotas or the superuser.
    """
    target = target_of(path)
    folder = target.parent
    if folder.exists() and not folder.is_dir():
        raise NotADirectoryError(f"cannot write to the folder {folder}: it is a file")
    made = _missing_folders(folder)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise type(error)(f"cannot write to the folder {folder}: {error.strerror or error}") from error
    finally:
        with suppress(OSError):  # another process uses the folder by now, or has removed it
            for each in made:
                each.rmdir()


def make_folders(folder: Path) -> list[Path]:
    """Make `folder` and its parents; return those that were made, innermost first."""
    made = _missing_folders(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return made


def _new_temporary(target: Path) -> tuple[int, str]:
    """Make a temporary file beside `target` and lock it, so that `remove_temporaries` of other processes leaves it alone."""
    while True:
        handle, temporary = tempfile.mkstemp(
            dir=target.parent, prefix=f"{hidden_name(target)}.", suffix=".tmp"
        )
        _lock(handle, wait=True)
        if os.fstat(handle).st_nlink:
            return handle, temporary
        os.close(handle)  # removed before it was locked


def _lock(descriptor: int, *, wait: bool) -> bool:
    """Lock an open file until it is closed; False if another process has locked it. True without `flock`."""
    if fcntl is None:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except BlockingIOError:
        return False
    except OSError:
        return wait  # a file system without locks: what others may be writing stays
    return True


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
