"""The queue of one device: the state of the measurement there, and the inputs that wait to be measured.

With small batches the time goes to launches, not to the GPU. So the hook of a small input only keeps a reference to it, and one
launch at the end of the decoder's call serves all layers; the smallest wait until several forwards have ended. A byte budget
bounds what is kept.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor

from fastheads.capture.deferral.backlog import DeferredForwards
from fastheads.capture.profiled import Kept, KeptLaunch, Profiled, TracedSite
from fastheads.models.residual import OutputNorms, scales
from fastheads.stats.state import CommittedState, PendingState, StateLayout

# On a CPU a product over a few tokens costs less than its call; a larger one would only push the model's data out of the cache.
CPU_KEEP_BYTES = 256 * 2**10

# What the contributions are multiplied with behind a norm: the norms of the projection's output, and 1/‖r‖ where the ratio is
# measured.
ScaledBy = tuple[OutputNorms, Tensor | None]

# A site that is measured behind its projection too: its input, and what its contributions are multiplied with.
Scaled = tuple[Profiled, Tensor, ScaledBy]


@dataclass(eq=False)
class Group:
    """Inputs that one launch measures: of one shape, dtype and head_dim, each of another row."""

    shape: torch.Size
    dtype: torch.dtype
    head_dim: int
    rows: list[int] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    extras: list[Any] = field(default_factory=list)


S = TypeVar("S", bound=PendingState)


@dataclass(eq=False)
class DeviceQueue(Generic[S]):
    """The state of the measurement on one device, and the inputs kept there for the launch to come."""

    device: torch.device
    state: S
    budget: int  # bytes; an input that does not fit is not kept
    largest: int  # bytes of the largest input worth keeping
    kept: list[Kept] = field(default_factory=list)
    # Of the kept ones, those that are measured with a scale too.
    scaled: list[Scaled] = field(default_factory=list)
    # Bytes that may still be kept; -1 while no call of the decoder is under way in plain Python.
    room: int = -1
    thread: int = 0  # the one that runs the forward whose inputs are kept
    kept_launch: KeptLaunch | None = None
    deferred: DeferredForwards = field(default_factory=DeferredForwards)
    recorded: bool = False  # whether the forward under way has samples in the pending moments
    stream: torch.cuda.Stream | None = None  # where the forward under way began
    raw_stream: int = 0

    def __post_init__(self) -> None:
        self.is_cuda = self.device.type == "cuda"
        self.index = -1 if self.device.index is None else self.device.index
        if self.device.type == "cpu":
            self.largest = min(self.largest, CPU_KEEP_BYTES)

    def open(self, thread: int) -> None:
        """Let inputs of this thread be kept."""
        self.room, self.thread = self.budget - self.deferred.size, thread

    def close(self) -> None:
        """Drop the kept inputs, and keep none until `open`."""
        self.room = -1
        self.kept, self.scaled = [], []

    def take(self) -> tuple[list[Kept], list[Scaled]]:
        """Remove and return the kept inputs: all, and those to be measured with a scale too."""
        taken = self.kept, self.scaled
        self.kept, self.scaled, self.room = [], [], self.budget - self.deferred.size
        return taken

    def held(self) -> list[Tensor]:
        """Return all inputs held here: the kept ones, and those of deferred forwards."""
        kept = [x for _, x, _ in (*self.kept, *self.scaled)]
        return kept + [x for ended in self.deferred.held() for _, x, _ in ended.kept]

    def follow_stream(self) -> None:
        """Make the current stream that of the forward which begins; it waits for the stream of the one before."""
        if not self.is_cuda or (self.stream is not None and not self.off_stream()):
            return
        current = torch.cuda.current_stream(self.device)
        if (
            self.stream is not None
            and self.stream != current
            and not torch.cuda.is_current_stream_capturing()
        ):
            current.wait_stream(self.stream)
        self.stream, self.raw_stream = current, current.cuda_stream
        self.kept_launch = None  # its scratch belongs to the other stream
        self.deferred.forget_form()

    def off_stream(self) -> bool:
        """Return True if the current stream is not the one that the forward began on."""
        return self.is_cuda and torch._C._cuda_getCurrentRawStream(self.index) != self.raw_stream

    def as_current_device(self) -> AbstractContextManager[Any]:
        """Return a context in which this device is the current one."""
        return torch.cuda.device(self.device) if self.is_cuda else nullcontext()

    @contextmanager
    def on_own_stream(self) -> Iterator[None]:
        """Launch on the forward's own stream within the context, in order with the current one."""
        if not self.off_stream() or self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.current_stream(self.device).wait_stream(self.stream)

    @contextmanager
    def on_its_stream(self) -> Iterator[None]:
        """Launch on the current stream within the context, in order with the forward's own."""
        if not self.off_stream() or self.stream is None:
            yield
            return
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)
        yield
        self.stream.wait_stream(current)


