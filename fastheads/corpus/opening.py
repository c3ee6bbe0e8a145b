"""Open a caller's data, of any supported kind, as a source of documents."""

import os
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from fastheads.corpus import filesets, hf_datasets, in_memory
from fastheads.corpus.readers import Chat
from fastheads.corpus.sources import (
    Source,
    TableSource,
    default_text,
    exists,
    is_hub_name,
    refuse_field_options,
)
from fastheads.errors import DataError


def open_source(
    data: Any,
    *,
    field: str | None = None,
    chat: Chat = "auto",
    split: str = "train",
    streaming: bool = False,
) -> Source | None:
    """Open `data` as a source of documents; return None if it holds token batches instead.

    Args:
        data: one of
            None: the text that comes with Python (`sources.default_text`);
            a path, whose suffix gives the format: .jsonl, .ndjson or .json (JSON lines), .csv, .tsv, .parquet, anything
            else plain text; all but Parquet also compressed (.gz, .bz2, .xz);
            a glob pattern (`data/*.jsonl`), a folder, or a list of `pathlib.Path` (`filesets.files_source`);
            "-": standard input;
            a data set of the Hub as `owner/name` or `owner/name:configuration`;
            a `datasets.Dataset` or `IterableDataset`;
            a list or tuple of texts, of records (dicts with a field for the documents) or of chats;
            a table of pandas, polars or pyarrow, or a dict of columns.
        field: the field or column that holds the documents. None: `text`, else `messages` or `conversations`.
        chat: True if the documents are chats: lists of messages with `role` and `content`, to which the tokenizer's
            chat template is applied. "auto": a document is a chat if it is such a list.
        split: the split of a data set of the Hub.
        streaming: stream a data set of the Hub instead of downloading it to the cache.

    Raises:
        DataError: the data cannot be read; most faults show here, before a model is loaded.
        OptionError: `field` or `chat` is given for data without fields or chats.
        MissingExtraError: `datasets` is needed and not installed.
    """
    source = named_source(data, field=field, chat=chat, split=split, streaming=streaming)
    if source is not None:
        return source
    if isinstance(data, Iterator) or not isinstance(data, Iterable) or _has_tokens(data):
        return None
    found = in_memory.in_memory(data, field, chat)
    return found if isinstance(found, Source) else None


def named_source(
    data: Any,
    *,
    field: str | None = None,
    chat: Chat = "auto",
    split: str = "train",
    streaming: bool = False,
) -> Source | None:
    """Open `data` as `open_source` does if it is None, a source, a name or an object of `datasets`; else return None."""
    if data is None:
        refuse_field_options("the text of Python", field, chat)
        return default_text()
    if isinstance(data, Source):
        return data
    if isinstance(data, str | os.PathLike):
        if isinstance(data, str) and data == "-":
            return filesets.stdin_source(field, chat)
        if not isinstance(data, str) or ("\n" not in data and exists(data)) or filesets.is_pattern(data):
            return filesets.files_source([data], field, chat)
        if is_hub_name(data):
            table = hf_datasets.hub_table(data, field, chat, split=split, streaming=streaming)
            return TableSource(table.name, None, None, table, version=table.version)
        raise DataError(
            f"no data file {data[:80]!r}; to profile a text itself, pass it in a list "
            "(a data set of the Hub is named owner/name)"
        )
    library = sys.modules.get("datasets")
    if library is not None and isinstance(data, library.Dataset | library.IterableDataset):
        if _has_tokens(data):
            return None
        table = hf_datasets.object_table(data, field, chat)
        return TableSource(table.name, None, None, table, version=table.version)
    return None


def _has_tokens(data: Any) -> bool:
    """True if a data set of `datasets` has token ids rather than documents."""
    return "input_ids" in (getattr(data, "column_names", None) or ())
