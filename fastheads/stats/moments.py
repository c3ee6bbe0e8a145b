"""Running moments: count, nonfinite, mean, m2, min, max, updated by batches and merged exactly.

Within a batch the mean is computed first, then the squared deviations from it. Batches merge by the formula of Chan, Golub &
LeVeque (1983):

    n = n_a + n_b,  d = mean_b - mean_a,  mean = mean_a + d n_b / n,  m2 = m2_a + m2_b + d² n_a n_b / n

Counts are int64 and the rest float64, so that 10⁹ samples lose no precision; no sums of squares are subtracted.
"""

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

COUNT, NONFINITE, MEAN, M2, MIN, MAX = range(6)
PLANES = 6


class Moments(NamedTuple):
    """Moments of one or many streams of samples: six tensors of one shape.

    `m2` is the sum of squared deviations from the mean. With count 0, mean and m2 are 0, min is +inf, max -inf.
    """

    count: Tensor  # type: ignore[assignment]  # int64: finite samples (hides tuple.count)
    nonfinite: Tensor  # int64: samples that were NaN or infinite, excluded from the others
    mean: Tensor  # float64, like the three below
    m2: Tensor
    min: Tensor
    max: Tensor

    @classmethod
    def of(cls, values: Tensor, present: Tensor | None = None) -> Self:
        """Moments over the first dimension of `values` `[n, ...]` (n ≥ 1), without the rows where `present` `[n]` is False."""
        values = values.double()
        here = torch.ones_like(values, dtype=torch.bool)
        if present is not None:
            here &= present.view(-1, *[1] * (values.dim() - 1))
        finite = here & values.isfinite()
        count = finite.sum(0)
        n = count.clamp(min=1)
        # Select rather than multiply by zero: 0 · NaN is NaN.
        mean = torch.where(finite, values, 0.0).sum(0) / n
        deviation = torch.where(finite, values - mean, 0.0)
        return cls(
            count=count,
            nonfinite=(here & ~finite).sum(0),
            mean=mean,
            m2=deviation.square().sum(0),
            min=torch.where(finite, values, torch.inf).amin(0),
            max=torch.where(finite, values, -torch.inf).amax(0),
        )

    def merged(self, other: Self) -> Self:
        """Merge with the moments of another stream, by Chan's formula."""
        count = self.count + other.count
        n = count.clamp(min=1).double()
        delta = other.mean - self.mean
        weight = self.count * (other.count / n)
        return type(self)(
            count=count,
            nonfinite=self.nonfinite + other.nonfinite,
            mean=self.mean + delta * (other.count / n),
            # In this order, since delta² may overflow where one side is empty and the weight 0.
            m2=self.m2 + other.m2 + delta * weight * delta,
            min=torch.minimum(self.min, other.min),
            max=torch.maximum(self.max, other.max),
        )

    def scaled(self, factor: Tensor) -> Self:
        """The moments of the samples multiplied by `factor` ≥ 0, which is broadcast against the tensors."""
        seen = self.count > 0  # 0 · inf is NaN
        return type(self)(
            count=self.count,
            nonfinite=self.nonfinite,
            mean=self.mean * factor,
            m2=self.m2 * factor.square(),
            min=torch.where(seen, self.min * factor, self.min),
            max=torch.where(seen, self.max * factor, self.max),
        )

    def var(self) -> Tensor:
        """Unbiased variance; NaN where count < 2."""
        return torch.where(self.count > 1, self.m2 / (self.count - 1).clamp(min=1), torch.nan)


class RunningMoments:
    """The moments of `metrics × rows × heads` streams in one buffer on one device.

    `buffer` is float64 `[6, metrics, rows, heads]`: the planes COUNT, NONFINITE (int64 bits), MEAN, M2, MIN, MAX. With one buffer
    the whole state is copied at once, and a kernel takes one pointer.
    """

    def __init__(self, metrics: int, rows: int, heads: int, device: torch.device) -> None:
        self.buffer = torch.empty(PLANES, metrics, rows, heads, dtype=torch.float64, device=device)
        self.batches: list[Any] = []  # samples not merged yet; used by the accumulator
        self.clear()

    @classmethod
    def over(cls, buffer: Tensor) -> Self:
        """Wrap an existing `buffer`, sharing its memory."""
        moments = cls.__new__(cls)
        moments.buffer, moments.batches = buffer, []
        return moments

    def clear(self) -> None:
        """Forget every sample, in place (addresses do not change)."""
        self.buffer.zero_()
        self.buffer[MIN].fill_(torch.inf)
        self.buffer[MAX].fill_(-torch.inf)

    def views(self) -> Moments:
        """Return the planes as tensors `[metrics, rows, heads]` that share the buffer's memory."""
        counts = self.buffer[:MEAN].view(torch.int64)
        return Moments(counts[0], counts[1], *self.buffer[MEAN:])

    def update(self, rows: slice | list[int], values: Tensor, present: Tensor | None = None) -> None:
        """Merge samples `values` `[n, m ≤ metrics, rows, h ≤ heads]`, without those where `present` `[n]` is False."""
        if values.shape[0] == 0:
            return
        metrics, heads = values.shape[1], values.shape[-1]
        planes = Moments(*(plane[:metrics] for plane in self.views()))
        state = Moments(*(plane[:, rows, :heads] for plane in planes))
        merged = state.merged(Moments.of(values.to(self.buffer.device), present))
        for plane, new in zip(planes, merged, strict=True):
            plane[:, rows, :heads] = new


