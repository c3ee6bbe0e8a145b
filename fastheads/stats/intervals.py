"""Bootstrap intervals. Needs no torch."""

import numpy as np

from fastheads.stats.arrays import Array

RESAMPLES = 2_000
LEVEL = 0.95


def bootstrap_interval(values: Array, *, level: float = LEVEL) -> tuple[Array, Array]:
    """Return the ends of the percentile bootstrap interval of the mean over the last dimension, `[..., n]` to `[...]`.

    The resamples are the same in each call. NaN below two values.
    """
    n = values.shape[-1]
    if n < 2:
        none = np.full(values.shape[:-1], np.nan)
        return none, none.copy()
    shares = np.random.default_rng(0).multinomial(n, np.full(n, 1 / n), size=RESAMPLES) / n  # [resamples, n]
    low, high = np.quantile(values @ shares.T, [(1 - level) / 2, (1 + level) / 2], axis=-1)
    return low, high
