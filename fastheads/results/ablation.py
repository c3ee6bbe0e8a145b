"""AblationResult: what happened to the loss when heads were ablated, as a table, a plot and a JSON file. Needs no torch.

The JSON object (all numbers are finite; a list "of sequences" has one number for each sequence scored, nats per token):

    format, version   "fastheads.ablation", 1
    mode              "zero" or "mean"
    complete          false while sequences are still to be scored: the lists then hold those that are
    about             model, weights (their hash), data (source, sha256, seq_len, sequences, ...), num_heads, seed, ...
    base              {"loss": of sequences}, of the intact model
    curves            a list of {"metric", "fractions": [F], "heads": [F][pairs], "rise": [F][sequences], "kl": [F][sequences]}:
                      the heads lowest by the metric; pairs are [layer, head]
    random            null, or the same without a metric, and one more dimension behind F: draws of as many heads
    matched           a list as `random`, each with the metric whose choice it matches: as many heads in each layer
    each_head         null, or {"heads": [pairs], "rise": [heads][sequences], "kl": [heads][sequences]}

`rise` is the loss with the heads ablated less that of the intact model; `kl` is KL(intact ‖ ablated) of the next token.
"""

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Self

import numpy as np

from fastheads.errors import AblationFileError
from fastheads.results.files import UnreadableError, read_once, write_atomic
from fastheads.stats.arrays import Array
from fastheads.stats.intervals import bootstrap_interval

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FORMAT, VERSION = "fastheads.ablation", 1
LARGEST = 2**28  # bytes
MODES = ("zero", "mean")

Pairs = list[tuple[int, int]]


@dataclass(frozen=True, eq=False)
class Curve:
    """The heads lowest by a metric. Arrays are float64 `[fractions, sequences]`."""

    metric: str
    fractions: list[float]
    heads: list[Pairs]
    rise: Array
    kl: Array


@dataclass(frozen=True, eq=False)
class Draws:
    """Heads drawn at random. Arrays are float64 `[fractions, draws, sequences]`."""

    metric: str | None  # of the curve whose heads in each layer are matched; None: over the whole model
    fractions: list[float]
    heads: list[list[Pairs]]
    rise: Array
    kl: Array


@dataclass(frozen=True, eq=False)
class EachHead:
    """Heads one by one. Arrays are float64 `[heads, sequences]`."""

    heads: Pairs
    rise: Array
    kl: Array


