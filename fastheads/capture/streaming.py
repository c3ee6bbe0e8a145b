"""Streaming errors: what the residual stream loses if a head sees only the first tokens of a sequence and the last ones.

With z the attention's output and z_w that of the streaming attention, on the same queries, keys and values, the error of a token
is the norm of what the layer adds for z − z_w, over that of the residual stream. A tap on the attention function makes z − z_w;
it waits, in the forward, for the projection's input or output, by which its norms are measured: like the ratio of the heads, by
two channels of their own, one with the heads and one with the KV groups.
"""

import dataclasses
from typing import Any

import torch
from torch import Tensor, nn

from fastheads.backends.accumulator import Accumulator
from fastheads.backends.registry import without_fused
from fastheads.backends.streaming_attention import TokenPlaces, Window, check_distance, places_of, streamed
from fastheads.capture.channels import Channel, Updates
from fastheads.capture.forward import Forward
from fastheads.capture.residual_stream import RATIO_PLANES, ResidualStreams
from fastheads.errors import ForwardError, OptionError
from fastheads.models.attention import AttentionCall, AttentionTap, cannot_stream
from fastheads.models.sites import HeadSite, attention_of, known_num_kv_heads
from fastheads.stats.metric import STREAMING
from fastheads.stats.moments import Moments
from fastheads.stats.token_layout import TokenLayout

OF_HEADS, OF_KV_GROUPS = STREAMING[:2], STREAMING[2:]


@dataclasses.dataclass(frozen=True, eq=False)
class Loss:
    """The output z of an attention, to recognize the projection's input by, and its difference z − z_w from the windowed one."""

    output: Tensor  # [batch, seq, heads, head_dim]
    difference: Tensor | None  # [batch, seq, heads * head_dim]; None: no token is beyond sink + window


