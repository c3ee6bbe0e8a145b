"""Text about profiles, made safe to show."""

import math
from collections.abc import Callable

import numpy as np

from fastheads.results.protocol import Profile
from fastheads.stats.arrays import Array

MOST_DECIMALS, TOO_LARGE = 8, 1e7  # beyond these, numbers are written as powers of ten


def clean(text: object) -> str:
    """Replace control characters, marks of direction and lone surrogates in `text`, so that it cannot steer what shows it."""
    return "".join(c if c.isprintable() else "?" for c in str(text))


def samples_of(profile: Profile, metric: str) -> str:
    """Return how many samples the heads have, as in "16 sequences a head"; "12 to 16 ..." if their numbers differ."""
    count = profile.arrays[metric].count
    measured = count[count > 0]
    low, high = (int(measured.min()), int(measured.max())) if measured.size else (0, 0)
    number = f"{high:,}" if low == high else f"{low:,} to {high:,}"
    return f"{number} {'tokens' if profile.metadata.get('token_agg') == 'token' else 'sequences'} a head"


def about_samples(profile: Profile, metric: str) -> str:
    """Return what was measured in one line: samples, aggregation, tokens."""
    metadata = profile.metadata
    data = metadata.get("data", {})
    parts = [samples_of(profile, metric), f"token_agg {clean(metadata.get('token_agg', '?'))}"]
    if metadata.get("skip_first"):
        parts.append(f"skip_first {metadata['skip_first']}")
    if "tokens" in data:
        parts.append(f"{data['tokens']:,} tokens" + ("" if data.get("complete", True) else ", incomplete"))
    return ", ".join(parts)


def ranges(numbers: list[int]) -> str:
    """Format whole numbers in ascending order as in "0-3, 8"."""
    parts: list[list[int]] = []
    for number in numbers:
        if parts and number == parts[-1][-1] + 1:
            parts[-1] = [parts[-1][0], number]
        else:
            parts.append([number])
    return ", ".join("-".join(map(str, part)) for part in parts)


def decimals(values: Array, errors: Array | None = None) -> int | None:
    """Return how many decimals a column of `values` needs: four digits for all but the smallest tenth, one of a middling error.

    None: they span too much, and are better written as powers of ten.
    """
    sizes = np.sort(np.abs(values[np.isfinite(values) & (values != 0)]))
    if not sizes.size:
        return 0
    wanted = 3 - math.floor(math.log10(sizes[sizes.size // 10]))
    if errors is not None:
        known = np.sort(errors[np.isfinite(errors) & (errors > 0)])
        if known.size:
            wanted = max(wanted, -math.floor(math.log10(known[known.size // 2])))
    wanted = max(wanted, 0)
    return None if wanted > MOST_DECIMALS or sizes[-1] >= TOO_LARGE else wanted


def aligned(values: Array, errors: Array | None = None) -> Callable[[float], str]:
    """Return a function that formats numbers of one column with the decimals of `decimals`."""
    places = decimals(values, errors)
    return (lambda value: f"{value:.3e}") if places is None else (lambda value: f"{value:.{places}f}")
