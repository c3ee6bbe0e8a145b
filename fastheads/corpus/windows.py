"""A corpus as windows of tokenized sequences.

A *window* is a stretch of the corpus, some millions of characters of it, that is tokenized, sorted and batched
together. Which documents are in which window is decided before anything is tokenized, from the texts' own lengths:
with the cut `documents` a rank tokenizes only its own windows. With `stream`, where a block begins where the last
one ended, and with `max_tokens`, which counts tokens in the corpus' order, every rank tokenizes everything and
keeps its own.

Neither the windows nor what is in them depend on timing, on the number of workers or on where reading began.
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

from fastheads.corpus.identity import head_of, item_bytes, tokenizer_fingerprint
from fastheads.corpus.prefetch import prefetched
from fastheads.corpus.readers import Item, characters
from fastheads.corpus.sources import Cut, Source, check_lengths
from fastheads.corpus.tokenizer_pool import TokenizerPool, encoder_of
from fastheads.errors import DataError, OptionError

# A window of a large corpus: about a million tokens, a few dozen batches of a large GPU.
WINDOW_CHARACTERS = 2**22
# Of a small one: few enough that the first is soon ready and several ranks get some.
SMALLEST_WINDOW = 2**16
WINDOWS = 32  # of a corpus between the two
# Small windows make batches together: a quarter of a million tokens, eight batches of a large GPU. Fewer sequences cannot be
# sorted into such batches with little padding (one: 14 %, four: 6 %, eight: under 5 %, for log-normal lengths up to 2,048).
STRETCH_CHARACTERS = 2**20
WINDOW_DOCUMENTS = 2**16  # at most, for those that hold hardly anything

TASK_CHARACTERS = 2**18  # tokenized by one worker at a time
AHEAD = 2  # windows that are read and tokenized while one is in use
# Below it, tokenizing takes less time than starting processes for it.
WORTH_PROCESSES = 2**24


@dataclass(frozen=True)
class Window:
    """A stretch of the corpus; `sequences` are int32 `[tokens]`, in the corpus' order, none of them empty.

    `index` counts the windows of all ranks. `resume`, given to `Corpus.windows()` of the same corpus and options,
    makes this window the first again, `after` the one behind it; both can be written as JSON. `after` also says
    what was read until then, by all ranks together: windows (`index`), `documents`, `characters` and a running hash
    of them (`sha256`).
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
        """The largest id: a model must have more embeddings than that."""
        return max(int(ids.max()) for ids in self.sequences)


@dataclass
class _Draft:
    """A window whose documents have been read, and are being tokenized if they are wanted."""

    before: dict[str, Any]
    after: dict[str, Any]
    ended: bool  # with the corpus
    futures: "list[Future[list[Tensor]]]"
    wanted: bool  # else another rank's
    starts: frozenset[int] = (
        frozenset()
    )  # of a stream of several texts, which futures begin one that others precede


