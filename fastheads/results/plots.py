"""Plot a profile as a heatmap, layers by heads (needs matplotlib)."""

import io
import os
import textwrap
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from fastheads.errors import MissingExtraError, OptionError
from fastheads.results.colours import Colours, colours_of
from fastheads.results.files import write_atomic
from fastheads.results.kv_groups import kv_heads
from fastheads.results.protocol import Profile
from fastheads.results.ranking import by_metric, displayed_metric, missing_ratio
from fastheads.results.text import about_samples
from fastheads.stats.arrays import Array
from fastheads.stats.names import KV_METRICS
from fastheads.stats.scales import scale_of

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure


SUFFIXES = (".png", ".pdf", ".svg")
MARKED = 10  # highest and lowest heads each
ACROSS, DOWN = 20, 32  # ticks of an axis, at most
STEPS = (1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 200, 500, 1000)


def heatmap(
    profile: Profile,
    metric: str | None = None,
    stat: str = "mean",
    *,
    ax: "Axes | None" = None,
    cmap: "str | Colormap | None" = None,
    vmin: float | None = None,
    vmax: float | None = None,
    marked: int = MARKED,
) -> "Axes":
    """Plot `stat` of `metric`; heads that do not exist or have no samples stay blank. `HeadProfile.plot` says what the rest is.

    `ax` None: a new figure of pyplot.
    """
    check_installed()
    missing = missing_ratio(profile) if metric is None else ""
    metric = displayed_metric(profile.metrics) if metric is None else metric
    stats = profile.statistics(metric)
    if stat not in stats:
        raise OptionError(f"unknown stat {stat!r}: choose one of {', '.join(stats)}")
    values = np.where(stats["count"] > 0, stats[stat], np.nan)
    of_groups = metric in KV_METRICS
    if of_groups:  # fewer than heads
        measured = np.flatnonzero((stats["count"] > 0).any(axis=0))
        values = values[:, : int(measured.max(initial=0)) + 1]
    colours = colours_of(metric, values, of_means=stat == "mean")
    norm, extend = _norm(colours, values, vmin, vmax)
    caption = []
    if ax is None:
        import matplotlib.pyplot as plt

        ax = _axes(plt.figure(), profile)
    diverging = colours.kind == "diverging"
    # Arrays of objects cannot be drawn: counts are whole numbers, the rest is float64.
    image = ax.imshow(
        values.astype(np.float64),
        aspect="auto",
        interpolation="nearest",
        cmap=cmap or ("PuOr_r" if diverging else "viridis"),
        norm=norm,
    )
    ax.set_facecolor("0.85")
    note = f"\n({scale_of(metric).note})" if scale_of(metric).note and stat == "mean" else ""
    label = f"{stat} of {metric}{note}" + (f"\n{missing}" if missing else "")
    ax.figure.colorbar(image, ax=ax, label=label, extend=extend, aspect=35, pad=0.03)
    if extend != "neither":
        caption.append(f"colours end at {norm.vmin:.3g} and {norm.vmax:.3g}")

    rows, heads = values.shape
    ax.set_xlabel("KV head" if of_groups else "head")
    ax.set_ylabel("layer")
    ax.set_xticks(range(0, heads, _step(heads, ACROSS)))
    step = _step(rows, DOWN)
    ax.set_yticks(range(0, rows, step), [str(layer) for layer in profile.layers[::step]])
    ax.set_title(_title(profile, metric, stat), fontsize="medium", loc="left")
    if not of_groups and _mark_groups(ax, profile, "0.3" if diverging else "white"):
        caption.append("lines separate KV groups")
    cells = by_metric(profile, metric).cells()
    if stat == "mean" and 0 < 4 * marked <= len(cells):
        caption[:0] = _mark(ax, cells, stats["mean"], marked)
    _explain(ax, caption)
    return ax


def figure_of(profile: Profile, metric: str | None = None) -> "Figure":
    """Return a figure with the heatmap of `metric` that pyplot does not know, and so does not keep."""
    check_installed()
    from matplotlib.figure import Figure

    figure = Figure()
    heatmap(profile, metric, ax=_axes(figure, profile))
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
    figure_of(profile, metric).savefig(buffer, format=kind, dpi=150)
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


def _axes(figure: Any, profile: Profile) -> "Axes":
    """Give an empty figure a size that suits the profile, and return its axes."""
    rows, heads = profile.shape
    figure.set_size_inches(min(3 + 0.35 * max(heads, 9), 12), min(2.4 + 0.22 * max(rows, 14), 13))
    figure.set_layout_engine("constrained")
    axes: Axes = figure.add_subplot()
    return axes


