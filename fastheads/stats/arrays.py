"""Moments as NumPy arrays, so that profiles read from files need no torch."""

from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class MomentArrays(NamedTuple):
    """`stats.moments.Moments` as arrays of one shape; the formulas give the same numbers, bit for bit."""

    count: Array  # type: ignore[assignment]  # int64 (hides tuple.count)
    nonfinite: Array  # int64
    mean: Array  # float64, like the three below
    m2: Array
    min: Array
    max: Array

    def merged(self, other: Self) -> Self:
        """Merge with the moments of another stream, by Chan's formula."""
        with np.errstate(all="ignore"):  # squares may overflow
            count = self.count + other.count
            n = np.maximum(count, 1).astype(np.float64)
            delta = other.mean - self.mean
            weight = self.count * (other.count / n)
            return type(self)(
                count=count,
                nonfinite=self.nonfinite + other.nonfinite,
                mean=self.mean + delta * (other.count / n),
                # In this order, since delta² may overflow where one side is empty and the weight 0.
                m2=self.m2 + other.m2 + delta * weight * delta,
                min=np.minimum(self.min, other.min),
                max=np.maximum(self.max, other.max),
            )

    def var(self) -> Array:
        """Unbiased variance; NaN where count < 2."""
        with np.errstate(all="ignore"):
            return np.where(self.count > 1, self.m2 / np.maximum(self.count - 1, 1), np.nan)


def as_arrays(moments: Any) -> MomentArrays:
    """Convert `Moments` or `MomentArrays` to arrays, which share memory with tensors on the CPU."""
    return MomentArrays(*map(_as_array, moments))


def _as_array(plane: Any) -> Array:
    # A tensor: called by its method, so that torch is not imported. force: also if it requires gradients.
    return plane if isinstance(plane, np.ndarray) else plane.numpy(force=True)
