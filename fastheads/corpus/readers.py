"""The documents of files and of what is in memory, one after another, from any position that was noted before.

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

from fastheads.errors import DataError

Item = str | list[dict[str, str]]
Chat = Literal["auto"] | bool

CHAT_FIELDS = ("messages", "conversations")
# As chats in ShareGPT's format call who speaks.
ROLES = {"human": "user", "gpt": "assistant"}

OPENERS: dict[str, Callable[..., Any]] = {".gz": gzip.GzipFile, ".bz2": bz2.BZ2File, ".xz": lzma.LZMAFile}

# A stream is tokenized in pieces of as many bytes or up to twice as many.
PIECE_BYTES = 2**16


class Reader(Protocol):
    """An iterator over documents that can say where it is."""

    def __next__(self) -> Item: ...

    def position(self) -> dict[str, Any]:
        """Where it is, as JSON: a reader that starts there gives what this one gives next."""

    def close(self) -> None: ...


class FileReader:
    """What the readers of bytes have in common; `position` is where another one stood."""

    def __init__(self, raw: Any, name: str, position: Mapping[str, Any] | None) -> None:
        self.file, self.name = io.BufferedReader(raw), name
        if position:
            self._try(self.file.seek, position["byte"])
        elif self._try(self.file.peek, 3)[:3] == b"\xef\xbb\xbf":  # a byte-order mark is no text
            self.file.seek(3)

    def _try(self, read: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return read(*arguments)
        except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
            raise DataError(f"cannot read the data file {self.name}: {error}") from error

    def line_of_bytes(self) -> bytes:
        line: bytes = self._try(self.file.readline)
        return line

    def position(self) -> dict[str, Any]:
        return {"byte": self.file.tell()}

    def close(self) -> None:
        self.file.close()

    def text(self, content: bytes) -> str:
        try:
            return content.decode()
        except UnicodeDecodeError as error:
            raise DataError(f"{self.name} is not UTF-8 text: {error.reason}") from error


class Pieces(FileReader):
    """A stream in pieces of one to two times `PIECE_BYTES`, that end where tokenizers split in any case.

    That is between two lines, best where neither blank lines nor indentation stand between them, so that the pieces
    have the tokens that the whole would have. In a line without end it is before a space.
    """

    SEAMS = tuple(map(re.compile, (rb"\S\n(?=\S)", rb"\n(?=\S)", rb"(?= )")))

    def __init__(self, raw: Any, name: str, position: Mapping[str, Any] | None) -> None:
        super().__init__(raw, name, position)
        self.ahead = b""  # read, and not yet given

    def position(self) -> dict[str, Any]:
        return {"byte": self.file.tell() - len(self.ahead)}

    def __next__(self) -> str:
        self.ahead += self._try(self.file.read, 2 * PIECE_BYTES - len(self.ahead))
        end = len(self.ahead)
        if not end:
            raise StopIteration
        if end == 2 * PIECE_BYTES:
            found = (seam.search(self.ahead, PIECE_BYTES) for seam in self.SEAMS)
            end = next((match.end() for match in found if match), 0) or _whole_characters(self.ahead)
        piece, self.ahead = self.ahead[:end], self.ahead[end:]
        return self.text(piece)


def _whole_characters(piece: bytes) -> int:
    """Where the last character of a UTF-8 text starts; all of it where that is no UTF-8."""
    starts = (i for i in range(len(piece) - 1, 0, -1) if piece[i] & 0xC0 != 0x80)
    return next(starts, len(piece))


class Lines(FileReader):
    """The lines of a text, each a document, without their ends."""

    def __next__(self) -> str:
        line = self.line_of_bytes()
        if not line:
            raise StopIteration
        return self.text(line).rstrip("\r\n")


class JsonLines(FileReader):
    """The documents of JSON lines; blank lines are passed over. `field` None: `choose_field` of the first."""

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
        """The next line's object."""
        while content := self.line_of_bytes():
            self.line += 1
            if not (line := self.text(content)).strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError) as error:
                reason = error.msg if isinstance(error, json.JSONDecodeError) else "it is nested too deeply"
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

    def __next__(self) -> Item:
        record = self.record()
        if self.field is None:
            self.field = choose_field(list(record), None, self.chat, self.where)
        if self.field not in record:
            choose_field(list(record), self.field, self.chat, self.where)
        return as_item(record[self.field], self.field, self.chat, self.where)


