"""HeadProfile: the moments of every head and metric, as tables, rankings, files and plots.

A profile read from a file needs no torch for any of these, only for `moments` and `results()`.
"""

import copy
import os
import warnings
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from fastheads.errors import MergeError, OptionError, ProfileError, ProfileFileError
from fastheads.results.container import ContainerError, pack, unpack_arrays
from fastheads.results.files import UnreadableError, read_once, write_atomic
from fastheads.results.mean_vectors import VECTOR_ARRAYS, MeanVectors, check_structure, check_values
from fastheads.results.merge import check_mergeable, merged_metadata, merged_vectors
from fastheads.results.possible import contradiction, impossible, least_of
from fastheads.results.ranking import RANKING_METRIC, Mode, by_metric, check_number, choose
from fastheads.results.shown import Shown
from fastheads.results.with_model import WithModel
from fastheads.stats.arrays import Array, MomentArrays, as_arrays

if TYPE_CHECKING:
    from fastheads.stats.moments import Moments

STATS = ("mean", "var", "std", "sem", "min", "max", "count", "nonfinite")

FILE_KEY = "fastheads"  # the key of the file's metadata string
FORMAT_VERSION = 2  # 1 had no digest; it is still read
VECTORS_VERSION = 3  # with mean vectors; without them version 2 is written, which earlier releases read
READ_VERSIONS = (1, 2, 3)
LARGEST = 2**28  # bytes; more than a thousand layers of a thousand heads need
LARGEST_HEADER = 2**24
COUNTS = ("count", "nonfinite")

# Types of the metadata entries that are used after reading a file. Other entries may have any type.
TYPES: dict[str, tuple[type, ...]] = {
    "model": (str,),
    "token_agg": (str,),
    "skip_first": (int,),
    "layers": (list, NoneType),
    "weights": (dict, NoneType),
    "residual_update": (str, list),
    "residual_stream": (str, list),
    "streaming": (dict,),
    "streaming_unknown": (dict,),
    "data": (dict,),
}
DATA_TYPES: dict[str, tuple[type, ...]] = {
    "source": (str,),
    "tokens": (int,),
    "sequences": (int,),
    "complete": (bool,),
    "parts": (list,),
}


