"""Sources of documents: text files, JSON lines, CSV, tables and texts in memory.

A *stream* (a text file, the default text) is one text, cut into contiguous blocks of `seq_len` tokens; only the last block
can be shorter. *Documents* (JSON lines, texts in a list) are tokenized one by one, and split where they exceed `seq_len`.
Special tokens are the tokenizer's defaults: if it adds a BOS token, a stream has one at its start and every document its own.
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

from fastheads.corpus import hf_datasets, readers
from fastheads.corpus.readers import Chat, Document, Reader
from fastheads.errors import DataError, OptionError
from fastheads.stats.options import check_whole

JSON_LINES_SUFFIXES = (".jsonl", ".ndjson", ".json")
DELIMITERS = {".csv": ",", ".tsv": "\t"}
PARQUET = ".parquet"
Cut = Literal["documents", "stream"]

# Larger files are not hashed: reading them an extra time would take long.
HASHED_BYTES = 2**30


class Source(ABC):
    """Documents that can be read repeatedly, and from any position that a reader returned."""

    name: str  # a path, or another description of where the documents come from
    kind: Cut  # the default cut
    sha256: str | None  # of the file's bytes, or of the texts as UTF-8; None for files above HASHED_BYTES
    size: int | None  # in bytes; None if unknown
    version: tuple[tuple[str, Any], ...] = ()  # identifies the contents further, e.g. where there is no hash
    once = False  # True: a later process cannot read it again

    @abstractmethod
    def read(self, cut: Cut | None = None, position: Mapping[str, Any] | None = None) -> Reader:
        """Return a reader of the documents from `position` on; of the chunks of a text that is cut as a stream."""

    def items(self, cut: Cut | None = None) -> Iterator[Document]:
        """Yield all documents, or chunks, from the start."""
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
    field: str | None = None  # for JSON lines and CSV; None: `readers.choose_field`
    chat: Chat = "auto"
    held: tuple[Document, ...] = ()  # the documents, if there is no file
    version: tuple[tuple[str, Any], ...] = ()

    def read(self, cut: Cut | None = None, position: Mapping[str, Any] | None = None) -> Reader:
        if self.path is None and self.kind == "documents":
            return readers.InMemoryReader(self.held, position)
        raw = io.BytesIO(str(self.held[0]).encode()) if self.path is None else readers.open_bytes(self.path)
        try:
            return self._reader(raw, cut, position)
        except BaseException:
            raw.close()
            raise

    def _reader(self, raw: Any, cut: Cut | None, position: Mapping[str, Any] | None) -> Reader:
        if self.kind == "stream":
            return (readers.LineReader if cut == "documents" else readers.TextChunks)(
                raw, self.name, position
            )
        assert self.path is not None
        delimiter = DELIMITERS.get(readers.plain_suffix(self.path))
        if delimiter is not None:
            return readers.CsvReader(raw, self.name, position, self.field, delimiter)
        return readers.JsonLinesReader(raw, self.name, position, self.field, self.chat)


@dataclass(frozen=True)
class TableSource(Source):
    """Documents that Hugging Face `datasets` reads."""

    name: str
    sha256: str | None
    size: int | None
    table: hf_datasets.Table
    kind: Cut = "documents"
    version: tuple[tuple[str, Any], ...] = ()

    def read(self, cut: Cut | None = None, position: Mapping[str, Any] | None = None) -> Reader:
        return self.table.read(position)


def is_hub_name(name: str) -> bool:
    """True if `name` has the form `owner/name[:configuration]`, no such file exists, and the suffix is no data file's."""
    return (
        re.fullmatch(r"[\w-][\w.-]*/[\w-][\w.-]*(:[\w.-]+)?", name) is not None
        and not exists(name)
        and not has_data_suffix(Path(name))
    )


def refuse_field_options(what: str, field: str | None, chat: Chat) -> None:
    """Raise OptionError if `field` or `chat` is given; for data without fields, where they would have no effect."""
    for option, given in (("field", field is not None), ("chat", chat is True)):
        if given:
            raise OptionError(f"{option} is for JSON lines, tables and data sets: {what} has no fields")


def exists(name: str) -> bool:
    """True if there is a file or folder of this name."""
    try:
        return Path(name).exists()
    except (OSError, ValueError):  # too long for a name, or with a zero byte
        return False


