"""The scope of a manager: the model, the sites that are measured, and their channels of metrics."""

from dataclasses import dataclass
from functools import cached_property

from torch import nn

from fastheads.backends import tensor_parallel
from fastheads.backends.accumulator import Accumulator, read_weights
from fastheads.backends.factors import SiteFactor
from fastheads.backends.streaming_attention import Window
from fastheads.capture.channels import (
    Channel,
    Updates,
    channel_of_function,
    channel_of_heads,
    channel_of_kv_groups,
    channel_of_updates,
)
from fastheads.capture.engine import TransformersEngine
from fastheads.capture.residual_stream import ResidualStreams
from fastheads.capture.streaming import StreamingErrors
from fastheads.errors import OptionError
from fastheads.models.metadata import kv_heads_of
from fastheads.models.residual import Update
from fastheads.models.sites import HeadSite, find_sites, sites_of_layers
from fastheads.stats.metric import HEAD_METRICS, KV_GROUP, RATIOS, UPDATE
from fastheads.stats.options import MeasureOptions
from fastheads.stats.state import StateLayout


@dataclass(frozen=True, eq=False)
class Scope:
    """The model, the profiled sites, and the channels that measure them; made once, before the hooks attach."""

    model: nn.Module
    engine: TransformersEngine
    options: MeasureOptions
    # All sites of the model, the rows of the results; by row the profiled ones, with tensor parallelism only this rank's heads.
    sites: list[HeadSite]
    chosen: dict[int, HeadSite]
    ranks: tensor_parallel.Ranks | None
    updates: Updates
    residuals: ResidualStreams | None  # None: no metric needs them
    streaming: StreamingErrors | None  # None: they are not measured
    channels: tuple[Channel, ...]
    at_input: tuple[Channel, ...]  # channels that need only the projection's input
    kv_heads: list[int | None]  # of the attentions of `sites`

    @property
    def accumulator(self) -> Accumulator:
        """The accumulator of the metrics of each head."""
        return self.channels[0].accumulator

    @property
    def group_bytes(self) -> int:
        """Bytes of inputs to keep on each device; 0 for backends that read the weight, which others may change meanwhile, and
        with streaming errors, whose inputs are as large again.
        """
        reads_weight = any(metric.needs_weight for metric in self.options.registered())
        is_at_once = reads_weight or self.streaming is not None or not self.accumulator.factors
        return 0 if is_at_once else self.options.group_bytes

    @property
    def kept_bytes(self) -> int:
        """Bytes of all that is kept on each device: residual streams are allowed as many as inputs."""
        return self.group_bytes if self.residuals is None else 2 * self.group_bytes

    @cached_property
    def layout(self) -> StateLayout:
        """The layout of what is measured on each device."""
        all_metrics = len(HEAD_METRICS) + (0 if self.residuals is None else len(RATIOS))
        return StateLayout(
            metrics=tuple(1 if channel.is_single else all_metrics for channel in self.channels),
            rows=len(self.sites),
            heads=max(site.num_heads for site in self.sites),
            head_dim=max(site.head_dim for site in self.sites) if self.options.vectors else None,
        )

    @property
    def normed(self) -> dict[int, Update]:
        """By row, the updates that are measured behind the projection."""
        wanted = self.options.measures(UPDATE) or self.residuals is not None
        return self.updates.normed if wanted else {}

    def factors(self) -> list[SiteFactor]:
        """Return the factors of all channels."""
        return [factor for channel in self.channels for factor in channel.accumulator.factors.values()]


def scope_of(model: nn.Module, options: MeasureOptions) -> Scope:
    """Find the sites of `model` for these options, and make their channels; reads the weight of every profiled projection."""
    layers = options.layer_list()
    sites = find_sites(model, options.include, layers=layers)
    chosen = sites_of_layers(sites, layers)
    ranks = tensor_parallel.ranks_of(chosen)
    if ranks is not None:
        if options.verify or options.measures(KV_GROUP) or options.streaming is not None:
            name = "verify=True cannot check" if options.verify else "kv_groups=True cannot measure"
            if options.streaming is not None:
                name = "streaming= cannot measure"
            raise OptionError(f"{name} tensor-parallel projections: no rank has all their heads")
        chosen = ranks.own(chosen)
    updates = Updates(model, chosen, ranks)
    how = {"backend": options.backend, "precision": options.precision, "token_agg": options.token_agg}
    channels = [channel_of_heads(chosen, ranks, **how)]
    if options.measures(KV_GROUP):
        channels.append(channel_of_kv_groups(len(channels), model, chosen, **how))
    for metric in options.registered():
        channels.append(channel_of_function(len(channels), chosen, metric, options.token_agg))
    at_input = tuple(channels)
    wants_ratio = any(options.measures(metric) for metric in RATIOS)
    wants_stream = wants_ratio or options.streaming is not None
    residuals = ResidualStreams(model, chosen, updates) if wants_stream else None
    streaming = None
    if residuals is not None and options.streaming is not None:
        streaming = StreamingErrors(model, chosen, updates, residuals, Window(*options.streaming), **how)
        channels += streaming.make_channels(len(channels))
    if updates.normed and (options.measures(UPDATE) or wants_stream):
        channels.append(channel_of_updates(len(channels), chosen, updates.normed, ranks=ranks, **how))
    read_weights(channel.accumulator for channel in channels)
    return Scope(
        model=model,
        engine=TransformersEngine(model, chosen, ranks, options.skip_first),
        options=options,
        sites=sites,
        chosen=chosen,
        ranks=ranks,
        updates=updates,
        residuals=residuals,
        streaming=streaming,
        channels=tuple(channels),
        at_input=at_input,
        kv_heads=kv_heads_of(model, sites),
    )
