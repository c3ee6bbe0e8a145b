"""PruningPlan: which heads to remove, how, and what that was decided from. A JSON file.

A plan holds no weights. It names the model by the fingerprint of its weights, and is refused for another one.
"""

import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal, Self, get_args

import numpy as np
from torch import nn

from fastheads.errors import OptionError, PlanError, ResultsError
from fastheads.models.fingerprint import fingerprint
from fastheads.models.sites import HeadSite, find_sites, known_num_kv_heads, unwrapped
from fastheads.results.files import UnreadableError, read_once, write_atomic
from fastheads.results.head_profile import HeadProfile
from fastheads.results.merge import difference_of_weights
from fastheads.results.ranking import Mode, Ranking, ranking_of
from fastheads.results.vectors import checked_sites
from fastheads.stats.arrays import Array
from fastheads.stats.names import KV_METRIC

FORMAT, VERSION = "fastheads pruning plan", 1
LARGEST = 2**24  # bytes of a file
MOST_HEADS = 10**6
LARGEST_NUMBER = 2**31  # of a layer or a head

# How the numbers of a KV group's query heads make the group's number.
GroupBy = Literal["sum", "max"]

Heads = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class PruningPlan:
    """Heads to remove, each as (layer, head), sorted.

    `mode` says what takes their place: "zero", or "mean", the head's mean output. `uniform`: whole KV groups are cut out, as many
    in each layer; `kv_groups` are these, as (layer, group), and else the groups of which no head is left. `metric` is what the
    heads were chosen by; `model`, `weights` (its fingerprint) and `data` are those of the profile, or None.

    Raises PlanError if the heads are no such pairs, or the rest is of the wrong kind.
    """

    heads: Heads
    mode: Mode = "zero"
    uniform: bool = False
    kv_groups: Heads = ()
    metric: str | None = None
    model: str | None = None
    weights: dict[str, Any] | None = None
    data: dict[str, Any] | None = None
    options: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", _checked_pairs(self.heads, "heads"))
        object.__setattr__(self, "kv_groups", _checked_pairs(self.kv_groups, "kv_groups"))
        if not self.heads:
            raise PlanError("the plan names no heads")
        if self.mode not in get_args(Mode):
            raise PlanError(f"mode must be one of {', '.join(get_args(Mode))}, not {self.mode!r}")
        if not isinstance(self.uniform, bool):
            raise PlanError(f"uniform must be true or false, not {self.uniform!r}")
        for name, kind in (("metric", str), ("model", str), ("weights", dict), ("data", dict)):
            value = getattr(self, name)
            if value is not None and not isinstance(value, kind):
                raise PlanError(f"{name} must be of type {kind.__name__}, not {value!r:.80}")
        if not isinstance(self.options, dict):
            raise PlanError(f"options must be an object, not {self.options!r:.80}")

    @property
    def by_layer(self) -> dict[int, list[int]]:
        """The heads of each layer."""
        found: dict[int, list[int]] = {}
        for layer, head in self.heads:
            found.setdefault(layer, []).append(head)
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the plan as JSON, atomically. Raises OSError if `path` cannot be written."""
        write_atomic(path, self.to_json().encode())

    def to_json(self) -> str:
        """Return the content of the file that `save()` writes."""
        document = {"format": FORMAT, "version": VERSION, **asdict(self)}
        return json.dumps(document, indent=1, allow_nan=False) + "\n"

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Self:
        """Read a file that `save()` wrote, or a JSON list of pairs [layer, head]. Safe for files from anywhere.

        Raises:
            PlanError: it is neither.
            OSError: it cannot be read.
        """
        path = Path(path)
        try:
            document = json.loads(read_once(path, LARGEST), parse_constant=_refuse_constant)
        except (UnreadableError, ValueError, RecursionError) as error:
            why = "it is nested too deeply" if isinstance(error, RecursionError) else error
            raise PlanError(f"{path} is no pruning plan: {why}") from error
        try:
            return cls(heads=tuple(document)) if isinstance(document, list) else cls._of_document(document)
        except PlanError as error:
            raise PlanError(f"{path} is no pruning plan: {error}") from None

    @classmethod
    def _of_document(cls, document: Any) -> Self:
        if not isinstance(document, dict) or document.get("format") != FORMAT:
            raise PlanError(f"it is neither an object of the format {FORMAT!r} nor a list of [layer, head]")
        version = document.get("version")
        if version != VERSION or isinstance(version, bool):
            raise PlanError(f"it has the version {version!r:.20}; this release reads {VERSION}")
        names = {item.name for item in fields(cls)}
        missing = sorted(names - document.keys())
        if missing:
            raise PlanError(f"it lacks {', '.join(missing)}")
        return cls(**{name: document[name] for name in names})

    def filled_in(self, model: nn.Module) -> Self:
        """Return the plan with the KV groups and the weights of `model`, which a list of heads lacks. Raises as `sites_of`."""
        groups = whole_groups(model, self.sites_of(model).values(), self.heads)
        weights = fingerprint(unwrapped(model)) if self.weights is None else self.weights
        return replace(self, kv_groups=tuple(groups), weights=weights)

    def sites_of(self, model: nn.Module) -> dict[int, HeadSite]:
        """Return the sites of the layers with heads to remove, by layer, once the plan is found to be of this model.

        Raises:
            PlanError: the plan is of other weights, or names a head that `model` has not.
        """
        if self.weights is not None:
            difference = difference_of_weights(self.weights, fingerprint(unwrapped(model)))
            if difference is None:
                raise PlanError(
                    "the fingerprints of the plan and of the model do not prove that their weights are the same: they are of "
                    "different versions, or leave some weights out"
                )
            if difference:
                raise PlanError(f"the plan is not of this model's weights; they differ in {difference}")
        sites = _sites_by_layer(find_sites(model))
        chosen = {}
        for layer, heads in self.by_layer.items():
            among = sites.get(layer, [])
            if len(among) > 1:
                names = ", ".join(site.name for site in among)
                raise PlanError(
                    f"layer {layer} has several output projections, so that a head is ambiguous: {names}"
                )
            if not among or heads[-1] >= among[0].num_heads:
                raise PlanError(f"the model has no head {heads[-1]} in layer {layer}")
            chosen[layer] = among[0]
        return chosen


def plan_pruning(
    profile: HeadProfile,
    model: nn.Module,
    fraction: float,
    *,
    metric: str | None = None,
    mode: Mode = "zero",
    uniform: bool = False,
    group_by: GroupBy = "sum",
) -> PruningPlan:
    """Choose the lowest heads of a profile of `model`.

    Args:
        profile: of these weights.
        model: the model that was profiled.
        fraction: of the heads, or with `uniform` of each layer's KV groups, rounded to a whole number.
        metric: ranks the heads (`HeadProfile.rank`). None: the ratio to the residual stream, for mode "mean" the mean-ablation
            error per residual.
        mode: what takes the heads' place, "zero" or "mean".
        uniform: choose whole KV groups, the same number in each layer, lowest first within the layer.
        group_by: a group's number: the sum of its query heads', or the greatest ("max"). Not for a metric of KV groups.

    Raises:
        OptionError: an option is unknown or out of range, or leaves nothing to remove, or no group in a layer.
        PlanError: a layer has several output projections.
        ResultsError: the profile is not of this model, or does not hold what the ranking needs.
    """
    if not 0 < fraction < 1:
        raise OptionError(f"fraction must be between 0 and 1, not {fraction}")
    if group_by not in get_args(GroupBy):
        raise OptionError(f"unknown group_by {group_by!r}: choose one of {', '.join(get_args(GroupBy))}")
    if metric == KV_METRIC and not uniform:
        raise OptionError(f"{metric} ranks KV groups, not heads: it needs uniform (--uniform)")
    sites = _sites_of_profile(profile, model)
    by_error = mode == "mean" and metric is None
    if uniform:
        ranking = ranking_of(profile, metric, "mean" if by_error else "zero", model if by_error else None)
        kv_groups = _lowest_groups(
            ranking, [_KvGroups.of(model, site) for site in sites], sites, fraction, group_by
        )
        heads = heads_of_groups(model, sites, kv_groups)
        name: str = ranking.name
    else:
        heads = profile.lowest(
            fraction, metric, mode="mean" if by_error else "zero", model=model if by_error else None
        )
        kv_groups = whole_groups(model, sites, heads)
        name = ranking_of(profile, metric, "mean" if by_error else "zero", model if by_error else None).name
    if not heads:
        number = sum(site.num_heads for site in sites)
        raise OptionError(f"fraction {fraction} of {number} heads is none")
    data = profile.metadata.get("data")
    return PruningPlan(
        heads=tuple(heads),
        mode=mode,
        uniform=uniform,
        kv_groups=tuple(kv_groups),
        metric=name,
        model=profile.metadata.get("model"),
        weights=profile.metadata["weights"],
        data=data if isinstance(data, dict) else None,
        options={"fraction": fraction} | ({"group_by": group_by} if uniform and name != KV_METRIC else {}),
    )


def whole_groups(
    model: nn.Module, sites: Iterable[HeadSite], heads: Iterable[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Return the KV groups, as (layer, group), all of whose query heads are among `heads`; none where groups are unknown."""
    removed, found = set(heads), []
    for site in sites:
        try:
            groups = _KvGroups.of(model, site)
        except OptionError:
            continue
        for group in range(groups.number):
            if all((site.layer, head) in removed for head in groups.heads(group)):
                found.append((site.layer, group))
    return found


