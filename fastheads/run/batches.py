"""Make batches ahead of the model, and track a run's position in the data.

Batches depend on the data and the options, never on timing, so that a resumed run makes the same ones. Only running out of
memory changes them; the position then includes the changed batches.
"""

import copy
import hashlib
import math
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from fastheads.corpus import readers, token_batches
from fastheads.corpus.token_batches import plan
from fastheads.corpus.windows import Corpus, Window
from fastheads.errors import CheckpointError, DataError
from fastheads.models.batch_sharing import Sharing

AHEAD = 4  # batches that are made before the model is ready for them
CPU_TOKENS = 2048  # in a batch, by default
GPU_TOKENS = 32_768  # at most, by default: a GPU does not get faster beyond, and padding grows
GPU_SHARE = 0.5  # of the free memory that a batch may take, by estimate


@dataclass
class Batch:
    """The input of one forward.

    `arguments` are passed to the decoder; tensors are on the CPU. `valid` `[rows, tokens]` is 0 for padding; None: there is no
    padding, or `arguments` has the mask.
    """

    arguments: dict[str, Any]
    valid: Tensor | None
    lengths: list[int]  # valid tokens of each row
    width: int

    @property
    def tokens(self) -> int:
        return sum(self.lengths)

    @property
    def sequences(self) -> int:
        return sum(n > 0 for n in self.lengths)

    @property
    def area(self) -> int:
        """Tokens, padding included."""
        return len(self.lengths) * self.width


class Feed(Protocol):
    """Batches in order. After `next()` call `done()`, or `halve()` if the batch did not fit into memory."""

    total: int | None  # tokens in all; None if unknown
    expected: int | None  # estimate of the same from what was read so far

    @property
    def stretches(self) -> int:
        """Number of windows (joined ones count as one), or token batches, completed; only then are samples representative."""

    def next(self) -> Batch | None:
        """Return the next batch; None after the last."""

    def done(self) -> None:
        """Advance the position past the batch."""

    def halve(self) -> bool:
        """Halve the batch and those after it; False if it is one row already."""

    @property
    def exhausted(self) -> bool:
        """True if every batch is done and `max_tokens` left out no data."""

    def position(self) -> dict[str, Any]:
        """Return the position (JSON) after the last batch that is done."""

    def close(self) -> None:
        """Stop making batches."""


def padding_id(tokenizer: Any, embeddings: int | None) -> int:
    """Return the token id that fills a batch: the tokenizer's, if the model embeds it: on the right any id does."""
    given = getattr(tokenizer, "pad_token_id", None)
    if isinstance(given, int) and given >= 0 and (embeddings is None or given < embeddings):
        return given
    return 0


@dataclass
class _Planned:
    window: Window
    todo: deque[list[int]]


