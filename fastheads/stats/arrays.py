"""Moments as NumPy arrays: what is done with a profile that was read from a file, which needs no torch."""

from typing import Any, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]


class MomentArrays(NamedTuple):
    """The planes of `stats.moments.Moments`, as arrays of one shape. Its formulas give the same numbers, to the last bit."""

    count: Array  # type: ignore[assignment]  # int64 (hides tuple.count)
    nonfinite: Array  # int64
    mean: Array  # float64, as the three below
    m2: Array
    min: Array
    max: Array

    def merged(self, other: Self) -> Self:
        """The moments of both streams together, by Chan's formula."""
        with np.errstate(all="ignore"):  # squares may be infinite
            count = self.count + other.count
            n = np.maximum(count, 1).astype(np.float64)
            delta = other.mean - self.mean
            weight = self.count * (other.count / n)
            return type(self)(
                count=count,
                nonfinite=self.nonfinite + other.nonfinite,
                mean=self.mean + delta * (other.count / n),
                # In this order: where one side is empty the weight is 0, and a square may be infinite.
                m2=self.m2 + other.m2 + delta * weight * delta,
                min=np.minimum(self.min, other.min),
                max=np.maximum(self.max, other.max),
            )

    def var(self) -> Array:
        """Unbiased variance; NaN where count < 2."""
        with np.errstate(all="ignore"):
            return np.where(self.count > 1, self.m2 / np.maximum(self.count - 1, 1), np.nan)


def as_arrays(moments: Any) -> MomentArrays:
    """The planes of `Moments` or `MomentArrays`, of memory that is shared where it is the CPU's."""
    return MomentArrays(*map(_as_array, moments))


def _as_array(plane: Any) -> Array:
    # By its method, for torch need not be here. Forced: one that takes part in gradients too.
    return plane if isinstance(plane, np.ndarray) else plane.numpy(force=True)
