"""The state of one forward, and the look at the stack that tells if it is still under way.

A forward is a call of the outermost module, in one thread. Torch tells its hooks when such a call returns or raises an Exception,
but not when Ctrl-C breaks it off; and other threads are not told at all. So each forward remembers torch's frame of its call: it
is under way as long as that frame is on its thread's stack.
"""

import sys
import threading
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from fastheads.capture.phases import Phase
from fastheads.capture.profiled import TracedSite
from fastheads.capture.queue import DeviceQueue, ScaledBy
from fastheads.stats.token_layout import TokenLayout

_CALL = nn.Module._call_impl.__code__
_INNER_CALL = f"{_CALL.co_qualname}.<locals>.inner"


class Forward:
    """State of one forward, from its start until its samples are committed."""

    def __init__(self, queues: dict[torch.device, Any]) -> None:
        """`queues`: by device, the queue that keeps the forward's inputs and holds its samples; the dict may grow."""
        self.queues: dict[torch.device, DeviceQueue[Any]] = queues
        self.idle()

    def idle(self) -> None:
        """Set everything to the state of no forward."""
        self.module: nn.Module | None = None  # the outermost; None where it is over
        self.frame: FrameType | None = None  # torch's, that calls it
        self.thread = 0
        self.outer: Forward | None = None  # the one of this thread that it is called in
        self.rooms: list[int] | None = None  # of the queues, while another forward runs inside this one
        self.counts = True  # not within `paused()`
        self.epoch = 0  # how often the manager had been reset when it began
        self.generations: list[int] = []  # of the factors, as it began
        self.capturing = False  # a CUDA graph is captured by hand
        self.in_graphs = False  # compiled code measured something
        # Rows that ran in the decoder's call under way; that did not in some call that ended.
        self.ran: set[int] = set()
        self.skipped: set[int] = set()
        # The decoder's call under way: torch's frame of it, its token layout (None: none is), whether a graph is traced that
        # holds it, and what that graph keeps for its operators.
        self.decoder_frame: FrameType | None = None
        self.layout: TokenLayout | None = None
        self.decoder_traced = False
        self.traced: list[tuple[TracedSite, Tensor, Tensor | None]] = []
        self.traced_scaled: list[tuple[TracedSite, Tensor, ScaledBy]] = []
        # For streaming errors (`capture.streaming`): the layout by the call's own arguments; by device where its tokens are, and
        # the layout of those that are measured; by row what waits for the projection.
        self.own_layout: TokenLayout | None = None
        self.places: dict[torch.device, Any] = {}
        self.beyond: dict[torch.device, TokenLayout] = {}
        self.losses: dict[int, Any] = {}
        # 1/‖r‖ `[B, S]` by row, of the residual stream r that the next output of that row's projection is added to.
        self.inverse_norms: dict[int, Tensor] = {}

    def is_live(self) -> bool:
        """True if the forward is under way: its call is on its thread's stack."""
        return self.module is not None and on_stack(self.frame, self.thread)

    @property
    def phase(self) -> Phase:
        """The phase that the forward is in."""
        if self.module is None:
            return Phase.IDLE
        if self.decoder_traced:
            return Phase.TRACED
        return Phase.BEGUN if self.decoder_frame is None else Phase.DECODING

    def suspend(self) -> None:
        """Keep no input while another forward runs inside this one."""
        self.rooms = [queue.room for queue in self.queues.values()]
        for queue in self.queues.values():
            queue.room = -1

    def resume(self) -> None:
        """Keep inputs again after `suspend`."""
        for queue, room in zip(self.queues.values(), self.rooms or (), strict=False):
            queue.room = room
        self.rooms = None


def on_stack(frame: FrameType | None, thread: int) -> bool:
    """True if `frame` is running, on the stack of that thread."""
    if frame is None:
        return False
    found = sys._getframe(1) if thread == threading.get_ident() else sys._current_frames().get(thread)
    while found is not None and found is not frame:
        found = found.f_back
    return found is not None


def frame_of_call() -> tuple[FrameType | None, bool]:
    """Return torch's frame of the call whose hook is running, and True if torch runs the hook because the forward raised: it then
    does so outside the function that runs the other hooks.
    """
    frame: FrameType | None = sys._getframe(1)
    raised = True
    while frame is not None and frame.f_code is not _CALL:
        code = frame.f_code
        if code.co_name == "_call_impl" and code.co_filename == _CALL.co_filename:
            break  # code that Dynamo made of it
        if code.co_qualname == _INNER_CALL:
            raised = False
        frame = frame.f_back
    return frame, raised


def frame_of_compiled_call() -> FrameType:
    """Return the outermost of torch's frames that entered the compiled code whose custom op is running."""
    frame: FrameType = sys._getframe(1)
    entry = frame
    while frame.f_back is not None:
        frame = frame.f_back
        if frame.f_code.co_filename.endswith("eval_frame.py"):
            entry = frame
    return entry