# The manager's own queues: those of a forward beside others hold its samples alone.
ManagerQueue = DeviceQueue[CommittedState]


class DeviceQueues:
    """The manager's own queues, one for each device, made when the device is first needed."""

    def __init__(self, layout: StateLayout, *, largest: int, budget: int) -> None:
        """`layout`: of the state of each device; `largest`: bytes of an input that may be kept, `budget`: of all on a device."""
        self.by_device: dict[torch.device, ManagerQueue] = {}
        self._layout, self._largest, self._budget = layout, largest, budget
        self.in_use = False  # a forward is under way on these queues

    def on(self, device: torch.device) -> ManagerQueue:
        """Return the device's queue; makes it if there is none."""
        queue = self.by_device.get(device)
        if queue is None:
            state = CommittedState(self._layout, device)
            if self.in_use:  # if the forward under way fails, what it leaves here must go
                state.begin(always=False)
            queue = self.by_device[device] = DeviceQueue(device, state, self._budget, self._largest)
            queue.follow_stream()
        return queue

    def beside(self, device: torch.device) -> DeviceQueue[PendingState]:
        """Make a queue on the device for a forward that runs beside the one on these queues."""
        queue = DeviceQueue(device, self.on(device).state.like(), self._budget, self._largest)
        queue.follow_stream()
        return queue

    def __iter__(self) -> Iterator[ManagerQueue]:
        return iter(self.by_device.values())

    def is_capturing(self) -> bool:
        """True if a CUDA graph is captured on the current stream."""
        on_gpu = any([queue.is_cuda for queue in self.by_device.values()])
        return on_gpu and torch.cuda.is_current_stream_capturing()


def grouped(inputs: Iterable[tuple[Profiled | TracedSite, Tensor, Any]]) -> list[Group]:
    """Group the inputs, and the extras that come with them, by shape, dtype and head_dim, in order; a row is once in a group."""
    groups: list[Group] = []
    for site, x, extra in inputs:
        for group in groups:
            # Compared and not hashed: the shape may hold symbols that a hash would make numbers of.
            if (
                x.shape == group.shape
                and x.dtype == group.dtype
                and site.head_dim == group.head_dim
                and _has_ratio(extra) == _has_ratio(group.extras[0])
                and site.row not in group.rows
            ):
                break
        else:
            group = Group(x.shape, x.dtype, site.head_dim)
            groups.append(group)
        group.rows.append(site.row)
        group.inputs.append(x)
        group.extras.append(extra)
    return groups


def _has_ratio(extra: Any) -> bool:
    """True if 1/‖r‖, or r, comes with an input: its extra itself, or the second part of a `ScaledBy`."""
    return extra is not None and (isinstance(extra, Tensor) or extra[1] is not None)


def factors_of(scaled_by: Sequence[ScaledBy]) -> tuple[Tensor, Tensor | None]:
    """The scale and the ratio `[len(scaled_by), batch, seq]` of inputs that are measured behind their projections."""
    given = [inverse for _, inverse in scaled_by if inverse is not None]
    return scales([norms for norms, _ in scaled_by]), torch.stack(given) if given else None
