"""Detect moments that no samples can have, so that a file with such moments is refused before merges spread them."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np

from fastheads.stats.arrays import Array, MomentArrays, as_arrays
from fastheads.stats.names import (
    KV_METRIC,
    METRICS,
    RATIO_METRIC,
    RATIO_SQUARE_METRIC,
    STREAMING_METRICS,
    UPDATE_METRIC,
)

if TYPE_CHECKING:
    from fastheads.stats.moments import Moments

MOST_SAMPLES = 2**53  # of a head; float64, in which moments are merged, represents larger counts inexactly

# Error allowed in the mean, relative to the largest sample: 10⁹ merges give about 3e-12, one merge 1e-16.
ROUNDING = 1e-9
TINY = float(np.finfo(np.float64).tiny)  # smaller numbers have fewer digits


def impossible(moments: "Moments | MomentArrays", *, least: float = -np.inf) -> Array:
    """Mark the moments that no samples ≥ `least` can have: a bool array of the planes' shape.

    For n finite samples with minimum a, maximum b and mean μ:

        a + (b - a)/n ≤ μ ≤ b - (b - a)/n,
        (b - μ)² + (μ - a)² ≤ m2 ≤ n (b - μ) (μ - a)   (Bhatia & Davis 2000), for n > 1,

    up to rounding. One sample equals its mean, min and max; without samples the moments are those of `Moments` at count 0.
    Squares of samples above 1e154 overflow float64, and sums above 1e308: m2, and then the mean, may be infinite or NaN there.
    """
    with np.errstate(all="ignore"):
        return _impossible(as_arrays(moments), least)


def _impossible(m: MomentArrays, least: float) -> Array:
    n = np.maximum(m.count, 1).astype(np.float64)
    low, high = m.min, m.max
    largest = np.maximum(np.abs(low), np.abs(high))
    no_squares = np.isinf(4 * n * np.square(largest))
    no_sums = np.isinf(n * largest)
    error = ROUNDING * largest + TINY
    above, below = np.maximum(high - m.mean, 0), np.maximum(m.mean - low, 0)
    inset = (high - low) / n
    mean_fits = (m.mean >= low + inset - error) & (m.mean <= high - inset + error)
    room = n * (np.square(error) + TINY)
    spread_fits = (m.m2 <= n * (above + error) * (below + error) * (1 + ROUNDING) + room) & (
        m.m2 * (1 + ROUNDING) + room
        >= np.square(np.maximum(above - error, 0)) + np.square(np.maximum(below - error, 0))
    )
    one_fits = (low == high) & (m.m2 == 0)
    spread_fits = np.where(m.count == 1, one_fits, spread_fits)
    in_range = np.isfinite(low) & np.isfinite(high) & (low <= high) & (low >= least)
    some = (
        (m.count > 0)
        & in_range
        & (mean_fits | (no_sums & ~np.isfinite(m.mean)))
        & (((m.m2 >= 0) & spread_fits) | (no_squares & ((m.m2 >= 0) | np.isnan(m.m2))))
    )
    none = (m.count == 0) & (m.mean == 0) & (m.m2 == 0) & (low == np.inf) & (high == -np.inf)
    counts = (m.count >= 0) & (m.nonfinite >= 0) & (m.count <= MOST_SAMPLES) & (m.nonfinite <= MOST_SAMPLES)
    return ~(counts & (some | none))


def least_of(metric: str) -> float:
    """Return the least possible sample of a metric: 0 for norms, their ratios and squares."""
    is_norm = metric.endswith(("_norm", "_ratio", "_square")) or metric in STREAMING_METRICS
    return 0.0 if is_norm else -np.inf


def contradiction(by_metric: "Mapping[str, Moments] | Mapping[str, MomentArrays]") -> str | None:
    """Describe how the totals (`count` + `nonfinite`, `[rows, heads]`) of metrics contradict each other; None if they do not.

    Each sample of a head counts once in each of `METRICS`, and at most once in the update metric and the ratios (unknown in
    some parts of a merged profile); each sample of a layer counts once for each KV group.
    """
    arrays = {metric: as_arrays(moments) for metric, moments in by_metric.items()}
    totals = {metric: m.count + m.nonfinite for metric, m in arrays.items()}
    of_heads = [metric for metric in METRICS if metric in totals]
    if not of_heads:
        return None
    first = totals[of_heads[0]]
    for metric in of_heads[1:]:
        if not np.array_equal(totals[metric], first):
            return f"{of_heads[0]} and {metric} have different numbers of samples"
    for metric in (UPDATE_METRIC, RATIO_METRIC, RATIO_SQUARE_METRIC):
        if metric in totals and bool((totals[metric] > first).any()):
            return f"{metric} has more samples than {of_heads[0]}"
    if KV_METRIC in totals:
        groups = totals[KV_METRIC]
        of_layer = first.max(axis=1, keepdims=True)
        rising = bool((groups[:, 1:] > groups[:, :-1]).any())  # a group after a missing one
        if rising or not np.array_equal(groups.max(axis=1, keepdims=True), of_layer):
            return f"{KV_METRIC} and {of_heads[0]} have different numbers of samples"
        if bool(((groups != 0) & (groups != of_layer)).any()):
            return f"{KV_METRIC} has different numbers of samples for groups of a layer"
    return None
