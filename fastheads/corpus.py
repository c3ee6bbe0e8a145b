"""A corpus as windows of tokenised sequences, and the batches of a window.

A *window* is a stretch of the corpus, some millions of characters of it, that is tokenised, sorted and batched
together. Which texts are in which window is decided before anything is tokenised, from the texts' own lengths:
with the cut `documents` a rank tokenises only its own windows. With `stream`, where a block begins where the last
one ended, and with `max_tokens`, which counts tokens in the corpus' order, every rank tokenises everything and
keeps its own.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from fastheads.data import TextSource, check_lengths
from fastheads.errors import DataError

WINDOW_CHARACTERS = 2**22


@dataclass(frozen=True)
class Window:
    """A stretch of the corpus. `index` counts the windows of all ranks; `sequences` are int32 `[tokens]`, in order.

    `resume`, given to `Corpus.windows()` of the same corpus and options, makes this window the first again;
    `after` the one behind it. Both can be written as JSON.
    """

    index: int
    sequences: list[Tensor]
    resume: dict[str, Any]
    after: dict[str, Any]
    documents: int
    characters: int

    @property
    def tokens(self) -> int:
        return sum(map(len, self.sequences))


class Corpus:
    """The windows of `source`, of which this rank gives those with `index % shard[1] == shard[0]`."""

    def __init__(
        self,
        source: TextSource,
        tokenizer: Any,
        *,
        cut: Literal["documents", "stream"] | None = None,
        seq_len: int,
        max_tokens: int | None = None,
        shard: tuple[int, int] = (0, 1),
        workers: int | None = None,
        window_characters: int = WINDOW_CHARACTERS,
    ) -> None:
        check_lengths(seq_len, max_tokens)
        self.source, self.tokenizer = source, tokenizer
        self.cut, self.seq_len, self.max_tokens, self.shard = cut or source.kind, seq_len, max_tokens, shard
        self.window_characters = window_characters

    @property
    def identity(self) -> dict[str, Any]:
        return {
            "source": self.source.name,
            "sha256": self.source.sha256,
            "cut": self.cut,
            "seq_len": self.seq_len,
            "max_tokens": self.max_tokens,
            "shard": list(self.shard),
            "window_characters": self.window_characters,
        }

    def windows(self, resume: dict[str, Any] | None = None) -> Iterator[Window]:
        """This rank's windows, from the first or from the one that `resume` belongs to."""
        at = resume or {"index": 0, "item": 0, "tokens": 0, "rest": []}
        fresh = not at["index"]
        any_text = False
        texts = self.source.texts()
        for _ in range(at["item"]):
            next(texts)
        ended = False
        while not ended and (self.max_tokens is None or at["tokens"] < self.max_tokens):
            held: list[str] = []
            while sum(map(len, held)) < self.window_characters:
                text = next(texts, None)
                if text is None:
                    ended = True
                    break
                held.append(text)
            sequences, rest = self._cut(held, at, ended)
            any_text |= bool(sequences)
            tokens = sum(map(len, sequences))
            after = {
                "index": at["index"] + 1,
                "item": at["item"] + len(held),
                "tokens": at["tokens"] + tokens,
            }
            after["rest"] = rest
            if sequences and at["index"] % self.shard[1] == self.shard[0]:
                yield Window(at["index"], sequences, at, after, len(held), sum(map(len, held)))
            at = after
        if fresh and not any_text:
            raise DataError(f"no tokens in {self.source.name}: every text in it is empty")

    def _cut(self, texts: list[str], at: dict[str, Any], ended: bool) -> tuple[list[Tensor], list[int]]:
        from fastheads.data import _ids

        sequences: list[Tensor] = []
        rest = torch.tensor(at["rest"], dtype=torch.int32)
        for number, text in enumerate(texts, start=at["item"]):
            if self.cut == "documents":
                sequences += _ids(self.tokenizer, text).split(self.seq_len) if text else ()
            else:
                ids = torch.cat([rest, _ids(self.tokenizer, text, special=number == 0)])
                whole = len(ids) // self.seq_len * self.seq_len
                sequences += ids[:whole].split(self.seq_len) if whole else ()
                rest = ids[whole:]
        if ended and len(rest):
            sequences.append(rest)
            rest = rest[:0]
        if self.max_tokens is not None:
            room = self.max_tokens - at["tokens"]
            kept = []
            for ids in sequences:
                if room > 0:
                    kept.append(ids[:room])
                room -= len(ids)
            sequences = kept
        return sequences, rest.tolist()


def plan(lengths: Sequence[int], budget: int, max_rows: int | None = None) -> list[list[int]]:
    """The rows of each batch: longest first, rows × longest ≤ `budget` and rows ≤ `max_rows`, but at least one row.

    Equal lengths keep their order.
    """
    batches: list[list[int]] = []
    width = 0
    for row in sorted(range(len(lengths)), key=lambda row: (-lengths[row], row)):
        full = not batches or (len(batches[-1]) + 1) * width > budget or len(batches[-1]) == max_rows
        if full:
            batches.append([])
            width = lengths[row]
        batches[-1].append(row)
    return batches
