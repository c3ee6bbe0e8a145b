"""Colours for the values of a metric: limits that suit its scale, and palettes that colour-blind people can read."""

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from fastheads.stats.arrays import Array
from fastheads.stats.scales import scale_of

# matplotlib's viridis at nine equal steps
VIRIDIS = (
    *((68, 1, 84), (71, 44, 122), (59, 81, 139), (44, 113, 142), (33, 144, 141)),
    *((39, 173, 129), (92, 200, 99), (170, 220, 50), (253, 231, 37)),
)
# ColorBrewer's PuOr, from violet (below) to orange (above)
PUOR = (
    *((45, 0, 75), (84, 39, 136), (128, 115, 172), (178, 171, 210), (216, 218, 235), (247, 247, 247)),
    *((254, 224, 182), (253, 184, 99), (224, 130, 20), (179, 88, 6), (127, 59, 8)),
)

ROBUST = (0.02, 0.98)  # quantiles: what lies beyond has the last colour
DECADES = 1.5  # powers of ten between the quantiles, from which on colours are logarithmic

Kind = Literal["linear", "log", "diverging"]


@dataclass(frozen=True)
class Colours:
    """How values become colours: from `low` to `high`; a diverging palette has its middle at `centre`."""

    kind: Kind
    low: float
    high: float
    centre: float | None = None

    def position(self, value: float) -> float:
        """Return the place of `value` on the palette: 0 to 1, beyond the limits that of the nearer one."""
        low, high = self.low, self.high
        if self.kind == "log":
            value, low, high = math.log(max(value, low)), math.log(low), math.log(high)
        if self.kind == "diverging" and self.centre is not None:
            # Each side reaches as far as its own limit.
            low, high = (
                (2 * self.centre - high, high) if value > self.centre else (low, 2 * self.centre - low)
            )
        return min(max((value - low) / ((high - low) or 1.0), 0.0), 1.0)


def colours_of(metric: str, values: Array, *, of_means: bool = True) -> Colours:
    """Return the colours for `values` of a metric, float64 of any shape; NaN and infinite values do not count.

    Means around a known centre, as 1 is a layer's average, diverge from it. Ratios begin at zero. Other values are logarithmic
    if they span more than `DECADES`. Limits are the quantiles `ROBUST`. `of_means` False: another statistic of the metric.
    """
    found = values[np.isfinite(values)]
    if not found.size:
        return Colours("linear", 0.0, 1.0)
    # Among the values themselves, so that of a few none lies beyond.
    low = float(np.quantile(found, ROBUST[0], method="lower"))
    high = float(np.quantile(found, ROBUST[1], method="higher"))
    scale = scale_of(metric)
    if of_means and scale.centre is not None:
        room = 1e-6 * abs(scale.centre)  # on both sides
        return Colours(
            "diverging", min(low, scale.centre - room), max(high, scale.centre + room), scale.centre
        )
    if scale.ratio and high > 0 <= found.min():
        return Colours("linear", 0.0, high)
    if found.min() > 0 and np.log10(high) - np.log10(low) >= DECADES:
        return Colours("log", low, high)
    return Colours("linear", low, high if high > low else low + (abs(low) or 1.0))
