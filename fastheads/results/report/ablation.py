"""Read the file of an ablation, and make of it the curves that the page draws."""

import json
import math
import os
from pathlib import Path
from typing import Any

import numpy as np

from fastheads.errors import ProfileFileError, one_line
from fastheads.results.files import UnreadableError, read_once
from fastheads.results.text import clean

LARGEST = 2**26  # bytes
BASELINES = {"random": "random heads", "matched": "random heads, as many of each layer"}


def load_curves(path: str | os.PathLike[str]) -> dict[str, Any]:
    """Return the curves of a file as the page needs them: text, unit, and lines of points [share, mean, low, high].

    A point's mean is that of the sequences' rises in loss; low and high are one standard error away, or None.

    Raises:
        ProfileFileError: the file holds no curves, or is damaged.
        OSError: it cannot be read.
    """
    path = Path(path)
    try:
        document = json.loads(read_once(path, LARGEST), parse_constant=_refuse)
        return _curves(document)
    except (UnreadableError, ValueError, RecursionError) as error:
        raise ProfileFileError(f"{path} is not the result of an ablation: {one_line(error, 200)}") from error


def _refuse(constant: str) -> None:
    raise ValueError(f"it holds {constant}")


def _curves(document: Any) -> dict[str, Any]:
    if not isinstance(document, dict) or not isinstance(document.get("curves"), list):
        raise ValueError("it has no curves")
    lines = [
        _line(curve, clean(curve.get("metric", "?"))) for curve in document["curves"] if _is_curve(curve)
    ]
    for key, name in BASELINES.items():
        if _is_curve(document.get(key)):
            lines.append(_line(document[key], name))
    if not lines:
        raise ValueError("it has no curve with fractions and rises")
    base = document.get("base")
    said = f"; loss of the whole model {base:.4g}" if isinstance(base, int | float) else ""
    return {
        "text": f"The share of the heads given is replaced ({clean(document.get('mode', '?'))}), the lowest of each ranking "
        f"first{said}. Bars: one standard error over the sequences.",
        "unit": "rise in loss",
        "lines": lines,
    }


def _is_curve(curve: Any) -> bool:
    return isinstance(curve, dict) and "fractions" in curve and "rise" in curve


def _line(curve: dict[str, Any], name: str) -> dict[str, Any]:
    fractions, rises = curve["fractions"], curve["rise"]
    if not isinstance(fractions, list) or not isinstance(rises, list) or len(rises) != len(fractions):
        raise ValueError(f"the curve of {name} has not one list of rises for each fraction")
    points = []
    for fraction, rise in zip(fractions, rises, strict=True):
        values = np.asarray(rise, dtype=np.float64).ravel()  # of sequences; of random draws, too
        if not _is_number(fraction) or not values.size or not np.isfinite(values).all():
            raise ValueError(f"the curve of {name} holds something else than numbers")
        mean = float(values.mean())
        spread = float(values.std(ddof=1) / math.sqrt(values.size)) if values.size > 1 else None
        ends = [None, None] if spread is None else [mean - spread, mean + spread]
        points.append([float(fraction), mean, *ends])
    return {"name": name, "points": points}


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)
