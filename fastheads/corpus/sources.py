"""Sources of documents: text files, JSON lines, CSV, tables and texts in memory.

A *stream* (a text file, the default text) is one text, cut to contiguous blocks of `seq_len` tokens; only the
last block can be shorter. *Documents* (JSON lines, texts in a list) are sequences of their own, cut at `seq_len`.
Both are tokenized with the tokenizer's defaults: where it begins a text with a BOS token, a stream has one at its
start, and every document has its own.
"""

import hashlib
import io
import json
import os
import platform
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from fastheads.corpus import hf_datasets as tables
from fastheads.corpus import readers
from fastheads.corpus.readers import Chat, Item, Reader
from fastheads.errors import DataError, OptionError

JSON_LINES_SUFFIXES = (".jsonl", ".ndjson", ".json")
CELLS = {".csv": ",", ".tsv": "\t"}
PARQUET = ".parquet"
Cut = Literal["documents", "stream"]

# Reading a larger file once more for its hash would take long.
HASHED_BYTES = 2**30


class Source(ABC):
    """Documents that can be read as often as wanted, and from any position that a reader gave."""

    name: str  # a path, or what else says where the documents come from
    kind: Cut  # how it is cut where nothing is said
    sha256: str | None  # of the file's bytes, or of the texts as UTF-8; None where that would take long
    size: int | None  # in bytes, where it is known
    version: tuple[tuple[str, Any], ...] = ()  # what else tells other contents, where there is no hash
    once = False  # True: a later process cannot read it again

    @abstractmethod
    def read(self, cut: Cut | None = None, position: Mapping[str, Any] | None = None) -> Reader:
        """The documents; for the cut `stream` of a text, its pieces."""

    def items(self, cut: Cut | None = None) -> Iterator[Item]:
        """All that `read` gives."""
        reader = self.read(cut)
        try:
            while (item := next(reader, None)) is not None:  # type: ignore[call-overload]
                yield item
        finally:
            reader.close()


@dataclass(frozen=True)
class TextSource(Source):
    """A text file, JSON lines, CSV, or texts in memory."""

    name: str
    kind: Cut
    sha256: str | None
    size: int
    path: Path | None = None
    field: str | None = None  # of JSON lines and CSV; None: `readers.choose_field`
    chat: Chat = "auto"
    held: tuple[Item, ...] = ()  # the documents, where there is no file
    version: tuple[tuple[str, Any], ...] = ()

    def read(self, cut: Cut | None = None, position: Mapping[str, Any] | None = None) -> Reader:
        if self.path is None and self.kind == "documents":
            return readers.Held(self.held, position)
        raw = io.BytesIO(str(self.held[0]).encode()) if self.path is None else readers.open_bytes(self.path)
        try:
            return self._reader(raw, cut, position)
        except BaseException:
            raw.close()
            raise

    def _reader(self, raw: Any, cut: Cut | None, position: Mapping[str, Any] | None) -> Reader:
        if self.kind == "stream":
            return (readers.Lines if cut == "documents" else readers.Pieces)(raw, self.name, position)
        assert self.path is not None
        delimiter = CELLS.get(readers.plain_suffix(self.path))
        if delimiter is not None:
            return readers.Cells(raw, self.name, position, self.field, delimiter)
        return readers.JsonLines(raw, self.name, position, self.field, self.chat)


@dataclass(frozen=True)
class TableSource(Source):
    """What Hugging Face `datasets` reads."""

    name: str
    sha256: str | None
    size: int | None
    table: tables.Table
    kind: Cut = "documents"
    version: tuple[tuple[str, Any], ...] = ()

    def read(self, cut: Cut | None = None, position: Mapping[str, Any] | None = None) -> Reader:
        return self.table.read(position)


def names_a_data_set(name: str) -> bool:
    """Whether this is the name of a data set of the Hub: there is no such file, and it does not look like a file's name."""
    return (
        re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?", name) is not None
        and not exists(name)
        and not names_a_file(Path(name))
    )


def check_is_read(what: str, field: str | None, chat: Chat) -> None:
    """Raise OptionError for options that would be passed over, for data without fields."""
    for option, given in (("field", field is not None), ("chat", chat is True)):
        if given:
            raise OptionError(f"{option} is for JSON lines, tables and data sets: {what} has no fields")


def exists(name: str) -> bool:
    """True if there is a file or folder of that name."""
    try:
        return Path(name).exists()
    except (OSError, ValueError):  # too long for a name, or with a zero byte
        return False


