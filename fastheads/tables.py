"""Documents through Hugging Face `datasets`: CSV and Parquet files, data sets of the Hub, `datasets`' own objects.

Files are read as a stream, without a copy in the cache, a thousand rows at a time. Nothing is unpickled and no code
that comes with data is run: `datasets` 4 and later cannot, and older ones are refused.
"""

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastheads.errors import DataError, FastheadsError, MissingExtraError
from fastheads.readers import Chat, Item, as_item, choose_field

ROWS = 1000  # read at a time

BUILDERS = {".csv": "csv", ".tsv": "csv", ".parquet": "parquet"}
# What `datasets` reads compressed as it does plain.
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")


def builder_of(path: Path) -> str | None:
    """The format of a file that `datasets` reads for us, by its name; None for all others."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = bool(suffixes) and suffixes[-1] in COMPRESSIONS
    suffix = suffixes[-2] if compressed and len(suffixes) > 1 else "".join(suffixes[-1:])
    return "json" if compressed and suffix in JSON_SUFFIXES else BUILDERS.get(suffix)


def file_table(path: Path, field: str | None, chat: Chat) -> "Table":
    """The rows of a file, for `builder_of(path)`.

    Raises:
        DataError: if it cannot be read, has no rows, or no column for the documents.
        MissingExtraError: if `datasets` is not installed.
    """
    builder, name = str(builder_of(path)), str(path)
    options: dict[str, Any] = {"data_files": [_literal(path)], "split": "train", "streaming": True}
    if builder == "csv":
        # All cells are texts as they stand: "NA" is no missing value and 007 no number.
        options |= {"chunksize": ROWS, "na_filter": False, "sep": "\t" if ".tsv" in path.suffixes else ","}
    elif builder == "parquet":
        options["batch_size"] = ROWS
    load = _library(f"reading {path.name}").load_dataset
    with _errors(name):
        # Of a CSV file one row is read: the types that are guessed for its cells are of no interest.
        rows = load(builder, **options | ({"nrows": 1} if builder == "csv" else {}))
        field = _field(rows, field, chat, name)
        if builder == "csv":
            features = _library(name).Features({field: _library(name).Value("string")})
            rows = load(builder, **options, usecols=[field], features=features)
        elif builder == "parquet":
            rows = load(builder, **options, columns=[field])
        return Table(name, rows, field, chat)


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
    """
    name = getattr(dataset.info, "dataset_name", None) or "a data set in memory"
    with _errors(name):
        return Table(name, dataset, _field(dataset, field, chat, name), chat)


class Table:
    """Rows whose column `field` holds the documents. They can be read again and from any position."""

    def __init__(self, name: str, rows: Any, field: str, chat: Chat) -> None:
        self.name, self.field, self.chat = name, field, chat
        rows = rows.with_format(None).select_columns([field])
        # Pictures and the like are not decoded: what is no text is refused as it is.
        self.rows = rows.decode(False) if hasattr(rows, "decode") else rows

    def read(self, position: Mapping[str, Any] | None) -> "TableReader":
        return TableReader(self, position)


class TableReader:
    """The documents of a table's rows."""

    def __init__(self, table: Table, position: Mapping[str, Any] | None) -> None:
        self.table, self.row = table, position["row"] if position else 0
        rows, self.stateful = table.rows, hasattr(table.rows, "state_dict")
        with _errors(table.name):
            if self.stateful:
                # Streams remember where to start: each reader has one of its own.
                rows = rows.select_columns([table.field])
                rows.load_state_dict(position["state"] if position else None)
            elif self.row:
                rows = rows.skip(self.row)
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


def _library(what: str) -> Any:
    try:
        import datasets
    except ImportError as error:
        raise MissingExtraError(what, "datasets", "corpus") from error
    if int(datasets.__version__.split(".")[0]) < 4:  # older ones run code that comes with the data
        raise MissingExtraError(what, "datasets 4 or later", "corpus")
    # What its readers log is what they raise, which becomes our one line.
    logging.getLogger("datasets.packaged_modules").setLevel(logging.CRITICAL)
    return datasets


def _field(rows: Any, field: str | None, chat: Chat, where: str) -> str:
    columns = rows.column_names
    if columns is None:  # of a stream without a schema
        first = next(iter(rows), None)
        if first is None:
            raise DataError(f"no tokens in {where}: it has no rows")
        columns = list(first)
    return choose_field(columns, field, chat, where)


def _literal(path: Path) -> str:
    """The path as a pattern that only it matches: `datasets` takes names of files for patterns."""
    return "".join(f"[{c}]" if c in "*?[" else c for c in str(path.absolute()))


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
        said = " ".join(str(root).split())[:300] or type(root).__name__
        raise DataError(f"cannot read {name}: {said}") from error
