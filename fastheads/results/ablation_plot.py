"""Plot the rise in loss of ablated heads against random draws (needs matplotlib)."""

import io
import os
from typing import TYPE_CHECKING, Any

from fastheads.results.files import write_atomic
from fastheads.results.plots import check_installed, picture_format
from fastheads.stats.intervals import bootstrap_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

COLOURS = ("tab:blue", "tab:orange", "tab:green", "tab:red", "tab:purple", "tab:brown")


def draw(result: Any, ax: "Axes | None" = None) -> "Axes":
    """As `AblationResult.plot`: draw each metric's curve with its interval, and the band from the least to the greatest draw."""
    check_installed()
    if ax is None:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, 4.4))
        figure.set_layout_engine("constrained")
        ax = figure.add_subplot()
    if result.random is not None:
        _band(ax, result.random, "0.5", f"random: mean and range of {result.random.rise.shape[1]} draws")
    matched = {draws.metric: draws for draws in result.matched}
    for n, curve in enumerate(result.curves):
        colour = COLOURS[n % len(COLOURS)]
        percent = [100 * fraction for fraction in curve.fractions]
        mean, (low, high) = curve.rise.mean(-1), bootstrap_interval(curve.rise)
        bars = [(mean - low).clip(min=0), (high - mean).clip(min=0)]
        label = f"lowest by {curve.metric}".replace("$", r"\$")
        ax.errorbar(
            percent, mean, yerr=bars, color=colour, marker="o", markersize=4, capsize=3, label=label, zorder=3
        )
        if curve.metric in matched:
            draws = matched[curve.metric].rise.mean(-1)
            ax.plot(
                percent, draws.mean(-1), color=colour, linestyle=":", label="random, as many in each layer"
            )
    ax.set_xlabel("heads ablated, %")
    ax.set_ylabel("rise in loss, nats per token")
    ax.set_ylim(bottom=min(0.0, ax.get_ylim()[0]))
    what = {"zero": "replaced by zero", "mean": "replaced by their mean"}[result.mode]
    part = "" if result.complete else ", incomplete"
    ax.set_title(f"heads {what}; {result.sequences} sequences{part}", fontsize="medium", loc="left")
    if ax.get_legend_handles_labels()[0]:
        ax.legend(fontsize="small")
    return ax


def _band(ax: Any, draws: Any, colour: str, label: str) -> None:
    percent, means = (
        [100 * fraction for fraction in draws.fractions],
        draws.rise.mean(-1),
    )  # [fractions, draws]
    ax.fill_between(percent, means.min(-1), means.max(-1), color=colour, alpha=0.25, linewidth=0)
    ax.plot(percent, means.mean(-1), color=colour, linestyle="--", label=label)


def save_plot(result: Any, path: str | os.PathLike[str]) -> None:
    """Plot an AblationResult and write it to `path`, atomically.

    Raises:
        OptionError: the suffix of `path` is not that of a picture.
        OSError: `path` cannot be written.
        MissingExtraError: matplotlib is not installed.
    """
    kind = picture_format(path)
    buffer = io.BytesIO()
    figure: Any = draw(result).figure
    figure.savefig(buffer, format=kind, dpi=150)
    write_atomic(path, buffer.getvalue())