class StreamingErrors:
    """The streaming errors of the sites, by row: `attentions` that are seen, `unknown` why others are not."""

    def __init__(
        self,
        model: nn.Module,
        sites: dict[int, HeadSite],
        updates: Updates,
        residuals: ResidualStreams,
        window: Window,
        **how: Any,
    ) -> None:
        """`how`: the arguments of an Accumulator. Raises OptionError if no site's error can be measured."""
        self.window = window
        self._updates, self._how = updates, how
        self.attentions: dict[int, nn.Module] = {}
        self.unknown: dict[int, str] = {}
        for row, site in sites.items():
            owner = attention_of(model, site)
            why = cannot_stream(owner) or residuals.unknown.get(row)
            if why is None:
                self.attentions[row] = owner
            else:
                self.unknown[row] = why
        if not self.attentions:
            row = next(iter(sites))
            raise OptionError(f"no attention can be streamed: {sites[row].name}: {self.unknown[row]}")
        self._sites = {row: sites[row] for row in self.attentions}
        self._normed = {row: u for row, u in updates.normed.items() if row in self.attentions}
        self._groups = {}
        for row, site in self._sites.items():
            kv_heads = known_num_kv_heads(model, site)
            width = site.num_heads * site.head_dim // kv_heads
            self._groups[row] = dataclasses.replace(site, num_heads=kv_heads, head_dim=width)
        self._unchecked = set(self.attentions)
        self._checks: list[tuple[int, Tensor, torch.dtype]] = []
        self.channels: tuple[Channel, ...] = ()

    def make_channels(self, first: int) -> tuple[Channel, ...]:
        """Make the channels of the heads and of the KV groups, with indices from `first` on."""
        backend = self._how["backend"]
        made: list[Channel] = []
        for sites, metrics, by in (
            (self._sites, OF_HEADS, backend),
            (self._groups, OF_KV_GROUPS, without_fused(backend)),
        ):
            accumulator = Accumulator(sites, **{**self._how, "backend": by}, updates=self._normed)
            planes = {metric.name: plane for metric, plane in zip(metrics, RATIO_PLANES, strict=True)}
            made.append(Channel(first + len(made), accumulator, planes))
        self.channels = tuple(made)
        return self.channels

    def at_input(self, row: int) -> bool:
        """True if the error is measured with the projection's input alone."""
        return row in self.attentions and row not in self._normed

    def behind(self, row: int) -> bool:
        """True if the error is measured behind the projection, since a norm follows."""
        return row in self._normed

    def tap(self, row: int, forwards: Any) -> AttentionTap:
        """Make the tap of the attention of this row, for the forwards under way (`capture.forwards.Forwards`)."""

        def tap(call: AttentionCall, output: Tensor) -> None:
            forward = forwards.current()
            if forward is None or not forward.counts or forward.layout is None:
                return
            with torch.no_grad():
                forward.losses[row] = self._loss(forward, row, call, output.detach())

        return tap

    def _loss(self, forward: Forward, row: int, call: AttentionCall, output: Tensor) -> Loss:
        places = self._places(forward, output)
        if places.shape[1] <= self.window.reach:
            return Loss(output, None)
        z, distance = streamed(call, output, places, self.window, check=row in self._unchecked)
        if distance is not None:
            self._unchecked.discard(row)
            if output.device.type == "cpu":
                check_distance(call.module, distance, output.dtype)
            else:  # looked at where results are collected, since it would wait for the device
                self._checks.append((row, distance, output.dtype))
        return Loss(output, (output - z).flatten(2))

    def _places(self, forward: Forward, x: Tensor) -> TokenPlaces:
        places: TokenPlaces | None = forward.places.get(x.device)
        if places is None:
            assert forward.own_layout is not None
            shape = (x.shape[0], x.shape[1])
            places = forward.places[x.device] = places_of(forward.own_layout, shape, self.window, x.device)
        return places

    def take(self, forward: Forward, row: int, x: Tensor) -> Tensor | None:
        """Remove and return z − z_w for an input `x` `[batch, seq, heads * head_dim]`; None if no token has any.

        Raises ForwardError if the input is not what the attention gave.
        """
        loss: Loss | None = forward.losses.pop(row, None)
        name = self._sites[row].name
        if loss is None:
            raise ForwardError(
                f"{name} ran without a call of its attention function: leave out streaming=, or choose layers="
            )
        output = loss.output
        if x.data_ptr() != output.data_ptr() and not self._is_equal(row, x, output):
            raise ForwardError(
                f"{name}: what its attention gives is changed before the projection (a gate or a norm), so that the "
                "streaming error is unknown: leave out streaming=, or choose layers="
            )
        return loss.difference

    def _is_equal(self, row: int, x: Tensor, output: Tensor) -> bool:
        if x.shape[:2] != output.shape[:2] or x.numel() != output.numel():
            return False
        apart = (x.flatten(2) - output.flatten(2)).float().norm()
        if x.device.type == "cpu":
            return not bool(apart > 0)  # NaN may be where padding is
        self._checks.append((row, apart * torch.finfo(torch.float32).max, x.dtype))
        return True

    def layout(self, forward: Forward, x: Tensor) -> TokenLayout:
        """Return the layout of the valid tokens beyond sink + window."""
        found: TokenLayout | None = forward.beyond.get(x.device)
        if found is None:
            layout, places = forward.layout, self._places(forward, x)
            assert layout is not None
            valid = layout.mask(x)
            beyond = places.beyond if valid is None else places.beyond & valid
            found = dataclasses.replace(layout, valid=beyond, skip_first=0)
            forward.beyond[x.device] = found
        return found

    def check(self) -> None:
        """Raise ForwardError if an attention turned out to be something else. Waits for the device."""
        checks, self._checks = self._checks, []
        for row, distance, dtype in checks:
            check_distance(self.attentions[row], distance, dtype)

    def moments(self, by_metric: dict[str, Moments]) -> dict[str, Moments]:
        """Return the moments `[rows, heads]` of the metrics, with the layers' multipliers; other rows are empty."""
        found = {}
        for metrics in (OF_HEADS, OF_KV_GROUPS):
            for power, metric in enumerate(metrics, 1):
                of_metric = by_metric[metric.name]
                found[metric.name] = self._updates.combined(
                    of_metric, of_metric, rows=self.attentions, power=power
                )
        return found

    def describe(self, sites: list[HeadSite]) -> dict[str, str]:
        """Return why the error of a site is unknown, by name, for a profile's metadata."""
        return {sites[row].name: why for row, why in sorted(self.unknown.items())}
