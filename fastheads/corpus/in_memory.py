"""Turn objects in memory into documents or token batches.

Objects are recognized by type, never just iterated over: iterating a table gives column names, and iterating bytes gives
numbers. Optional libraries are looked up in `sys.modules`: none of their objects exists before they are imported.
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
    has_data_suffix,
    held_texts,
    in_memory_source,
    refuse_field_options,
)
from fastheads.corpus.token_batches import as_batch, as_int_tensor
from fastheads.errors import DataError

LONGEST_NAME = 1024  # characters of a text that may be the name of a file
_NOTHING = object()


def in_memory(data: Any, field: str | None, chat: Chat) -> Source | Iterator[dict[str, Any]]:
    """Return a source of the documents in `data`, or an iterator over its token batches. Iterators of documents are consumed.

    Raises:
        DataError: the type is not supported, or an item is of another type than the first; the message names it.
        OptionError: `field` or `chat` is given for data without fields or chats.
    """
    _refuse(data)
    table = _table_columns(data)
    if table is not None:
        return _from_column(*table, field, chat)
    data = _as_list(data)
    if isinstance(data, Tensor | Mapping):
        data = [data]
    if not isinstance(data, Iterable):
        raise DataError(f"data must be a path, texts or token batches, not {_type_name(data)}")
    items = iter(data)
    first = next(items, _NOTHING)
    if first is _NOTHING:
        raise DataError("no data: nothing to iterate over")
    return _from_items(first, itertools.chain([first], items), field, chat)


def _from_items(
    first: Any, items: Iterable[Any], field: str | None, chat: Chat
) -> Source | Iterator[dict[str, Any]]:
    """As `in_memory`, for an iterable whose `first` item decides the type of all."""
    if isinstance(first, str):
        refuse_field_options("a list of texts", field, chat)
        texts = list(items)
        _check_no_names(texts)
        return held_texts(texts)
    if isinstance(first, os.PathLike):
        paths = list(items)
        for number, path in enumerate(paths):
            if not isinstance(path, os.PathLike):
                raise DataError(f"item {number} of the data is {_type_name(path)} where the first is a path")
        return files_source(paths, field, chat)
    if isinstance(first, Mapping) and "input_ids" not in first:
        return in_memory_source(_documents(items, field, chat))
    if isinstance(first, list | tuple) and first and isinstance(first[0], Mapping):
        refuse_field_options("a list of chats", field, "auto")
        return in_memory_source(
            readers.as_document(chat_, "messages", True, f"document {number} of the data")
            for number, chat_ in enumerate(items)
        )
    if isinstance(first, list | tuple) and not all(map(_is_token_row, first)):
        raise DataError(
            f"an item of the data is a list of {_type_name(first[0])}: documents are texts, chats or records "
            "(dicts); token ids are whole numbers"
        )
    if isinstance(first, int | float) and not isinstance(first, bool):
        raise DataError(
            "an item of the data is a number: token ids are given by sequences, as [[1, 2, 3], ...], and not "
            f"{_type_name(first)}"
        )
    _refuse(first)
    refuse_field_options("what is iterated over", field, chat)
    return map(as_batch, items)


def _is_token_row(item: Any) -> bool:
    return isinstance(item, Integral | list | tuple | Tensor) or as_int_tensor(item) is not item


def _documents(records: Iterable[Any], field: str | None, chat: Chat) -> Iterator[readers.Document]:
    """Yield the document in the field of each record."""
    for number, record in enumerate(records):
        where = f"record {number} of the data"
        if not isinstance(record, Mapping):
            raise DataError(f"{where} is {_type_name(record)} where the first is a dict")
        if field is None or field not in record:
            field = readers.choose_field(list(record), field, chat, where)
        yield readers.as_document(record[field], field, chat, where)


def _from_column(
    names: list[Any], column: Callable[[str], Any], what: str, field: str | None, chat: Chat
) -> Source:
    field = readers.choose_field(names, field, chat, what)
    values = _as_list(column(field))
    if isinstance(values, str | Mapping) or not isinstance(values, Sequence):
        raise DataError(
            f"{what}: {field!r} is {_type_name(values)} and no column: pass columns as lists, or records as a list of dicts"
        )
    if not values:
        raise DataError(f"no data: {what} has no rows")
    return in_memory_source(
        readers.as_document(value, field, chat, f"{what}, row {number}")
        for number, value in enumerate(values)
    )


def _table_columns(data: Any) -> tuple[list[Any], Callable[[str], Any], str] | None:
    """Return a table's column names, a function that returns a column, and a name for messages; None if it is no table."""
    if _is_instance(data, "pandas", "DataFrame"):
        return list(data.columns), lambda name: data[name], "the DataFrame"
    if _is_instance(data, "polars", "DataFrame"):
        return list(data.columns), lambda name: data[name], "the DataFrame"
    if _is_instance(data, "pyarrow", "Table", "RecordBatch"):
        return list(data.schema.names), data.column, "the table"
    if isinstance(data, Mapping) and "input_ids" not in data:
        if _is_instance(data, "datasets", "DatasetDict", "IterableDatasetDict"):
            names = ", ".join(f"data[{str(name)[:40]!r}]" for name in [*data][:8])
            advice = f"choose one of {names}" if names else "this one is empty"
            raise DataError(f"a {_type_name(data)} is a dict of splits: {advice}")
        return list(data), lambda name: data[name], "the dict of columns"
    if (
        hasattr(data, "columns")
        and not isinstance(data, Sequence)
        and not _is_instance(data, "datasets", "Dataset", "IterableDataset")
    ):
        raise DataError(
            f"a table of the type {_type_name(data)} is not known: give a pandas DataFrame, or a list of texts"
        )
    return None