class HeadProfile(WithModel, Shown):
    """The results for every head.

    `moments` holds the running moments by metric: CPU tensors `[rows, heads]`, int64 for the two counts and float64 for the rest.
    Row i is `metadata["sites"][i]`; its `layer` is the number shown to users, and two sites of one layer share it, also in
    `rank()`, `lowest()` and the tables. Heads that do not exist or were left out have count 0. `vectors` holds the heads' mean
    vectors, or is None.
    """

    def __init__(
        self,
        moments: "Mapping[str, Moments] | Mapping[str, MomentArrays]",
        metadata: dict[str, Any],
        vectors: MeanVectors | None = None,
    ) -> None:
        """Keep `moments`, `vectors`, and `metadata`, which must hold `sites`: a list of name, layer, num_heads, head_dim.

        NumPy arrays may take the place of tensors.

        Raises:
            ProfileError: shapes or dtypes are not those above, or the sites do not fit them.
        """
        _check_structure(moments, metadata)
        self._keep(moments)
        self.metadata = metadata
        self.vectors = vectors
        if vectors is not None:
            check_structure(vectors, metadata["sites"], self.shape)

    def _keep(self, moments: Any) -> None:
        # Only one of the two is kept: tensors once a caller has them, since it may write to them.
        of_arrays = any(isinstance(plane, np.ndarray) for planes in moments.values() for plane in planes)
        self._arrays: dict[str, MomentArrays] = {}
        self._tensors: dict[str, Moments] | None = None
        if of_arrays:
            self._arrays = {metric: as_arrays(planes) for metric, planes in moments.items()}
        else:
            self._tensors = moments

    @property
    def moments(self) -> "dict[str, Moments]":
        """The running moments by metric, as tensors. Changing them changes the profile."""
        if self._tensors is None:
            import torch

            from fastheads.stats.moments import Moments

            self._tensors = {
                # Copied only if read-only, since a tensor is writable.
                metric: Moments(
                    *(torch.from_numpy(np.require(plane, requirements=["C", "W"])) for plane in planes)
                )
                for metric, planes in self._arrays.items()
            }
        return self._tensors

    @moments.setter
    def moments(self, moments: "dict[str, Moments]") -> None:
        self._keep(moments)

    @property
    def arrays(self) -> Mapping[str, MomentArrays]:
        """`moments` as NumPy arrays, which share their memory. Needs no torch if the profile is from a file."""
        if self._tensors is None:
            return self._arrays
        return {metric: as_arrays(planes) for metric, planes in self._tensors.items()}

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, heads) of every plane."""
        rows, heads = next(iter(self._kept.values())).count.shape
        return rows, heads

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(self._kept)

    @property
    def _kept(self) -> Mapping[str, Any]:
        """The moments by metric, as tensors or arrays."""
        return self._arrays if self._tensors is None else self._tensors

    @property
    def layers(self) -> list[int]:
        """The layer of each row."""
        return [site["layer"] for site in self.metadata["sites"]]

    def results(self) -> dict[str, dict[str, Any]]:
        """Return `{metric: {stat: tensor [rows, heads]}, ..., "metadata": {...}}` with the statistics of `STATS`.

        `var` is unbiased, `std` its root, `sem` = std/√count, which assumes independent samples: true of sequences, too small for
        tokens of one text. Mean, min and max are NaN at count 0; var, std and sem below 2.
        """
        import torch

        results: dict[str, dict[str, Any]] = {
            metric: {stat: torch.from_numpy(values) for stat, values in _stats(moments).items()}
            for metric, moments in self.arrays.items()
        }
        results["metadata"] = copy.deepcopy(self.metadata)
        return results

    def statistics(self, metric: str = RANKING_METRIC) -> dict[str, Array]:
        """Return the statistics of one metric as in `results()`, as NumPy arrays `[rows, heads]`."""
        return _stats(self._of(metric))

    def __getitem__(self, metric: str) -> dict[str, Array]:
        """Return `statistics(metric)`: `profile["head_output_norm"]["mean"]`."""
        return self.statistics(metric)

    def rank(
        self,
        metric: str | None = None,
        *,
        n: int | None = None,
        descending: bool = False,
        mode: Mode = "zero",
        model: Any = None,
    ) -> list[tuple[int, int]]:
        """Return the measured heads as (layer, head), lowest first, or highest; ties in order of position.

        Args:
            metric: the metric whose means rank the heads. None: `head_residual_ratio`, which may be compared across layers. A
                raw norm (`head_output_norm`, `head_residual_contribution_norm`, ...) that ranks heads of several layers warns
                once per process.
            n: return the first n heads only. None: all.
            descending: highest first.
            mode: what the heads are to be replaced with. "zero": zero; rank by `metric`. "mean": their mean; rank by
                `mean_ablation_error_ratio(model)`.
            model: for mode "mean", the model that was profiled.

        Raises:
            ResultsError: the profile lacks the ratio, or mean-ablation errors, of some heads; the message names the metrics that
                it has.
            OptionError: `metric` is not in the profile, `n` is more than the heads, or the arguments do not fit each other.
        """
        return choose(self, metric, n=n, descending=descending, mode=mode, model=model)

    def lowest(
        self,
        fraction: float | None = None,
        metric: str | None = None,
        *,
        n: int | None = None,
        mode: Mode = "zero",
        model: Any = None,
    ) -> list[tuple[int, int]]:
        """Return the lowest `fraction` (0 to 1) of the heads, rounded to a whole number of heads, or the `n` lowest.

        The other arguments and the errors are those of `rank()`.
        """
        check_number(fraction, n)
        return choose(self, metric, fraction=fraction, n=n, mode=mode, model=model)

    def highest(
        self,
        fraction: float | None = None,
        metric: str | None = None,
        *,
        n: int | None = None,
        mode: Mode = "zero",
        model: Any = None,
    ) -> list[tuple[int, int]]:
        """Return the highest heads, highest first; otherwise as `lowest()`."""
        check_number(fraction, n)
        return choose(self, metric, fraction=fraction, n=n, descending=True, mode=mode, model=model)

    def ranked_cells(
        self, metric: str = RANKING_METRIC, *, descending: bool = False
    ) -> list[tuple[int, int]]:
        """Return the heads with samples of `metric` as (row, head), lowest mean first, or highest."""
        return by_metric(self, metric).cells(descending=descending)

    def _of(self, metric: str) -> MomentArrays:
        if metric not in self._kept:
            raise OptionError(f"no metric {metric!r} in this profile; it has {', '.join(self._kept)}")
        return as_arrays(self._kept[metric])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file, atomically: arrays `metric/plane`, and the metadata as JSON.

        Raises:
            ProfileError: `load()` would refuse the file: moments that no samples can have, or metadata that are not JSON.
            OSError: `path` cannot be written.
        """
        write_atomic(path, self.to_bytes())

    def to_bytes(self) -> bytes:
        """Return the content of the file that `save()` writes. Raises ProfileError as that does."""
        arrays = {
            f"{metric}/{plane}": values
            for metric, moments in self.arrays.items()
            for plane, values in moments._asdict().items()
        }
        version = FORMAT_VERSION
        if self.vectors is not None:
            version, arrays = VECTORS_VERSION, arrays | self.vectors.arrays()
        document = {"format": version, "metrics": list(self.metrics), "metadata": self.metadata}
        try:
            content = pack(arrays, FILE_KEY, document)
            if len(content) > LARGEST:
                raise ContainerError(f"it has more than {LARGEST:,} bytes")
            self._of_content(content)
        except (ContainerError, ProfileError) as error:
            raise ProfileError(
                f"this profile cannot be saved, since load() would refuse it: {error}"
            ) from error
        return content

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file that `save()` wrote. Safe for files from anywhere: everything is checked, nothing is unpickled or run.

        Raises:
            ProfileFileError: it is no head profile, or damaged.
            OSError: it cannot be read.
        """
        path = Path(path)
        try:
            return cls._of_content(read_once(path, LARGEST))
        except (ContainerError, UnreadableError, ProfileError) as error:
            raise ProfileFileError(f"{path} is not a head profile: {error}") from error

    @classmethod
    def _of_content(cls, content: bytes) -> Self:
        """Parse the content of a file. Raises ContainerError and ProfileError."""
        arrays, document = unpack_arrays(
            content, FILE_KEY, formats=READ_VERSIONS, digested=READ_VERSIONS[1:], header_limit=LARGEST_HEADER
        )
        metrics, metadata = _parse_document(document)
        has_vectors = document["format"] == VECTORS_VERSION
        moments = _moments_of(metrics, arrays, VECTOR_ARRAYS if has_vectors else ())
        profile = cls(moments, metadata, MeanVectors.of_arrays(arrays) if has_vectors else None)
        _check_values(profile.arrays, metadata)
        if profile.vectors is not None:
            check_values(profile.vectors, metadata["sites"], profile.arrays, metadata.get("token_agg"))
        return profile

    @classmethod
    def merge(
        cls, profiles: Sequence[Self], *, names: Sequence[str] | None = None, allow_repeated: bool = False
    ) -> Self:
        """Merge the samples of all profiles by Chan's formula, in the order given.

        The result has mean vectors if all profiles do; if only some do, a warning says so.

        `metadata["data"]` of the result holds the sums and, under "parts", the entry of each part.

        Args:
            profiles: of the same weights (model names may differ), sites, token_agg, skip_first and metrics. If a profile has no
                complete fingerprint of its weights, the model names must be equal.
            names: names of the profiles in error messages; None: their numbers.
            allow_repeated: accept profiles of the same or overlapping data: those samples count twice, and standard errors come
                out too small. Profiles of different layers over the same data do not overlap.

        Raises:
            MergeError: there are no profiles, or two differ or overlap; the message says which, and in what.
            OptionError: there is not one name for each profile.
        """
        profiles = list(profiles)
        if not profiles:
            raise MergeError("nothing to merge: no profiles were given")
        if names is None:
            names = [f"profile {number}" for number in range(1, len(profiles) + 1)]
        if len(names) != len(profiles):
            raise OptionError(f"names must be one for each profile: {len(profiles)}, not {len(names)}")
        check_mergeable(profiles, names, allow_repeated=allow_repeated)
        if len(profiles) == 1:
            return cls(dict(profiles[0]._kept), merged_metadata(profiles), profiles[0].vectors)
        merged = dict(profiles[0].arrays)
        for other in profiles[1:]:
            merged = {metric: moments.merged(other.arrays[metric]) for metric, moments in merged.items()}
        return cls(merged, merged_metadata(profiles), merged_vectors(profiles, names))


def warn_where_empty(profile: HeadProfile) -> None:
    """Warn, at the caller's caller, if a profile has no samples, so that its statistics are all NaN."""
    if not any(bool((m.count + m.nonfinite).any()) for m in profile.arrays.values()):
        warnings.warn(
            "nothing was measured: no forward of the model has ended normally since the hooks were attached or reset, or "
            "skip_first left none of its tokens (a direct call of model.forward() runs no hooks: call the model itself)",
            RuntimeWarning,
            stacklevel=3,
        )


