"""Curves of an ablation, as the page draws them."""

from typing import Any

from fastheads.results.ablation import AblationResult, Draws
from fastheads.results.text import clean
from fastheads.stats.intervals import bootstrap_interval


def curves_of(result: AblationResult) -> dict[str, Any]:
    """Return text, a unit, and lines of points [share of the heads, mean rise in loss, low, high], JSON.

    Low and high are the 95 % interval over sequences; of random draws the least and the greatest.
    """
    lines = []
    matched = {draws.metric: draws for draws in result.matched}
    for curve in result.curves:
        low, high = bootstrap_interval(curve.rise)
        points = zip(curve.fractions, curve.rise.mean(-1), low, high, strict=True)
        lines.append(_line(f"lowest by {curve.metric}", points))
        if (draws := matched.get(curve.metric)) is not None:
            lines.append(_of_draws(f"random, as many in each layer as by {curve.metric}", draws))
    if result.random is not None:
        lines.append(_of_draws("random", result.random))
    done = {"zero": "zero", "mean": "their mean"}[result.mode]
    number = f"{result.sequences:,} sequences" + ("" if result.complete else " so far")
    base = f"; the intact model's loss is {result.base.mean():.4g}" if result.sequences else ""
    return {
        "text": f"What the loss rises by when heads are replaced by {done}, on {number}{base}. Bars: the 95 % interval over "
        "sequences; of random draws the least and the greatest.",
        "unit": "rise in loss, nats per token",
        "lines": lines,
    }


def _of_draws(name: str, draws: Draws) -> dict[str, Any]:
    means = draws.rise.mean(-1)  # [fractions, draws]
    points = zip(draws.fractions, means.mean(-1), means.min(-1), means.max(-1), strict=True)
    return _line(f"{name}: {means.shape[1]} draws", points)


def _line(name: str, points: Any) -> dict[str, Any]:
    return {"name": clean(name), "points": [[float(number) for number in point] for point in points]}
