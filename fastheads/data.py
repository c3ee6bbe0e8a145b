"""Text and token sources, to batches of tokens.

A *stream* (a text file, the default text) is one text, cut to contiguous blocks of `seq_len` tokens; only the
last block can be shorter. *Documents* (JSON lines, texts in a list) are sequences of their own, cut at
`seq_len`; a batch of unequal ones is padded on the right. Both are tokenised as the tokenizer does it by
default: where it begins a text with a BOS token, a stream has one at its start, every document its own.
"""

import hashlib
import io
import json
import os
import platform
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from fastheads.errors import DataError, OptionError

JSON_LINES_SUFFIXES = (".jsonl", ".ndjson", ".json")

# A longer stream is tokenised in pieces that end with a line: no more is read than the budget asks for.
PIECE_CHARACTERS = 2**20


@dataclass(frozen=True)
class TextSource:
    """Texts that can be read once more each time `texts()` is called."""

    name: str  # a path, or what else says where the text comes from
    kind: Literal["stream", "documents"]
    sha256: str  # of the file's bytes, or of the texts as UTF-8
    path: Path | None = None
    field: str = "text"  # of a JSON line
    held: tuple[str, ...] = ()  # the texts, where there is no file

    def texts(self) -> Iterator[str]:
        """The documents, or the pieces of the stream."""
        if self.path is None:
            yield from self.held if self.kind == "documents" else _pieces(io.StringIO(self.held[0]))
            return
        with _open_text(self.path) as file:
            try:
                yield from (
                    _pieces(file) if self.kind == "stream" else _json_texts(file, self.path, self.field)
                )
            except UnicodeDecodeError as error:
                raise DataError(f"{self.path} is not UTF-8 text: {error.reason}") from error


def text_file(path: str | os.PathLike[str], field: str = "text") -> TextSource:
    """A text file as a stream; a file named .jsonl, .ndjson or .json as JSON lines with the text in `field`.

    Raises:
        DataError: if there is no such file, it cannot be read, is empty or starts with no text.
    """
    path = Path(path)
    if path.exists() and not path.is_file():  # a pipe cannot be read twice, as it is here
        raise DataError(f"the data file {path} is not a regular file")
    try:
        with path.open("rb") as file:
            sha256 = hashlib.file_digest(file, "sha256").hexdigest()
            empty = file.tell() == 0
    except OSError as error:
        raise DataError(f"cannot read the data file {path}: {error.strerror}") from error
    if empty:
        raise DataError(f"the data file {path} is empty")
    kind: Literal["stream", "documents"] = "stream"
    if path.suffix.lower() in JSON_LINES_SUFFIXES:
        kind = "documents"
    source = TextSource(str(path), kind, sha256, path=path, field=field)
    next(source.texts(), None)  # most faults show at once, before a model is loaded
    return source


def held_texts(texts: Iterable[str]) -> TextSource:
    """Texts in memory, each a document. The hash is that of all of them, each followed by a zero byte.

    Raises:
        DataError: if one of them is no text.
    """
    held = tuple(texts)
    digest = hashlib.sha256()
    for number, text in enumerate(held):
        if not isinstance(text, str) or not _is_unicode(text):
            raise DataError(f"text {number} of the data is not a text: {str(text)[:40]!a}")
        digest.update(text.encode() + b"\0")
    return TextSource("texts", "documents", digest.hexdigest(), held=held)


def default_text() -> TextSource:
    """The English text that every CPython carries: the topics of `pydoc_data`, sorted, blank lines between.

    About 465,000 characters. It differs between Python versions: its name and its hash say which one it was.
    """
    from pydoc_data.topics import topics

    text = "\n\n".join(topics[name] for name in sorted(topics))
    name = f"pydoc_data.topics of Python {platform.python_version()}"
    return TextSource(name, "stream", hashlib.sha256(text.encode()).hexdigest(), held=(text,))


def tokenize(source: TextSource, tokenizer: Any, seq_len: int, max_tokens: int | None = None) -> list[Tensor]:
    """The sequences of `source`: int32 tensors of 1 to `seq_len` tokens, in all `max_tokens` tokens or fewer.

    Raises:
        DataError: if the source holds no tokens, is not UTF-8 or not JSON lines.
        ValueError: if `seq_len` or `max_tokens` is below 1.
    """
    check_lengths(seq_len, max_tokens)
    sequences: list[Tensor] = []
    total = 0
    for block in _blocks(source, tokenizer, seq_len):
        kept = block if max_tokens is None else block[: max_tokens - total]
        sequences.append(kept)
        total += len(kept)
        if total == max_tokens:
            break
    if not sequences:
        raise DataError(f"no tokens in {source.name}: every text in it is empty")
    return sequences


def check_lengths(seq_len: int, max_tokens: int | None) -> None:
    """Raise ValueError if `seq_len` or `max_tokens` is below 1."""
    if seq_len < 1:
        raise OptionError(f"seq_len must be at least 1 token, not {seq_len}")
    if max_tokens is not None and max_tokens < 1:
        raise OptionError(f"max_tokens must be at least 1, not {max_tokens}: nothing would be measured")