def _stats(moments: MomentArrays) -> dict[str, Array]:
    """Compute the statistics of `STATS`, each `[rows, heads]`."""
    some = moments.count > 0
    var = moments.var()
    with np.errstate(all="ignore"):
        std = np.sqrt(var)
        sem = std / np.sqrt(moments.count.astype(np.float64))
    values = {
        "mean": np.where(some, moments.mean, np.nan),
        "var": var,
        "std": std,
        "sem": sem,
        "min": np.where(some, moments.min, np.nan),
        "max": np.where(some, moments.max, np.nan),
        "count": moments.count.copy(),
        "nonfinite": moments.nonfinite.copy(),
    }
    return {stat: values[stat] for stat in STATS}


def _check_structure(moments: Mapping[str, Any], metadata: dict[str, Any]) -> None:
    """Raise ProfileError unless all planes have one shape and the right dtypes, and each row has a site."""
    if not moments:
        raise ProfileError("it holds no metrics")
    shape = tuple(next(iter(moments.values())).count.shape)
    if len(shape) != 2 or 0 in shape:
        raise ProfileError(f"planes must be [rows, heads], one of each at least, not {list(shape)}")
    for metric, planes in moments.items():
        for plane, values in planes._asdict().items():
            # By the dtype's name, so that torch need not be imported.
            dtype = "torch.int64" if plane in COUNTS else "torch.float64"
            found = f"torch.{values.dtype}" if isinstance(values, np.ndarray) else str(values.dtype)
            device = str(getattr(values, "device", "cpu"))
            if values.shape != shape or found != dtype or device.partition(":")[0] != "cpu":
                raise ProfileError(
                    f"{metric}/{plane} must be {dtype} {list(shape)} on the CPU, "
                    f"not {found} {list(values.shape)} on {device}"
                )
    sites = metadata.get("sites")
    if not isinstance(sites, list) or len(sites) != shape[0]:
        raise ProfileError(f"its metadata must name a site for each of the {shape[0]} rows")
    for row, site in enumerate(sites):
        if not isinstance(site, dict) or not isinstance(site.get("name"), str):
            raise ProfileError(f"site {row} of its metadata has no name")
        numbers = [site.get(key) for key in ("layer", "num_heads", "head_dim")]
        if not all(type(number) is int for number in numbers):  # True is an instance of int
            raise ProfileError(
                f"site {row} of its metadata needs whole numbers as layer, num_heads and head_dim"
            )
        in_range = 0 <= site["layer"] < 2**31 and 1 <= site["head_dim"] < 2**31
        if not (in_range and 1 <= site["num_heads"] <= shape[1]):
            raise ProfileError(f"site {row} of its metadata is out of range for {shape[1]} heads")


