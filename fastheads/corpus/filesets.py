"""Open several files as one source (lists of paths, glob patterns, folders), and standard input."""

import glob
import hashlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastheads.corpus import readers
from fastheads.corpus.readers import Chat, Document, Reader
from fastheads.corpus.sources import Cut, Source, TextSource, has_data_suffix, text_file
from fastheads.errors import DataError

STDIN = "standard input"
COPY_BYTES = 2**20  # size of the copy buffer


@dataclass(frozen=True)
class FilesSource(Source):
    """The documents of several files, one file after another."""

    name: str
    kind: Cut
    sha256: str | None  # of the files' hashes; None if one of them is unknown
    size: int | None
    parts: tuple[Source, ...]
    version: tuple[tuple[str, Any], ...] = ()

    @property
    def mixed(self) -> bool:
        """True if some parts are streams of text and some are documents."""
        return len({part.kind for part in self.parts}) > 1

    def read(self, cut: Cut | None = None, position: Mapping[str, Any] | None = None) -> Reader:
        return FilesReader(self.parts, cut, position)

    def bytes_before(self, position: Mapping[str, Any]) -> int | None:
        """Count the bytes before a position; None if unknown, as in compressed files."""
        sizes = [part.size for part in self.parts]
        plain = all(
            getattr(part, "path", None) is not None and part.path.suffix.lower() not in readers.OPENERS  # type: ignore[attr-defined]
            for part in self.parts
        )
        if not plain or None in sizes or "byte" not in position:
            return None
        return sum(size or 0 for size in sizes[: position["file"]]) + int(position["byte"])


class FilesReader:
    """Read one file after another. `begins` is True if the last document returned was the first of its file."""

    def __init__(
        self, parts: tuple[Source, ...], cut: Cut | None, position: Mapping[str, Any] | None
    ) -> None:
        self._parts, self._cut = parts, cut
        self.begins = False
        rest = dict(position or {})
        self._file = int(rest.pop("file", 0))
        if not 0 <= self._file < len(parts):
            raise DataError("the position to resume from is not one in these files")
        self._fresh = not rest
        self._reader = parts[self._file].read(cut, rest or None)

    def __next__(self) -> Document:
        while (item := next(self._reader, None)) is None:  # type: ignore[call-overload]
            if self._file + 1 == len(self._parts):
                raise StopIteration
            self._reader.close()
            self._file += 1
            self._fresh = True
            self._reader = self._parts[self._file].read(self._cut)
        self.begins, self._fresh = self._fresh, False
        return item  # type: ignore[no-any-return]

    def position(self) -> dict[str, Any]:
        return {"file": self._file, **self._reader.position()}

    def close(self) -> None:
        self._reader.close()


def files_source(
    names: Iterable[str | os.PathLike[str]], field: str | None = None, chat: Chat = "auto"
) -> Source:
    """Open the files in `names`, in order: paths, glob patterns ("data/*.jsonl") and folders.

    Files that match a pattern, or lie in a folder at any depth, are sorted by name. For a single file, return `text_file` of it.

    Raises:
        DataError: there is no such file, one occurs twice, a folder holds files of unlike kinds, or one cannot be read.
        MissingExtraError, OptionError: as `text_file`.
    """
    paths = [path for name in names for path in _expand(name)]
    seen: set[str] = set()
    for path in paths:
        resolved = os.path.realpath(path)
        if resolved in seen:
            raise DataError(f"the data file {path} is given twice: its documents would count twice")
        seen.add(resolved)
    parts = tuple(text_file(path, field, chat) for path in paths)
    if len(parts) == 1:
        return parts[0]
    hashes, sizes = [part.sha256 for part in parts], [part.size for part in parts]
    known = [digest for digest in hashes if digest is not None]
    whole = hashlib.sha256("".join(known).encode()).hexdigest() if len(known) == len(parts) else None
    version: tuple[tuple[str, Any], ...] = (("files_sha256", hashes),)
    for key in dict.fromkeys(key for part in parts for key, _ in part.version):
        version += ((key, [dict(part.version).get(key) for part in parts]),)
    return FilesSource(
        name=_name(parts),
        kind=parts[0].kind if len({part.kind for part in parts}) == 1 else "documents",
        sha256=whole,
        size=None if None in sizes else sum(size or 0 for size in sizes),
        parts=parts,
        version=version,
    )


def is_pattern(name: str) -> bool:
    """True if `name` is a glob pattern."""
    return glob.has_magic(name) and "\n" not in name and "\0" not in name


def _expand(name: str | os.PathLike[str]) -> list[Path]:
    text = os.fspath(name)
    if not text:
        raise DataError("the name of a data file is empty")
    path = Path(text)
    if path.is_dir():
        return _folder_files(path)
    if not path.exists() and is_pattern(text):
        found = sorted(Path(match) for match in glob.glob(text, recursive=True) if os.path.isfile(match))
        if not found:
            raise DataError(f"no data file matches {text!r}")
        return found
    return [path]


def _folder_files(folder: Path) -> list[Path]:
    """List the files of a folder, without hidden ones; raise DataError unless all are data files, or all of one suffix."""
    inside = sorted(folder.rglob("*"))
    files = [
        path
        for path in inside
        if path.is_file() and not any(part.startswith(".") for part in path.relative_to(folder).parts)
    ]
    if not files:
        raise DataError(f"the data folder {folder} holds no files")
    strange = [path for path in files if not has_data_suffix(path)]
    if strange and len({readers.plain_suffix(path) for path in files}) > 1:
        raise DataError(
            f"the data folder {folder} holds {strange[0].relative_to(folder)} beside other kinds of files: name the data "
            f"files, as in '{folder}/*.jsonl'"
        )
    return files


def _name(parts: tuple[Source, ...]) -> str:
    if len(parts) <= 3:
        return " + ".join(part.name for part in parts)
    return f"{parts[0].name} and {len(parts) - 1} other files"


class StdinSource(TextSource):
    """A copy of standard input, in a temporary file that is deleted with this object."""

    once = True


def stdin_source(field: str | None = None, chat: Chat = "auto") -> Source:
    """Copy standard input to a temporary file, since it is read more than once, and open that.

    It is read as JSON lines if its first line is a JSON object, or `field` or `chat` is given; else as plain text.

    Raises:
        DataError: it is empty, or cannot be read.
        OptionError: as `text_file`.
    """
    # Deleted when the object is collected, or the process ends.
    file = tempfile.NamedTemporaryFile(prefix="fastheads-stdin-")  # noqa: SIM115
    try:
        shutil.copyfileobj(sys.stdin.buffer, file, COPY_BYTES)
        file.flush()
    except OSError as error:
        raise DataError(f"cannot read {STDIN}: {error.strerror}") from error
    path = Path(file.name)
    if not path.stat().st_size:
        raise DataError(f"{STDIN} is empty")
    records = field is not None or chat is True or _begins_with_object(path)
    kind: Cut = "documents" if records else "stream"
    source = StdinSource(STDIN, kind, _digest(path), path.stat().st_size, path=path, field=field, chat=chat)
    object.__setattr__(source, "_file", file)
    next(source.items(), None)  # most faults show at once, before a model is loaded
    return source


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _begins_with_object(path: Path) -> bool:
    """True if the first line that is not blank is a JSON object."""
    with path.open("rb") as file:
        line = next((line for line in iter(lambda: file.readline(COPY_BYTES), b"") if line.strip()), b"")
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False