class Corpus:
    """The windows of `source`; of them this rank gives those with `index % shard[1] == shard[0]`.

    Args:
        source: what `corpus.open_source` returns.
        tokenizer: of transformers, or a function with the same signature.
        cut: "documents": each is a sequence of its own, cut at `seq_len`; of a text file, each line.
            "stream": contiguous blocks of `seq_len` tokens that run on from one document to the next, between
            which there is the tokenizer's EOS token if it has one (between chats, what their template writes); only
            the last block can be shorter. None: a text file is a stream, all else documents.
        seq_len: tokens in a sequence, at most.
        max_tokens: stop after so many tokens of the corpus, all ranks together; the last sequence is cut.
        shard: this rank and the number of ranks.
        workers: processes that tokenize; 0: a thread. None: by the size of the corpus and the number of cores.
        window_characters: a window ends with the document that makes it as long. None: by the size of the corpus.

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
                f"{source.name}: some are texts, which are streams, and some are documents: cut='documents' (--cut documents) "
                "takes the lines of a text as documents; else profile them one by one, and merge"
            )
        self.cut: Cut = source.kind if cut is None else cut
        self.seq_len, self.max_tokens, self.shard = seq_len, max_tokens, shard
        # In characters, if a token is four of them; None where nobody knows.
        sizes = [size for size in (source.size, max_tokens and 4 * max_tokens) if size is not None]
        expected = min(sizes, default=None)
        if workers is None:
            cores = _cores() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
            small = expected is not None and expected < WORTH_PROCESSES
            workers = 0 if small else max(1, min(4, cores - 1))
        self.workers = workers
        self.window_characters = window_characters or _window_characters(expected)
        self._stretch_characters = STRETCH_CHARACTERS if window_characters is None else 0
        head, probe, chat = head_of(source)
        self._encoder = encoder_of(tokenizer, probe, chat)
        # A stream of one text is no sequence of documents: nothing comes between its pieces.
        self._pieces = source.kind == self.cut == "stream"
        # Chats have the marks of their template.
        self._chat = chat
        self._separator = None if self.cut == "documents" or self._pieces or chat else self._eos()
        # Between texts of several files.
        self._between = self._eos() if self._pieces and hasattr(source, "parts") else None
        self.read_to_end = False  # whether the last `windows()` came to the end of the data
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
        # The same for all shards, and for all names of the same content.
        named = {key: value for key, value in self.identity.items() if key not in ("source", "shard")}
        self._mark = hashlib.sha256(json.dumps(named, sort_keys=True).encode()).hexdigest()[:16]

    def with_shard(self, shard: tuple[int, int]) -> "Corpus":
        """The same corpus with the windows of another rank.

        Raises:
            OptionError: the shard is out of range.
        """
        _check_shard(shard)
        other = copy.copy(self)
        other.shard = (shard[0], shard[1])
        other.identity = self.identity | {"shard": list(shard)}
        return other

    def windows(self, resume: Mapping[str, Any] | None = None) -> Generator[Window]:
        """The windows of this rank that hold tokens, from the first on or from where `resume` says.

        The next ones are read and tokenized meanwhile; closing the iterator ends that.

        Raises:
            DataError: the source cannot be read any further, holds no tokens, or `resume` is of another corpus.
            TokenizerError: a tokenizing process has ended, or the tokenizer failed.
        """
        return self._windows(self._start() if resume is None else self._checked(resume))

    def stretches(self, resume: Mapping[str, Any] | None = None) -> Iterator[Window]:
        """The same, with small windows joined until they hold enough sequences to be sorted into batches with little padding;
        where the size of windows was given, each by itself. `resume` is that of a stretch, or its `after`.
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
            prefetched(self._drafts(start, pool), AHEAD) as drafts,
        ):
            for draft in drafts:
                before, after = draft.before, draft.after
                if self._tokenizes_all:
                    before |= {"tokens": total, "rest": rest.tolist()}
                try:
                    documents = [ids for future in draft.futures for ids in future.result()]
                except DataError as error:
                    raise DataError(f"{self.source.name}: {error}") from error
                sequences, rest = self._sequences(documents, rest, draft.ended, draft.starts)
                read = sum(map(len, sequences))
                if self.max_tokens is not None:
                    sequences = _limited(sequences, self.max_tokens - total)
                cut_off = read > sum(map(len, sequences)) or len(rest) > 0
                total += sum(map(len, sequences))
                if self._tokenizes_all:
                    after |= {"tokens": total, "rest": rest.tolist()}
                # Another rank's window that was not tokenized here counts by what can be seen of it.
                seen |= bool(sequences) or (not draft.wanted and after["characters"] > before["characters"])
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
                    self.read_to_end = not cut_off and (draft.ended or _are_empty(drafts))
                    return
        self.read_to_end = True
        if not seen:
            raise DataError(f"no tokens in {self.source.name}: every text in it is empty")

    def _drafts(self, at: dict[str, Any], pool: TokenizerPool) -> Iterator[_Draft]:
        """The windows from `at` on, of all ranks."""
        try:
            reader = self.source.read(self.cut, at["position"])
        except KeyError as error:
            raise DataError("this is no position in a corpus") from error
        try:
            ended = False
            while not ended:
                wanted = self._tokenizes_all or at["index"] % self.shard[1] == self.shard[0]
                futures: list[Future[list[Tensor]]] = []
                starts: list[int] = []
                task: list[Item] = []
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
                    digest.update(item_bytes(item) + (b"" if self._pieces else b"\0"))
                    length, count = length + size, count + 1
                    if not wanted or not item:
                        continue
                    task.append(item)
                    held += size
                    # The first piece of a stream is alone: it has the BOS token.
                    if held >= TASK_CHARACTERS or self._pieces:
                        first = at["documents"] + count == 1
                        begins = self._pieces and getattr(reader, "begins", first)
                        special = not self._pieces or begins
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
                yield _Draft(dict(at), dict(after), ended, futures, wanted, frozenset(starts))
                at = after
        finally:
            reader.close()

    def _sequences(
        self, documents: list[Tensor], rest: Tensor, ended: bool, starts: frozenset[int]
    ) -> tuple[list[Tensor], Tensor]:
        """The sequences of a window, and the tokens that are left for the next."""
        if self.cut == "documents":
            return [block for ids in documents if len(ids) for block in ids.split(self.seq_len)], rest
        parts = [rest]
        for number, ids in enumerate(documents):
            if number in starts and self._between is not None and parts[-1][-1:].tolist() != [self._between]:
                parts.append(torch.tensor([self._between], dtype=torch.int32))
            parts.append(ids)
            if self._separator is not None and len(ids) and int(ids[-1]) != self._separator:
                parts.append(torch.tensor([self._separator], dtype=torch.int32))
        stream = torch.cat(parts)
        whole = len(stream) if ended else len(stream) // self.seq_len * self.seq_len
        # A copy, else the few tokens would keep the whole window in memory.
        return list(stream[:whole].split(self.seq_len)) if whole else [], stream[whole:].clone()

    def _eos(self) -> int | None:
        """The token between documents, unless the tokenizer puts it in front of each (OPT's BOS is its EOS)."""
        eos = getattr(self.tokenizer, "eos_token_id", None)
        if not isinstance(eos, int):
            return None
        (ids,) = self._encoder(["a"], special=True)
        return None if ids and ids[0] == eos else eos

    def _start(self) -> dict[str, Any]:
        zero = dict.fromkeys(("index", "documents", "characters", "tokens"), 0)
        return zero | {"position": None, "rest": [], "sha256": "", "corpus": self._mark}

    def _checked(self, resume: Mapping[str, Any]) -> dict[str, Any]:
        """`resume`, which may come from a file, if it is what `windows` made for this corpus; else DataError."""
        start = self._start()
        if not isinstance(resume, Mapping) or resume.keys() != start.keys():
            raise DataError("this is no position in a corpus")
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
            raise DataError("this is no position in a corpus")
        if resume["corpus"] != self._mark:
            raise DataError(
                f"the position is one in another corpus than {self.source.name}, or it was cut or tokenised otherwise"
            )
        return dict(resume)


