"""The residual stream r that each attention block's output is added to: where it is read, and the ratio metrics made with it.

A hook sees r before the projection's input comes. Where that input waits for a launch, r waits with it, as a `Kept` entry of its
own just before; else 1/‖r‖ is computed at once.
"""

from collections import Counter
from collections.abc import Iterable

from torch import Tensor, nn

from fastheads.capture.channels import Updates
from fastheads.capture.profiled import Kept, Profiled, TracedSite
from fastheads.errors import ForwardError
from fastheads.models.sites import HeadSite
from fastheads.models.stream import StreamSource, UnknownStreamError, stream_of
from fastheads.stats.metric import HEAD_METRICS, RATIOS
from fastheads.stats.moments import Moments

# The planes of the ratio metrics in a channel's moments, behind those of each head.
RATIO_PLANES = range(len(HEAD_METRICS), len(HEAD_METRICS) + len(RATIOS))


class ResidualStreams:
    """The residual streams that the sites' outputs are added to, by row: `sources` where they are read, `unknown` why not."""

    def __init__(self, model: nn.Module, sites: dict[int, HeadSite], updates: Updates) -> None:
        self._updates = updates
        self.sources: dict[int, StreamSource] = {}
        self.unknown: dict[int, str] = {}
        named = dict(model.named_modules(remove_duplicate=False))
        names: dict[int, list[str]] = {}  # of each module, by its id
        for name, module in named.items():
            names.setdefault(id(module), []).append(name)
        for row, site in sites.items():
            if row in updates.unknown:
                self.unknown[row] = updates.unknown[row]
                continue
            try:
                source = stream_of(model, site)
                if _is_shared([_around(named, name) for name in names[id(site.module)]], source.module):
                    raise UnknownStreamError("several layers share the projection, and each adds to its own")
                self.sources[row] = source
            except UnknownStreamError as error:
                self.unknown[row] = str(error)
        # The modules whose calls show r, by a name of theirs.
        self.modules = {names[id(s.module)][0]: s.module for s in self.sources.values()}
        self._uses = Counter(id(source.module) for source in self.sources.values())
        # The rows whose ratio is measured with the projection's input alone.
        self.at_input = frozenset(self.sources) - frozenset(updates.normed)

    def cannot_wait(self, row: int) -> bool:
        """True if r must be read at once: the model writes into it, or sites that share it would keep one memory twice."""
        source = self.sources[row]
        return source.is_overwritten or self._uses[id(source.module)] > 1

    def describe(self, rows: Iterable[int]) -> str | list[str]:
        """Describe r for a profile's metadata: one text for each row, or a single one if all are equal."""
        texts = [str(self.sources[row]) if row in self.sources else self.unknown.get(row, "") for row in rows]
        return texts[0] if len(set(texts)) == 1 else texts

    def moments(self, of_heads: Moments, of_updates: Moments | None) -> dict[str, Moments]:
        """Return the moments `[rows, heads]` of the ratio metrics from those of two channels `[planes, rows, heads]`, which
        `Updates.combined` combines. Rows whose r is unknown are empty.
        """
        found = {}
        for plane, (power, metric) in zip(RATIO_PLANES, enumerate(RATIOS, 1), strict=True):
            parts = [
                None if each is None else Moments(*(p[plane] for p in each))
                for each in (of_heads, of_updates)
            ]
            found[metric.name] = self._updates.combined(*parts, rows=self.sources, power=power)
        return found


def _around(named: dict[str, nn.Module], name: str) -> list[nn.Module]:
    """Return the modules around the one of that name, from the outside."""
    parts = name.split(".")
    return [named[".".join(parts[:depth])] for depth in range(len(parts))]


def _is_shared(around: list[list[nn.Module]], shows: nn.Module) -> bool:
    """True if a projection is called by other layers than the one with the module that `shows` their residual stream; `around`:
    the modules around the projection, for each of its names.
    """
    if len(around) == 1:
        return False
    layers = [module for module in reversed(around[0]) if any(part is shows for part in module.modules())]
    return any(all(module is not layers[0] for module in modules) for modules in around)


def check_shape(profiled: Profiled, x: Tensor, residual: Tensor) -> None:
    """Raise ForwardError if r is not over the tokens of the projection's input `x` `[B, S, width]`."""
    if type(residual) is not Tensor or residual.shape[:2] != x.shape[:2] or residual.device != x.device:
        raise ForwardError(
            f"{profiled.name}: the residual stream is {list(residual.shape)} on {residual.device}, and the projection's input "
            f"{list(x.shape)} on {x.device}: leave head_residual_ratio out (metrics=[...])"
        )


class Pairing:
    """Kept inputs with their residual streams: each belongs to the last stream of its site that was kept before it."""

    def __init__(self, kept: list[Kept]) -> None:
        self.inputs: list[Kept] = []
        self.residuals: list[Tensor | None] = []
        self.used: list[Kept] = []  # the entries of streams that have an input
        self.left: list[Kept] = []  # those whose input is still to come
        waiting: dict[int, Kept] = {}
        for entry in kept:
            profiled = entry[0]
            if profiled.is_residual:
                waiting[profiled.row] = entry
                continue
            self.inputs.append(entry)
            found = waiting.pop(profiled.row, None)
            self.residuals.append(None if found is None else found[1])
            if found is not None:
                self.used.append(found)
        self.left = list(waiting.values())

    def check(self, at_input: frozenset[int]) -> None:
        """Raise ForwardError if an input of the rows `at_input` has no stream, or one stream is over other tokens."""
        for (profiled, x, _), residual in zip(self.inputs, self.residuals, strict=True):
            if residual is not None:
                check_shape(profiled, x, residual)
            elif profiled.row in at_input:
                raise missing(profiled)


def missing(profiled: Profiled | TracedSite) -> ForwardError:
    """Make the error for an input without its residual stream."""
    return ForwardError(
        f"{profiled.name} ran without a call of the module whose input is its residual stream: leave head_residual_ratio out "
        "(metrics=[...])"
    )
