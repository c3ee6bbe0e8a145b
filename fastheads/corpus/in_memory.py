"""Data in memory: which documents, or token batches, an object stands for.

Each kind is known by what it is. Nothing is merely iterated over: a table gives its columns' names then, and bytes give numbers.
Libraries are not imported: what is theirs cannot be there unless they are.
"""

import io
import itertools
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from pathlib import Path
from typing import Any

from torch import Tensor

from fastheads.corpus import readers
from fastheads.corpus.filesets import files_source
from fastheads.corpus.readers import Chat
from fastheads.corpus.sources import (
    Source,
    check_is_read,
    held_items,
    held_texts,
    names_a_file,
)
from fastheads.corpus.token_batches import as_batch, as_numbers
from fastheads.errors import DataError

LONGEST_NAME = 1024  # characters of a text that may be the name of a file
_NOTHING = object()


def in_memory(data: Any, field: str | None, chat: Chat) -> Source | Iterator[dict[str, Any]]:
    """The documents, or the token batches, that `data` stands for. Iterators of documents are read to their end.

    Raises:
        DataError: if it is nothing that this knows, or some of it is not what the first of it is; the message names it.
        OptionError: if `field` or `chat` is given for data that have neither.
    """
    _refuse(data)
    table = _columns(data)
    if table is not None:
        return _of_column(*table, field, chat)
    data = _listed(data)
    if isinstance(data, Tensor | Mapping):
        data = [data]
    if not isinstance(data, Iterable):
        raise DataError(f"data must be a path, texts or token batches, not {_kind(data)}")
    items = iter(data)
    first = next(items, _NOTHING)
    if first is _NOTHING:
        raise DataError("no data: nothing to iterate over")
    return _of_items(first, itertools.chain([first], items), field, chat)


def _of_items(
    first: Any, items: Iterable[Any], field: str | None, chat: Chat
) -> Source | Iterator[dict[str, Any]]:
    """What all `items` are, by the first of them."""
    if isinstance(first, str):
        check_is_read("a list of texts", field, chat)
        texts = list(items)
        _check_no_names(texts)
        return held_texts(texts)
    if isinstance(first, os.PathLike):
        paths = list(items)
        for number, path in enumerate(paths):
            if not isinstance(path, os.PathLike):
                raise DataError(f"item {number} of the data is {_kind(path)} where the first is a path")
        return files_source(paths, field, chat)
    if isinstance(first, Mapping) and "input_ids" not in first:
        return held_items(_documents(items, field, chat))
    if isinstance(first, list | tuple) and first and isinstance(first[0], Mapping):
        check_is_read("a list of chats", field, "auto")
        return held_items(
            readers.as_item(chat_, "messages", True, f"document {number} of the data")
            for number, chat_ in enumerate(items)
        )
    if isinstance(first, list | tuple) and not all(map(_is_rows, first)):
        raise DataError(
            f"an item of the data is a list of {_kind(first[0])}: documents are texts, or chats or records as dicts; token ids "
            "are whole numbers"
        )
    if isinstance(first, int | float) and not isinstance(first, bool):
        raise DataError(
            "an item of the data is a number: token ids are given by sequences, as [[1, 2, 3], ...], and not "
            f"{_kind(first)}"
        )
    _refuse(first)
    check_is_read("what is iterated over", field, chat)
    return map(as_batch, items)


def _is_rows(item: Any) -> bool:
    return isinstance(item, Integral | list | tuple | Tensor) or as_numbers(item) is not item


def _documents(records: Iterable[Any], field: str | None, chat: Chat) -> Iterator[readers.Item]:
    """What stands in the field of each record."""
    for number, record in enumerate(records):
        where = f"record {number} of the data"
        if not isinstance(record, Mapping):
            raise DataError(f"{where} is {_kind(record)} where the first is a dict")
        if field is None or field not in record:
            field = readers.choose_field(list(record), field, chat, where)
        yield readers.as_item(record[field], field, chat, where)


