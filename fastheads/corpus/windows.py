"""Split a corpus into windows of tokenized sequences.

A *window* is a contiguous part of the corpus, up to some millions of characters, that is tokenized, sorted and batched
together. Documents are assigned to windows by their length in characters, before tokenizing, so that with the cut `documents`
a rank tokenizes only its own windows. With `stream`, where a block begins where the last one ended, and with `max_tokens`,
which counts tokens in the corpus' order, every rank tokenizes everything and keeps its own windows.

Windows and their contents do not depend on timing, on the number of workers or on the position that reading started from.
"""

import copy
import hashlib
import json
import os
from collections.abc import Generator, Iterator, Mapping
from concurrent.futures import Future
from contextlib import closing
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from fastheads.corpus.identity import beginning_of, document_bytes, tokenizer_fingerprint
from fastheads.corpus.prefetch import prefetched
from fastheads.corpus.readers import Document, characters
from fastheads.corpus.sources import Cut, Source, check_lengths
from fastheads.corpus.tokenizer_pool import TokenizerPool, make_encoder
from fastheads.errors import DataError, OptionError

# A window of a large corpus: about a million tokens, a few dozen batches of a large GPU.
WINDOW_CHARACTERS = 2**22
# A window of a small corpus: small enough that the first is soon ready and several ranks get some.
SMALLEST_WINDOW = 2**16
WINDOWS_PER_CORPUS = 32  # for a corpus between the two
# Small windows are batched together, up to a quarter of a million tokens: eight batches of a large GPU. With fewer batches
# padding grows (one batch: 14 %, four: 6 %, eight: under 5 %, for log-normal lengths up to 2,048).
STRETCH_CHARACTERS = 2**20
WINDOW_DOCUMENTS = 2**16  # at most, for nearly empty documents

TASK_CHARACTERS = 2**18  # tokenized by one worker at a time
AHEAD = 2  # windows that are read and tokenized while one is in use
# Below this, starting processes takes longer than tokenizing.
MIN_CHARACTERS_FOR_PROCESSES = 2**24


