"""What a manager measures: the model, its sites, and the streams of metrics of each."""

from dataclasses import dataclass

from torch import nn

from fastheads.backends import tensor_parallel
from fastheads.backends.accumulator import Accumulator, read_weights
from fastheads.backends.factors import SiteFactor
from fastheads.capture.channels import (
    Channel,
    Updates,
    channel_of_heads,
    channel_of_kv_groups,
    channel_of_updates,
)
from fastheads.errors import OptionError
from fastheads.models.sites import HeadSite, decoder_of, find_sites, is_sequence_first, sites_of_layers
from fastheads.stats.metrics import METRICS
from fastheads.stats.options import MeasureOptions


@dataclass(frozen=True, eq=False)
class Scope:
    """The model, the sites that are profiled, and the channels that measure them; fixed when the hooks attach."""

    model: nn.Module
    decoder: nn.Module
    options: MeasureOptions
    sites: list[HeadSite]  # all of the model's: the rows of the results
    chosen: dict[
        int, HeadSite
    ]  # those that are profiled, by row; with tensor parallelism with this rank's heads
    ranks: tensor_parallel.Ranks | None
    updates: Updates
    channels: tuple[Channel, ...]
    at_input: tuple[Channel, ...]  # those that need the projection's input alone
    sequence_first: frozenset[int]  # rows whose inputs are [seq, batch, width]

    @property
    def accumulator(self) -> Accumulator:
        """That of the metrics of each head."""
        return self.channels[0].accumulator

    @property
    def group_bytes(self) -> int:
        """Bytes of inputs to keep: none for backends that read the weight, which must come before a hook of others changes it."""
        return self.options.group_bytes if self.accumulator.factors else 0

    @property
    def shape(self) -> tuple[int, int, int]:
        """(metrics, rows, heads) of a channel's moments."""
        return len(METRICS), len(self.sites), max(site.num_heads for site in self.sites)

    def factors(self) -> list[SiteFactor]:
        """The factors of all channels."""
        return [factor for channel in self.channels for factor in channel.accumulator.factors.values()]


def scope_of(model: nn.Module, options: MeasureOptions) -> Scope:
    """The scope of `model` with these options; reads every weight that is profiled."""
    sites = find_sites(model, options.include)
    chosen = sites_of_layers(sites, options.layer_list())
    ranks = tensor_parallel.ranks_of(chosen)
    if ranks is not None:
        if options.verify or options.kv_groups:
            name = "verify=True cannot check" if options.verify else "kv_groups=True cannot measure"
            raise OptionError(f"{name} tensor-parallel projections: no rank has all their heads")
        chosen = ranks.own(chosen)
    updates = Updates(model, chosen, ranks)
    how = {"backend": options.backend, "precision": options.precision, "token_agg": options.token_agg}
    channels = [channel_of_heads(chosen, ranks, **how)]
    if options.kv_groups:
        channels.append(channel_of_kv_groups(1, model, chosen, **how))
    at_input = tuple(channels)
    if updates.normed:
        channels.append(channel_of_updates(len(channels), chosen, updates.normed, ranks=ranks, **how))
    read_weights(channel.accumulator for channel in channels)
    return Scope(
        model=model,
        decoder=decoder_of(model),
        options=options,
        sites=sites,
        chosen=chosen,
        ranks=ranks,
        updates=updates,
        channels=tuple(channels),
        at_input=at_input,
        sequence_first=frozenset(row for row, site in chosen.items() if is_sequence_first(model, site)),
    )
