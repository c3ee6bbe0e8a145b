"""Rank heads by the means of a metric, or by their mean-ablation errors, and tell which ranks are ties.

The default metric is the ratio to the residual stream: of the scores here it predicts best what zeroing a head changes, in all
layers alike. Raw norms grow with depth; across layers they choose heads worse than a random draw.
"""

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, get_args

import numpy as np

from fastheads.errors import OptionError, ResultsError
from fastheads.results.protocol import Profile
from fastheads.stats.arrays import Array
from fastheads.stats.names import (
    KV_METRICS,
    KV_STREAMING_METRIC,
    KV_STREAMING_SQUARE_METRIC,
    METRICS,
    RATIO_METRIC,
    RATIO_SQUARE_METRIC,
    STREAMING_METRIC,
    STREAMING_METRICS,
    STREAMING_SQUARE_METRIC,
)
from fastheads.stats.scales import scale_of

RANKING_METRIC = RATIO_METRIC
RELATIVE_METRIC = METRICS[3]
MEAN_ABLATION = "mean-ablation error per residual"
# Metrics with their squares, which have a root mean square.
SQUARES = {
    RATIO_METRIC: RATIO_SQUARE_METRIC,
    STREAMING_METRIC: STREAMING_SQUARE_METRIC,
    KV_STREAMING_METRIC: KV_STREAMING_SQUARE_METRIC,
}
TIE = 1.96  # standard errors of a difference: 95 % of a normal distribution

# What a head is to be replaced with: zero, or its mean over the tokens.
Mode = Literal["zero", "mean"]

_warned: set[str] = set()  # not empty once a raw norm has ranked heads of several layers


@dataclass(frozen=True)
class Ranking:
    """One number of each head. Arrays are `[rows, heads]`: float64, and bool for `measured`."""

    name: str  # of the metric
    values: Array
    measured: Array  # True for the heads that are ranked
    sem: Array | None = None  # the standard errors of `values`, if known
    rms: Array | None = None  # the root mean square, for the ratio to the residual stream

    def cells(self, *, descending: bool = False) -> list[tuple[int, int]]:
        """Return (row, head) of all ranked heads, lowest value first, or highest; ties in order of position, NaN last."""
        cells = np.argwhere(self.measured)
        values = self.values[self.measured]
        order = np.argsort(-values if descending else values, kind="stable")
        return [(row, head) for row, head in cells[order].tolist()]

    def tied(self) -> Array:
        """Mark the heads whose value is within `TIE` standard errors of the difference to a neighbour in the ranking.

        Heads with an unknown standard error (of a single sample) are ties too.
        """
        found = np.zeros(self.values.shape, dtype=bool)
        if self.sem is None:
            return found
        row, head = np.array(self.cells(), dtype=np.int64).reshape(-1, 2).T
        values, sem = self.values[row, head], self.sem[row, head]
        with np.errstate(invalid="ignore"):  # inf - inf
            near = ~(np.diff(values) > TIE * np.hypot(sem[1:], sem[:-1]))
        found[row[1:], head[1:]] |= near
        found[row[:-1], head[:-1]] |= near
        return found


def displayed_metric(metrics: Iterable[str]) -> str:
    """Return the metric to show if none is asked for: the ratio, else a relative metric, else what there is."""
    metrics = tuple(metrics)
    wanted = (RATIO_METRIC, RELATIVE_METRIC, METRICS[2], *_comparable(metrics), *metrics)
    return next(metric for metric in wanted if metric in metrics)


def missing_ratio(profile: Profile) -> str:
    """Tell that something else is shown since the profile lacks the ratio; empty if it has it."""
    if RATIO_METRIC in profile.metrics:
        return ""
    return f"shown since this profile has no {RATIO_METRIC}"


def by_metric(profile: Profile, metric: str) -> Ranking:
    """Rank by the means of `metric`. Raises as `HeadProfile.statistics`."""
    stats = profile.statistics(metric)
    rms = None
    square = SQUARES.get(metric, metric)
    if square in SQUARES.values() and square in profile.metrics:
        rms = np.sqrt(profile.statistics(square)["mean"])
    return Ranking(metric, stats["mean"], stats["count"] > 0, stats["sem"], rms)


def by_mean_ablation(profile: Any, model: Any) -> Ranking:
    """Rank by `HeadProfile.mean_ablation_error_ratio(model)`.

    Raises:
        ResultsError: the error of a measured head is unknown (NaN).
    """
    values = np.asarray(profile.mean_ablation_error_ratio(model), dtype=np.float64)
    counts = [moments.count for metric, moments in profile.arrays.items() if metric not in KV_METRICS]
    measured = np.any([count > 0 for count in counts], axis=0) if counts else ~np.isnan(values)
    unknown = measured & np.isnan(values)
    if unknown.any():
        raise ResultsError(
            f"the {MEAN_ABLATION} is unknown for {_which(profile, unknown, measured)}: "
            "look at mean_ablation_error_ratio(model), or rank by a metric"
        )
    return Ranking(MEAN_ABLATION, values, measured)


