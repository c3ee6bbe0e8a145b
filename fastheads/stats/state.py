"""The state of a measurement on one device: running moments by channel, and mean vectors, in one buffer.

Begin and commit of a forward are then one device copy each, which a CUDA graph can capture, and a compiled graph has one tensor
to update.
"""

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from fastheads.stats.mean_vectors import MEAN, RunningMeanVectors
from fastheads.stats.mean_vectors import merged_buffers as merged_vectors
from fastheads.stats.moments import PLANES, RunningMoments

# Elements that each part begins at a multiple of: kernels are compiled for pointers that are aligned to 16 bytes.
ALIGNMENT = 8


@dataclass(frozen=True)
class StateLayout:
    """The layout of a flat float64 buffer: of each channel (`capture.channels`) the moments, then the mean vectors."""

    metrics: tuple[int, ...]  # of each channel
    rows: int
    heads: int
    head_dim: int | None = None  # of the mean vectors, which belong to the first channel; None: not measured

    @cached_property
    def _shapes(self) -> list[tuple[int, ...]]:
        """The shapes of the parts."""
        shapes: list[tuple[int, ...]] = [(PLANES, metrics, self.rows, self.heads) for metrics in self.metrics]
        if self.head_dim is not None:
            shapes.append((self.rows, self.heads, MEAN + self.head_dim))
        return shapes

    @cached_property
    def _starts(self) -> list[int]:
        """Where each part begins, and last the size of the whole."""
        starts = [0]
        for shape in self._shapes:
            starts.append(starts[-1] + -(-math.prod(shape) // ALIGNMENT) * ALIGNMENT)
        return starts

    def buffer(self, device: torch.device) -> Tensor:
        """Allocate a buffer without samples."""
        device = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
        with torch.inference_mode(False):  # an inference tensor could not be updated outside inference mode
            buffer = torch.empty(self._starts[-1], dtype=torch.float64, device=device)
        self.clear(buffer)
        return buffer

    def clear(self, buffer: Tensor) -> None:
        """Forget every sample in `buffer`, in place."""
        buffer.zero_()
        for moments in self.moments(buffer):
            moments.clear()

    def channel(self, buffer: Tensor, index: int) -> RunningMoments:
        """Return the moments of a channel, with the mean vectors if they belong to it; they share the buffer's memory."""
        return RunningMoments.over(self._part(buffer, index), None if index else self.vectors(buffer))

    def moments(self, buffer: Tensor) -> list[RunningMoments]:
        """Return the moments of every channel, as `channel` does."""
        return [self.channel(buffer, index) for index in range(len(self.metrics))]

    def vectors(self, buffer: Tensor) -> RunningMeanVectors | None:
        """Return the mean vectors, which share the buffer's memory; None if they are not measured."""
        return None if self.head_dim is None else RunningMeanVectors.over(self._part(buffer, -1))

    def parts(self, buffer: Tensor) -> list[Tensor]:
        """Return the buffer's parts: of each channel `[6, metrics, rows, heads]`, then those of the mean vectors."""
        return [self._part(buffer, index) for index in range(len(self._shapes))]

    def _part(self, buffer: Tensor, index: int) -> Tensor:
        shape = self._shapes[index]
        start = self._starts[index if index >= 0 else index - 1]
        return buffer[start : start + math.prod(shape)].view(shape)

    def merged(self, one: Tensor, other: Tensor) -> Tensor:
        """Merge two buffers into a new one."""
        merged = torch.zeros_like(one)
        for target, left, right in zip(*map(self.moments, (merged, one, other)), strict=True):
            planes = left.views().merged(right.views())
            for plane, new in zip(target.views(), planes, strict=True):
                plane.copy_(new)
        if self.head_dim is not None:
            self._part(merged, -1).copy_(merged_vectors(self._part(one, -1), self._part(other, -1)))
        return merged


def _read_here(buffer: Tensor) -> None:
    """Keep the memory of `buffer`, which another stream allocated, from reuse until the current stream has read it."""
    if buffer.is_cuda:
        buffer.record_stream(torch.cuda.current_stream(buffer.device))


class PendingState:
    """The samples of a forward that runs beside another; merged into the committed state when it ends.

    `pending` lists the moments by channel.
    """

    def __init__(self, layout: StateLayout, device: torch.device) -> None:
        self.layout = layout
        self.pending_buffer = layout.buffer(device)
        self.pending = layout.moments(self.pending_buffer)

    def like(self) -> "PendingState":
        """Make an empty state of the same layout on the same device."""
        return PendingState(self.layout, self.pending_buffer.device)


class CommittedState(PendingState):
    """The state in two copies: `pending` takes a forward's samples, `committed` holds those of completed forwards.

    Forwards that run beside the one that uses `pending` (in other threads, or nested in it) have a `PendingState` of their own,
    which `add` merges.
    """

    def __init__(self, layout: StateLayout, device: torch.device) -> None:
        super().__init__(layout, device)
        # A separate tensor, since compilers copy tensors that share memory.
        self.committed_buffer = layout.buffer(device)
        self._begun = (
            False  # True: a forward has begun since the last commit, so pending may differ from committed
        )
        # True: CUDA graphs begin forwards too, and Python does not know what they leave pending.
        self._begun_in_graph = False
        self._added: Tensor | None = None  # samples that other forwards committed since this one began

    @property
    def committed(self) -> list[RunningMoments]:
        """The committed moments by channel."""
        return self.layout.moments(self.committed_buffer)

    def begin(self, always: bool) -> None:
        """Start a forward: overwrite what an exception may have left in `pending`.

        `always`: also if, as far as Python knows, no forward has begun since the last commit; a CUDA graph may have.
        """
        if always or self._begun or self._begun_in_graph:
            self.pending_buffer.copy_(self.committed_buffer)
        self._added = None
        self._begun = True

    def is_even(self) -> bool:
        """True if pending is known to equal committed."""
        return not (self._begun or self._begun_in_graph)

    def commit(self) -> None:
        """End a forward normally: its samples count."""
        if self._added is not None:
            self.pending_buffer.copy_(self.layout.merged(self.pending_buffer, self._added))
            _read_here(self._added)
            self._added = None
        self.committed_buffer.copy_(self.pending_buffer)
        self._begun = False

    def leave(self) -> None:
        """End a forward that added no samples here."""
        if self._added is None:
            self._begun = False
        self._added = None

    def add(self, samples: Tensor) -> None:
        """Commit `samples`, a buffer, of a forward other than the running one, if there is one."""
        total = self.layout.merged(self.committed_buffer, samples)
        _read_here(samples)
        if self._added is not None:
            _read_here(self._added)
        # An interrupt may come after any of these lines, so first record the samples for the running forward, whose commit
        # overwrites committed; and if there is none, that the next one has to begin with a copy.
        is_under_way, self._begun = self._begun, True
        self._added = samples.clone() if self._added is None else self.layout.merged(self._added, samples)
        self.committed_buffer.copy_(total)
        if not is_under_way:
            self._added = None

    def begun_in_graph(self) -> None:
        """Note that a captured CUDA graph begins forwards by itself: from now on `begin` always copies."""
        self._begun_in_graph = True

    def distrust(self) -> None:
        """Note that pending may differ from committed, also between forwards."""
        self._begun = True

    def clear(self) -> None:
        """Forget every sample, in place."""
        for buffer in self.buffers():
            self.layout.clear(buffer)
        self._added = None

    def freeze(self) -> None:
        """Move the committed samples to memory that no CUDA graph writes to."""
        with torch.inference_mode(False):
            self.committed_buffer = self.committed_buffer.clone()

    def buffers(self) -> tuple[Tensor, Tensor]:
        """Return the memory that a CUDA graph reads and writes."""
        return self.committed_buffer, self.pending_buffer
