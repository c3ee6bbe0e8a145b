"""Running moments: count, nonfinite, mean, m2, min, max, updated by batches and merged exactly.

Within a batch the mean is computed first, then the squared deviations from it. Batches merge by the formula of Chan, Golub &
LeVeque (1983):

    n = n_a + n_b,  d = mean_b - mean_a,  mean = mean_a + d n_b / n,  m2 = m2_a + m2_b + d² n_a n_b / n

Counts are int64 and the rest float64, so that 10⁹ samples lose no precision; no sums of squares are subtracted.
"""

from typing import Any, NamedTuple, Self

import torch
from torch import Tensor

from fastheads.stats.mean_vectors import RunningMeanVectors

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
        self.vectors: RunningMeanVectors | None = None  # the mean vectors that are measured with them
        self.batches: list[Any] = []  # samples not merged yet; used by the accumulator
        self.clear()

    @classmethod
    def over(cls, buffer: Tensor, vectors: RunningMeanVectors | None = None) -> Self:
        """Wrap an existing `buffer`, sharing its memory."""
        moments = cls.__new__(cls)
        moments.buffer, moments.vectors, moments.batches = buffer, vectors, []
        return moments

    def clear(self) -> None:
        """Forget every sample, in place (addresses do not change); `vectors` are left as they are."""
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