def _norm(colours: Colours, values: Array, vmin: float | None, vmax: float | None) -> tuple["Normalize", str]:
    """Return matplotlib's norm for `colours`, with limits that are given in place of its own, and where values lie beyond."""
    from matplotlib.colors import LogNorm, Normalize, TwoSlopeNorm

    low = colours.low if vmin is None else vmin
    high = colours.high if vmax is None else vmax
    if not low < high:
        raise OptionError(f"vmin must be below vmax, not {low:.4g} and {high:.4g}")
    norm: Normalize
    if colours.kind == "diverging" and colours.centre is not None and low < colours.centre < high:
        norm = TwoSlopeNorm(colours.centre, low, high)
    elif colours.kind == "log" and low > 0:
        norm = LogNorm(low, high)
    else:
        norm = Normalize(low, high)
    found = values[np.isfinite(values)]
    below, above = bool((found < low).any()), bool((found > high).any())
    return norm, {(0, 0): "neither", (1, 0): "min", (0, 1): "max", (1, 1): "both"}[below, above]


def _step(number: int, labels: int) -> int:
    """Return the step of the ticks of an axis with `number` entries, so that `labels` are enough."""
    return next((step for step in STEPS if number <= step * labels), number)


def _mark_groups(ax: "Axes", profile: Profile, colour: str) -> bool:
    """Draw lines between the KV groups of each row; return whether there are any."""
    sites = profile.metadata["sites"]
    edges = []  # x, row
    for row, number in enumerate(kv_heads(profile)):
        if number is not None and 1 < number < sites[row]["num_heads"]:
            width = sites[row]["num_heads"] // number
            edges += [(group * width - 0.5, row) for group in range(1, number)]
    if edges:
        x, row = np.array(edges).T
        ax.vlines(x, row - 0.5, row + 0.5, colors=colour, linewidth=0.8)
    return bool(edges)


def _mark(ax: "Axes", cells: list[tuple[int, int]], means: Array, marked: int) -> list[str]:
    """Mark the highest and the lowest means; return what the caption says of them."""
    said = []
    # The longest that a mark may be, in points, so that it does not cover its neighbours.
    box = ax.get_window_extent()
    rows, heads = means.shape
    room = min(box.width / heads, box.height / rows) / ax.figure.dpi * 72
    size = min(max(0.6 * room, 2.5), 5.0)
    for name, chosen, marker, colour in (
        ("highest", cells[-marked:], "o", "black"),
        ("lowest", cells[:marked], "x", "white"),
    ):
        y, x = zip(*chosen, strict=True)
        # Black with a white edge, and white, are seen on all colours that either kind has.
        edge: dict[str, Any] = {"edgecolors": "white"} if marker == "o" else {}
        ax.scatter(
            x, y, marker=marker, s=size**2, c=colour, linewidths=1, label=f"the {marked} {name}", **edge
        )
        low, high = (means[cell] for cell in (chosen[0], chosen[-1]))
        said.append(
            f"{'circles' if marker == 'o' else 'crosses'}: the {marked} {name}, {low:.4g} to {high:.4g}"
        )
    return said


def _explain(ax: "Axes", caption: list[str]) -> None:
    """Put a legend below the heatmap, with the caption as its title; below a figure that holds nothing else."""
    if not caption:
        return
    text = "\n".join(textwrap.wrap("; ".join(caption), 76))
    style: dict[str, Any] = {"ncols": 2, "fontsize": "small", "title_fontsize": "small", "alignment": "left"}
    style |= {"facecolor": "0.6", "framealpha": 1, "title": text[0].upper() + text[1:]}
    named = ax.get_legend_handles_labels()
    if ax.figure.get_layout_engine() is not None and len(ax.figure.axes) == 2:  # the heatmap and its scale
        ax.figure.legend(*named, loc="outside lower left", **style)
    else:
        ax.legend(*named, loc="upper left", bbox_to_anchor=(0, -0.12), borderaxespad=0, **style)


def _title(profile: Profile, metric: str, stat: str) -> str:
    model = Path(str(profile.metadata.get("model", ""))).name
    lines = [model, f"{stat} of {metric}", about_samples(profile, metric)]
    # matplotlib renders $...$ as math
    return "\n".join(line for line in lines if line).replace("$", r"\$")