@dataclass(frozen=True, eq=False)
class AblationResult:
    """The effects of ablating heads, by sequence. The module's description has the meaning of each part."""

    mode: str
    base: Array  # float64 [sequences]: loss of the intact model
    curves: list[Curve]
    random: Draws | None = None
    matched: list[Draws] = field(default_factory=list)
    each_head: EachHead | None = None
    about: dict[str, Any] = field(default_factory=dict)
    complete: bool = True

    @property
    def sequences(self) -> int:
        """Number of sequences scored."""
        return len(self.base)

    def table(self) -> list[dict[str, Any]]:
        """Return a row for each metric and fraction, of means over sequences.

        `rise`, its `median`, `low` and `high` (a 95 % bootstrap interval) and `kl` are of the metric's choice; `random_mean` and
        `random_least` are over draws, of which `random_below` of `draws` rise less than the choice does; `matched_...` likewise.
        Values without draws are None.
        """
        rows = []
        matched = {draws.metric: draws for draws in self.matched}
        for curve in self.curves:
            low, high = bootstrap_interval(curve.rise)
            for n, fraction in enumerate(curve.fractions):
                rise = float(curve.rise[n].mean())
                row = {
                    "metric": curve.metric,
                    "fraction": fraction,
                    "heads": len(curve.heads[n]),
                    "rise": rise,
                    "median": float(np.median(curve.rise[n])),
                    "low": float(low[n]),
                    "high": float(high[n]),
                    "kl": float(curve.kl[n].mean()),
                }
                for name, draws in (("random", self.random), ("matched", matched.get(curve.metric))):
                    means = None if draws is None else draws.rise[n].mean(-1)
                    row[f"{name}_mean"] = None if means is None else float(means.mean())
                    row[f"{name}_least"] = None if means is None else float(means.min())
                    row[f"{name}_below"] = None if means is None else int((means < rise).sum())
                    row["draws"] = row.get("draws") if means is None else len(means)
                rows.append(row)
        return rows

    def each_head_table(self) -> list[dict[str, Any]]:
        """Return a row for each head, the largest effect first: `layer`, `head`, `kl` and `rise` with 95 % intervals."""
        if self.each_head is None:
            return []
        each = self.each_head
        columns: dict[str, Array] = {}
        for name, values in (("kl", each.kl), ("rise", each.rise)):
            columns[name] = values.mean(-1)
            columns[f"{name}_low"], columns[f"{name}_high"] = bootstrap_interval(values)
        order = np.argsort(-columns["kl"], kind="stable")
        return [
            {"layer": each.heads[n][0], "head": each.heads[n][1]}
            | {name: float(v[n]) for name, v in columns.items()}
            for n in order.tolist()
        ]

    def plot(self, ax: "Axes | None" = None) -> "Axes":
        """Draw the rise in loss over the fraction of heads, with the band of the random draws. Returns the axes.

        Raises:
            MissingExtraError: matplotlib is not installed.
        """
        from fastheads.results.ablation_plot import draw

        return draw(self, ax)

    # ---------------------------------------------------------------- files

    def to_json(self) -> str:
        """Return the JSON object that the module describes."""
        return json.dumps(
            {
                "format": FORMAT,
                "version": VERSION,
                "mode": self.mode,
                "complete": self.complete,
                "about": self.about,
                "base": {"loss": self.base.tolist()},
                "curves": [
                    {
                        "metric": curve.metric,
                        "fractions": curve.fractions,
                        "heads": curve.heads,
                        "rise": curve.rise.tolist(),
                        "kl": curve.kl.tolist(),
                    }
                    for curve in self.curves
                ],
                "random": None if self.random is None else _of_draws(self.random),
                "matched": [_of_draws(draws) for draws in self.matched],
                "each_head": None
                if self.each_head is None
                else {
                    "heads": self.each_head.heads,
                    "rise": self.each_head.rise.tolist(),
                    "kl": self.each_head.kl.tolist(),
                },
            },
            allow_nan=False,
        )

    @classmethod
    def from_json(cls, text: str | bytes) -> Self:
        """Read what `to_json` wrote.

        Raises:
            AblationFileError: it is something else, or its parts do not fit each other.
        """
        document = parsed(text)
        if document.get("format") != FORMAT:
            raise AblationFileError("no ablation result: its format is not that of one")
        if document.get("version") != VERSION:
            raise AblationFileError(
                f"of version {document.get('version')!r:.40}: this release reads {VERSION}"
            )
        mode, complete, about = (document.get(key) for key in ("mode", "complete", "about"))
        if mode not in MODES or not isinstance(complete, bool) or not isinstance(about, dict):
            raise AblationFileError(
                "a damaged ablation result: its mode, complete or about is not what it must be"
            )
        base = numbers(_part(document, "base", dict).get("loss"), "base", None)
        n = len(base)
        random, each = document.get("random"), document.get("each_head")
        return cls(
            mode=mode,
            base=base,
            curves=[_curve(part, n) for part in _part(document, "curves", list)],
            random=None if random is None else _draws(random, n, with_metric=False),
            matched=[_draws(part, n, with_metric=True) for part in _part(document, "matched", list)],
            each_head=None if each is None else _each_head(each, n),
            about=about,
            complete=complete,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the JSON to a file, atomically. Raises OSError."""
        write_atomic(path, (self.to_json() + "\n").encode())

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file that `save` wrote.

        Raises:
            AblationFileError: it is no such file, or a damaged one.
            OSError: it cannot be read.
        """
        try:
            return cls.from_json(read_once(path, LARGEST))
        except (AblationFileError, UnreadableError) as error:
            raise AblationFileError(f"{os.fspath(path)}: {error}") from error


# ---------------------------------------------------------------- reading JSON


def parsed(text: str | bytes) -> dict[str, Any]:
    """Parse a JSON object. Raises AblationFileError if it is none, or holds NaN or infinite numbers."""
    try:
        document = json.loads(text, parse_constant=_refuse_constant)
    except (ValueError, RecursionError) as error:
        raise AblationFileError(f"no JSON: {str(error)[:80]}") from None
    if not isinstance(document, dict):
        raise AblationFileError("no JSON object")
    return document


def numbers(values: Any, what: str, length: int | None) -> Array:
    """Check a list of `length` finite numbers (None: any). Raises AblationFileError, naming `what`."""
    sound = isinstance(values, list) and all(type(v) in (int, float) and _is_finite(v) for v in values)
    if not sound or (length is not None and len(values) != length):
        raise AblationFileError(
            f"a damaged ablation result: {what} is no list of finite numbers, one for each sequence"
        )
    return np.array(values, dtype=np.float64)


def pairs(values: Any) -> Pairs:
    """Check a list of [layer, head]. Raises AblationFileError."""
    if not isinstance(values, list) or not all(
        isinstance(p, list) and len(p) == 2 and all(type(n) is int and 0 <= n < 2**31 for n in p)
        for p in values
    ):
        raise AblationFileError("a damaged ablation result: heads are no lists of [layer, head]")
    return [(layer, head) for layer, head in values]


def _is_finite(value: Any) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:  # an integer beyond float64
        return False


def _refuse_constant(name: str) -> None:
    raise AblationFileError(f"{name} is no number")


def _part(document: Any, key: str, kind: type) -> Any:
    value = document.get(key) if isinstance(document, dict) else None
    if not isinstance(value, kind):
        raise AblationFileError(f"a damaged ablation result: {key} is missing")
    return value


def _fractions(part: Any) -> list[float]:
    found = numbers(_part(part, "fractions", list), "fractions", None)
    if not ((found > 0) & (found <= 1)).all():
        raise AblationFileError("a damaged ablation result: fractions must be above 0 and up to 1")
    return [float(fraction) for fraction in found]


def _listed(part: Any, key: str, length: int) -> list[Any]:
    found: list[Any] = _part(part, key, list)
    if len(found) != length:
        raise AblationFileError(f"a damaged ablation result: {key} has {len(found)} entries, not {length}")
    return found


def _metric(part: Any) -> str:
    found: str = _part(part, "metric", str)
    return found


def _stacked(rows: Sequence[Array], *shape: int) -> Array:
    return np.stack(rows).reshape(shape) if rows else np.zeros(shape)


def _curve(part: Any, n: int) -> Curve:
    fractions = _fractions(part)
    many = len(fractions)
    rise, kl = (
        _stacked([numbers(row, key, n) for row in _listed(part, key, many)], many, n)
        for key in ("rise", "kl")
    )
    return Curve(_metric(part), fractions, [pairs(some) for some in _listed(part, "heads", many)], rise, kl)


def _draws(part: Any, n: int, *, with_metric: bool) -> Draws:
    fractions = _fractions(part)
    many = len(fractions)
    heads = [
        [pairs(some) for some in _part({"heads": row}, "heads", list)] for row in _listed(part, "heads", many)
    ]
    draws = len(heads[0]) if heads else 0
    if not draws or any(len(row) != draws for row in heads):
        raise AblationFileError(
            "a damaged ablation result: it has no draws, or another number for another fraction"
        )
    rise, kl = (
        _stacked(
            [
                numbers(row, key, n)
                for rows in _listed(part, key, many)
                for row in _listed({key: rows}, key, draws)
            ],
            *(many, draws, n),
        )
        for key in ("rise", "kl")
    )
    return Draws(_metric(part) if with_metric else None, fractions, heads, rise, kl)


def _each_head(part: Any, n: int) -> EachHead:
    heads = pairs(_part(part, "heads", list))
    rise, kl = (
        _stacked([numbers(row, key, n) for row in _listed(part, key, len(heads))], len(heads), n)
        for key in ("rise", "kl")
    )
    return EachHead(heads, rise, kl)


def _of_draws(draws: Draws) -> Mapping[str, Any]:
    metric = {} if draws.metric is None else {"metric": draws.metric}
    return metric | {
        "fractions": draws.fractions,
        "heads": draws.heads,
        "rise": draws.rise.tolist(),
        "kl": draws.kl.tolist(),
    }
