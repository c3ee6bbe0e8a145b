"""Handle SIGINT and SIGTERM between batches, so that no batch is counted in part."""

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

AGAIN = 1.0  # seconds after which a second signal counts as new, not as the first one passed on
NAMES = {signal.SIGINT: "interrupted", signal.SIGTERM: "ended by SIGTERM"}


class Stopped(KeyboardInterrupt):
    """The run was asked to stop by a signal."""

    def __init__(self, number: int) -> None:
        super().__init__(NAMES.get(signal.Signals(number), "stopped"))
        self.number = number


class SignalHandler:
    """Raise Stopped on a signal, but inside a `guarded()` block only at its end. A second signal interrupts the block."""

    def __init__(self, *, patient: bool = False) -> None:
        """`patient`: raise nothing; `number` holds the signal that came."""
        self.number: int | None = None
        self._since = 0.0
        self._patient = patient
        self._guarded = self._ignored = False

    @contextmanager
    def handling(self) -> Iterator[None]:
        """Handle the signals in this context, if it is entered in the main thread: no other thread can."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before: dict[int, Any] = {}
        try:
            for wanted in NAMES:
                if (
                    signal.getsignal(wanted) is not signal.SIG_IGN
                ):  # ignored in a background job of a script: leave it so
                    before[wanted] = signal.signal(wanted, self._handle)
            yield
        finally:
            for number, handler in before.items():
                if handler is not None:  # None: not set from Python, so it cannot be restored
                    signal.signal(number, handler)

    @contextmanager
    def guarded(self) -> Iterator[None]:
        """Delay signals to the end of this context, so that a forward and its count are not separated."""
        self._guarded = True
        try:
            yield
        finally:
            self._guarded = False
        if self.number is not None and not self._patient:
            raise Stopped(self.number)

    @contextmanager
    def ignore_signals(self) -> Iterator[None]:
        """Ignore signals in this context, while the last checkpoint is written."""
        self._ignored = True
        try:
            yield
        finally:
            self._ignored = False

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._ignored:
            return
        now = time.monotonic()
        if self.number is not None:
            # torchrun passes on a signal that the terminal has already sent to every process: twice the same at once.
            if now - self._since > AGAIN:
                raise KeyboardInterrupt
            return
        self.number, self._since = number, now
        if not self._guarded and not self._patient:
            raise Stopped(number)
