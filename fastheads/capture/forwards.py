"""Keep the forwards under way: a stack for each thread, and the one that uses the manager's own queues.

The first forward under way uses the manager's own queues and pending moments (`main`). One that begins while it runs, in another
thread or called inside it, has its own, which are merged when it ends (`beside`). A forward that a graph holds as a whole is
`whole`: Python is told of its start by an operator, and not of its end.
"""

import threading
from collections.abc import Callable
from threading import get_ident
from types import FrameType
from typing import Any

import torch
from torch import nn

from fastheads.capture.forward import Forward, on_stack


class Forwards:
    """Every forward of one manager that is under way."""

    def __init__(
        self,
        own_queues: dict[torch.device, Any],
        main_ends: Callable[[], None],
        main_fails: Callable[[], None],
    ) -> None:
        """`own_queues`: the manager's. When the forward that uses them ends, `main_ends` is called; if it does not count,
        `main_fails` is called before.
        """
        self._own_queues, self._main_ends, self._main_fails = own_queues, main_ends, main_fails
        # Of this thread: `forward`, the innermost one under way, and `paused`. No subclass: Dynamo would not guard what it reads.
        self.here = threading.local()
        self.main: Forward | None = None
        self._beside: list[Forward] = []
        self.whole = Forward(own_queues)
        self.epoch = 0  # how often every sample was forgotten

    def is_paused(self) -> bool:
        """True within `paused()` in this thread."""
        return getattr(self.here, "paused", False)

    def innermost(self) -> Forward | None:
        """Return the innermost forward of this thread. Drops those that Ctrl-C ended, for which torch called no hook."""
        forward: Forward | None = getattr(self.here, "forward", None)
        while forward is not None and not forward.is_live():
            forward = self.drop(forward)
        whole = self.whole
        if forward is None and whole.module is not None and whole.thread == get_ident():
            if whole.is_live():
                return whole  # its graph broke
            whole.idle()
        return forward

    def current(self) -> Forward | None:
        """Return the innermost forward of this thread; skips the look at the stack unless forwards are nested."""
        forward: Forward | None = getattr(self.here, "forward", None)
        if forward is not None and forward.outer is not None:
            forward = self.innermost()
        if forward is None and self.whole.module is not None and self.whole.thread == get_ident():
            return self.whole
        return forward

    def traced(self) -> Forward | None:
        """Return the forward that the graph which Dynamo is tracing belongs to."""
        if self.whole.module is not None:
            return self.whole
        forward: Forward | None = getattr(self.here, "forward", None)
        return forward

    def push_main(self, module: nn.Module, frame: FrameType | None, outer: Forward | None) -> Forward:
        """Start a forward on the manager's own queues, as the innermost one of this thread."""
        self.main = self._push(module, frame, outer, self._own_queues)
        return self.main

    def push_beside(self, module: nn.Module, frame: FrameType | None, outer: Forward | None) -> Forward:
        """Start a forward with queues of its own, as the innermost one of this thread."""
        forward = self._push(module, frame, outer, {})
        self._beside.append(forward)
        return forward

    def push_paused(self, module: nn.Module, frame: FrameType | None, outer: Forward) -> None:
        """Start a forward that does not count, inside another one."""
        self._push(module, frame, outer, {}).counts = False

    def _push(
        self,
        module: nn.Module,
        frame: FrameType | None,
        outer: Forward | None,
        queues: dict[torch.device, Any],
    ) -> Forward:
        if outer is not None and outer.rooms is None:
            outer.suspend()
        forward = Forward(queues)
        forward.module, forward.frame, forward.outer = module, frame, outer
        forward.thread, forward.epoch = get_ident(), self.epoch
        self.here.forward = forward
        return forward

    def others(self) -> bool:
        """Return True if a forward is under way in any thread. Drops those that ended with their thread or by Ctrl-C."""
        main = self.main
        if main is not None and not main.is_live():
            self.drop(main)
        if self._beside:
            self._beside = [other for other in self._beside if other.is_live()]
        return self.main is not None or bool(self._beside)

    def main_is_elsewhere(self) -> bool:
        """True if a forward in another thread uses the manager's own queues."""
        return self.main is not None and self.main.thread != get_ident()

    def whole_is_under_way(self) -> bool:
        """True if a forward is running that a graph holds as a whole."""
        return on_stack(self.whole.frame, self.whole.thread)

    def is_beside(self, forward: Forward) -> bool:
        """True if the forward has moments of its own."""
        return forward is not self.main and forward is not self.whole

    def queues_beside(self) -> list[Any]:
        """Return the queues of all forwards that have their own."""
        # Copied at once: other threads may add to them meanwhile.
        return [queue for forward in [*self._beside] for queue in [*forward.queues.values()]]

    def forget_all(self) -> None:
        """Keep the forwards under way from counting."""
        self.epoch += 1

    def drop_all(self) -> None:
        """End every forward under way; none of them counts."""
        self.forget_all()
        for forward in [*self._beside, self.main]:
            if forward is not None:
                self.drop(forward)

    def drop(self, forward: Forward) -> Forward | None:
        """End a forward that does not count; returns the one that it was called in."""
        if forward is self.main:
            self._main_fails()
        return self.pop(forward)

    def pop(self, forward: Forward) -> Forward | None:
        """End a forward; returns the one that it was called in."""
        outer = forward.outer
        if forward is self.whole:
            forward.idle()
            return None
        if forward is self.main:
            self.main = None
            self._main_ends()
        elif forward in self._beside:
            self._beside.remove(forward)
        if getattr(self.here, "forward", None) is forward:
            self.here.forward = outer
            if outer is not None:
                outer.resume()
        # Another thread may still hold it as its innermost.
        forward.module = forward.frame = forward.decoder_frame = forward.layout = None
        return outer