def ranking_of(profile: Profile, metric: str | None, mode: str, model: Any) -> Ranking:
    """Rank as the arguments of `HeadProfile.rank` say.

    Raises:
        OptionError: they do not fit each other, or the metric is unknown.
        ResultsError: the profile does not hold for every head what the ranking needs.
    """
    if mode not in get_args(Mode):
        raise OptionError(f"unknown mode {mode!r}: choose one of {', '.join(get_args(Mode))}")
    if mode == "mean":
        if model is None:
            raise OptionError("mode 'mean' needs model=, the model that was profiled")
        if metric is not None:
            raise OptionError(f"mode 'mean' ranks by the {MEAN_ABLATION}: leave metric out")
        return by_mean_ablation(profile, model)
    if model is not None:
        raise OptionError("model= is for mode 'mean'")
    metric = RANKING_METRIC if metric is None else metric
    if metric == RATIO_METRIC:
        _check_ratio(profile)
    return by_metric(profile, metric)


def choose(
    profile: Profile,
    metric: str | None = None,
    *,
    fraction: float | None = None,
    n: int | None = None,
    descending: bool = False,
    mode: str = "zero",
    model: Any = None,
) -> list[tuple[int, int]]:
    """Return the first `n`, the first `fraction`, or all of the ranked heads, as (layer, head).

    Warns once per process, for the caller's caller, if a raw norm ranks heads of several layers. Raises as `ranking_of`.
    """
    ranking = ranking_of(profile, metric, mode, model)
    cells = ranking.cells(descending=descending)
    if fraction is not None:
        if not 0 <= fraction <= 1:
            raise OptionError(f"fraction must be between 0 and 1, not {fraction}")
        n = round(fraction * len(cells))
    if n is None:
        n = len(cells)
    if isinstance(n, bool) or not isinstance(n, int) or not 0 <= n <= len(cells):
        raise OptionError(f"n must be a whole number between 0 and the {len(cells)} heads ranked, not {n!r}")
    layers = profile.layers
    ranked = [(layers[row], head) for row, head in cells]
    if len({layer for layer, _ in ranked}) > 1 and not scale_of(ranking.name).comparable:
        _warn_of_raw(profile, ranking.name)
    return ranked[:n]


def check_number(fraction: float | None, n: int | None) -> None:
    """Raise OptionError unless exactly one of the two is given."""
    if (fraction is None) == (n is None):
        raise OptionError("give either a fraction of the heads or n=, the number of heads")


def covers(ratio: Array, other: Array) -> bool:
    """True if every head with samples by the counts `other` has samples by the counts `ratio` too."""
    return not bool(((other > 0) & (ratio == 0)).any())


def _check_ratio(profile: Profile) -> None:
    """Raise ResultsError if the profile has no ratio, or not for all heads."""
    others = [metric for metric in profile.metrics if metric not in (RATIO_METRIC, RATIO_SQUARE_METRIC)]
    named = ", ".join(_comparable(others) or others)
    if RATIO_METRIC not in profile.metrics:
        raise ResultsError(
            f"this profile has no {RATIO_METRIC}, by which heads are ranked: measure it, or name a metric that is here: {named}"
        )
    ratio = profile.arrays[RATIO_METRIC].count
    for metric in others:
        count = profile.arrays[metric].count
        if metric not in (*KV_METRICS, *STREAMING_METRICS) and not covers(ratio, count):
            which = _which(profile, (count > 0) & (ratio == 0), count > 0)
            raise ResultsError(f"{RATIO_METRIC} is missing for {which}: name another metric: {named}")


def _comparable(metrics: Iterable[str]) -> list[str]:
    return [metric for metric in metrics if scale_of(metric).comparable]


def _which(profile: Profile, chosen: Array, of: Array) -> str:
    """Format as in: 3 of 12 heads (layer 0, ...)."""
    layers = list(dict.fromkeys(profile.layers[row] for row in np.argwhere(chosen)[:, 0]))
    more = ", ..." if len(layers) > 1 else ""
    return f"{int(chosen.sum())} of {int(of.sum())} heads (layer {layers[0]}{more})"


def _warn_of_raw(profile: Profile, metric: str) -> None:
    if _warned:
        return
    _warned.add(metric)
    better = [name for name in (RATIO_METRIC, RELATIVE_METRIC, METRICS[2]) if name in profile.metrics]
    warnings.warn(
        f"{metric} grows with depth: across layers it chooses heads worse than a random draw; rank by "
        f"{(better or [RATIO_METRIC])[0]}, or within one layer",
        RuntimeWarning,
        stacklevel=4,
    )