def heads_of_groups(
    model: nn.Module, sites: Iterable[HeadSite], groups: Iterable[tuple[int, int]]
) -> list[tuple[int, int]]:
    """Return the query heads of KV groups, as (layer, head)."""
    by_layer = {site.layer: _KvGroups.of(model, site) for site in sites}
    return [(layer, head) for layer, group in groups for head in by_layer[layer].heads(group)]


@dataclass(frozen=True)
class _KvGroups:
    """How the query heads of an attention share keys and values: `size` successive ones each."""

    number: int
    size: int

    @classmethod
    def of(cls, model: nn.Module, site: HeadSite) -> Self:
        """Raises OptionError, naming the site, where it is unknown."""
        number = known_num_kv_heads(unwrapped(model), site)
        return cls(number, site.num_heads // number)

    def heads(self, group: int) -> range:
        return range(group * self.size, (group + 1) * self.size)


def num_kv_groups(model: nn.Module, site: HeadSite) -> int:
    """Return the number of KV groups of the attention of `site`. Raises OptionError, naming it, where that is unknown."""
    return _KvGroups.of(model, site).number


def _lowest_groups(
    ranking: Ranking, groups: list[_KvGroups], sites: list[HeadSite], fraction: float, group_by: GroupBy
) -> list[tuple[int, int]]:
    """Return the lowest KV groups of each layer, as (layer, group)."""
    number = groups[0].number
    if {of.number for of in groups} != {number}:
        raise OptionError("uniform: the layers differ in their number of KV groups")
    n = round(fraction * number)
    if not 0 < n < number:
        possible = ", ".join(f"{k / number:.3g}" for k in range(1, number))
        raise OptionError(
            f"uniform: fraction {fraction} of the {number} KV groups of a layer is {n}: "
            + (f"choose one of {possible}" if possible else "with one group a layer, none can be cut")
        )
    chosen = []
    for row, (site, of) in enumerate(zip(sites, groups, strict=True)):
        values = _values_of_groups(ranking, row, of, group_by)
        if np.isnan(values).any():
            raise ResultsError(
                f"uniform: {ranking.name} is unknown for heads of layer {site.layer}: choose another metric"
            )
        lowest = np.argsort(values, kind="stable")[:n]
        chosen += [(site.layer, int(group)) for group in sorted(lowest)]
    return chosen


def _values_of_groups(ranking: Ranking, row: int, groups: _KvGroups, group_by: GroupBy) -> Array:
    """Return one number of each KV group of a row: `[groups]`, NaN where one of its heads was not measured."""
    values = np.where(ranking.measured[row], ranking.values[row], np.nan)
    if ranking.name == KV_METRIC:
        return values[: groups.number]
    by_group = values[: groups.number * groups.size].reshape(groups.number, groups.size)
    return by_group.sum(1) if group_by == "sum" else by_group.max(1)


def _sites_of_profile(profile: HeadProfile, model: nn.Module) -> list[HeadSite]:
    """Return the sites. Raises ResultsError unless the profile is of this model, PlanError if a layer has several sites."""
    sites = checked_sites(profile, unwrapped(model))
    for layer, among in _sites_by_layer(sites).items():
        if len(among) > 1:
            names = ", ".join(site.name for site in among)
            raise PlanError(
                f"layer {layer} has several output projections, so that a head is ambiguous: {names}"
            )
    return sites


def _sites_by_layer(sites: Iterable[HeadSite]) -> dict[int, list[HeadSite]]:
    found: dict[int, list[HeadSite]] = {}
    for site in sites:
        found.setdefault(site.layer, []).append(site)
    return found


def _checked_pairs(pairs: Any, name: str) -> Heads:
    """Return pairs of whole numbers from 0, sorted. Raises PlanError if there are others, or one twice."""
    if not isinstance(pairs, list | tuple) or len(pairs) > MOST_HEADS:
        raise PlanError(f"{name} must be a list of at most {MOST_HEADS:,} pairs [layer, head]")
    checked: set[tuple[int, int]] = set()
    for pair in pairs:
        whole = (
            isinstance(pair, list | tuple) and len(pair) == 2 and all(type(number) is int for number in pair)
        )
        if not whole or not all(0 <= number < LARGEST_NUMBER for number in pair):
            raise PlanError(f"{name} must be pairs of whole numbers, [layer, head], not {pair!r:.80}")
        if (pair[0], pair[1]) in checked:
            raise PlanError(f"{name} has {list(pair)} twice")
        checked.add((pair[0], pair[1]))
    return tuple(sorted(checked))


def _refuse_constant(name: str) -> Any:
    raise PlanError(f"it holds {name}")