def _check_values(moments: Mapping[str, MomentArrays], metadata: dict[str, Any]) -> None:
    """Raise ProfileError for values that no run can have produced, since they would spread through merges."""
    rows, heads = next(iter(moments.values())).count.shape
    num_heads = np.array([site["num_heads"] for site in metadata["sites"]]).reshape(rows, 1)
    beyond = np.arange(heads) >= num_heads  # [rows, heads]
    for metric, m in moments.items():
        if bool(impossible(m, least=least_of(metric)).any()):
            raise ProfileError(f"the moments of {metric} contradict each other")
        if bool((beyond & ((m.count != 0) | (m.nonfinite != 0))).any()):
            raise ProfileError(f"{metric} has samples for heads that its sites do not have")
    if (reason := contradiction(moments)) is not None:
        raise ProfileError(reason)


def _parse_document(document: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """Return the names of the metrics, in order, and the metadata."""
    if not isinstance(document.get("metadata"), dict):
        raise ProfileError("its metadata are not an object")
    metrics = document.get("metrics")
    if not isinstance(metrics, list) or not all(isinstance(m, str) and m.isidentifier() for m in metrics):
        raise ProfileError("its metadata do not name its metrics")
    if len(set(metrics)) < len(metrics):
        raise ProfileError("its metadata name a metric twice")
    metadata: dict[str, Any] = document["metadata"]
    _check_types(metadata, TYPES)
    if not all(type(layer) is int for layer in metadata.get("layers") or []):
        raise ProfileError("the layers in its metadata are not whole numbers")
    data = metadata.get("data", {})
    _check_types(data, DATA_TYPES)
    for part in data.get("parts", []):
        if not isinstance(part, dict):
            raise ProfileError("the parts of its metadata are not objects")
        _check_types(part, DATA_TYPES)
    return metrics, metadata


def _check_types(record: dict[str, Any], types: dict[str, tuple[type, ...]]) -> None:
    """Raise ProfileError if an entry has another type than in `types` (True is no int), or an int is out of range."""
    for key, expected in types.items():
        if key in record and type(record[key]) not in expected:
            kinds = " or ".join("null" if kind is NoneType else kind.__name__ for kind in expected)
            raise ProfileError(f"{key} in its metadata must be {kinds}, not {type(record[key]).__name__}")
        if type(record.get(key)) is int and not 0 <= record[key] < 2**63:
            raise ProfileError(f"{key} in its metadata is out of range")


def _moments_of(
    metrics: list[str], arrays: dict[str, Array], others: Iterable[str]
) -> dict[str, MomentArrays]:
    """Return the moments among `arrays`. Raise ProfileError unless these and `others` are all that there is."""
    expected = {f"{metric}/{plane}" for metric in metrics for plane in MomentArrays._fields}.union(others)
    if set(arrays) != expected:
        wrong = sorted(set(arrays) ^ expected)
        raise ProfileError(f"arrays are missing or unknown, {wrong[0]!r} among them")
    return {
        metric: MomentArrays(**{plane: arrays[f"{metric}/{plane}"] for plane in MomentArrays._fields})
        for metric in metrics
    }
