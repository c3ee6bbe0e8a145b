"""HeadProfile: the moments of every head and metric, as tables, rankings, files and pictures."""

import copy
import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Any, Self

import torch
from torch import Tensor

from fastheads.errors import MergeError, MissingExtraError, OptionError, ProfileError, ProfileFileError
from fastheads.results.container import ContainerError, pack, unpack
from fastheads.results.files import UnreadableError, read_once, write_atomic
from fastheads.results.merge import check_mergeable, merged_metadata
from fastheads.results.possible import contradiction, impossible, least_of
from fastheads.stats.moments import Moments

if TYPE_CHECKING:
    import pandas as pd
    from matplotlib.figure import Figure

STATS = ("mean", "var", "std", "sem", "min", "max", "count", "nonfinite")

RANKING_METRIC = "relative_head_residual_contribution_norm"

FILE_KEY = "fastheads"  # of the one string of metadata in the file
FORMAT_VERSION = 2  # 1 had no digest; it is still read
READ_VERSIONS = (1, 2)
LARGEST = 2**28  # bytes; a thousand layers of a thousand heads would have fewer
LARGEST_HEADER = 2**24
COUNTS = ("count", "nonfinite")

# Of what is read from files and then used as such. Other entries may be anything.
TYPES: dict[str, tuple[type, ...]] = {
    "model": (str,),
    "token_agg": (str,),
    "skip_first": (int,),
    "layers": (list, NoneType),
    "weights": (dict, NoneType),
    "residual_update": (str, list),
    "data": (dict,),
}
DATA_TYPES: dict[str, tuple[type, ...]] = {
    "source": (str,),
    "tokens": (int,),
    "sequences": (int,),
    "complete": (bool,),
    "parts": (list,),
}


