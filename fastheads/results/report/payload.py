"""What the page of a report shows, as bytes: a JSON header, and planes of numbers with one entry for each head.

    uint32, little endian: length of the header | header | planes, in the order in which the header names them

A plane `[rows * heads]` is written byte by byte: the first bytes of all its numbers, then the second ones, which compress better.
Ranks and ties come from `results.ranking`, so that the page and the library never disagree.
"""

import json
import math
import struct
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from fastheads.results.colours import PUOR, VIRIDIS, colours_of
from fastheads.results.kv_groups import kv_heads
from fastheads.results.protocol import Profile
from fastheads.results.ranking import TIE, by_metric, displayed_metric, missing_ratio
from fastheads.results.text import about_samples, clean, decimals
from fastheads.stats.arrays import Array
from fastheads.stats.names import KV_METRIC
from fastheads.stats.scales import scale_of

LONGEST = 2_000  # characters of a text from the metadata
MARKED = 10  # highest and lowest heads each
# The metadata by heading; what is in none of these is shown under "Other".
HEADINGS = {
    "Model": ("model", "model_class", "residual_stream", "residual_update"),
    "Weights": ("weights",),
    "Data": ("data",),
    "Options": ("token_agg", "skip_first", "layers", "backend", "precision"),
    "Versions": ("versions",),
}
NOT_SHOWN = ("sites", "kv_heads")  # they are in the pictures


class Named(NamedTuple):
    """A profile and what to tell of it: a name that differs from the others', and lines about its file."""

    name: str
    profile: Profile
    about: Mapping[str, str] = {}


def payload(profiles: Sequence[Named], curves: Mapping[str, Any] | None, created: str, version: str) -> bytes:
    """Return the bytes for `profiles`, and for the curves of an ablation as `report.ablation` returns them."""
    planes: list[Array] = []
    header = {
        "created": created,
        "version": version,
        "tie": TIE,
        "marked": MARKED,
        "palettes": {"viridis": VIRIDIS, "puor": PUOR},
        "profiles": [_described(named, planes) for named in profiles],
        "ablation": curves,
    }
    text = json.dumps(header, allow_nan=False, separators=(",", ":")).encode()
    return b"".join([struct.pack("<I", len(text)), text, *map(_shuffled, planes)])


def _described(named: Named, planes: list[Array]) -> dict[str, Any]:
    """Describe a profile as JSON, and append its planes."""
    profile = named.profile
    rows, heads = profile.shape
    sites = profile.metadata["sites"]
    start = displayed_metric(profile.metrics)
    return {
        "name": clean(named.name),
        "model": clean(profile.metadata.get("model", "?")),
        "summary": clean(about_samples(profile, start)),
        "rows": rows,
        "heads": heads,
        "layers": profile.layers,
        "sites": [clean(site["name"]) for site in sites],
        "widths": [site["num_heads"] for site in sites],
        "kv": kv_heads(profile),
        "start": profile.metrics.index(start),
        "note": missing_ratio(profile),
        "tokens": profile.metadata.get("token_agg") == "token",  # samples of one text, not independent
        "metrics": [_metric(profile, metric, planes) for metric in profile.metrics],
        "about": _about(profile.metadata, named.about),
    }


def _metric(profile: Profile, metric: str, planes: list[Array]) -> dict[str, Any]:
    ranking = by_metric(profile, metric)
    rank = np.zeros(profile.shape, np.uint32)  # 1: the highest; 0: no samples
    cells = ranking.cells(descending=True)
    if cells:
        row, head = np.array(cells).T
        rank[row, head] = np.arange(1, len(cells) + 1)
    mean = np.where(ranking.measured, ranking.values, np.nan)
    moments = profile.arrays[metric]
    assert ranking.sem is not None
    here = {
        "mean": _narrow(mean),
        "sem": _narrow(ranking.sem),
        "rank": rank,
        "tied": ranking.tied().astype(np.uint8),
        "count": moments.count.astype(np.float64),
    }
    planes += here.values()
    colours = colours_of(metric, mean)
    places = decimals(mean[ranking.measured], ranking.sem[ranking.measured])
    return {
        "name": clean(metric),
        "note": scale_of(metric).note,
        "unit": "KV head" if metric == KV_METRIC else "head",
        "ranked": len(cells),
        "digits": -1 if places is None else places,  # decimals of the table's columns
        "nonfinite": int(moments.nonfinite.sum()),
        "colours": asdict(colours),
        "planes": [[name, plane.dtype.str[1:]] for name, plane in here.items()],
    }


def _narrow(values: Array) -> Array:
    """Return `values` in float32, seven digits, if their range allows; else unchanged."""
    found = np.abs(values[np.isfinite(values) & (values != 0)])
    if found.size and (found.max() > 1e37 or found.min() < 1e-37):
        return values
    return values.astype(np.float32)


def _shuffled(plane: Array) -> bytes:
    little = np.ascontiguousarray(plane, plane.dtype.newbyteorder("<"))
    return little.reshape(-1, 1).view(np.uint8).T.tobytes()


def _about(metadata: Mapping[str, Any], file: Mapping[str, str]) -> list[list[Any]]:
    """Return the metadata as [heading, [[name, text], ...]]."""
    found = [["File", [[clean(key), clean(text)] for key, text in file.items()]]] if file else []
    known = {key for keys in HEADINGS.values() for key in keys}
    other = tuple(key for key in metadata if key not in known and key not in NOT_SHOWN)
    for heading, keys in {**HEADINGS, "Other": other}.items():
        lines: list[list[str]] = []
        for key in keys:
            value = metadata.get(key)
            if isinstance(value, dict):
                lines += [[clean(name), _text(inner)] for name, inner in value.items()]
            elif value is not None:
                lines.append([clean(key), _text(value)])
        if lines:
            found.append([heading, lines])
    return found


def _text(value: Any) -> str:
    if isinstance(value, bool) or value is None:
        text = {True: "yes", False: "no", None: "none"}[value]
    elif isinstance(value, int):
        text = f"{value:,}"
    elif isinstance(value, float):
        text = f"{value:.6g}" if math.isfinite(value) else str(value)
    elif isinstance(value, str):
        text = value
    else:
        text = json.dumps(value, ensure_ascii=False)
    text = clean(text)
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def file_lines(path: Path, written: str) -> dict[str, str]:
    """Return the lines about a profile's file."""
    return {"name": str(path), "written": written}
