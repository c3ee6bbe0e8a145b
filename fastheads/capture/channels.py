"""Channels: the streams of metrics that are measured at the projections, each with its own heads, factors and moments.

The first channel measures the four metrics of each head. The others measure the second of these, the norm of a contribution, for
another product: the sum of the query heads that share keys and values, or a head's part of a normalized attention output.
"""

import dataclasses
from collections.abc import Container, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from fastheads.backends.accumulator import Accumulator
from fastheads.backends.metric_samples import MetricAccumulator
from fastheads.backends.registry import without_fused
from fastheads.backends.tensor_parallel import Ranks
from fastheads.errors import OptionError
from fastheads.models.residual import UnknownUpdateError, Update, update_of
from fastheads.models.sites import HeadSite, known_num_kv_heads
from fastheads.stats.metric import Metric
from fastheads.stats.metrics import KV_METRIC, METRICS, UPDATE_METRIC
from fastheads.stats.moments import Moments, RunningMoments

CONTRIBUTION = METRICS.index("head_residual_contribution_norm")


@dataclass(frozen=True, eq=False)
class Channel:
    """An accumulator, the index of its moments in a device's state, and the plane of each of its metrics by name."""

    index: int
    accumulator: Accumulator
    metrics: dict[str, int]
    is_single: bool = False  # one metric alone has moments, in plane 0

    def ratio(self, inverse_norms: Tensor | None) -> Tensor | None:
        """Return 1/‖r‖ if this channel measures the ratio with the projection's input alone: that of the heads does."""
        return inverse_norms if self.index == 0 else None


class Updates:
    """The updates of the layers, by row: how a layer scales or normalizes the attention's output, if that is known."""

    def __init__(self, model: nn.Module, sites: dict[int, HeadSite], ranks: Ranks | None = None) -> None:
        self._sites = sites
        self.known: dict[int, Update] = {}
        self.unknown: dict[int, str] = {}
        for row, site in sites.items():
            try:
                update = update_of(model, site)
                if update.norm is not None and ranks is not None and not ranks.whole_output(row):
                    raise UnknownUpdateError("the norm needs the sum over ranks, and each has a part of it")
                update.check()
                self.known[row] = update
            except UnknownUpdateError as error:
                self.unknown[row] = str(error)
        self.renew()

    def renew(self) -> None:
        """Read the current multipliers, and forget changes seen before."""
        self._changed: set[str] = set()
        self._is_over = False
        self._multipliers: dict[int, float] = {}
        for row, update in list(self.known.items()):
            if update.rule.multiplier is not None:
                try:
                    update.check()
                    self._multipliers[row] = update.multiplier
                except UnknownUpdateError as error:
                    self.unknown[row] = str(error)
                    del self.known[row]
        self._texts = {row: str(update) for row, update in self.known.items()}

    def look(self) -> None:
        """Note changed multipliers, at the start of each forward: all samples of a profile share one multiplier."""
        if self._multipliers and not self._is_over:
            for row, before in self._multipliers.items():
                try:
                    changed = self.known[row].multiplier != before
                except (TypeError, ValueError, RuntimeError):
                    changed = True
                if changed:
                    self._changed.add(self._sites[row].name)

    def close(self) -> None:
        """Note changes for the last time: later ones affect no sample."""
        self.look()
        self._is_over = True

    def changed(self) -> list[str]:
        """Return the names of the sites, in order, whose layer's multiplier has changed since the last `renew`."""
        self.look()
        return [site.name for site in self._sites.values() if site.name in self._changed]

    @property
    def normed(self) -> dict[int, Update]:
        """The updates through a norm, by row: they need the projection's output."""
        return {row: update for row, update in self.known.items() if update.norm is not None}

    def moments(self, by_metric: dict[str, Moments]) -> Moments:
        """Return the moments `[rows, heads]` of the update norm. Rows with an unknown update are empty."""
        return self.combined(
            by_metric[METRICS[CONTRIBUTION]], by_metric.get(UPDATE_METRIC), rows=self.known, power=1
        )

    def combined(
        self, at_input: Moments | None, behind: Moments | None, *, rows: Container[int], power: int
    ) -> Moments:
        """Combine moments `[rows, heads]` that were measured at the projection's input, times the layer's multiplier to that
        power, and, for layers with a norm, `behind` the projection. Other rows than `rows` are empty, and those with an unknown
        update.
        """
        assert at_input is not None
        count = at_input.count.shape[0]
        factor = torch.ones(count, 1, dtype=torch.float64, device="cpu")
        for row, multiplier in self._multipliers.items():
            factor[row] = abs(multiplier) ** power
        found = Moments(*(plane.clone() for plane in at_input.scaled(factor)))
        empty, normed = RunningMoments(1, 1, 1, torch.device("cpu")).views(), self.normed
        for row in range(count):
            for plane, name in zip(found, Moments._fields, strict=True):
                if row not in rows or row not in self.known:
                    plane[row] = getattr(empty, name)[0, 0, 0]
                elif row in normed:
                    plane[row] = getattr(behind, name)[row]
        return found

    def describe(self, rows: Iterable[int]) -> str | list[str]:
        """Describe the updates of `rows` for a profile's metadata: one text for each row, or a single one if all are equal."""
        texts = [self._texts[row] if row in self.known else self.unknown.get(row, "") for row in rows]
        return texts[0] if len(set(texts)) == 1 else texts


def channel_of_heads(
    sites: dict[int, HeadSite], ranks: Ranks | None, *, backend: str, precision: str, token_agg: str
) -> Channel:
    """Make the channel of the four metrics of each head."""
    accumulator = Accumulator(sites, backend, precision, token_agg, ranks=ranks)
    return Channel(0, accumulator, {name: plane for plane, name in enumerate(METRICS)})


def channel_of_updates(
    index: int,
    sites: dict[int, HeadSite],
    normed: dict[int, Update],
    *,
    ranks: Ranks | None,
    backend: str,
    precision: str,
    token_agg: str,
) -> Channel:
    """Make the channel of what each head adds to the residual stream, for layers that normalize the attention's output."""
    rows = {row: sites[row] for row in normed}
    if ranks is not None:
        backend = ranks.torch_backend(backend)
    # Without the ranks: there is no mean over heads here that would need them all.
    accumulator = Accumulator(rows, backend, precision, token_agg, updates=normed)
    return Channel(index, accumulator, {UPDATE_METRIC: CONTRIBUTION})


def channel_of_kv_groups(
    index: int, model: nn.Module, sites: dict[int, HeadSite], *, backend: str, precision: str, token_agg: str
) -> Channel:
    """Make the channel of KV groups: the query heads of one KV head are measured as a single wide head."""
    groups = {}
    for row, site in sites.items():
        try:
            kv_heads = known_num_kv_heads(model, site)
        except OptionError as error:
            raise OptionError(f"{error}: kv_groups=False") from None
        width = site.num_heads * site.head_dim // kv_heads
        groups[row] = dataclasses.replace(site, num_heads=kv_heads, head_dim=width)
    # Wide heads may be more than the kernel takes, whatever it is asked for by name.
    metrics = slice(CONTRIBUTION, CONTRIBUTION + 1)
    accumulator = Accumulator(groups, without_fused(backend), precision, token_agg, metrics=metrics)
    return Channel(index, accumulator, {KV_METRIC: 0}, is_single=True)


def channel_of_function(index: int, sites: dict[int, HeadSite], metric: Metric, token_agg: str) -> Channel:
    """A registered metric, which reads the input once more."""
    return Channel(index, MetricAccumulator(sites, metric, token_agg), {metric.name: 0}, is_single=True)