def names_a_file(path: Path) -> bool:
    """True if the name ends as those of data files do."""
    return readers.plain_suffix(path) in (".txt", PARQUET, *JSON_LINES_SUFFIXES, *CELLS)


def text_file(path: str | os.PathLike[str], field: str | None = None, chat: Chat = "auto") -> Source:
    """A file as the source that its name's end says (`open_source`): a text is a stream, all else documents.

    Raises:
        DataError: if there is no such file, it cannot be read, is empty or starts with no text.
        MissingExtraError: if reading it needs `datasets` and that is not installed.
        OptionError: if it has no fields, or no chats, and one is asked for.
    """
    path = Path(path)
    if path.is_dir():
        raise DataError(f"the data file {path} is a folder: name a file in it")
    if path.exists() and not path.is_file():  # a pipe cannot be read twice, as it is here
        raise DataError(f"the data file {path} is not a regular file (- reads standard input)")
    try:
        with path.open("rb") as file:
            about = os.fstat(file.fileno())
            size = about.st_size
            sha256 = hashlib.file_digest(file, "sha256").hexdigest() if size <= HASHED_BYTES else None
    except OSError as error:
        raise DataError(f"cannot read the data file {path}: {error.strerror}") from error
    if not size:
        raise DataError(f"the data file {path} is empty")
    version = () if sha256 is not None else (("modified_ns", about.st_mtime_ns),)
    source: Source
    suffix = readers.plain_suffix(path)
    if path.suffix.lower() == PARQUET:
        source = TableSource(
            str(path), sha256, size, tables.parquet_table(path, field, chat), version=version
        )
    elif suffix in JSON_LINES_SUFFIXES or suffix in CELLS:
        if suffix in CELLS and chat is True:
            raise OptionError(f"chat is for JSON lines, Parquet and data sets: the cells of {path} are texts")
        if suffix in JSON_LINES_SUFFIXES:
            field = field or _first_field(path, chat)
        source = TextSource(
            str(path), "documents", sha256, size, path=path, field=field, chat=chat, version=version
        )
    else:
        check_is_read(f"the text {path}", field, chat)
        source = TextSource(str(path), "stream", sha256, size, path=path, version=version)
    next(source.items(), None)  # most faults show at once, before a model is loaded
    return source


def _first_field(path: Path, chat: Chat) -> str | None:
    """Which field of the first of JSON lines holds the documents; None where there is no line."""
    lines = readers.JsonLines(readers.open_bytes(path), str(path), None, None, chat)
    try:
        return readers.choose_field(list(lines.record()), None, chat, lines.where)
    except StopIteration:
        return None
    finally:
        lines.close()


def held_texts(texts: Iterable[str]) -> TextSource:
    """Texts in memory, each a document. The hash is that of all of them, each followed by a zero byte.

    Raises:
        DataError: if one of them is no text.
    """
    held = tuple(texts)
    for number, text in enumerate(held):
        if not isinstance(text, str) or not readers.is_unicode(text):
            raise DataError(f"text {number} of the data is not a text: {str(text)[:40]!a}")
    return held_items(held)


def held_items(items: Iterable[Item]) -> TextSource:
    """Texts and chats in memory, as `held_texts`; of a chat, the hash is that of its JSON. They are taken as they are."""
    held = tuple(items)
    digest, size = hashlib.sha256(), 0
    for item in held:
        content = item.encode() if isinstance(item, str) else json.dumps(item).encode()
        digest.update(content + b"\0")
        size += len(content)
    return TextSource("texts", "documents", digest.hexdigest(), size, held=held)


def default_text() -> TextSource:
    """The English text that every CPython carries: the topics of `pydoc_data`, sorted, blank lines between.

    About 465,000 characters. It differs between Python versions: its name and its hash say which one it was.
    """
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    name = f"pydoc_data.topics of Python {platform.python_version()}"
    content = text.encode()
    return TextSource(name, "stream", hashlib.sha256(content).hexdigest(), len(content), held=(text,))


def check_lengths(seq_len: int, max_tokens: int | None) -> None:
    """Raise OptionError if `seq_len` or `max_tokens` is below 1."""
    if seq_len < 1:
        raise OptionError(f"seq_len must be at least 1 token, not {seq_len}")
    if max_tokens is not None and max_tokens < 1:
        raise OptionError(f"max_tokens must be at least 1, not {max_tokens}: nothing would be measured")
