"""Methods of `HeadProfile` that show it: as text, tables, pictures, and a page in a browser or a notebook."""

import os
from typing import TYPE_CHECKING, Any

import numpy as np

from fastheads.errors import MissingExtraError
from fastheads.results.files import write_atomic
from fastheads.results.text import clean, samples_of

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap


class Shown:
    """The methods of `HeadProfile` that show it. None of them needs torch."""

    def __repr__(self: Any) -> str:
        rows, heads = self.shape
        most = max(self.metrics, key=lambda metric: int(self.arrays[metric].count.max()))
        about = f"{rows} rows x {heads} heads, {samples_of(self, most)}"
        metrics = ", ".join(self.metrics)
        return f"HeadProfile({clean(self.metadata.get('model', '?'))}: {about}; {metrics})"

    def _repr_html_(self: Any) -> str:
        """Return the report as an iframe, which notebooks show and keep when they are exported."""
        from fastheads.results.report.page import frame

        return frame(self)

    def report(self: Any, path: str | os.PathLike[str]) -> None:
        """Write the profile as one HTML file that opens in a browser, offline: `path` ends in .html.

        It shows a heatmap and a ranking of any metric, two metrics against each other, and where the numbers come from.

        Raises:
            OptionError: the suffix of `path` is another.
            OSError: `path` cannot be written.
        """
        from fastheads.results.report.page import save_page
        from fastheads.results.report.payload import Named

        save_page([Named("this profile", self)], path)

    def plot(
        self: Any,
        metric: str | None = None,
        stat: str = "mean",
        *,
        ax: "Axes | None" = None,
        cmap: "str | Colormap | None" = None,
        vmin: float | None = None,
        vmax: float | None = None,
        marked: int = 10,
    ) -> "Axes":
        """Plot a heatmap of `stat`, layers by heads, and return its matplotlib Axes (`axes.figure.savefig(path)` writes it).

        Args:
            metric: None: `head_residual_ratio`; if the profile lacks it, a relative metric, and the figure says so.
            stat: a statistic of `results()`.
            ax: draw here; None: in a new figure of pyplot, which a notebook shows.
            cmap: a colormap; None: one that suits the metric.
            vmin: the value of the first colour; None: it suits the metric, and so does vmax.
            vmax: the value of the last colour.
            marked: mark this many of the highest means, and of the lowest, if there are four times as many heads.

        Raises:
            OptionError: unknown metric or stat, or vmin is not below vmax.
            MissingExtraError: matplotlib is not installed.
        """
        from fastheads.results.plots import heatmap

        return heatmap(self, metric, stat, ax=ax, cmap=cmap, vmin=vmin, vmax=vmax, marked=marked)

    def to_pandas(self: Any) -> "pd.DataFrame":
        """Return a DataFrame with one row for each metric and head with samples: layer, head, metric and the `STATS`.

        Raises:
            MissingExtraError: pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise MissingExtraError("to_pandas()", "pandas", "plot") from error
        layers = np.array(self.layers, dtype=np.int64)
        frames = []
        for metric, moments in self.arrays.items():
            row, head = (moments.count + moments.nonfinite).nonzero()
            stats = {name: values[row, head] for name, values in self.statistics(metric).items()}
            frames.append(pd.DataFrame({"layer": layers[row], "head": head, "metric": metric, **stats}))
        return pd.concat(frames, ignore_index=True)

    def to_csv(self: Any, path: str | os.PathLike[str]) -> None:
        """Write the table of `to_pandas()` as CSV, atomically; floats as their shortest text that reads back the same.

        Needs no pandas.

        Raises:
            OSError: `path` cannot be written.
        """
        from fastheads.results.tables import csv_text

        write_atomic(path, csv_text(self).encode())

    def to_parquet(self: Any, path: str | os.PathLike[str]) -> None:
        """Write the table of `to_pandas()` as Parquet, atomically.

        Raises:
            MissingExtraError: pandas or pyarrow is not installed.
            OSError: `path` cannot be written.
        """
        try:
            import pyarrow  # noqa: F401
        except ImportError as error:
            raise MissingExtraError("to_parquet()", "pyarrow", "corpus") from error
        write_atomic(path, self.to_pandas().to_parquet(None, index=False, engine="pyarrow"))
