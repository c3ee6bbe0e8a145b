"""What is measured at the projections, beyond one norm a head: channels with geometry, factors and moments of their own.

The first channel measures the four metrics of each head. Others take the second of these, the norm of a contribution, of another
product: of the heads that share keys and values together, or of what a norm behind the attention leaves of a head.
"""

import dataclasses
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import nn

from fastheads.backends.accumulator import TORCH_BACKENDS, Accumulator
from fastheads.backends.tensor_parallel import Ranks
from fastheads.errors import OptionError
from fastheads.models import geometry
from fastheads.models.residual import UnknownUpdateError, Update, update_of
from fastheads.models.sites import HeadSite
from fastheads.stats.metrics import KV_METRIC, METRICS, UPDATE_METRIC
from fastheads.stats.moments import Moments, RunningMoments

CONTRIBUTION = METRICS.index("head_residual_contribution_norm")


@dataclass(frozen=True, eq=False)
class Channel:
    """One accumulator, the place of its moments in a device's buffer, and the metrics that they give: by name, the plane."""

    index: int
    accumulator: Accumulator
    metrics: dict[str, int]


class Updates:
    """What the layers make of their attention's output, by row, as far as it is known."""

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
        """Take the multipliers as they are now."""
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
        """At the start of each forward: a profile is of one number, and where no norm comes between, so are its samples."""
        if self._multipliers and not self._is_over:
            for row, before in self._multipliers.items():
                try:
                    changed = self.known[row].multiplier != before
                except (TypeError, ValueError, RuntimeError):
                    changed = True
                if changed:
                    self._changed.add(self._sites[row].name)

    def close(self) -> None:
        """No forward comes any more: what the layers become is of no account."""
        self.look()
        self._is_over = True

    def changed(self) -> list[str]:
        """The names of the sites whose layer was seen with another multiplier than at first, or at the last `renew`, in order."""
        self.look()
        return [site.name for site in self._sites.values() if site.name in self._changed]

    @property
    def normed(self) -> dict[int, Update]:
        """Those for which the norm of each token is needed: they are measured behind the projection."""
        return {row: update for row, update in self.known.items() if update.norm is not None}

    def moments(self, by_metric: dict[str, Moments]) -> Moments:
        """Of what is really added, `[rows, heads]` as all of them: behind a norm those that were measured, else a multiple of the
        contribution's. Rows that are not known are empty.
        """
        contribution, measured = by_metric[METRICS[CONTRIBUTION]], by_metric.get(UPDATE_METRIC)
        rows, normed = contribution.count.shape[0], self.normed
        factor = torch.ones(rows, 1, dtype=torch.float64, device="cpu")
        for row, multiplier in self._multipliers.items():
            factor[row] = abs(multiplier)
        found = Moments(*(plane.clone() for plane in contribution.scaled(factor)))
        empty = RunningMoments(1, 1, 1, torch.device("cpu")).views()
        for row in range(rows):
            for plane, name in zip(found, Moments._fields, strict=True):
                if row in normed:
                    plane[row] = getattr(measured, name)[row]
                elif row not in self.known:
                    plane[row] = getattr(empty, name)[0, 0, 0]
        return found

    def describe(self, rows: Iterable[int]) -> str | list[str]:
        """For a profile's metadata: of each row, or once where all are alike."""
        texts = [self._texts[row] if row in self.known else self.unknown.get(row, "") for row in rows]
        return texts[0] if len(set(texts)) == 1 else texts


def channel_of_heads(
    sites: dict[int, HeadSite], ranks: Ranks | None, *, backend: str, precision: str, token_agg: str
) -> Channel:
    """The four metrics of each head."""
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
    """The norm of what each head adds to the residual stream, through a norm."""
    rows = {row: sites[row] for row in normed}
    if ranks is not None:
        backend = ranks.torch_backend(backend)
    # Without the ranks: there is no mean over heads here that would need them all.
    accumulator = Accumulator(rows, backend, precision, token_agg, updates=normed)
    return Channel(index, accumulator, {UPDATE_METRIC: CONTRIBUTION})


def channel_of_kv_groups(
    index: int, model: nn.Module, sites: dict[int, HeadSite], *, backend: str, precision: str, token_agg: str
) -> Channel:
    """The norm of what the query heads of each KV head contribute together: a head as wide as all of them."""
    groups = {}
    for row, site in sites.items():
        kv_heads = num_kv_heads(model, site)
        width = site.num_heads * site.head_dim // kv_heads
        groups[row] = dataclasses.replace(site, num_heads=kv_heads, head_dim=width)
    # Wide heads may be more than the kernel takes, whatever it is asked for by name.
    backend = backend if backend in TORCH_BACKENDS else "auto"
    accumulator = Accumulator(groups, backend, precision, token_agg)
    return Channel(index, accumulator, {KV_METRIC: CONTRIBUTION})


def num_kv_heads(model: nn.Module, site: HeadSite) -> int:
    """The KV heads of the attention that ends in `site`. Raises OptionError where that is not known, or contradictory."""
    parts = site.name.split(".")
    for depth in range(
        len(parts) - 1, 0, -1
    ):  # the attention is above the projection, most often right above
        owner = model.get_submodule(".".join(parts[:depth]))
        try:
            count = geometry.num_kv_heads(owner, site.num_heads)
        except ValueError as error:
            raise OptionError(
                f"{site.name}: how many query heads share keys and values is said in several ways ({error}): kv_groups=False"
            ) from None
        if count is not None:
            return count
    raise OptionError(
        f"{site.name}: its attention does not say how many query heads share keys and values: kv_groups=False"
    )