class WindowFeed:
    """Batches of a corpus, made in a thread ahead of the model.

    A batch has rows of about equal length from one window, or from several joined small ones.
    """

    def __init__(
        self,
        corpus: Corpus,
        *,
        budget: int,
        max_rows: int | None,
        pad_token_id: int,
        with_mask: bool,
        pinned: bool,
        embeddings: int | None,
        each_window: bool = False,
        sharing: Sharing | None = None,
        position: dict[str, Any] | None = None,
    ) -> None:
        """Start at `position`, or at the beginning.

        `budget`: tokens in a batch, padding included. `with_mask`: padded batches get an attention mask. `embeddings`: size of
        the model's vocabulary. `each_window`: small windows are not joined (`Corpus.stretches`). `sharing`: which rows may share
        a batch; None: all.

        Raises:
            CheckpointError: `position` is not a value of `position()`, or belongs to another corpus.
        """
        self._sharing = Sharing() if sharing is None else sharing
        self._budget, self._max_rows = budget, max_rows if self._sharing.alone is None else 1
        self._pad, self._with_mask, self._pinned = pad_token_id, with_mask, pinned
        self._embeddings = embeddings
        self._planned: deque[_Planned] = deque()
        self._made: deque[Future[Batch]] = deque()  # the first batches in `_planned`, made or in the making
        self._position: dict[str, Any] = {
            **{"window": None, "todo": None, "windows": 0},
            **{"budget": budget, "tokens": 0},
        }
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="fastheads-batches")
        self._finished = 0  # tokens in the windows that are done
        self._todo: list[list[int]] | None = None
        resume = None
        if position is not None:
            resume, self._todo, self._budget = _checked_position(position)
            self._position = copy.deepcopy(position)
            self._finished = position["tokens"]
            if resume is not None:
                try:
                    corpus.windows(resume).close()  # check it now, not when the first window is read
                except DataError as error:
                    raise CheckpointError(
                        f"the checkpoint has no position in this corpus: {error}"
                    ) from error
        self.total: int | None = None
        self.expected: int | None = None
        self._corpus = corpus
        self._windows = corpus.windows(resume) if each_window else corpus.stretches(resume)

    def next(self) -> Batch | None:
        self._fill()
        return self._made[0].result() if self._made else None

    def done(self) -> None:
        self._made.popleft()
        first = self._planned[0]
        first.todo.popleft()
        if not first.todo:
            self._planned.popleft()
            self._finished += first.window.tokens
        # After the last batch of a window, the position is the next window.
        self._position = {
            "window": first.window.resume if first.todo else first.window.after,
            "todo": list(first.todo) or None,
            "windows": self._position["windows"] + (not first.todo),
            "budget": self._budget,
            "tokens": self._finished,
        }

    def halve(self) -> bool:
        first = self._planned[0]
        rows = first.todo[0]
        if len(rows) == 1:
            return False
        for made in self._made:
            made.cancel()
        self._made.clear()
        area = len(rows) * max(len(first.window.sequences[row]) for row in rows)
        self._budget = max(area // 2, 1)
        smaller: deque[list[int]] = deque()
        for batch in first.todo:
            smaller += self._plan(first.window, batch)
        first.todo = smaller
        for later in list(self._planned)[1:]:  # as a run that resumes here would plan them
            later.todo = deque(self._plan(later.window))
        # A run that resumes here must make these same batches.
        self._position |= {"window": first.window.resume, "todo": list(smaller), "budget": self._budget}
        return True

    @property
    def stretches(self) -> int:
        return int(self._position["windows"])

    @property
    def exhausted(self) -> bool:
        return self.total is not None and not self._planned and self._corpus.read_to_end

    def position(self) -> dict[str, Any]:
        return dict(self._position)

    def close(self) -> None:
        self._worker.shutdown(wait=False, cancel_futures=True)
        close = getattr(self._windows, "close", None)
        if close is not None:
            close()

    def _fill(self) -> None:
        """Start making batches until `AHEAD` are under way."""
        while len(self._made) < AHEAD:
            waiting = sum(len(planned.todo) for planned in self._planned)
            if len(self._made) == waiting and not self._read():
                return
            index = len(self._made)
            for planned in self._planned:
                if index < len(planned.todo):
                    self._made.append(self._worker.submit(self._make, planned.window, planned.todo[index]))
                    break
                index -= len(planned.todo)

    def _read(self) -> bool:
        """Plan the next window; False if there is none."""
        window = next(self._windows, None)
        if window is None:
            self.total = self._finished + sum(planned.window.tokens for planned in self._planned)
            return False
        if self._embeddings is not None and window.largest_token >= self._embeddings:
            # On a GPU an index out of range would abort the process.
            raise DataError(
                f"the tokenizer is not the model's: it gave token {window.largest_token}, the model has {self._embeddings}: "
                "pass the model's own tokenizer"
            )
        share = _share_read(self._corpus, window)
        if share:
            self.expected = round(
                (self._finished + window.tokens + sum(p.window.tokens for p in self._planned)) / share
            )
        todo, self._todo = self._todo, None
        if todo is None:
            self._planned.append(_Planned(window, deque(self._plan(window))))
        else:
            rows = [row for batch in todo for row in batch]
            if len(set(rows)) != len(rows) or not all(0 <= row < len(window.sequences) for row in rows):
                raise CheckpointError("the checkpoint's batches are not of this data")
            self._planned.append(_Planned(window, deque(todo)))
        return True

    def _plan(self, window: Window, rows: list[int] | None = None) -> list[list[int]]:
        rows = list(range(len(window.sequences))) if rows is None else rows
        lengths = [len(window.sequences[row]) for row in rows]
        return [
            [rows[group[i]] for i in batch]
            for group in self._sharing.groups(lengths)
            for batch in plan([lengths[i] for i in group], self._budget, self._max_rows)
        ]

    def _make(self, window: Window, rows: list[int]) -> Batch:
        """Make a batch of the rows, padded on the right."""
        sequences = [window.sequences[row] for row in rows]
        arguments = token_batches.collate(sequences, self._pad, pin_memory=self._pinned)
        valid = arguments.get("attention_mask") if self._with_mask else arguments.pop("attention_mask", None)
        lengths = [len(sequence) for sequence in sequences]
        return Batch(arguments, valid, lengths, max(lengths))


class GivenFeed:
    """Token batches that the caller made. The position is their count, with a digest of their tensors."""

    def __init__(
        self,
        batches: Iterable[dict[str, Any]],
        *,
        max_tokens: int | None,
        digested: bool,
        sharing: Sharing | None = None,
        position: dict[str, Any] | None = None,
    ) -> None:
        """`digested`: keep the digest, which reads every batch. `sharing`: batches whose rows affect each other are not halved.

        Raises:
            CheckpointError: `position` is not a value of `position()`, or belongs to other batches.
        """
        self.total = self.expected = max_tokens
        self._sharing = Sharing() if sharing is None else sharing
        self._left_out = False  # True: max_tokens left out some of the data
        self._at_end = False
        self._batches: Iterator[dict[str, Any]] = self._truncated(batches, max_tokens)
        self._digest = hashlib.sha256() if digested else None
        self._count = self._row = 0  # batches read, and rows done of the last one
        self._parts: deque[dict[str, Any]] = deque()
        self._rows: int | None = None  # maximum rows of a forward, once memory ran out
        if position is not None:
            self._skip(position)

    def next(self) -> Batch | None:
        while not self._parts:
            whole = next(self._batches, None)
            if whole is None:
                self._at_end = True
                return None
            self._count_in(whole)
            self._row = 0
            self._parts += self._split(whole)
        first = self._parts[0]
        width = first["input_ids"].shape[1]
        return Batch(first, None, token_batches.tokens_by_row(first).tolist(), width)

    def done(self) -> None:
        self._row += self._parts.popleft()["input_ids"].shape[0]

    def halve(self) -> bool:
        rows = self._parts[0]["input_ids"].shape[0]
        if rows == 1 or not self._may_be_split(self._parts[0]):
            return False
        self._rows = rows // 2
        self._parts = deque(part for whole in self._parts for part in self._split(whole))
        return True

    @property
    def stretches(self) -> int:
        return self._count - bool(self._parts)

    @property
    def exhausted(self) -> bool:
        return self._at_end and not self._left_out

    def position(self) -> dict[str, Any]:
        return {
            "batches": self._count,
            "row": self._row if self._parts else None,  # rows done of the last batch; None: all
            "spans": [
                part["input_ids"].shape[0] for part in self._parts
            ],  # rows of each remaining part of it
            "rows": self._rows,
            "digest": None if self._digest is None else self._digest.hexdigest(),
        }

    def close(self) -> None:
        pass

    def _truncated(
        self, batches: Iterable[dict[str, Any]], max_tokens: int | None
    ) -> Iterator[dict[str, Any]]:
        """Yield the batches with valid tokens, up to exactly `max_tokens` of these; set `_left_out` if there are more."""
        left = math.inf if max_tokens is None else max_tokens
        for batch in batches:
            tokens = int(token_batches.tokens_by_row(batch).sum())
            if not tokens:
                continue
            self._left_out = tokens > left
            if left <= 0:
                return
            yield batch if tokens <= left else token_batches.truncate(batch, int(left))
            if self._left_out:
                return
            left -= tokens

    def _count_in(self, batch: dict[str, Any]) -> None:
        self._count += 1
        if self._digest is not None:
            for key in sorted(batch):
                value = batch[key]
                if isinstance(value, Tensor):
                    plain = value.detach().cpu().contiguous()
                    self._digest.update(f"{key} {plain.dtype} {list(plain.shape)} ".encode())
                    self._digest.update(plain.flatten().view(torch.uint8).numpy().tobytes())
                elif value is None or isinstance(value, bool | int | float | str):
                    self._digest.update(f"{key} {value!r} ".encode())

    def _may_be_split(self, batch: dict[str, Any]) -> bool:
        """True if parts of the batch give the same numbers as the whole: they keep its width, but not its largest position."""
        positions = self._sharing.by_width and batch.get("position_ids") is not None
        return self._sharing.alone is None and not positions

    def _split(self, batch: dict[str, Any]) -> list[dict[str, Any]]:
        rows = batch["input_ids"].shape[0]
        step = rows if self._rows is None or not self._may_be_split(batch) else self._rows
        return [
            batch if step == rows else _some_rows(batch, start, min(start + step, rows))
            for start in range(0, rows, max(step, 1))
        ] or [batch]

    def _skip(self, position: dict[str, Any]) -> None:
        count, row, rows, spans = (position.get(key) for key in ("batches", "row", "rows", "spans"))
        if (
            not (type(count) is int and count >= 0 and isinstance(spans, list))
            or not all(n is None or (type(n) is int and n >= least) for n, least in ((row, 0), (rows, 1)))
            or not all(type(n) is int and n > 0 for n in spans)
            or bool(spans) != (row is not None)
            or (count == 0 and row is not None)
        ):
            raise CheckpointError("the checkpoint has no position in token batches")
        self._rows = rows
        for number in range(count):
            whole = next(self._batches, None)
            if whole is None:
                raise CheckpointError("the token batches are not those of the checkpoint: there are fewer")
            self._count_in(whole)
            if number == count - 1 and row is not None:
                if row + sum(spans) != whole["input_ids"].shape[0]:
                    raise CheckpointError("the token batches are not those of the checkpoint")
                self._row = row
                for span in spans:
                    self._parts.append(_some_rows(whole, row, row + span))
                    row += span
        if self._digest is not None and self._digest.hexdigest() != position.get("digest"):
            raise CheckpointError("the token batches are not those of the checkpoint")


def _some_rows(batch: dict[str, Any], start: int, stop: int) -> dict[str, Any]:
    rows = batch["input_ids"].shape[0]
    return {
        key: value[start:stop] if isinstance(value, Tensor) and value.shape[:1] == (rows,) else value
        for key, value in batch.items()
    }


def _share_read(corpus: Corpus, window: Window) -> float | None:
    """Return the share of the shard that has been read at the end of the window; None if the size is unknown."""
    size, position = corpus.source.size, window.after["position"]
    path = getattr(corpus.source, "path", None)
    if not size or not isinstance(position, dict) or (path is not None and path.suffix in readers.OPENERS):
        return None
    before = getattr(corpus.source, "bytes_before", None)
    if before is not None:
        position = {"byte": before(position)}
    read = position.get("byte", window.after["characters"] if "item" in position else None)
    if not read:
        return None
    # Convert to this shard, which has done a larger share of its windows than all shards together.
    shards = corpus.shard[1]
    whole = (window.index // shards + 1) * shards / (window.index + 1)
    return min(read / size, 1.0) * whole


def _checked_position(
    position: dict[str, Any],
) -> tuple[dict[str, Any] | None, list[list[int]] | None, int]:
    window, todo, budget = position.get("window"), position.get("todo"), position.get("budget")
    rows_sound = todo is None or (
        isinstance(todo, list)
        and all(isinstance(batch, list) and batch and all(type(n) is int for n in batch) for batch in todo)
    )
    if (
        not (window is None or (isinstance(window, dict) and window))
        or not rows_sound
        or type(budget) is not int
        or budget < 1
        or not all(
            type(n) is int and 0 <= n < 2**62 for n in (position.get("tokens"), position.get("windows"))
        )
    ):
        raise CheckpointError("the checkpoint has no position in a corpus")
    return window, todo, budget


def automatic_budget(config: Any, device: torch.device, dtype: torch.dtype, seq_len: int) -> int:
    """Estimate the tokens in a batch for which a GPU has memory, in a forward without a head or a cache; fixed on the CPU.

    An estimate suffices, since batches that do not fit are halved.
    """
    if device.type != "cuda":
        return max(CPU_TOKENS, seq_len)
    free, _ = torch.cuda.mem_get_info(device)
    free += torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    hidden = getattr(config, "hidden_size", None) or 8192
    inner = getattr(config, "intermediate_size", None) or 4 * hidden
    if isinstance(inner, list | tuple):  # one for each layer
        inner = max(inner)
    # The residual stream, a norm's float32 copy of it, queries, keys, values, and the three tensors of a gated MLP.
    each = dtype.itemsize * (8 * hidden + 3 * inner) + 8 * hidden
    return max(min(int(GPU_SHARE * free / each), GPU_TOKENS), seq_len)