@dataclass(frozen=True)
class Window:
    """A contiguous part of the corpus. `sequences` are int32 `[tokens]`, in the corpus' order, none empty.

    `index` counts the windows of all ranks. `resume` and `after` are positions, as JSON values: `Corpus.windows()` of the same
    corpus and options, given `resume`, starts with this window, and given `after`, with the next. `after` also counts what
    all ranks together have read by then: windows (`index`), `documents`, `characters`, and a running hash (`sha256`).
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

    @property
    def largest_token(self) -> int:
        """The largest token id; the model needs more embeddings than that."""
        return max(int(ids.max()) for ids in self.sequences)


@dataclass
class _PendingWindow:
    """A window that has been read; its documents are being tokenized if `wanted`."""

    before: dict[str, Any]
    after: dict[str, Any]
    ended: bool  # True: the last window of the corpus
    futures: "list[Future[list[Tensor]]]"
    wanted: bool  # False: another rank's, not tokenized here
    # In a stream of several files: indices of the futures that begin a file other than the first.
    starts: frozenset[int] = frozenset()


class Corpus:
    """The windows of `source`; this rank yields those with `index % shard[1] == shard[0]`.

    Args:
        source: the result of `corpus.open_source`.
        tokenizer: of transformers, or a function with the same signature.
        cut: "documents": each document (each line, in a text file) is tokenized by itself, and split where it exceeds `seq_len`.
            "stream": contiguous blocks of `seq_len` tokens across documents, which are separated by the tokenizer's EOS token
            if it has one (chats by what their template writes); only the last block can be shorter.
            None: a text file is a stream, all else documents.
        seq_len: maximum tokens in a sequence.
        max_tokens: stop after so many tokens of the corpus, all ranks together; the last sequence is truncated.
        shard: this rank and the number of ranks.
        workers: number of tokenizing processes; 0: a thread. None: by the size of the corpus and the number of cores.
        window_characters: a window ends with the document that reaches this length. None: by the size of the corpus.

    Raises:
        DataError: the source cannot be read.
        OptionError: an option is unknown or out of range.
    """

    def __init__(
        self,
        source: Source,
        tokenizer: Any,
        *,
        cut: Cut | None = None,
        seq_len: int,
        max_tokens: int | None = None,
        shard: tuple[int, int] = (0, 1),
        workers: int | None = None,
        window_characters: int | None = None,
    ) -> None:
        check_lengths(seq_len, max_tokens)
        shard = (shard[0], shard[1])
        if cut not in (None, "documents", "stream"):
            raise OptionError(f"unknown cut {cut!r}: choose documents or stream")
        _check_shard(shard)
        if window_characters is not None and window_characters < 1:
            raise OptionError(f"window_characters must be at least 1, not {window_characters}")
        if workers is not None and workers < 0:
            raise OptionError(f"workers must be 0 or more, not {workers}")
        self.source, self.tokenizer = source, tokenizer
        if getattr(source, "mixed", False) and cut != "documents":
            raise OptionError(
                f"{source.name}: text files (streams) and documents cannot be mixed: cut='documents' (--cut documents) "
                "takes each line of a text as a document; or profile the files one by one, and merge"
            )
        self.cut: Cut = source.kind if cut is None else cut
        self.seq_len, self.max_tokens, self.shard = seq_len, max_tokens, shard
        # In characters, at four a token; None if unknown.
        sizes = [size for size in (source.size, max_tokens and 4 * max_tokens) if size is not None]
        expected = min(sizes, default=None)
        if workers is None:
            cores = _cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            small = expected is not None and expected < MIN_CHARACTERS_FOR_PROCESSES
            workers = 0 if small else max(1, min(4, cores - 1))
        self.workers = workers
        self.window_characters = window_characters or _window_characters(expected)
        self._stretch_characters = STRETCH_CHARACTERS if window_characters is None else 0
        head, probe, chat = beginning_of(source)
        self._encoder = make_encoder(tokenizer, probe, chat)
        # The chunks of one text are not separated.
        self._chunked = source.kind == self.cut == "stream"
        # Chats are separated by their template.
        self._chat = chat
        self._separator = None if self.cut == "documents" or self._chunked or chat else self._eos()
        # Between several files.
        self._file_separator = self._eos() if self._chunked and hasattr(source, "parts") else None
        self.read_to_end = False  # True if the last `windows()` reached the end of the data
        self._tokenizes_all = self.cut == "stream" or max_tokens is not None
        self.identity: dict[str, Any] = {
            "source": source.name,
            "sha256": source.sha256,
            "bytes": source.size,
            "head_sha256": head,
            "cut": self.cut,
            "seq_len": seq_len,
            "max_tokens": max_tokens,
            "tokenizer": tokenizer_fingerprint(tokenizer, chat),
            "shard": list(shard),
            "window_characters": self.window_characters,
            **dict(source.version),
        }
        # Independent of the shard and of the source's name.
        named = {key: value for key, value in self.identity.items() if key not in ("source", "shard")}
        self._corpus_id = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:16]

    def with_shard(self, shard: tuple[int, int]) -> "Corpus":
        """Return the same corpus with the windows of another rank.

        Raises:
            OptionError: the shard is out of range.
        """
        _check_shard(shard)
        other = copy.copy(self)
        other.shard = (shard[0], shard[1])
        other.identity = self.identity | {"shard": list(shard)}
        return other

    def windows(self, resume: Mapping[str, Any] | None = None) -> Generator[Window]:
        """Yield the windows of this rank that hold tokens, from the first or from the position `resume`.

        The next windows are read and tokenized in the background; close the iterator to stop that.

        Raises:
            DataError: the source cannot be read, holds no tokens, or `resume` belongs to another corpus.
            TokenizerError: a tokenizing process has ended, or the tokenizer failed.
        """
        return self._windows(self._start() if resume is None else self._checked_resume(resume))

    def stretches(self, resume: Mapping[str, Any] | None = None) -> Iterator[Window]:
        """As `windows`, but join small windows so that their sequences can be batched with little padding.

        Windows are not joined if `window_characters` was given. `resume` is the `resume` or `after` of a joined window.
        """
        with closing(self.windows(resume)) as windows:
            stretch: list[Window] = []
            for window in windows:
                stretch.append(window)
                if sum(part.characters for part in stretch) >= self._stretch_characters:
                    yield _joined(stretch)
                    stretch = []
            if stretch:
                yield _joined(stretch)

    def _windows(self, start: dict[str, Any]) -> Generator[Window]:
        rest = torch.tensor(start["rest"], dtype=torch.int32)
        total = start["tokens"]
        seen = bool(start["index"])
        self.read_to_end = False
        with (
            closing(TokenizerPool(self._encoder, self.workers)) as pool,
            prefetched(self._pending_windows(start, pool), AHEAD) as pending_windows,
        ):
            for pending in pending_windows:
                before, after = pending.before, pending.after
                if self._tokenizes_all:
                    before |= {"tokens": total, "rest": rest.tolist()}
                try:
                    documents = [ids for future in pending.futures for ids in future.result()]
                except DataError as error:
                    raise DataError(f"{self.source.name}: {error}") from error
                sequences, rest = self._sequences(documents, rest, pending.ended, pending.starts)
                read = sum(map(len, sequences))
                if self.max_tokens is not None:
                    sequences = _truncated(sequences, self.max_tokens - total)
                cut_off = read > sum(map(len, sequences)) or len(rest) > 0
                total += sum(map(len, sequences))
                if self._tokenizes_all:
                    after |= {"tokens": total, "rest": rest.tolist()}
                # Another rank's window is not tokenized here: judge by its characters.
                seen |= bool(sequences) or (not pending.wanted and after["characters"] > before["characters"])
                if sequences and before["index"] % self.shard[1] == self.shard[0]:
                    yield Window(
                        index=before["index"],
                        sequences=sequences,
                        resume=before,
                        after=after,
                        documents=after["documents"] - before["documents"],
                        characters=after["characters"] - before["characters"],
                    )
                if total == self.max_tokens:
                    self.read_to_end = not cut_off and (pending.ended or _are_empty(pending_windows))
                    return
        self.read_to_end = True
        if not seen:
            raise DataError(f"no tokens in {self.source.name}: every text in it is empty")

    def _pending_windows(self, at: dict[str, Any], pool: TokenizerPool) -> Iterator[_PendingWindow]:
        """Yield the windows of all ranks from the position `at` on, and submit their documents to `pool`."""
        try:
            reader = self.source.read(self.cut, at["position"])
        except KeyError as error:
            raise DataError("the position to resume from is not one in this corpus") from error
        try:
            ended = False
            while not ended:
                wanted = self._tokenizes_all or at["index"] % self.shard[1] == self.shard[0]
                futures: list[Future[list[Tensor]]] = []
                starts: list[int] = []
                task: list[Document] = []
                held = length = count = 0  # characters of the task; characters and documents of the window
                digest = hashlib.sha256(at["sha256"].encode())
                while not ended and length < self.window_characters and count < WINDOW_DOCUMENTS:
                    item = next(reader, None)  # type: ignore[call-overload]
                    if item is None:
                        ended = True
                        break
                    if not isinstance(item, str) and not self._chat:
                        where = f"{self.source.name}, document {at['documents'] + count}"
                        raise DataError(f"{where} is a chat where the first ones are texts")
                    size = characters(item)
                    digest.update(document_bytes(item) + (b"" if self._chunked else b"\0"))
                    length, count = length + size, count + 1
                    if not wanted or not item:
                        continue
                    task.append(item)
                    held += size
                    # Chunks are submitted one by one: only the first of a file gets the BOS token.
                    if held >= TASK_CHARACTERS or self._chunked:
                        first = at["documents"] + count == 1
                        begins = self._chunked and getattr(reader, "begins", first)
                        special = not self._chunked or begins
                        if begins and not first:
                            starts.append(len(futures))
                        futures.append(pool.submit(task, special, at["documents"] + count - len(task)))
                        task, held = [], 0
                if task:
                    futures.append(pool.submit(task, True, at["documents"] + count - len(task)))
                after = at | {
                    "index": at["index"] + 1,
                    "documents": at["documents"] + count,
                    "characters": at["characters"] + length,
                    "sha256": digest.hexdigest(),
                    "position": reader.position(),
                }
                yield _PendingWindow(dict(at), dict(after), ended, futures, wanted, frozenset(starts))
                at = after
        finally:
            reader.close()

    def _sequences(
        self, documents: list[Tensor], rest: Tensor, ended: bool, starts: frozenset[int]
    ) -> tuple[list[Tensor], Tensor]:
        """Return the sequences of a window, and the tokens left over for the next."""
        if self.cut == "documents":
            return [block for ids in documents if len(ids) for block in ids.split(self.seq_len)], rest
        parts = [rest]
        for number, ids in enumerate(documents):
            if (
                number in starts
                and self._file_separator is not None
                and parts[-1][-1:].tolist() != [self._file_separator]
            ):
                parts.append(torch.tensor([self._file_separator], dtype=torch.int32))
            parts.append(ids)
            if self._separator is not None and len(ids) and int(ids[-1]) != self._separator:
                parts.append(torch.tensor([self._separator], dtype=torch.int32))
        stream = torch.cat(parts)
        whole = len(stream) if ended else len(stream) // self.seq_len * self.seq_len
        # A clone, since a view of the few tokens would keep the whole window in memory.
        return list(stream[:whole].split(self.seq_len)) if whole else [], stream[whole:].clone()

    def _eos(self) -> int | None:
        """Return the EOS token to put between documents; None if the tokenizer begins each with it (OPT's BOS is its EOS)."""
        eos = getattr(self.tokenizer, "eos_token_id", None)
        if not isinstance(eos, int):
            return None
        (ids,) = self._encoder(["a"], special=True)
        return None if ids and ids[0] == eos else eos

    def _start(self) -> dict[str, Any]:
        zero = dict.fromkeys(("index", "documents", "characters", "tokens"), 0)
        return zero | {"position": None, "rest": [], "sha256": "", "corpus": self._corpus_id}

    def _checked_resume(self, resume: Mapping[str, Any]) -> dict[str, Any]:
        """Return `resume`, which may come from a file; raise DataError if it is no position in this corpus."""
        start = self._start()
        if not isinstance(resume, Mapping) or resume.keys() != start.keys():
            raise DataError("the position to resume from is not one in this corpus")
        rest, position = resume["rest"], resume["position"]
        counts = [resume[key] for key in ("index", "documents", "characters", "tokens")]
        if isinstance(position, dict):
            counts += [count for key, count in position.items() if key != "state"]
        if (
            not isinstance(rest, list)
            or not isinstance(position, dict | None)
            or not isinstance(resume["sha256"], str)
            or len(rest) >= self.seq_len
            or not all(type(count) is int and 0 <= count < 2**63 for count in counts)
            or not all(type(token) is int and 0 <= token < 2**31 for token in rest)
        ):
            raise DataError("the position to resume from is not one in this corpus")
        if resume["corpus"] != self._corpus_id:
            raise DataError(
                f"the position belongs to another corpus than {self.source.name}, or to one cut or tokenized differently"
            )
        return dict(resume)


def _check_shard(shard: tuple[int, int]) -> None:
    if not 0 <= shard[0] < shard[1]:
        raise OptionError(f"shard must be (index, number of shards) with 0 <= index < number, not {shard}")


def _window_characters(expected: int | None) -> int:
    """Choose the length of a window for a corpus of `expected` characters."""
    if expected is None:
        return WINDOW_CHARACTERS
    return min(WINDOW_CHARACTERS, max(SMALLEST_WINDOW, expected // WINDOWS_PER_CORPUS))


def _joined(windows: list[Window]) -> Window:
    """Join consecutive windows into one."""
    return Window(
        index=windows[-1].index,
        sequences=[sequence for window in windows for sequence in window.sequences],
        resume=windows[0].resume,
        after=windows[-1].after,
        documents=sum(window.documents for window in windows),
        characters=sum(window.characters for window in windows),
    )


def _cores() -> int:
    """Count the cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _truncated(sequences: list[Tensor], room: int) -> list[Tensor]:
    """Truncate `sequences` to `room` tokens in all."""
    kept = []
    for ids in sequences:
        if room <= 0:
            break
        kept.append(ids[:room])
        room -= len(ids)
    return kept


def _are_empty(pending_windows: Iterator[_PendingWindow]) -> bool:
    """True if no text is left; False if the rest cannot be read."""
    try:
        return all(pending.after["characters"] == pending.before["characters"] for pending in pending_windows)
    except DataError:
        return False
