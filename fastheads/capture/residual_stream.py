"""The residual stream r that each attention block's output is added to: where it is read, and the ratio metrics made with it.

A hook sees r before the projection's input comes. Where that input waits for a launch, r waits with it, as a `Kept` entry of its
own just before; else 1/‖r‖ is computed at once.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from fastheads.capture.channels import Updates
from fastheads.capture.profiled import Kept, Profiled, TracedSite
from fastheads.errors import ForwardError
from fastheads.models.sites import HeadSite
from fastheads.models.stream import StreamSource, UnknownStreamError, stream_of
from fastheads.stats.metric import HEAD_METRICS, RATIOS
from fastheads.stats.moments import Moments, RunningMoments

# The planes of the ratio metrics in a channel's moments, behind those of each head.
RATIO_PLANES = range(len(HEAD_METRICS), len(HEAD_METRICS) + len(RATIOS))


class Streams:
    """Where r is read, by row, for the sites of which it is known, and what the layer adds to it."""

    def __init__(self, model: nn.Module, sites: dict[int, HeadSite], updates: Updates) -> None:
        self._updates = updates
        self.sources: dict[int, StreamSource] = {}
        self.unknown: dict[int, str] = {}
        for row, site in sites.items():
            if row in updates.unknown:
                self.unknown[row] = updates.unknown[row]
                continue
            try:
                source = stream_of(model, site)
                if _is_shared(model, site, source):
                    raise UnknownStreamError("several layers share the projection, and each adds to its own")
                self.sources[row] = source
            except UnknownStreamError as error:
                self.unknown[row] = str(error)

        # The rows whose ratio is measured with the projection's input alone.
        self.at_input = frozenset(self.sources) - frozenset(updates.normed)

    def modules(self, model: nn.Module) -> dict[str, nn.Module]:
        """Return the modules whose calls show r, by their names in `model`."""
        names = {id(module): name for name, module in model.named_modules()}
        return {names[id(source.module)]: source.module for source in self.sources.values()}

    def cannot_wait(self, row: int) -> bool:
        """True if r must be read at once: the model writes into it, or sites that share it would keep one memory twice."""
        source = self.sources[row]
        shared = [other for other in self.sources.values() if other.module is source.module]
        return source.is_overwritten or len(shared) > 1

    def describe(self, rows: Iterable[int]) -> str | list[str]:
        """Describe r for a profile's metadata: one text for each row, or a single one if all are equal."""
        texts = [str(self.sources[row]) if row in self.sources else self.unknown.get(row, "") for row in rows]
        return texts[0] if len(set(texts)) == 1 else texts

    def moments(self, of_heads: Moments, of_updates: Moments | None) -> dict[str, Moments]:
        """Return the moments `[rows, heads]` of the ratio metrics from those of two channels `[planes, rows, heads]`: of the
        updates where a norm is behind the attention, else of the heads, times the layer's multiplier. Rows whose r is unknown are
        empty.
        """
        empty = RunningMoments(1, 1, 1, torch.device("cpu")).views()
        found = {}
        for plane, (power, metric) in zip(RATIO_PLANES, enumerate(RATIOS, 1), strict=True):
            factor = self._updates.factors(of_heads.count.shape[1]) ** power
            moments = Moments(*(each[plane].clone() for each in of_heads)).scaled(factor)
            for row in range(factor.shape[0]):
                for field, target in zip(Moments._fields, moments, strict=True):
                    if row not in self.sources or row in self._updates.unknown:
                        target[row] = getattr(empty, field)[0, 0, 0]
                    elif row in self._updates.normed:
                        assert of_updates is not None  # which has a channel
                        target[row] = getattr(of_updates, field)[plane, row]
            found[metric.name] = moments
        return found


def _is_shared(model: nn.Module, site: HeadSite, source: StreamSource) -> bool:
    """True if the projection is called by layers other than the one whose residual stream `source` shows."""
    named = dict(model.named_modules(remove_duplicate=False))

    def around(name: str) -> list[nn.Module]:
        parts = name.split(".")
        return [named[".".join(parts[:depth])] for depth in range(len(parts))]

    names = [name for name, module in named.items() if module is site.module]
    above = around(site.name)
    # The layer: the module that shows the stream, or has it as a child.
    layer = next((m for m in above if m is source.module), None) or next(
        (m for m in above if any(child is source.module for child in m.children())), None
    )
    return any(all(m is not layer for m in around(name)) for name in names)


def check_shape(profiled: Profiled, x: Tensor, stream: Tensor) -> None:
    """Raise ForwardError if r is not over the tokens of the projection's input `x` `[B, S, width]`."""
    if type(stream) is not Tensor or stream.shape[:2] != x.shape[:2] or stream.device != x.device:
        raise ForwardError(
            f"{profiled.name}: the residual stream is {list(stream.shape)} on {stream.device} where the projection's input is "
            f"{list(x.shape)} on {x.device}: leave head_residual_ratio out (metrics=[...])"
        )


class Pairing:
    """Kept entries as inputs with their streams: each input comes with the last stream of its site before it."""

    def __init__(self, kept: list[Kept]) -> None:
        self.inputs: list[Kept] = []
        self.streams: list[Tensor | None] = []
        self.used: list[Kept] = []  # the streams that have an input
        self.left: list[Kept] = []  # those whose input is still to come
        waiting: dict[int, Kept] = {}
        for entry in kept:
            profiled = entry[0]
            if profiled.is_stream:
                waiting[profiled.row] = entry
                continue
            self.inputs.append(entry)
            found = waiting.pop(profiled.row, None)
            self.streams.append(None if found is None else found[1])
            if found is not None:
                self.used.append(found)
        self.left = list(waiting.values())

    def check(self, at_input: frozenset[int]) -> None:
        """Raise ForwardError if an input of the rows `at_input` has no stream, or one stream is over other tokens."""
        for (profiled, x, _), stream in zip(self.inputs, self.streams, strict=True):
            if stream is not None:
                check_shape(profiled, x, stream)
            elif profiled.row in at_input:
                raise missing(profiled)


def missing(profiled: Profiled | TracedSite) -> ForwardError:
    """The error of an input that came without the residual stream it is added to."""
    return ForwardError(
        f"{profiled.name} ran without a call of the module whose input is its residual stream: leave head_residual_ratio out "
        "(metrics=[...])"
    )