class Cells(FileReader):
    """The cells in one column of a CSV file with a header, as they stand. `field` None: `choose_field`.

    Python's own reader rather than pandas', which takes "NA" for nothing and shifts the cells of a line that has
    too many.
    """

    def __init__(
        self, raw: Any, name: str, position: Mapping[str, Any] | None, field: str | None, delimiter: str
    ) -> None:
        super().__init__(raw, name, None)
        # For the whole process, for it cannot be set otherwise; documents are longer than its 128 KiB.
        csv.field_size_limit(2**31 - 1)
        self.line = 0
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
        """The next row that is not blank."""
        try:
            return next((row for row in self.rows if row), None)
        except csv.Error as error:
            raise DataError(f"{self.name}, line {self.line} is not CSV: {error}") from error

    def _lines(self) -> Iterator[str]:
        while content := self.line_of_bytes():
            self.line += 1
            yield self.text(content)


class Held:
    """Documents in memory."""

    def __init__(self, items: Sequence[Item], position: Mapping[str, Any] | None) -> None:
        self.items, self.next = items, position["item"] if position else 0

    def __next__(self) -> Item:
        if self.next >= len(self.items):
            raise StopIteration
        self.next += 1
        return self.items[self.next - 1]

    def position(self) -> dict[str, Any]:
        return {"item": self.next}

    def close(self) -> None:
        pass


def plain_suffix(path: Path) -> str:
    """The end of the name in small letters, without that of a compression."""
    return (path.with_suffix("") if path.suffix.lower() in OPENERS else path).suffix.lower()


def open_bytes(path: Path) -> Any:
    """The file's bytes, unpacked, for the readers of this module; DataError where it cannot be opened."""
    try:
        return OPENERS.get(path.suffix.lower(), io.FileIO)(path)
    except OSError as error:
        raise DataError(f"cannot read the data file {path}: {error.strerror}") from error


def choose_field(fields: Sequence[str], field: str | None, chat: Chat, where: str) -> str:
    """`field`, or which of `fields` holds the documents: 'text', or else what chats are usually called.

    Raises:
        DataError: if there is none; it names those there are.
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


def as_item(value: Any, field: str, chat: Chat, where: str) -> Item:
    """A document, if `value` is one; else DataError."""
    if isinstance(value, str) and chat is not True and is_unicode(value):
        return value
    if isinstance(value, list) and chat is not False:
        messages = [_message(message) for message in value]
        if messages and None not in messages:
            return messages  # type: ignore[return-value]
    kind = "a chat" if chat is True or (chat and field in CHAT_FIELDS) else "a text"
    raise DataError(f"{where}: field {field!r} is not {kind}")


def _message(message: Any) -> dict[str, str] | None:
    """A message of a chat with its role and content alone; None if it is none."""
    if not isinstance(message, Mapping):
        return None
    role = message.get("role", message.get("from"))
    content = message.get("content", message.get("value"))
    content = "" if content is None else content  # as where an assistant only calls a tool
    if not (isinstance(role, str) and isinstance(content, str) and is_unicode(role + content)):
        return None
    return {"role": ROLES.get(role, role), "content": content}


def characters(item: Item) -> int:
    """The length of a document; of a chat, of what is said in it."""
    return len(item) if isinstance(item, str) else sum(len(message["content"]) for message in item)


def is_unicode(text: str) -> bool:
    """False for a lone surrogate, which JSON can spell and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