def _blocks(source: TextSource, tokenizer: Any, seq_len: int) -> Iterator[Tensor]:
    """The sequences, in order."""
    if source.kind == "documents":
        for text in source.texts():
            yield from _ids(tokenizer, text).split(seq_len) if text else ()
        return
    rest = torch.empty(0, dtype=torch.int32)
    for number, text in enumerate(source.texts()):
        ids = torch.cat([rest, _ids(tokenizer, text, special=number == 0)])
        whole = len(ids) // seq_len * seq_len
        yield from ids[:whole].split(seq_len) if whole else ()
        rest = ids[whole:]
    if len(rest):
        yield rest


def _ids(tokenizer: Any, text: str, *, special: bool = True) -> Tensor:
    """The tokens of `text`, int32 `[tokens]`."""
    # verbose: else a text longer than the model's window draws a warning, and every stream is.
    ids = tokenizer(text, add_special_tokens=special, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int32)


def batches(sequences: list[Tensor], batch_size: int, pad_token_id: int = 0) -> Iterator[dict[str, Tensor]]:
    """Arguments for the model: `input_ids` `[rows, tokens]` int64, `batch_size` rows or fewer, in order.

    Where the rows are unequal they are padded on the right and `attention_mask`, of the same shape, says so.
    """
    for start in range(0, len(sequences), batch_size):
        rows = sequences[start : start + batch_size]
        lengths = torch.tensor([len(row) for row in rows])
        width = int(lengths.max())
        input_ids = torch.full((len(rows), width), pad_token_id, dtype=torch.int64)
        for target, row in zip(input_ids, rows, strict=True):
            target[: len(row)] = row
        batch = {"input_ids": input_ids}
        if int(lengths.min()) < width:
            batch["attention_mask"] = (torch.arange(width) < lengths.view(-1, 1)).long()
        yield batch


def as_batch(item: Any) -> dict[str, Any]:
    """The arguments that a token batch stands for: a tensor `[rows, tokens]` or `[tokens]`, or a mapping.

    Raises:
        DataError: for anything else, and for a mapping without `input_ids`.
    """
    if isinstance(item, Tensor):
        item = {"input_ids": item}
    if not isinstance(item, Mapping):
        raise DataError(f"a token batch is a tensor or a mapping with input_ids, not {type(item).__name__}")
    batch = dict(item)
    ids = batch.get("input_ids")
    if not isinstance(ids, Tensor) or ids.dim() not in (1, 2) or ids.is_floating_point() or ids.is_complex():
        raise DataError("input_ids of a token batch must be a tensor of whole numbers [rows, tokens]")
    if ids.dim() == 1:
        batch = {
            key: value[None] if isinstance(value, Tensor) and value.shape == ids.shape else value
            for key, value in batch.items()
        }
    mask = batch.get("attention_mask")
    if mask is not None and (not isinstance(mask, Tensor) or mask.shape != batch["input_ids"].shape):
        raise DataError(
            "the attention_mask of a token batch must have the shape of its input_ids [rows, tokens]"
        )
    return batch


def tokens_by_row(batch: Mapping[str, Any]) -> Tensor:
    """The number of real tokens of each row, int64 `[rows]`."""
    ids: Tensor = batch["input_ids"]
    mask = batch.get("attention_mask")
    return torch.full((ids.shape[0],), ids.shape[1]) if mask is None else (mask != 0).sum(1).cpu()


def cut(batch: dict[str, Any], max_tokens: int) -> dict[str, Any]:
    """`batch` up to its first `max_tokens` real tokens: later rows are dropped, later tokens masked."""
    ids: Tensor = batch["input_ids"]
    before = tokens_by_row(batch).cumsum(0) - tokens_by_row(batch)  # real tokens in the rows above
    keep = int((before < max_tokens).sum())
    batch = {
        key: value[:keep] if isinstance(value, Tensor) and value.shape[:1] == ids.shape[:1] else value
        for key, value in batch.items()
    }
    mask = batch.get("attention_mask")
    mask = torch.ones_like(batch["input_ids"]) if mask is None else mask.clone()
    room = max_tokens - int(before[keep - 1])
    mask[-1] *= ((mask[-1] != 0).cumsum(0) <= room).to(mask.dtype)
    return batch | {"attention_mask": mask}


def _is_unicode(text: str) -> bool:
    """False for a lone surrogate, which JSON can spell and no tokenizer takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _open_text(path: Path) -> io.TextIOWrapper:
    # utf-8-sig: a byte-order mark is no text. newline="": the text as it is in the file.
    return path.open(encoding="utf-8-sig", newline="")


def _pieces(file: io.TextIOBase) -> Iterator[str]:
    """The text in pieces of about `PIECE_CHARACTERS`, each but the last ending with a line."""
    while piece := file.read(PIECE_CHARACTERS):
        yield piece + file.readline() if len(piece) == PIECE_CHARACTERS else piece


def _json_texts(file: Iterable[str], path: Path, field: str) -> Iterator[str]:
    """The texts of JSON lines; blank lines are passed over."""
    for number, line in enumerate(file, start=1):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "it is nested too deeply"
            raise DataError(f"{where} is not JSON: {reason}") from error
        if not isinstance(record, dict):
            raise DataError(
                f"{where} is not a JSON object: one object a line is expected, its text in {field!r}"
            )
        if field not in record:
            names = ", ".join(map(repr, list(record)[:8])) or "none"
            raise DataError(f"{where} has no field {field!r} (its fields: {names})")
        if not isinstance(record[field], str) or not _is_unicode(record[field]):
            raise DataError(f"{where}: field {field!r} is not a text")
        yield record[field]
