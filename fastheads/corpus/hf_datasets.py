"""Documents through Hugging Face `datasets`: Parquet files, data sets of the Hub, `datasets`' own objects.

Parquet files are read as a stream, without a copy in the cache, a thousand rows at a time. Nothing is unpickled and no code
that comes with data is run: `datasets` 4 and later cannot. Releases before `OLDEST` lose their place when a stream is resumed
(they start again from the first row, or skip rows), and are refused.
"""

import glob
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from packaging.version import Version

from fastheads.corpus.readers import Chat, Item, as_item, choose_field
from fastheads.errors import DataError, FastheadsError, MissingExtraError, one_line

ROWS = 1000  # read at a time
OLDEST = "5.0.1"  # of `datasets`; as in pyproject.toml


def parquet_table(path: Path, field: str | None, chat: Chat) -> "Table":
    """The rows of a Parquet file.

    Raises:
        DataError: if it cannot be read, has no rows, or no column for the documents.
        MissingExtraError: if `datasets` is not installed.
    """
    name = str(path)
    load = _library(f"reading {path.name}").load_dataset
    with _errors(name):
        options = {"data_files": [_literal(path)], "split": "train", "streaming": True, "batch_size": ROWS}
        field = _field(load("parquet", **options), field, chat, name)
        return Table(name, load("parquet", **options, columns=[field]), field, chat)


def hub_table(
    name: str, field: str | None, chat: Chat, *, split: str = "train", streaming: bool = False
) -> "Table":
    """A data set of the Hub, `owner/name` or `owner/name:configuration`, from the cache, or read as a stream.

    Raises:
        DataError: if it cannot be loaded, has no rows, or no column for the documents.
        MissingExtraError: if `datasets` is not installed.
    """
    repository, _, configuration = name.partition(":")
    full = f"{name}, split {split}"
    load = _library(f"the data set {name}").load_dataset
    with _errors(full):
        rows = load(repository, configuration or None, split=split, streaming=streaming)
        return Table(full, rows, _field(rows, field, chat, full), chat)


def object_table(dataset: Any, field: str | None, chat: Chat) -> "Table":
    """A `datasets.Dataset` or `datasets.IterableDataset`.

    Raises:
        DataError: if it has no rows, or no column for the documents.
        MissingExtraError: if it is a stream of a release of `datasets` that loses its place.
    """
    if hasattr(dataset, "state_dict"):
        _library("a stream of the library datasets")
    name = getattr(dataset.info, "dataset_name", None) or "a data set in memory"
    with _errors(name):
        return Table(name, dataset, _field(dataset, field, chat, name), chat)


class Table:
    """Rows whose column `field` holds the documents. They can be read again and from any position."""

    def __init__(self, name: str, rows: Any, field: str, chat: Chat) -> None:
        self.name, self.field, self.chat = name, field, chat
        # A `Dataset` has a hash of where its rows come from and of what was done to them; a stream has none.
        mark = getattr(rows, "_fingerprint", None)
        self.version = () if mark is None else (("dataset", str(mark)),)
        rows = rows.with_format(None).select_columns([field])
        # Pictures and the like are not decoded: what is no text is refused as it is.
        # Of a stream whose columns have no known types nothing is decoded in any case.
        self.rows = rows.decode(False) if hasattr(rows, "decode") and rows.features is not None else rows

    def read(self, position: Mapping[str, Any] | None) -> "TableReader":
        return TableReader(self, position)


class TableReader:
    """The documents of a table's rows."""

    def __init__(self, table: Table, position: Mapping[str, Any] | None) -> None:
        self.table, self.row = table, position["row"] if position else 0
        rows, stream = table.rows, hasattr(table.rows, "state_dict")
        # The state of a stream leaves out what its shuffle buffers hold.
        self.stateful = stream and not _is_buffered(rows)
        with _errors(table.name):
            if stream and not self.stateful:
                rows = rows.skip(self.row)  # reads those rows once more
            elif self.stateful:
                # Streams remember where to start: each reader has one of its own.
                rows = rows.select_columns([table.field])
                rows.load_state_dict(position["state"] if position else None)
            elif self.row:
                rows = rows.skip(self.row) if self.row < len(rows) else ()
            self.rows = rows
            self.iterator: Iterator[Mapping[str, Any]] = iter(rows)

    def __next__(self) -> Item:
        with _errors(self.table.name):
            row = next(self.iterator, None)
        if row is None:
            raise StopIteration
        self.row += 1
        where = f"{self.table.name}, row {self.row}"
        return as_item(row[self.table.field], self.table.field, self.table.chat, where)

    def position(self) -> dict[str, Any]:
        return {"row": self.row} | ({"state": self.rows.state_dict()} if self.stateful else {})

    def close(self) -> None:
        close: Callable[[], None] | None = getattr(self.iterator, "close", None)
        if close is not None:
            close()


def _is_buffered(rows: Any) -> bool:
    """Whether a stream is shuffled in a buffer; True too where nobody can tell."""
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
    # What its readers log is what they raise, which becomes our one line.
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)
    return datasets


def _field(rows: Any, field: str | None, chat: Chat, where: str) -> str:
    columns = rows.column_names
    if columns is None:  # of a stream without a schema
        first = list(rows.take(1))
        if not first:
            raise DataError(f"no tokens in {where}: it has no rows")
        columns = list(first[0])
    return choose_field(columns, field, chat, where)


def _literal(path: Path) -> str:
    """The path as a pattern that only it matches: `datasets` takes names of files for patterns."""
    return glob.escape(str(path.absolute()))


@contextmanager
def _errors(name: str) -> Iterator[None]:
    """Whatever reading raises as a DataError of one line: damaged files raise errors of many kinds."""
    try:
        yield
    except (FastheadsError, StopIteration):
        raise
    except Exception as error:
        root: BaseException = error
        while root.__cause__ is not None:
            root = root.__cause__
        raise DataError(f"cannot read {name}: {one_line(root, 300)}") from error
