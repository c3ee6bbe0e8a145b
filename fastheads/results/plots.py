"""Plot a profile as a heatmap, layers by heads (needs matplotlib)."""

import io
import os
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fastheads.errors import MissingExtraError, OptionError
from fastheads.results.files import write_atomic
from fastheads.results.protocol import Profile
from fastheads.results.ranking import by_metric, displayed_metric, missing_ratio
from fastheads.stats.arrays import Array
from fastheads.stats.names import KV_METRICS
from fastheads.stats.scales import scale_of

if TYPE_CHECKING:
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure


SUFFIXES = (".png", ".pdf", ".svg")
MARKED = 10  # highest and lowest heads each


def heatmap(profile: Profile, metric: str | None = None, stat: str = "mean") -> "Figure":
    """Plot `stat` of `metric`; heads that do not exist or have no samples stay blank.

    `metric` None: the ratio to the residual stream, else a relative metric, and the figure says so. Means whose average head is
    known, as 1 is a layer's, have colours that diverge from it.

    Raises:
        OptionError: unknown metric or stat.
        MissingExtraError: matplotlib is not installed.
    """
    check_installed()
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    missing = missing_ratio(profile) if metric is None else ""
    metric = displayed_metric(profile.metrics) if metric is None else metric
    cells = by_metric(profile, metric).cells()
    stats = profile.statistics(metric)
    if stat not in stats:
        raise OptionError(f"unknown stat {stat!r}: choose one of {', '.join(stats)}")
    values = np.where(stats["count"] > 0, stats[stat], np.nan)
    is_of_groups = metric in KV_METRICS
    if is_of_groups:  # fewer than heads
        measured = np.flatnonzero((stats["count"] > 0).any(axis=0))
        values = values[:, : int(measured.max(initial=0)) + 1]

    rows, heads = values.shape
    figure = Figure(figsize=(min(3 + 0.35 * max(heads, 9), 18), min(2 + 0.22 * max(rows, 14), 24)))
    figure.set_layout_engine("constrained")
    axes = figure.add_subplot(facecolor="0.85")
    scale = scale_of(metric)
    centre = scale.centre if stat == "mean" else None
    colours = {"cmap": "viridis"} if centre is None else {"cmap": "PuOr_r", "norm": _around(centre, values)}
    image = axes.imshow(values, aspect="auto", interpolation="nearest", **colours)
    note = f"\n({scale.note})" if scale.note and stat == "mean" else ""
    figure.colorbar(image, label=f"{stat} of {metric}{note}" + (f"\n{missing}" if missing else ""))
    axes.set(xlabel="KV group" if is_of_groups else "head", ylabel="layer")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    step = -(-rows // 30)  # at most 30 labels are legible
    axes.set_yticks(range(0, rows, step), [str(layer) for layer in profile.layers[::step]])
    axes.set_title(_title(profile), fontsize="medium", loc="left")

    if stat == "mean" and len(cells) >= 4 * MARKED:
        marks = (("highest", cells[-MARKED:], "o", "black"), ("lowest", cells[:MARKED], "x", "white"))
        for name, marked, marker, colour in marks:
            y, x = zip(*marked, strict=True)
            axes.scatter(
                x, y, marker=marker, s=24, color=colour, linewidths=1.2, label=f"the {MARKED} {name}"
            )
        figure.legend(loc="outside lower left", ncols=2, fontsize="small", facecolor="0.6", framealpha=1)
    return figure


def save_heatmap(profile: Profile, path: str | os.PathLike[str], metric: str | None = None) -> None:
    """Plot the heatmap of the means of `metric` (None: as `heatmap`) and write it to `path`, atomically.

    Raises:
        OptionError: the suffix of `path` is not in `SUFFIXES`, or the metric is unknown.
        OSError: `path` cannot be written.
        MissingExtraError: matplotlib is not installed.
    """
    kind = picture_format(path)
    buffer = io.BytesIO()
    heatmap(profile, metric).savefig(buffer, format=kind, dpi=150)
    write_atomic(path, buffer.getvalue())


def picture_format(path: str | os.PathLike[str]) -> str:
    """Return the format of the suffix of `path`; raise OptionError if it is not in `SUFFIXES`."""
    suffix = Path(path).suffix.lower()
    if suffix not in SUFFIXES:
        raise OptionError(
            f"a picture's name must end in one of {', '.join(SUFFIXES)}, not {Path(path).name!r}"
        )
    return suffix[1:]


def check_installed() -> None:
    """Raise MissingExtraError unless matplotlib is installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise MissingExtraError("a picture", "matplotlib", "plot") from error


def _around(centre: float, values: Array) -> "Normalize":
    """Map values to colours that diverge from `centre`, each side as far as the values go."""
    from matplotlib.colors import TwoSlopeNorm

    found = values[np.isfinite(values)]
    low, high = (found.min(), found.max()) if found.size else (centre, centre)
    room = 1e-6 * abs(centre)  # the norm needs some on both sides
    return TwoSlopeNorm(centre, min(low, centre - room), max(high, centre + room))


def _title(profile: Profile) -> str:
    data = profile.metadata.get("data", {})
    tokens = f"{data['tokens']:,} tokens" if "tokens" in data else ""
    if not data.get("complete", True):
        tokens += ", incomplete"
    lines = [Path(str(profile.metadata.get("model", ""))).name, tokens]
    # matplotlib renders $...$ as math
    return "\n".join(line for line in lines if line).replace("$", r"\$")