def _as_list(data: Any) -> Any:
    """Convert a column or an array to a list, or to a tensor if it holds integers; return anything else unchanged."""
    if _is_instance(data, "pandas", "Series", "Index"):
        return data.tolist()
    if _is_instance(data, "polars", "Series"):
        return data.to_list()
    if _is_instance(data, "pyarrow", "Array", "ChunkedArray"):
        return data.to_pylist()
    if _is_instance(data, "numpy", "ndarray"):
        if data.dtype.kind in "UO" and data.ndim == 1:
            return data.tolist()
        numbers = as_int_tensor(data)
        if not isinstance(numbers, Tensor):
            raise DataError(
                f"an array of {data.dtype} {list(data.shape)} is neither texts [documents] nor token ids [rows, tokens]"
            )
        return numbers
    return data


def _refuse(data: Any) -> None:
    """Raise DataError for objects whose items are no documents, or come in no fixed order."""
    if isinstance(data, bytes | bytearray | memoryview):
        raise DataError(f"{_type_name(data)} is no text: decode it to a str, and pass texts in a list")
    if isinstance(data, io.IOBase) or callable(getattr(data, "read", None)):
        raise DataError(f"an open file ({_type_name(data)}) is no data: pass its path")
    if isinstance(data, set | frozenset):
        raise DataError("a set has no order, which a profile that can be repeated needs: pass a list")
    if _is_instance(data, "polars", "LazyFrame"):
        raise DataError("a LazyFrame has no rows yet: collect() it first")


def _check_no_names(texts: Sequence[Any]) -> None:
    """Raise DataError if some texts are probably meant as names of files."""
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
        if len(text.split()) == 1 and has_data_suffix(Path(text)):
            raise DataError(f"the text {text[:80]!r} looks like the name of a file: {how}")
        if os.path.isfile(text):
            raise DataError(f"the text {text[:80]!r} is the name of a file: {how}")
    if len(short) == len(texts) and all(map(os.path.exists, short)):
        raise DataError(f"the text {short[0][:80]!r} is the name of a folder: {how}")


def _is_instance(data: Any, library: str, *names: str) -> bool:
    """`isinstance` for classes of a library that may not have been imported."""
    module = sys.modules.get(library)
    kinds = tuple(kind for name in names if isinstance(kind := getattr(module, name, None), type))
    return isinstance(data, kinds)


def _type_name(data: Any) -> str:
    return type(data).__name__
