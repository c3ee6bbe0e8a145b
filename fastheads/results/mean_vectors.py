"""The mean vectors of a profile's heads: checks, merging, their names in files. Does not import torch."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Self

import numpy as np

from fastheads.errors import ProfileError
from fastheads.results.possible import MOST_SAMPLES, ROUNDING, TINY
from fastheads.stats.arrays import Array, MomentArrays
from fastheads.stats.names import METRICS

COUNTS = ("count", "nonfinite")
# Of the arrays' names in a file. Names of moments have a slash and no dot.
PREFIX = "vectors."


@dataclass(frozen=True, eq=False)
class MeanVectors:
    """The mean output of each head, z̄, and the means of ‖z‖² and ‖W_h z‖², all over the same tokens with weight one each.

    These are all valid tokens, under `token_agg` "last" the last ones; tokens where z or ‖W_h z‖² is NaN or infinite are left out
    and counted in `nonfinite`. NumPy arrays; the means are NaN at count 0.
    """

    count: Array  # int64 [rows, heads]: tokens
    nonfinite: Array  # int64 [rows, heads]: tokens left out
    mean: (
        Array  # float64 [rows, heads, head_dim]; 0 beyond the head_dim of a row that is narrower than others
    )
    power: Array  # float64 [rows, heads]: mean of ‖W_h z‖²
    output_power: Array  # float64 [rows, heads]: mean of ‖z‖²

    @classmethod
    def of(cls, planes: Any) -> Self:
        """Copy `stats.mean_vectors.MeanVectorPlanes`, whose means at count 0 are 0, to the CPU."""
        # A tensor's own method, so that torch is not imported.
        arrays = {name: getattr(planes, name).numpy(force=True).copy() for name in NAMES}
        empty = arrays["count"] == 0
        for name in NAMES:
            if name not in COUNTS:
                arrays[name][empty] = np.nan
        return cls(**arrays)

    def merged(self, other: Self) -> Self:
        """Merge with the vectors over other tokens, by weighted means. Merging with an empty side is exact."""
        with np.errstate(all="ignore"):
            count = self.count + other.count
            share = other.count / np.maximum(count, 1).astype(np.float64)

            def mean(name: str) -> Array:
                one, two = getattr(self, name), getattr(other, name)
                n_one, n_two, s = (
                    n.reshape(n.shape + (1,) * (one.ndim - 2)) for n in (self.count, other.count, share)
                )
                return np.where(n_two == 0, one, np.where(n_one == 0, two, one + (two - one) * s))

            means = {name: mean(name) for name in NAMES if name not in COUNTS}
        return type(self)(count=count, nonfinite=self.nonfinite + other.nonfinite, **means)

    def arrays(self) -> dict[str, Array]:
        """Return the arrays by their names in a file."""
        return {f"{PREFIX}{name}": getattr(self, name) for name in NAMES}

    @classmethod
    def of_arrays(cls, arrays: Mapping[str, Array]) -> Self:
        """Make them of what `arrays` returned, unchecked."""
        return cls(**{name: arrays[f"{PREFIX}{name}"] for name in NAMES})


NAMES = tuple(field.name for field in fields(MeanVectors))
VECTOR_ARRAYS = tuple(f"{PREFIX}{name}" for name in NAMES)  # in a file


def check_structure(vectors: MeanVectors, sites: Sequence[Mapping[str, Any]], shape: tuple[int, int]) -> None:
    """Raise ProfileError unless the arrays have the dtypes and shapes of `shape` (rows, heads) and the widest head of `sites`."""
    head_dim = max(site["head_dim"] for site in sites)
    for name in NAMES:
        array = getattr(vectors, name)
        dtype = np.dtype(np.int64 if name in COUNTS else np.float64)
        expected = (*shape, head_dim) if name == "mean" else shape
        if not isinstance(array, np.ndarray) or array.dtype != dtype or array.shape != expected:
            found = (
                f"{array.dtype} {list(array.shape)}"
                if isinstance(array, np.ndarray)
                else type(array).__name__
            )
            raise ProfileError(f"{PREFIX}{name} must be an array of {dtype} {list(expected)}, not {found}")


def check_values(
    vectors: MeanVectors,
    sites: Sequence[Mapping[str, Any]],
    moments: Mapping[str, MomentArrays],
    token_agg: Any,
) -> None:
    """Raise ProfileError for vectors that no tokens can have, or not those of `moments`."""
    with np.errstate(all="ignore"):
        if bool(_impossible(vectors, sites).any()):
            raise ProfileError("its mean vectors are not those of any tokens")
    metric = next((metric for metric in METRICS if metric in moments), None)
    if metric is None:
        return
    tokens, samples = vectors.count + vectors.nonfinite, moments[metric].count + moments[metric].nonfinite
    # Under "all" a sample is the mean over a sequence, of one token at least.
    fits = (tokens >= samples) & ((samples > 0) | (tokens == 0)) if token_agg == "all" else tokens == samples
    if not bool(fits.all()):
        raise ProfileError(
            f"its mean vectors and {metric} have numbers of samples that contradict each other"
        )


def _impossible(v: MeanVectors, sites: Sequence[Mapping[str, Any]]) -> Array:
    """Mark the heads whose vectors no tokens can have, bool `[rows, heads]`."""
    num_heads, head_dim = (
        np.array([site[key] for site in sites]).reshape(-1, 1) for key in ("num_heads", "head_dim")
    )
    heads, width = v.mean.shape[1:]
    missing = np.arange(heads) >= num_heads  # [rows, heads]
    counts = (v.count >= 0) & (v.nonfinite >= 0) & (v.count <= MOST_SAMPLES) & (v.nonfinite <= MOST_SAMPLES)
    counts &= ~missing | ((v.count == 0) & (v.nonfinite == 0))
    padding = (np.arange(width) >= head_dim)[:, None]  # [rows, 1, head_dim]
    constant = np.square(v.mean).sum(-1)  # ‖E z‖² ≤ E‖z‖², and equal for one token
    room = ROUNDING * v.output_power + TINY
    some = (
        (v.count > 0)
        & np.isfinite(v.mean).all(-1)
        & ~(padding & (v.mean != 0)).any(-1)
        & np.isfinite(v.power)
        & (v.power >= 0)
        & np.isfinite(v.output_power)
        & (constant <= v.output_power + room)
        & ((v.count > 1) | (constant >= v.output_power - room))
    )
    none = (v.count == 0) & np.isnan(v.mean).all(-1) & np.isnan(v.power) & np.isnan(v.output_power)
    return ~(counts & (some | none))