class HeadProfile:
    """What was measured of every head.

    `moments` holds the running moments by metric; every plane is a CPU tensor `[rows, heads]`, int64 for
    the two counts and float64 for the rest. Row i is `metadata["sites"][i]`: its `layer` is the number that
    people see. Cells that do not exist (a layer with fewer heads, one that was left out) have count 0.
    Where two sites share a layer, they share its number in `rank()`, `lowest()` and the tables too.
    """

    def __init__(self, moments: dict[str, Moments], metadata: dict[str, Any]) -> None:
        """Keep `moments` and `metadata`, which must hold `sites`: a list of name, layer, num_heads, head_dim.

        Raises:
            ProfileError: if shapes or dtypes are not those above, or the sites do not fit them.
        """
        _check_structure(moments, metadata)
        self.moments = moments
        self.metadata = metadata

    def __repr__(self) -> str:
        rows, heads = self.shape
        samples = max(int(m.count.max()) if m.count.numel() else 0 for m in self.moments.values())
        model = self.metadata.get("model", "?")
        return f"HeadProfile({model}: {rows} rows x {heads} heads, {samples} samples)"

    @property
    def shape(self) -> tuple[int, int]:
        """(rows, heads) of every plane."""
        rows, heads = next(iter(self.moments.values())).count.shape
        return rows, heads

    @property
    def metrics(self) -> tuple[str, ...]:
        return tuple(self.moments)

    @property
    def layers(self) -> list[int]:
        """The layer of each row."""
        return [site["layer"] for site in self.metadata["sites"]]

    def results(self) -> dict[str, dict[str, Any]]:
        """`{metric: {stat: tensor [rows, heads]}, ..., "metadata": {...}}` with the statistics of `STATS`.

        `var` is unbiased, `std` its root, `sem` = std/√count (samples taken as independent: true of
        sequences, too small for tokens of one text). Mean, min and max are NaN at count 0; var, std and
        sem below 2.
        """
        results: dict[str, dict[str, Any]] = {
            metric: _stats(moments) for metric, moments in self.moments.items()
        }
        results["metadata"] = copy.deepcopy(self.metadata)
        return results

    def rank(self, metric: str = RANKING_METRIC, *, descending: bool = False) -> list[tuple[int, int]]:
        """All measured heads as (layer, head), the lowest mean first, or the highest; ties stand in order of position."""
        return [(self.layers[row], head) for row, head in self.ranked_cells(metric, descending=descending)]

    def lowest(self, fraction: float, metric: str = RANKING_METRIC) -> list[tuple[int, int]]:
        """The lowest `fraction` (0 to 1) of the measured heads by mean, rounded to a whole number of heads.

        Raises:
            ValueError: if `fraction` is not between 0 and 1.
        """
        if not 0 <= fraction <= 1:
            raise OptionError(f"fraction must be between 0 and 1, not {fraction}")
        ranked = self.rank(metric)
        return ranked[: round(fraction * len(ranked))]

    def ranked_cells(
        self, metric: str = RANKING_METRIC, *, descending: bool = False
    ) -> list[tuple[int, int]]:
        """As `rank()`, with the row in place of the layer."""
        moments = self._of(metric)
        cells: list[tuple[int, int]] = [(row, head) for row, head in moments.count.nonzero().tolist()]
        means = (-moments.mean if descending else moments.mean).tolist()
        return sorted(cells, key=lambda cell: means[cell[0]][cell[1]])  # stable

    def _of(self, metric: str) -> Moments:
        if metric not in self.moments:
            raise OptionError(f"no metric {metric!r} in this profile; it has {', '.join(self.moments)}")
        return self.moments[metric]

    def to_pandas(self) -> "pd.DataFrame":
        """One row for each metric and head that got a sample: layer, head, metric and the `STATS`.

        Raises:
            ImportError: where pandas is not installed.
        """
        try:
            import pandas as pd
        except ImportError as error:
            raise MissingExtraError("to_pandas()", "pandas", "plot") from error
        layers = torch.tensor(self.layers)
        frames = []
        for metric, moments in self.moments.items():
            row, head = (moments.count + moments.nonfinite).nonzero(as_tuple=True)
            stats = {name: values[row, head].numpy() for name, values in _stats(moments).items()}
            frames.append(
                pd.DataFrame({"layer": layers[row].numpy(), "head": head.numpy(), "metric": metric, **stats})
            )
        return pd.concat(frames, ignore_index=True)

    def plot(self, metric: str = RANKING_METRIC, stat: str = "mean") -> "Figure":
        """A heatmap of `stat`, layers by heads, as a matplotlib figure (`figure.savefig(path)` writes it).

        Raises:
            ValueError: for an unknown metric or stat.
            ImportError: where matplotlib is not installed.
        """
        from fastheads.results.plots import heatmap

        return heatmap(self, metric, stat)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file: arrays `metric/plane` and the metadata as JSON. Whole or not at all.

        Raises:
            ProfileError: where `load()` would not read it: moments that no samples can have, metadata that are not JSON.
            OSError: where `path` cannot be written.
        """
        write_atomic(path, self.to_bytes())

    def to_bytes(self) -> bytes:
        """The content of the file that `save()` writes. Raises ProfileError as that does."""
        tensors = {
            f"{metric}/{plane}": values.contiguous()
            for metric, moments in self.moments.items()
            for plane, values in moments._asdict().items()
        }
        document = {"format": FORMAT_VERSION, "metrics": list(self.metrics), "metadata": self.metadata}
        try:
            content = pack(tensors, FILE_KEY, document)
            if len(content) > LARGEST:
                raise ContainerError(f"it has more than {LARGEST:,} bytes")
            self._of_content(content)
        except (ContainerError, ProfileError) as error:
            raise ProfileError(
                f"this profile cannot be saved, for it could not be loaded: {error}"
            ) from error
        return content

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read what `save()` wrote. The file may come from anywhere: all of it is checked, none of it run.

        Raises:
            ProfileFileError: if it is no head profile, or a damaged one.
            OSError: if it cannot be read.
        """
        path = Path(path)
        try:
            return cls._of_content(read_once(path, LARGEST))
        except (ContainerError, UnreadableError, ProfileError) as error:
            raise ProfileFileError(f"{path} is not a head profile: {error}") from error

    @classmethod
    def _of_content(cls, content: bytes) -> Self:
        """The profile in the content of a file. Raises ContainerError and ProfileError."""
        tensors, document = unpack(
            content, FILE_KEY, formats=READ_VERSIONS, digested=(FORMAT_VERSION,), header_limit=LARGEST_HEADER
        )
        metrics, metadata = _parse_document(document)
        profile = cls(_moments_from_tensors(metrics, tensors), metadata)
        _check_values(profile.moments, metadata)
        return profile

    @classmethod
    def merge(
        cls, profiles: Sequence[Self], *, names: Sequence[str] | None = None, allow_repeated: bool = False
    ) -> Self:
        """The profile of all samples together, by Chan's formula, in the order given.

        `metadata["data"]` then holds the sums and, under "parts", each part's own.

        Args:
            profiles: of the same weights (under whatever name), sites, token_agg, skip_first and metrics. Where a profile does
                not tell its weights, the names of the models must be the same.
            names: what errors call the profiles; None: by their places.
            allow_repeated: accept profiles of the same data, or of parts that overlap: those samples count twice, and standard
                errors come out too small. Profiles of other layers over the same data repeat nothing.

        Raises:
            MergeError: for no profiles, or such that differ, or repeat data; it says which, and in what.
            OptionError: for other than one name for each.
        """
        profiles = list(profiles)
        if not profiles:
            raise MergeError("nothing to merge: no profiles were given")
        if names is None:
            names = [f"profile {number}" for number in range(1, len(profiles) + 1)]
        if len(names) != len(profiles):
            raise OptionError(f"names must be one for each profile: {len(profiles)}, not {len(names)}")
        check_mergeable(profiles, names, allow_repeated=allow_repeated)
        merged = dict(profiles[0].moments)
        for other in profiles[1:]:
            merged = {metric: moments.merged(other.moments[metric]) for metric, moments in merged.items()}
        return cls(merged, merged_metadata(profiles))


