"""Measure what profiling adds to a forward, on batches of the run itself.

One batch in `EVERY` is run a second time with the hooks paused, directly before or after the forward that counts, and both are
timed: on a GPU by events that are read later, so that nothing waits.
"""

import statistics
import time
from collections import deque
from collections.abc import Callable
from typing import Any

import torch

from fastheads.capture.manager import HookManager

FIRST = 16  # batches before the first sample, so that warm-ups and short runs are not measured
EVERY = 256  # batches between samples, which cost 0.4 % of the time
KEPT = 101  # latest samples


class Overhead:
    """Run forwards, and time some of them twice, with and without hooks."""

    def __init__(self, device: torch.device) -> None:
        self._on_gpu = device.type == "cuda"
        self._batches = 0
        self._ratios: deque[float] = deque(maxlen=KEPT)
        self._pending: deque[tuple[tuple[Any, Any], tuple[Any, Any]]] = deque()

    def run(self, forward: Callable[[], None], hooks: HookManager) -> None:
        """Run a forward that counts, and for a sample one that does not."""
        self._batches += 1
        number, rest = divmod(self._batches - FIRST, EVERY)
        if rest or number < 0:
            forward()
            return

        def plain() -> None:
            with hooks.paused():
                forward()

        # In alternating order, since the second finds its data in the caches. If the plain one comes last, its failure must not
        # make the batch count twice.
        plain_first = number % 2 == 0
        if plain_first:
            without = self._timed(plain)
            profiled = self._timed(forward)
        else:
            profiled = self._timed(forward)
            try:
                without = self._timed(plain)
            except (RuntimeError, MemoryError):  # out of memory, say; the batch has already counted
                return
        self._pending.append((profiled, without))

    @property
    def share(self) -> float | None:
        """The median overhead of profiling as a share of a forward; None before the first sample."""
        while self._pending and self._is_over(self._pending[0]):
            profiled, without = (self._seconds(span) for span in self._pending.popleft())
            if without > 0:
                self._ratios.append(profiled / without - 1)
        return statistics.median(self._ratios) if self._ratios else None

    def _timed(self, call: Callable[[], None]) -> tuple[Any, Any]:
        start = self._now()
        call()
        return start, self._now()

    def _now(self) -> Any:
        if not self._on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _is_over(self, spans: tuple[tuple[Any, Any], tuple[Any, Any]]) -> bool:
        return not self._on_gpu or all(end.query() for _, end in spans)

    def _seconds(self, span: tuple[Any, Any]) -> float:
        start, end = span
        return start.elapsed_time(end) / 1000 if self._on_gpu else end - start