def _buffer(metrics: int, rows: int, heads: int, device: torch.device, channels: int) -> Tensor:
    """Allocate memory for moments, float64 `[channels, 6, metrics, rows, heads]`."""
    device = torch.device("cpu") if device.type == "mps" else device  # MPS has no float64
    with torch.inference_mode(False):  # an inference tensor could not be updated outside inference mode
        return torch.empty(channels, PLANES, metrics, rows, heads, dtype=torch.float64, device=device)


def merged_buffers(one: Tensor, other: Tensor) -> Tensor:
    """Merge two buffers of moments into a new one, `[channels, 6, metrics, rows, heads]`."""
    merged = torch.empty_like(one)
    for target, left, right in zip(merged, one, other, strict=True):
        planes = RunningMoments.over(left).views().merged(RunningMoments.over(right).views())
        for plane, new in zip(RunningMoments.over(target).views(), planes, strict=True):
            plane.copy_(new)
    return merged


def _read_here(buffer: Tensor) -> None:
    """Keep the memory of `buffer`, which another stream allocated, from reuse until the current stream has read it."""
    if buffer.is_cuda:
        buffer.record_stream(torch.cuda.current_stream(buffer.device))


class PendingMoments:
    """The samples, by channel, of a forward that runs beside another; merged into the committed moments when it ends."""

    def __init__(self, metrics: int, rows: int, heads: int, device: torch.device, channels: int = 1) -> None:
        self.pending_buffer = _buffer(metrics, rows, heads, device, channels)
        self.pending = [RunningMoments.over(channel) for channel in self.pending_buffer]
        for moments in self.pending:
            moments.clear()

    def like(self) -> "PendingMoments":
        """Make empty moments of the same shape on the same device."""
        channels, _, metrics, rows, heads = self.pending_buffer.shape
        return PendingMoments(metrics, rows, heads, self.pending_buffer.device, channels)


class CommittedMoments(PendingMoments):
    """Running moments in two copies: `pending` takes a forward's samples, `committed` holds those of completed forwards.

    Both are lists by channel (`capture.channels`). Begin and commit are one device copy each, which a CUDA graph can capture.
    Forwards that run beside the one that uses `pending` (in other threads, or nested in it) have `PendingMoments` of their own,
    which `add` merges.
    """

    def __init__(self, metrics: int, rows: int, heads: int, device: torch.device, channels: int = 1) -> None:
        super().__init__(metrics, rows, heads, device, channels)
        # A separate tensor, since compilers copy tensors that share memory.
        self.committed_buffer = _buffer(metrics, rows, heads, device, channels)
        self._begun = (
            False  # True: a forward has begun since the last commit, so pending may differ from committed
        )
        # True: CUDA graphs begin forwards too, and Python does not know what they leave pending.
        self._begun_in_graph = False
        self._added: Tensor | None = None  # samples that other forwards committed since this one began
        self.clear()

    @property
    def committed(self) -> list[RunningMoments]:
        return [RunningMoments.over(channel) for channel in self.committed_buffer]

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
            self.pending_buffer.copy_(merged_buffers(self.pending_buffer, self._added))
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
        """Commit `samples` `[channels, 6, metrics, rows, heads]` of a forward other than the running one, if there is one."""
        total = merged_buffers(self.committed_buffer, samples)
        _read_here(samples)
        if self._added is not None:
            _read_here(self._added)
        # An interrupt may come after any of these lines, so first record the samples for the running forward, whose commit
        # overwrites committed; and if there is none, that the next one has to begin with a copy.
        is_under_way, self._begun = self._begun, True
        self._added = samples.clone() if self._added is None else merged_buffers(self._added, samples)
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
        for moments in (*self.committed, *self.pending):
            moments.clear()
        self._added = None

    def freeze(self) -> None:
        """Move the committed moments to memory that no CUDA graph writes to."""
        with torch.inference_mode(False):
            self.committed_buffer = self.committed_buffer.clone()

    def buffers(self) -> tuple[Tensor, Tensor]:
        """Return the memory that a CUDA graph reads and writes."""
        return self.committed_buffer, self.pending_buffer