def _check_shard(shard: tuple[int, int]) -> None:
    if not 0 <= shard[0] < shard[1]:
        raise OptionError(f"shard {shard} must be a number below that of the shards, and that")


def _window_characters(expected: int | None) -> int:
    """How long a window is, for as many characters."""
    if expected is None:
        return WINDOW_CHARACTERS
    return min(WINDOW_CHARACTERS, max(SMALLEST_WINDOW, expected // WINDOWS))


def _joined(windows: list[Window]) -> Window:
    """One window of several that follow one another."""
    return Window(
        index=windows[-1].index,
        sequences=[sequence for window in windows for sequence in window.sequences],
        resume=windows[0].resume,
        after=windows[-1].after,
        documents=sum(window.documents for window in windows),
        characters=sum(window.characters for window in windows),
    )


def _cores() -> int:
    """Those that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _limited(sequences: list[Tensor], room: int) -> list[Tensor]:
    """`sequences` up to `room` tokens, the last one cut."""
    kept = []
    for ids in sequences:
        if room <= 0:
            break
        kept.append(ids[:room])
        room -= len(ids)
    return kept


def _are_empty(drafts: Iterator[_Draft]) -> bool:
    """Whether no text is left; False too where what is left cannot be read."""
    try:
        return all(draft.after["characters"] == draft.before["characters"] for draft in drafts)
    except DataError:
        return False
