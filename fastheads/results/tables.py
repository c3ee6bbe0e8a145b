"""The statistics of a profile as rows of a table, for CSV and JSON. Needs no pandas."""

import csv
import io
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from fastheads.results.protocol import Profile
from fastheads.results.ranking import Ranking

RANKED = ("rank", "layer", "head", "mean", "sem", "tied", "count")  # columns of `ranked_rows`


def rows(profile: Profile) -> Iterator[dict[str, Any]]:
    """Yield, for each metric and head with samples, its layer, head, metric and statistics: ints and floats."""
    layers = profile.layers
    for metric, moments in profile.arrays.items():
        stats = {name: values.tolist() for name, values in profile.statistics(metric).items()}
        for row, head in zip(*(moments.count + moments.nonfinite).nonzero(), strict=True):
            place = {"layer": layers[row], "head": int(head), "metric": metric}
            yield place | {name: values[row][head] for name, values in stats.items()}


def ranked_rows(profile: Profile, ranking: Ranking) -> Iterator[dict[str, Any]]:
    """Yield the ranked heads, highest first: rank from 1, layer, head, mean, sem, whether it is a tie, samples.

    `sem` and `count` are None where the ranking is not by a metric; then `mean` is the number that ranks.
    """
    tied = ranking.tied()
    moments = profile.arrays.get(ranking.name)
    for rank, (row, head) in enumerate(ranking.cells(descending=True), 1):
        yield {
            "rank": rank,
            "layer": profile.layers[row],
            "head": head,
            "mean": float(ranking.values[row, head]),
            "sem": None if ranking.sem is None else float(ranking.sem[row, head]),
            "tied": bool(tied[row, head]),
            "count": None if moments is None else int(moments.count[row, head]),
        }


def csv_text(profile: Profile) -> str:
    """Return `rows` as CSV with a header; NaN is empty."""
    return csv_of(rows(profile), ("layer", "head", "metric", *profile.statistics(profile.metrics[0])))


def csv_of(table: Iterable[dict[str, Any]], names: Sequence[str]) -> str:
    """Return a table as CSV with the columns `names`; None and NaN are empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, names, lineterminator="\n")
    writer.writeheader()
    for row in table:
        empty = {name: "" for name, value in row.items() if isinstance(value, float) and math.isnan(value)}
        writer.writerow(row | empty)
    return text.getvalue()
