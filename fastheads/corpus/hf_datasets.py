"""Read documents with Hugging Face `datasets`: Parquet files, data sets of the Hub, and the library's own objects.

Parquet files are streamed, a thousand rows at a time, without a copy in the cache. Nothing is unpickled and no code that comes
with data is run: `datasets` 4 and later cannot. Releases before `OLDEST` are refused, since they resume a stream wrongly (from
its first row, or with rows skipped).
"""

import glob
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from packaging.version import Version

from fastheads.corpus.readers import Chat, Document, as_document, choose_field
from fastheads.errors import DataError, FastheadsError, MissingExtraError, one_line

ROWS = 1000  # read at a time
OLDEST = "5.0.1"  # of `datasets`; as in pyproject.toml


def parquet_table(path: Path, field: str | None, chat: Chat) -> "Table":
    """Open a Parquet file.

    Raises:
        DataError: it cannot be read, or has no rows or no column with documents.
        MissingExtraError: `datasets` is not installed.
    """
    name = str(path)
    load = _library(f"reading {path.name}").load_dataset
    with _as_data_errors(name):
        options = {"data_files": [_escaped(path)], "split": "train", "streaming": True, "batch_size": ROWS}
        field = _field(load("parquet", **options), field, chat, name)
        return Table(name, load("parquet", **options, columns=[field]), field, chat)


def hub_table(
    name: str, field: str | None, chat: Chat, *, split: str = "train", streaming: bool = False
) -> "Table":
    """Open a data set of the Hub, `owner/name` or `owner/name:configuration`: from the cache, or streamed.

    Raises:
        DataError: it cannot be loaded, or has no rows or no column with documents.
        MissingExtraError: `datasets` is not installed.
    """
    repository, _, configuration = name.partition(":")
    full = f"{name}, split {split}"
    load = _library(f"the data set {name}").load_dataset
    with _as_data_errors(full):
        rows = load(repository, configuration or None, split=split, streaming=streaming)
        return Table(full, rows, _field(rows, field, chat, full), chat)


def object_table(dataset: Any, field: str | None, chat: Chat) -> "Table":
    """Open a `datasets.Dataset` or `datasets.IterableDataset`.

    Raises:
        DataError: it has no rows, or no column with documents.
        MissingExtraError: it is a stream, and the installed `datasets` is older than `OLDEST`.
    """
    if hasattr(dataset, "state_dict"):
        _library("a stream of the library datasets")
    name = getattr(dataset.info, "dataset_name", None) or "a data set in memory"
    with _as_data_errors(name):
        return Table(name, dataset, _field(dataset, field, chat, name), chat)


class Table:
    """Rows whose column `field` holds the documents; can be read repeatedly and from any position."""

    def __init__(self, name: str, rows: Any, field: str, chat: Chat) -> None:
        self.name, self.field, self.chat = name, field, chat
        # A `Dataset` has a hash of its origin and of every transformation; a stream has none.
        fingerprint = getattr(rows, "_fingerprint", None)
        self.version = () if fingerprint is None else (("dataset", str(fingerprint)),)
        rows = rows.with_format(None).select_columns([field])
        # Do not decode images and the like, which are refused anyway.
        # A stream without a schema decodes nothing.
        self.rows = rows.decode(False) if hasattr(rows, "decode") and rows.features is not None else rows

    def read(self, position: Mapping[str, Any] | None) -> "TableReader":
        return TableReader(self, position)


class TableReader:
    """The documents of a table's rows."""

    def __init__(self, table: Table, position: Mapping[str, Any] | None) -> None:
        self.table, self.row = table, position["row"] if position else 0
        rows, stream = table.rows, hasattr(table.rows, "state_dict")
        # A stream's state lacks the contents of its shuffle buffers.
        self.stateful = stream and not _is_buffered(rows)
        with _as_data_errors(table.name):
            if stream and not self.stateful:
                rows = rows.skip(self.row)  # reads the skipped rows again
            elif self.stateful:
                # The position belongs to the stream object, so each reader needs a copy.
                rows = rows.select_columns([table.field])
                rows.load_state_dict(position["state"] if position else None)
            elif self.row:
                rows = rows.skip(self.row) if self.row < len(rows) else ()
            self.rows = rows
            self.iterator: Iterator[Mapping[str, Any]] = iter(rows)

    def __next__(self) -> Document:
        with _as_data_errors(self.table.name):
            row = next(self.iterator, None)
        if row is None:
            raise StopIteration
        self.row += 1
        where = f"{self.table.name}, row {self.row}"
        return as_document(row[self.table.field], self.table.field, self.table.chat, where)

    def position(self) -> dict[str, Any]:
        return {"row": self.row} | ({"state": self.rows.state_dict()} if self.stateful else {})

    def close(self) -> None:
        close: Callable[[], None] | None = getattr(self.iterator, "close", None)
        if close is not None:
            close()


def _is_buffered(rows: Any) -> bool:
    """True if a stream has a shuffle buffer, or if that cannot be determined."""
    waiting = [getattr(rows, "_ex_iterable", None)]
    while waiting:
        part = waiting.pop()
        if part is None or "Shuffle" in type(part).__name__:
            return True
        parents = [getattr(part, name) for name in ("ex_iterable", "ex_iterables") if hasattr(part, name)]
        for parent in parents:
            waiting += parent if isinstance(parent, list | tuple) else [parent]
    return False


def _library(what: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError(what, "datasets", "corpus") from error
    if Version(datasets.__version__) < Version(OLDEST):
        raise MissingExtraError(
            what, f"datasets {OLDEST} or later ({datasets.__version__} is installed)", "corpus"
        )
    # Its readers log the errors that they raise, and those become our messages.
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)
    return datasets


def _field(rows: Any, field: str | None, chat: Chat, where: str) -> str:
    columns = rows.column_names
    if columns is None:  # a stream without a schema
        first = list(rows.take(1))
        if not first:
            raise DataError(f"no tokens in {where}: it has no rows")
        columns = list(first[0])
    return choose_field(columns, field, chat, where)


def _escaped(path: Path) -> str:
    """Escape the path, since `datasets` reads file names as glob patterns."""
    return glob.escape(str(path.absolute()))


@contextmanager
def _as_data_errors(name: str) -> Iterator[None]:
    """Raise any error of the block as a DataError with a one-line message: damaged files raise errors of many types."""
    try:
        yield
    except (FastheadsError, StopIteration):
        raise
    except Exception as error:
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        raise DataError(f"cannot read {name}: {one_line(root, 300)}") from error
