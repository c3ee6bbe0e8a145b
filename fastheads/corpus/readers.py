"""Read the documents of a file, or of a list in memory, in order, starting anywhere a reader stopped before.

A document is a text, or a chat: a list of messages `{"role": ..., "content": ...}`.
"""

import bz2
import csv
import gzip
import io
import json
import lzma
import re
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

from fastheads.errors import DataError, one_line

Document = str | list[dict[str, str]]
Chat = Literal["auto"] | bool

CHAT_FIELDS = ("messages", "conversations")
# ShareGPT's names of the roles.
ROLES = {"human": "user", "gpt": "assistant"}

OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.GzipFile, ".bz2": bz2.BZ2File, ".xz": lzma.LZMAFile}

# Bytes of a line of a file, and of a row of a table: a document is at most as long. A small compressed file may hold any length.
LONGEST_DOCUMENT = 2**26

# A stream is tokenized in chunks of one to two times as many bytes.
CHUNK_BYTES = 2**16


class Reader(Protocol):
    """An iterator over documents that knows its position."""

    def __next__(self) -> Document: ...

    def position(self) -> dict[str, Any]:
        """Return the current position as JSON values: a reader started there continues with this reader's next document."""

    def close(self) -> None: ...


class FileReader:
    """Base of the readers of files; `position`, if given, is one that such a reader returned."""

    def __init__(self, raw: Any, name: str, position: Mapping[str, Any] | None) -> None:
        self.file, self.name = io.BufferedReader(raw), name
        if position:
            self._try(self.file.seek, position["byte"])
        elif self._try(self.file.peek, 3)[:3] == b"\xef\xbb\xbf":  # skip the byte-order mark
            self.file.seek(3)

    def _try(self, read: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return read(*arguments)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise DataError(f"cannot read the data file {self.name}: {error}") from error

    def line_of_bytes(self) -> bytes:
        line: bytes = self._try(self.file.readline, LONGEST_DOCUMENT + 1)
        self._check_length(len(line))
        return line

    def _check_length(self, length: int) -> None:
        if length > LONGEST_DOCUMENT:
            raise DataError(
                f"{self.where}: a document of more than {LONGEST_DOCUMENT:,} bytes is not read: split it, or give the file as "
                "plain text (.txt)"
            )

    @property
    def where(self) -> str:
        """The file and the place in it that is being read, for a message."""
        return f"{self.name}, near byte {self.file.tell():,}"

    def position(self) -> dict[str, Any]:
        return {"byte": self.file.tell()}

    def close(self) -> None:
        self.file.close()

    def text(self, content: bytes) -> str:
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            place = self._place_of(self.position()["byte"] - len(content) + error.start)
            raise DataError(
                f"{self.name} is not UTF-8 text: {error.reason} 0x{content[error.start]:02x} in {place}; convert it, as with "
                "iconv -f ISO-8859-1 -t UTF-8"
            ) from error

    def _place_of(self, byte: int) -> str:
        """Return the line of a byte of the file; the byte, where the file cannot be read again."""
        lines = 1
        try:
            self.file.seek(0)
            while byte > 0 and (content := self.file.read(min(byte, 2**20))):
                lines, byte = lines + content.count(b"\n"), byte - len(content)
        except (OSError, ValueError):
            return f"byte {byte:,}"
        return f"line {lines:,}"


class TextChunks(FileReader):
    """The chunks of a text, of one to two times `CHUNK_BYTES` each.

    A chunk ends where tokenizers split anyway, so that the chunks have the tokens that the whole text would have: after a
    newline, preferably one with no blank line or indentation beside it; in very long lines, before a space.
    """

    BREAKS = tuple(map(re.compile, (rb"\S\n(?=\S)", rb"\n(?=\S)", rb"(?= )")))

    def __init__(self, raw: Any, name: str, position: Mapping[str, Any] | None) -> None:
        super().__init__(raw, name, position)
        self.ahead = b""  # read, not yet returned

    def position(self) -> dict[str, Any]:
        return {"byte": self.file.tell() - len(self.ahead)}

    def __next__(self) -> str:
        self.ahead += self._try(self.file.read, 2 * CHUNK_BYTES - len(self.ahead))
        end = len(self.ahead)
        if not end:
            raise StopIteration
        if end == 2 * CHUNK_BYTES:
            found = (pattern.search(self.ahead, CHUNK_BYTES) for pattern in self.BREAKS)
            end = next((match.end() for match in found if match), 0) or _whole_characters(self.ahead)
        chunk, self.ahead = self.ahead[:end], self.ahead[end:]
        return self.text(chunk)


def _whole_characters(chunk: bytes) -> int:
    """Return the byte at which the last UTF-8 character starts; the length if there is no such byte."""
    starts = (i for i in range(len(chunk) - 1, 0, -1) if chunk[i] & 0xC0 != 0x80)
    return next(starts, len(chunk))


class LineReader(FileReader):
    """The lines of a text, each a document, without the newline."""

    def __next__(self) -> str:
        line = self.line_of_bytes()
        if not line:
            raise StopIteration
        return self.text(line).rstrip("\r\n")


class JsonLinesReader(FileReader):
    """The documents of a JSON lines file, without blank lines. `field` None: `choose_field` from the first line."""

    def __init__(
        self,
        raw: Any,
        name: str,
        position: Mapping[str, Any] | None,
        field: str | None,
        chat: Chat,
    ) -> None:
        super().__init__(raw, name, position)
        self.line = position["line"] if position else 0
        self.field, self.chat = field, chat

    def position(self) -> dict[str, Any]:
        return super().position() | {"line": self.line}

    def record(self) -> Mapping[str, Any]:
        """Return the object on the next line that is not blank."""
        while content := self.line_of_bytes():
            self.line += 1
            if not (line := self.text(content)).strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = "it is nested too deeply"
                if isinstance(error, ValueError):
                    reason = error.msg if isinstance(error, json.JSONDecodeError) else one_line(error, 100)
                raise DataError(f"{self.where} is not JSON: {reason}") from error
            if not isinstance(record, dict):
                field = self.field or "text"
                raise DataError(
                    f"{self.where} is not a JSON object: one object a line is expected, its text in {field!r}"
                )
            return record
        raise StopIteration

    @property
    def where(self) -> str:
        return f"{self.name}, line {self.line}"

    def __next__(self) -> Document:
        record = self.record()
        if self.field is None:
            self.field = choose_field(list(record), None, self.chat, self.where)
        if self.field not in record:
            choose_field(list(record), self.field, self.chat, self.where)
        return as_document(record[self.field], self.field, self.chat, self.where)


class CsvReader(FileReader):
    """The cells of one column of a CSV file with a header, as unconverted text. `field` None: `choose_field`.

    Uses the csv module rather than pandas, which reads "NA" as missing and shifts the cells of lines that have too many.
    """

    def __init__(
        self, raw: Any, name: str, position: Mapping[str, Any] | None, field: str | None, delimiter: str
    ) -> None:
        super().__init__(raw, name, None)
        # Documents exceed the default of 128 KiB. The limit can be set only for the whole process.
        csv.field_size_limit(2**31 - 1)  # `LONGEST_DOCUMENT` of a row is less
        self.line = self._row_bytes = 0
        self.rows = csv.reader(self._lines(), delimiter=delimiter, strict=True)
        header = self._row()
        if header is None:
            raise DataError(f"no tokens in {name}: it has no rows")
        self.width, self.column = len(header), header.index(choose_field(header, field, False, name))
        self.field = header[self.column]
        if position:
            self._try(self.file.seek, position["byte"])
            self.line = position["line"]

    def position(self) -> dict[str, Any]:
        return super().position() | {"line": self.line}

    def __next__(self) -> str:
        row = self._row()
        if row is None:
            raise StopIteration
        if len(row) != self.width:
            raise DataError(
                f"{self.name}, line {self.line} has {len(row)} cells where the header has {self.width}"
            )
        return row[self.column]

    def _row(self) -> list[str] | None:
        """Return the next row that is not blank; None at the end."""
        try:
            for row in self.rows:
                self._row_bytes = 0
                if row:
                    return row
        except csv.Error as error:
            raise DataError(f"{self.name}, line {self.line} is not CSV: {error}") from error
        return None

    def _lines(self) -> Iterator[str]:
        while content := self.line_of_bytes():
            self.line += 1
            self._row_bytes += len(content)
            self._check_length(self._row_bytes)
            yield self.text(content)

    @property
    def where(self) -> str:
        return f"{self.name}, line {self.line}"


class InMemoryReader:
    """Documents in memory."""

    def __init__(self, items: Sequence[Document], position: Mapping[str, Any] | None) -> None:
        self.items, self.next = items, position["item"] if position else 0

    def __next__(self) -> Document:
        if self.next >= len(self.items):
            raise StopIteration
        self.next += 1
        return self.items[self.next - 1]

    def position(self) -> dict[str, Any]:
        return {"item": self.next}

    def close(self) -> None:
        pass


def plain_suffix(path: Path) -> str:
    """Return the suffix in lower case, ignoring that of a compression: ".csv" for "a.CSV.gz"."""
    return (path.with_suffix("") if path.suffix.lower() in OPENERS else path).suffix.lower()


def open_bytes(path: Path) -> Any:
    """Open a file for reading, decompressed; raise DataError if it cannot be opened."""
    try:
        return OPENERS.get(path.suffix.lower(), io.FileIO)(path)
    except OSError as error:
        raise DataError(f"cannot read the data file {path}: {error.strerror}") from error


def choose_field(fields: Sequence[str], field: str | None, chat: Chat, where: str) -> str:
    """Return the field that holds the documents: `field` if given, else the first of 'text' and `CHAT_FIELDS` in `fields`.

    Raises:
        DataError: there is no such field; the message lists `fields`.
    """
    usual = (*(() if chat is True else ("text",)), *(() if chat is False else CHAT_FIELDS))
    for wanted in usual if field is None else (field,):
        if wanted in fields:
            return wanted
    names = ", ".join(f"{str(name)[:40]!r}" for name in fields[:8]) or "none"
    missing = usual[0] if field is None else field
    raise DataError(
        f"{where} has no field {missing!r} (its fields: {names}; field=, or --field, chooses one)"
    )


def as_document(value: Any, field: str, chat: Chat, where: str) -> Document:
    """Return `value` as a document; raise DataError if it is none."""
    if isinstance(value, str) and chat is not True and is_unicode(value):
        return value
    if isinstance(value, list) and chat is not False:
        messages = [_message(message) for message in value]
        if messages and None not in messages:
            return messages  # type: ignore[return-value]
    kind = "a chat" if chat is True or (chat and field in CHAT_FIELDS) else "a text"
    raise DataError(f"{where}: field {field!r} is not {kind}")


def _message(message: Any) -> dict[str, str] | None:
    """Reduce a chat message to its role and content; None if it is no message."""
    if not isinstance(message, Mapping):
        return None
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    content = "" if content is None else content  # null where the assistant only calls a tool
    if not (isinstance(role, str) and isinstance(content, str) and is_unicode(role + content)):
        return None
    return {"role": ROLES.get(role, role), "content": content}


def characters(item: Document) -> int:
    """Count the characters of a document; of a chat, those of its messages' contents."""
    return len(item) if isinstance(item, str) else sum(len(message["content"]) for message in item)


def is_unicode(text: str) -> bool:
    """False if the text has a lone surrogate, which JSON can express and no tokenizer accepts."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
