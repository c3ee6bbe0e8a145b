"""KvMap: which KV groups keep the full cache, and which need only the first tokens and the last ones. A JSON file.

A map is made of a profile with streaming errors. It names the model by the fingerprint of its weights, and is refused for another
one. It is exported in the format that DuoAttention reads, too: a table of numbers between 0 and 1, layers by KV groups, and a
`config.json` with `sink_size` and `recent_size`.
"""

import json
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Self

import numpy as np
from torch import nn

from fastheads._version import __version__
from fastheads.errors import KvMapError, OptionError, ResultsError
from fastheads.models.fingerprint import fingerprint
from fastheads.models.sites import unwrapped
from fastheads.results.files import UnreadableError, read_once, write_atomic
from fastheads.results.head_profile import HeadProfile
from fastheads.results.merge import difference_of_weights
from fastheads.stats.names import KV_STREAMING_METRIC, KV_STREAMING_SQUARE_METRIC

FORMAT, VERSION = "fastheads kv map", 1
LARGEST = 2**24  # bytes of a file
MOST = 2**20  # KV groups, and the tokens of a window times 2**20
DUO_TABLE, DUO_CONFIG = "full_attention_heads.tsv", "config.json"

# How the errors of a group's tokens make one number: the root mean square weighs rare large errors more.
By = Literal["rms", "mean"]
Pairs = list[tuple[int, int]]


