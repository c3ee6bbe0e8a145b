"""SIGINT and SIGTERM, heeded between two batches, so that no batch is half counted."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

AGAIN = 1.0  # seconds after which another signal is one of its own
NAMES = {signal.SIGINT: "interrupted", signal.SIGTERM: "ended by SIGTERM"}


class Stopped(KeyboardInterrupt):
    """A signal asks the run to stop."""

    def __init__(self, number: int) -> None:
        super().__init__(NAMES.get(signal.Signals(number), "stopped"))
        self.number = number


class SignalHandler:
    """Raises Stopped at once, or at the end of a `guarded()` block. A second signal breaks into that block too."""

    def __init__(self, *, patient: bool = False) -> None:
        """`patient`: raise nothing by itself; `number` says that a signal came."""
        self.number: int | None = None
        self._since = 0.0
        self._patient = patient
        self._guarded = self._deaf = False

    @contextmanager
    def handling(self) -> Iterator[None]:
        """A context in which this heeds the signals, if it is entered in the main thread; elsewhere nobody can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: dict[int, Any] = {}
        try:
            for wanted in NAMES:
                if (
                    signal.getsignal(wanted) is not signal.SIG_IGN
                ):  # as for a job that a script left in the background
                    before[wanted] = signal.signal(wanted, self._heed)
            yield
        finally:
            for number, handler in before.items():
                if handler is not None:  # None: set by other than Python, and not to be had
                    signal.signal(number, handler)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """What belongs together: a forward, and the note that it is done."""
        self._guarded = True
        try:
            yield
        finally:
            self._guarded = False
        if self.number is not None and not self._patient:
            raise Stopped(self.number)

    @contextmanager
    def ignore_signals(self) -> Iterator[None]:
        """A context in which no signal does anything: the last checkpoint is written."""
        self._deaf = True
        try:
            yield
        finally:
            self._deaf = False

    def _heed(self, number: int, frame: FrameType | None) -> None:
        if self._deaf:
            return
        now = time.monotonic()
        if self.number is not None:
            # torchrun passes on what the terminal has sent to everybody already: the same signal twice at once.
            if now - self._since > AGAIN:
                raise KeyboardInterrupt
            return
        self.number, self._since = number, now
        if not self._guarded and not self._patient:
            raise Stopped(number)