def has_data_suffix(path: Path) -> bool:
    """True if the name has the suffix of a data file, compressed or not."""
    return readers.plain_suffix(path) in (".txt", PARQUET, *JSON_LINES_SUFFIXES, *DELIMITERS)


def text_file(path: str | os.PathLike[str], field: str | None = None, chat: Chat = "auto") -> Source:
    """Open a file in the format of its suffix (`open_source`): plain text is a stream, all else documents.

    Raises:
        DataError: there is no such file, it is empty, or its first document cannot be read.
        MissingExtraError: reading it needs `datasets`, which is not installed.
        OptionError: `field` or `chat` is given for a format without fields or chats.
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
        is_bare = isinstance(error, FileNotFoundError) and path.parent == Path() and not has_data_suffix(path)
        hint = f"; a data set of the Hub is named owner/name, as in owner/{path}" if is_bare else ""
        raise DataError(f"cannot read the data file {path}: {error.strerror}{hint}") from error
    if not size:
        raise DataError(f"the data file {path} is empty")
    version = () if sha256 is not None else (("modified_ns", about.st_mtime_ns),)
    source: Source
    suffix = readers.plain_suffix(path)
    if path.suffix.lower() == PARQUET:
        source = TableSource(
            str(path), sha256, size, hf_datasets.parquet_table(path, field, chat), version=version
        )
    elif suffix in JSON_LINES_SUFFIXES or suffix in DELIMITERS:
        if suffix in DELIMITERS and chat is True:
            raise OptionError(f"chat is for JSON lines, Parquet and data sets: the cells of {path} are texts")
        if suffix in JSON_LINES_SUFFIXES:
            field = field or _first_field(path, chat)
        source = TextSource(
            str(path), "documents", sha256, size, path=path, field=field, chat=chat, version=version
        )
    else:
        refuse_field_options(f"the text {path}", field, chat)
        source = TextSource(str(path), "stream", sha256, size, path=path, version=version)
    next(source.items(), None)  # most faults show at once, before a model is loaded
    return source


def _first_field(path: Path, chat: Chat) -> str | None:
    """Choose the field that holds the documents from the first line of a JSON lines file; None if it has no lines."""
    lines = readers.JsonLinesReader(readers.open_bytes(path), str(path), None, None, chat)
    try:
        return readers.choose_field(list(lines.record()), None, chat, lines.where)
    except StopIteration:
        return None
    finally:
        lines.close()


def held_texts(texts: Iterable[str]) -> TextSource:
    """Return a source of texts in memory, one document each. Its hash covers all of them, each followed by a zero byte.

    Raises:
        DataError: an item is not a str, or not valid Unicode.
    """
    held = tuple(texts)
    for number, text in enumerate(held):
        if not isinstance(text, str) or not readers.is_unicode(text):
            raise DataError(f"text {number} of the data is not a text: {str(text)[:40]!a}")
    return in_memory_source(held)


def in_memory_source(items: Iterable[Document]) -> TextSource:
    """As `held_texts`, for texts and chats, which are not checked. A chat is hashed as JSON."""
    held = tuple(items)
    digest, size = hashlib.sha256(), 0
    for item in held:
        content = item.encode() if isinstance(item, str) else json.dumps(item).encode()
        digest.update(content + b"\0")
        size += len(content)
    return TextSource("texts", "documents", digest.hexdigest(), size, held=held)


def default_text() -> TextSource:
    """Return the English text that comes with CPython: the topics of `pydoc_data`, sorted, joined by blank lines.

    About 465,000 characters. It differs between Python versions; the source's name and hash tell which one it is.
    """
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    name = f"pydoc_data.topics of Python {platform.python_version()}"
    content = text.encode()
    return TextSource(name, "stream", hashlib.sha256(content).hexdigest(), len(content), held=(text,))


def check_lengths(seq_len: int, max_tokens: int | None) -> None:
    """Raise OptionError unless `seq_len` and `max_tokens` are whole numbers from 1 on."""
    check_whole("seq_len", seq_len)
    if max_tokens is not None:
        check_whole("max_tokens", max_tokens)
    if seq_len < 1:
        raise OptionError(f"seq_len must be at least 1 token, not {seq_len}")
    if max_tokens is not None and max_tokens < 1:
        raise OptionError(f"max_tokens must be at least 1, not {max_tokens}: nothing would be measured")