@dataclass(frozen=True)
class KvMap:
    """`errors[row][group]`: the streaming error of a KV group, None where it is unknown; `full[row][group]`: True if it keeps the
    full cache, as do all whose error is unknown; `layers[row]`: the layer. `by` says what the errors are. `model`, `weights` (its
    fingerprint), `data` and `options` are those of the profile, or None.

    Raises KvMapError if these do not fit each other.
    """

    sink: int
    window: int
    layers: tuple[int, ...]
    errors: tuple[tuple[float | None, ...], ...]
    full: tuple[tuple[bool, ...], ...]
    by: By = "rms"
    model: str | None = None
    weights: dict[str, Any] | None = None
    data: dict[str, Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)
    version: str = __version__

    def __post_init__(self) -> None:
        for name, least in (("sink", 0), ("window", 1)):
            if not _is_whole(getattr(self, name), least, 2**40):
                raise KvMapError(
                    f"{name} must be a number of tokens, {least} or more, not {getattr(self, name)!r:.40}"
                )
        object.__setattr__(self, "layers", _tuple(self.layers, "layers"))
        for name in ("errors", "full"):
            rows = tuple(_tuple(row, name) for row in _tuple(getattr(self, name), name))
            object.__setattr__(self, name, rows)
        if not all(_is_whole(layer, 0, 2**31) for layer in self.layers) or not self.layers:
            raise KvMapError("layers must be numbers of layers, one at least")
        if not [len(row) for row in self.errors] == [len(row) for row in self.full] or len(
            self.errors
        ) != len(self.layers):
            raise KvMapError("layers, errors and full do not have the same rows and groups")
        if len(set(self.layers)) < len(self.layers):
            raise KvMapError("a layer is there twice")
        if not 0 < sum(map(len, self.full)) <= MOST or not all(self.full):
            raise KvMapError("a layer has no KV groups, or the map has too many")
        for errors, full in zip(self.errors, self.full, strict=True):
            for error, keeps in zip(errors, full, strict=True):
                if not isinstance(keeps, bool):
                    raise KvMapError(f"full must be of true and false, not {keeps!r:.40}")
                if error is None:
                    if not keeps:
                        raise KvMapError("a KV group whose error is unknown must keep the full cache")
                elif (
                    isinstance(error, bool) or not isinstance(error, int | float) or not 0 <= error < math.inf
                ):
                    raise KvMapError(f"an error must be a number, 0 or more, not {error!r:.40}")
        if self.by not in ("rms", "mean"):
            raise KvMapError(f"by must be rms or mean, not {self.by!r:.40}")
        for name, kind in (("model", str), ("weights", dict), ("data", dict), ("version", str)):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise KvMapError(f"{name} must be of type {kind.__name__}, not {value!r:.80}")
        if not isinstance(self.options, dict):
            raise KvMapError(f"options must be an object, not {self.options!r:.80}")

    @property
    def known(self) -> Pairs:
        """The KV groups with a known error, as (layer, group)."""
        return self._where(lambda error, full: error is not None)

    @property
    def streaming(self) -> Pairs:
        """The KV groups that need only sink and window, as (layer, group)."""
        return self._where(lambda error, full: not full)

    @property
    def kept(self) -> Pairs:
        """The KV groups that keep the full cache, as (layer, group)."""
        return self._where(lambda error, full: full)

    def _where(self, chosen: Any) -> Pairs:
        return [
            (layer, group)
            for layer, errors, full in zip(self.layers, self.errors, self.full, strict=True)
            for group, (error, keeps) in enumerate(zip(errors, full, strict=True))
            if chosen(error, keeps)
        ]

    def ranked(self) -> Pairs:
        """Return the KV groups with a known error, highest first."""
        errors = {
            (layer, group): error
            for layer, row in zip(self.layers, self.errors, strict=True)
            for group, error in enumerate(row)
            if error is not None
        }
        return sorted(errors, key=lambda pair: (-errors[pair], pair))

    def with_share(self, keep: float) -> Self:
        """Return the map in which this share of the KV groups with a known error keep the full cache: those with the highest."""
        check_share(keep)
        ranked = self.ranked()
        return self._with_kept(set(ranked[: round(keep * len(ranked))]), {"keep": keep})

    def with_bound(self, bound: float) -> Self:
        """Return the map in which the KV groups with an error above `bound` keep the full cache."""
        if not 0 <= bound < math.inf:
            raise OptionError(f"the bound of the error must be a number, 0 or more, not {bound}")
        ranked = self.ranked()
        errors = dict(zip(self.layers, self.errors, strict=True))
        kept = {(layer, group) for layer, group in ranked if (errors[layer][group] or 0.0) > bound}
        return self._with_kept(kept, {"bound": bound})

    def _with_kept(self, kept: set[tuple[int, int]], options: dict[str, Any]) -> Self:
        full = tuple(
            tuple(error is None or (layer, group) in kept for group, error in enumerate(row))
            for layer, row in zip(self.layers, self.errors, strict=True)
        )
        others = {name: value for name, value in self.options.items() if name not in ("keep", "bound")}
        return type(self)(**{**vars(self), "full": full, "options": others | options})

    # ------------------------------------------------------------------ files

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the map as JSON, atomically. Raises OSError if `path` cannot be written."""
        write_atomic(path, self.to_json().encode())

    def to_json(self) -> str:
        """Return the content of the file that `save()` writes."""
        document = {"format": FORMAT, "format_version": VERSION, **vars(self)}
        return json.dumps(document, indent=1, allow_nan=False) + "\n"

    @classmethod
    def load(cls, path: str | os.PathLike[str], model: nn.Module | None = None) -> Self:
        """Read a file that `save()` wrote. Safe for files from anywhere.

        Raises:
            KvMapError: it is none, or with `model` it is not of this model's weights.
            OSError: it cannot be read.
        """
        path = Path(path)
        document = _read_json(path)
        try:
            found = cls._of_document(document)
            if model is not None:
                found.check_model(model)
        except KvMapError as error:
            raise KvMapError(f"{path}: {error}") from None
        return found

    @classmethod
    def _of_document(cls, document: Any) -> Self:
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise KvMapError(f"it is no object of the format {FORMAT!r}")
        version = document.get("format_version")
        if version != VERSION or isinstance(version, bool):
            raise KvMapError(f"it has the format version {version!r:.20}; this release reads {VERSION}")
        names = set(cls.__dataclass_fields__)
        missing = sorted(names - document.keys())
        if missing:
            raise KvMapError(f"it lacks {', '.join(missing)}")
        return cls(**{name: document[name] for name in names})

    def check_model(self, model: nn.Module) -> None:
        """Raise KvMapError unless the map is of the weights of `model`."""
        if self.weights is None:
            raise KvMapError("the map has no fingerprint of a model's weights: make it anew")
        difference = difference_of_weights(self.weights, fingerprint(unwrapped(model)))
        if difference is None:
            raise KvMapError(
                "the fingerprints of the map and of the model do not prove that their weights are the same: they are of "
                "different versions, or leave some weights out"
            )
        if difference:
            raise KvMapError(f"the map is not of this model's weights; they differ in {difference}")

    def scores(self) -> np.ndarray[Any, np.dtype[np.float64]]:
        """Return numbers between 0 and 1, `[layers, groups]`, for DuoAttention: at least 0.5 for the groups that keep the full
        cache and less for the others, and in the order of the errors; 1 where the error is unknown.

        Raises ResultsError unless the map has all layers from 0 on, each with the same number of groups.
        """
        widths = {len(row) for row in self.full}
        if self.layers != tuple(range(len(self.layers))) or len(widths) > 1:
            raise ResultsError(
                "DuoAttention's format is for models whose layers all have the same number of KV groups"
            )
        table = np.ones((len(self.layers), widths.pop()))
        ranked = self.ranked()
        kept = [pair for pair in ranked if self.full[pair[0]][pair[1]]]
        streaming = [pair for pair in ranked if not self.full[pair[0]][pair[1]]]
        for pairs, high in ((kept, 1.0), (streaming, 0.5)):
            for place, pair in enumerate(pairs):
                lowest = 0.5 if high == 1.0 else 0.0
                table[pair] = high - (high - lowest) * (place + (high == 0.5)) / (len(pairs) + (high == 0.5))
        return table

    def save_duo(self, folder: str | os.PathLike[str]) -> None:
        """Write `full_attention_heads.tsv` and `config.json` as DuoAttention reads them, and the map itself beside them.

        Raises ResultsError as `scores` does, OSError if the folder cannot be written.
        """
        lines = ["\t".join(f"{value:.18e}" for value in row) for row in self.scores().tolist()]
        write_atomic(Path(folder) / DUO_TABLE, ("\n".join(lines) + "\n").encode())
        config = {"sink_size": self.sink, "recent_size": self.window}
        write_atomic(Path(folder) / DUO_CONFIG, (json.dumps(config) + "\n").encode())
        self.save(Path(folder) / "kv_map.json")


@dataclass(frozen=True)
class DuoPattern:
    """A pattern of DuoAttention: numbers `[layers, KV groups]` between 0 and 1; groups of at least a threshold keep the cache."""

    scores: np.ndarray[Any, np.dtype[np.float64]]
    sink: int
    window: int

    @classmethod
    def load(cls, folder: str | os.PathLike[str]) -> Self:
        """Read `full_attention_heads.tsv` and `config.json`. Safe for files from anywhere.

        Raises:
            KvMapError: they are no such files.
            OSError: they cannot be read.
        """
        path, config = Path(folder) / DUO_TABLE, _read_json(Path(folder) / DUO_CONFIG)
        try:
            text = read_once(path, LARGEST).decode("ascii")
            rows = [
                [float(number) for number in line.split("\t")] for line in text.splitlines() if line.strip()
            ]
        except (UnreadableError, ValueError) as error:
            raise KvMapError(f"{path} is no table of numbers: {error}") from error
        if not rows or len({len(row) for row in rows}) > 1 or not np.isfinite(rows).all():
            raise KvMapError(f"{path} is no table of numbers with rows of one length")
        sizes: list[Any] = [
            config.get(name) if isinstance(config, dict) else None for name in ("sink_size", "recent_size")
        ]
        if not (_is_whole(sizes[0], 0, 2**40) and _is_whole(sizes[1], 1, 2**40)):
            raise KvMapError(f"{Path(folder) / DUO_CONFIG} has no sink_size and recent_size")
        return cls(np.clip(np.array(rows), 0.0, 1.0), sizes[0], sizes[1])

    def streaming(self, threshold: float = 0.5) -> Pairs:
        """Return the KV groups below the threshold, as (layer, group)."""
        return [(int(layer), int(group)) for layer, group in np.argwhere(self.scores < threshold)]


def kv_map(
    profile: HeadProfile, *, keep: float | None = None, bound: float | None = None, by: By = "rms"
) -> KvMap:
    """Choose the KV groups that keep the full cache.

    Args:
        profile: with streaming errors (`profile(..., streaming=(sink, window))`).
        keep: the share of the KV groups, those with the highest errors; or
        bound: the error above which a group keeps it.
        by: the root mean square of the errors of tokens, or their mean.

    Raises:
        OptionError: not exactly one of `keep` and `bound` is given, or one is out of range.
        ResultsError: the profile has no streaming errors.
    """
    if (keep is None) == (bound is None):
        raise OptionError("give either keep=, a share of the KV groups, or bound=, an error")
    if by not in ("rms", "mean"):
        raise OptionError(f"by must be 'rms' or 'mean', not {by!r}")
    metric = KV_STREAMING_SQUARE_METRIC if by == "rms" else KV_STREAMING_METRIC
    settings = profile.metadata.get("streaming")
    if metric not in profile.metrics or not isinstance(settings, Mapping):
        raise ResultsError(
            "this profile has no streaming errors: profile with streaming=(sink, window) (--streaming-error)"
        )
    stats = profile.statistics(metric)
    means = np.sqrt(stats["mean"]) if by == "rms" else stats["mean"]
    if not (stats["count"] > 0).any():
        raise ResultsError(
            "no sequence is longer than sink + window, so that there are no streaming errors: use longer texts"
        )
    layers = profile.layers
    if len(set(layers)) < len(layers):
        raise ResultsError("a layer has several attentions, so that its KV groups are ambiguous")
    # A layer that was not measured: as many groups as others have.
    counts = [int((row > 0).sum()) for row in stats["count"]]
    errors = tuple(
        tuple(
            float(mean) if count > 0 else None
            for mean, count in zip(row[:width], of_row[:width], strict=True)
        )
        for row, of_row, width in zip(means, stats["count"], [n or max(counts) for n in counts], strict=True)
    )
    weights, data = profile.metadata.get("weights"), profile.metadata.get("data")
    found = KvMap(
        sink=settings.get("sink"),  # type: ignore[arg-type]  # checked there
        window=settings.get("window"),  # type: ignore[arg-type]
        layers=tuple(layers),
        errors=errors,
        full=tuple(tuple(True for _ in row) for row in errors),
        by=by,
        model=profile.metadata.get("model"),
        weights=weights if isinstance(weights, dict) else None,
        data=data if isinstance(data, dict) else None,
        options={
            "token_agg": profile.metadata.get("token_agg"),
            "skip_first": profile.metadata.get("skip_first"),
        },
    )
    if keep is not None:
        return found.with_share(keep)
    assert bound is not None
    return found.with_bound(bound)


def check_share(keep: float) -> None:
    """Raise OptionError if `keep` is no share."""
    if not 0 <= keep <= 1:
        raise OptionError(f"keep must be a share of the KV groups from 0 to 1, not {keep}")


def _read_json(path: Path) -> Any:
    try:
        return json.loads(read_once(path, LARGEST), parse_constant=_refuse)
    except (UnreadableError, ValueError, RecursionError) as error:
        why = "it is nested too deeply" if isinstance(error, RecursionError) else error
        raise KvMapError(f"{path} is no JSON: {why}") from error


def _refuse(name: str) -> None:
    raise KvMapError(f"{name} is no number in JSON")


def _tuple(value: Any, name: str) -> tuple[Any, ...]:
    if not isinstance(value, list | tuple):
        raise KvMapError(f"{name} must be lists, not {value!r:.40}")
    return tuple(value)


def _is_whole(value: Any, least: int, most: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
