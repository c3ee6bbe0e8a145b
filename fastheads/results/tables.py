"""The statistics of a profile as rows of a table, for CSV and JSON. Needs no pandas."""

import csv
import io
import math
from collections.abc import Iterator
from typing import Any

from fastheads.results.protocol import Profile


def rows(profile: Profile) -> Iterator[dict[str, Any]]:
    """Yield, for each metric and head with samples, its layer, head, metric and statistics: ints and floats."""
    layers = profile.layers
    for metric, moments in profile.arrays.items():
        stats = {name: values.tolist() for name, values in profile.statistics(metric).items()}
        for row, head in zip(*(moments.count + moments.nonfinite).nonzero(), strict=True):
            place = {"layer": layers[row], "head": int(head), "metric": metric}
            yield place | {name: values[row][head] for name, values in stats.items()}


def csv_text(profile: Profile) -> str:
    """Return `rows` as CSV with a header; NaN is empty."""
    text = io.StringIO()
    names = ["layer", "head", "metric", *profile.statistics(profile.metrics[0])]
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for row in rows(profile):
        empty = {name: "" for name, value in row.items() if isinstance(value, float) and math.isnan(value)}
        writer.writerow(row | empty)
    return text.getvalue()