def warn_where_empty(profile: HeadProfile) -> None:
    """Warn the caller of the caller of a profile without any sample, whose statistics are all NaN."""
    if not any(bool((m.count + m.nonfinite).any()) for m in profile.moments.values()):
        warnings.warn(
            "nothing was measured: no forward of the model has ended normally since the hooks were attached or reset, or "
            "skip_first left none of its tokens",
            RuntimeWarning,
            stacklevel=3,
        )


def _stats(moments: Moments) -> dict[str, Tensor]:
    """The statistics of `STATS`, each `[rows, heads]`."""
    some = moments.count > 0
    var = moments.var()
    std = var.sqrt()
    values = {
        "mean": torch.where(some, moments.mean, torch.nan),
        "var": var,
        "std": std,
        "sem": std / moments.count.double().sqrt(),
        "min": torch.where(some, moments.min, torch.nan),
        "max": torch.where(some, moments.max, torch.nan),
        "count": moments.count.clone(),
        "nonfinite": moments.nonfinite.clone(),
    }
    return {stat: values[stat] for stat in STATS}


def _check_structure(moments: dict[str, Moments], metadata: dict[str, Any]) -> None:
    """Raise ProfileError unless all planes have one shape, their dtypes and a site for each row."""
    if not moments:
        raise ProfileError("it holds no metrics")
    shape = next(iter(moments.values())).count.shape
    if len(shape) != 2 or 0 in shape:
        raise ProfileError(f"planes must be [rows, heads], one of each at least, not {list(shape)}")
    for metric, planes in moments.items():
        for plane, values in planes._asdict().items():
            dtype = torch.int64 if plane in COUNTS else torch.float64
            if values.shape != shape or values.dtype != dtype or values.device.type != "cpu":
                raise ProfileError(
                    f"{metric}/{plane} must be {dtype} {list(shape)} on the CPU, "
                    f"not {values.dtype} {list(values.shape)} on {values.device}"
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


def _check_values(moments: dict[str, Moments], metadata: dict[str, Any]) -> None:
    """Raise ProfileError for values that no run can have written: they would spread through merges."""
    rows, heads = next(iter(moments.values())).count.shape
    num_heads = torch.tensor([site["num_heads"] for site in metadata["sites"]]).view(rows, 1)
    beyond = torch.arange(heads) >= num_heads  # [rows, heads]
    for metric, m in moments.items():
        if bool(impossible(m, least=least_of(metric)).any()):
            raise ProfileError(f"the moments of {metric} contradict each other")
        if bool((beyond & ((m.count != 0) | (m.nonfinite != 0))).any()):
            raise ProfileError(f"{metric} has samples for heads that its sites do not have")
    if (told := contradiction(moments)) is not None:
        raise ProfileError(told)


def _parse_document(document: dict[str, Any]) -> tuple[list[str], dict[str, Any]]:
    """The names of the metrics, in order, and the metadata."""
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
    """Raise ProfileError where an entry that is there has another type than `types` says. True is no int, and ints are counts."""
    for key, expected in types.items():
        if key in record and type(record[key]) not in expected:
            said = " or ".join("null" if kind is NoneType else kind.__name__ for kind in expected)
            raise ProfileError(f"{key} in its metadata must be {said}, not {type(record[key]).__name__}")
        if type(record.get(key)) is int and not 0 <= record[key] < 2**63:
            raise ProfileError(f"{key} in its metadata is out of range")


def _moments_from_tensors(metrics: list[str], tensors: dict[str, Tensor]) -> dict[str, Moments]:
    expected = {f"{metric}/{plane}" for metric in metrics for plane in Moments._fields}
    if set(tensors) != expected:
        wrong = sorted(set(tensors) ^ expected)
        raise ProfileError(f"arrays are missing or unknown, {wrong[0]!r} among them")
    return {
        metric: Moments(**{plane: tensors[f"{metric}/{plane}"] for plane in Moments._fields})
        for metric in metrics
    }