def _of_column(
    names: list[Any], column: Callable[[str], Any], what: str, field: str | None, chat: Chat
) -> Source:
    field = readers.choose_field(names, field, chat, what)
    values = _listed(column(field))
    if isinstance(values, str | Mapping) or not isinstance(values, Sequence):
        raise DataError(
            f"{what}: {field!r} is {_kind(values)} and no column: a column is a list, and records are given as a list of dicts"
        )
    if not values:
        raise DataError(f"no data: {what} has no rows")
    return held_items(
        readers.as_item(value, field, chat, f"{what}, row {number}") for number, value in enumerate(values)
    )


def _columns(data: Any) -> tuple[list[Any], Callable[[str], Any], str] | None:
    """The names of a table's columns, what gives one of them, and what to call the table; None for what is no table."""
    if _is_of(data, "pandas", "DataFrame"):
        return list(data.columns), lambda name: data[name], "the DataFrame"
    if _is_of(data, "polars", "DataFrame"):
        return list(data.columns), lambda name: data[name], "the DataFrame"
    if _is_of(data, "pyarrow", "Table", "RecordBatch"):
        return list(data.schema.names), data.column, "the table"
    if isinstance(data, Mapping) and "input_ids" not in data:
        if _is_of(data, "datasets", "DatasetDict", "IterableDatasetDict"):
            raise DataError(
                f"a {_kind(data)} has several splits: choose one, such as data[{next(iter(data), '')!r}]"
            )
        return list(data), lambda name: data[name], "the dict of columns"
    if (
        hasattr(data, "columns")
        and not isinstance(data, Sequence)
        and not _is_of(data, "datasets", "Dataset", "IterableDataset")
    ):
        raise DataError(
            f"a table of the type {_kind(data)} is not known: give a pandas DataFrame, or a list of texts"
        )
    return None


def _listed(data: Any) -> Any:
    """The values of a column or an array, as a list or, of whole numbers, a tensor; anything else as it is."""
    if _is_of(data, "pandas", "Series", "Index"):
        return data.tolist()
    if _is_of(data, "polars", "Series"):
        return data.to_list()
    if _is_of(data, "pyarrow", "Array", "ChunkedArray"):
        return data.to_pylist()
    if _is_of(data, "numpy", "ndarray"):
        if data.dtype.kind in "UO" and data.ndim == 1:
            return data.tolist()
        numbers = as_numbers(data)
        if not isinstance(numbers, Tensor):
            raise DataError(
                f"an array of {data.dtype} {list(data.shape)} is neither texts [documents] nor token ids [rows, tokens]"
            )
        return numbers
    return data


def _refuse(data: Any) -> None:
    """Raise DataError for what can be iterated over and would give something else than documents."""
    if isinstance(data, bytes | bytearray | memoryview):
        raise DataError(f"{_kind(data)} is no text: decode it to a str, and pass texts in a list")
    if isinstance(data, io.IOBase) or callable(getattr(data, "read", None)):
        raise DataError(f"an open file ({_kind(data)}) is no data: pass its path")
    if isinstance(data, set | frozenset):
        raise DataError("a set has no order, which a profile that can be repeated needs: pass a list")
    if _is_of(data, "polars", "LazyFrame"):
        raise DataError("a LazyFrame has no rows yet: collect() it first")


def _check_no_names(texts: Sequence[Any]) -> None:
    """Raise DataError where texts may be meant as files."""
    short = [
        t
        for t in texts
        if isinstance(t, str) and 0 < len(t) <= LONGEST_NAME and "\n" not in t and "\0" not in t
    ]
    how = (
        "pass pathlib.Path objects for what is in files, or fastheads.corpus.sources.held_texts(texts) for these words "
        "themselves"
    )
    for text in short:
        if len(text.split()) == 1 and names_a_file(Path(text)):
            raise DataError(f"the text {text[:80]!r} looks like the name of a file: {how}")
        if os.path.isfile(text):
            raise DataError(f"the text {text[:80]!r} is the name of a file: {how}")
    if len(short) == len(texts) and all(map(os.path.exists, short)):
        raise DataError(f"the text {short[0][:80]!r} is the name of a folder: {how}")


def _is_of(data: Any, library: str, *names: str) -> bool:
    """Whether `data` is an object of one of those classes of a library that may not be there."""
    module = sys.modules.get(library)
    kinds = tuple(kind for name in names if isinstance(kind := getattr(module, name, None), type))
    return isinstance(data, kinds)


def _kind(data: Any) -> str:
    return type(data).__name__
