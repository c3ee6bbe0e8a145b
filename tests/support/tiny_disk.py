"""A file system of a few kilobytes, in a mount namespace that ends with the process: nothing else ever sees it."""

import ctypes
import os
import sys
from pathlib import Path

CLONE_NEWNS, CLONE_NEWUSER = 0x20000, 0x10000000
MS_PRIVATE_AND_BELOW = 0x40000 | 0x4000


class NoMounts(Exception):
    """Users of this machine may not mount anything."""


def mount(folder: Path, size: int) -> None:
    """Put an empty tmpfs of `size` bytes over `folder`, for this process, which must have one thread, and its children.

    Raises:
        NoMounts: if that is not allowed here.
    """
    if not sys.platform.startswith("linux"):
        raise NoMounts(f"no mount namespaces on {sys.platform}")
    library = ctypes.CDLL(None, use_errno=True)

    def call(name: str, *arguments) -> None:
        if getattr(library, name)(*arguments):
            raise OSError(ctypes.get_errno(), f"{name}: {os.strerror(ctypes.get_errno())}")

    user, group = os.getuid(), os.getgid()
    try:
        # Its own root, who may mount; what is mounted stays in here.
        call("unshare", CLONE_NEWUSER | CLONE_NEWNS)
        Path("/proc/self/setgroups").write_text("deny")
        Path("/proc/self/uid_map").write_text(f"0 {user} 1")
        Path("/proc/self/gid_map").write_text(f"0 {group} 1")
        call("mount", b"none", b"/", None, ctypes.c_ulong(MS_PRIVATE_AND_BELOW), None)
        options = f"size={size}".encode()
        call("mount", b"tiny", os.fsencode(folder), b"tmpfs", ctypes.c_ulong(0), options)
    except OSError as error:
        raise NoMounts(f"mounts are not allowed here ({error})") from error


def fill(folder: Path) -> Path:
    """A file that takes all the room that is left there."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file:
        try:
            while True:
                file.write(bytes(1024))
        except OSError:
            return path
