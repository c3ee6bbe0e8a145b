"""The sites that are measured, what the hook of a small input keeps, and the launch that may serve the next forward's."""

from collections.abc import Iterable
from itertools import compress
from operator import attrgetter, sub
from typing import Any, NamedTuple

from torch import Tensor

from fastheads.backends.accumulator import Accumulator, run_again
from fastheads.backends.protocol import Launch
from fastheads.backends.residual_norms import inverse_norms
from fastheads.models.sites import HeadSite
from fastheads.stats.moments import RunningMoments
from fastheads.stats.token_layout import TokenLayout


class Profiled:
    """A site that is profiled: its row in the results, and the queue of its weight's device."""

    def __init__(self, row: int, site: HeadSite, queue: Any) -> None:
        """`queue`: a `capture.queue.DeviceQueue`."""
        self.row, self.site, self.queue = row, site, queue
        self.name, self.head_dim = site.name, site.head_dim
        self.width = site.num_heads * site.head_dim  # of its input
        self.is_residual = False

    def residual(self) -> "Profiled":
        """Return a copy that marks a `Kept` entry as the residual stream of this site."""
        found = Profiled(self.row, self.site, self.queue)
        found.is_residual = True
        return found

    def traced(self) -> "TracedSite":
        """The site as constants, for a compiled graph."""
        return TracedSite(self.row, self.name, self.head_dim, self.width, str(self.queue.device))


class TracedSite(NamedTuple):
    """A profiled site in constants. torch.compile does not look again at what a graph read of a module, as long as that is
    constants alone, and the module as it was.
    """

    row: int
    name: str
    head_dim: int
    width: int
    device: str


# What the hook of a small input leaves behind: the site, its input, and the input's version (None for an inference tensor: it
# has none, so that nothing shows whether it was changed). Just before it may come the same of the residual stream.
Kept = tuple[Profiled, Tensor, int | None]

_VERSION = attrgetter("_version")


class KeptLaunch:
    """The launch that served all kept inputs of a forward, for those of the next: decode steps differ in nothing but addresses,
    and what is looked at here is all that the time of such a step allows.
    """

    def __init__(self, kept: list[Kept], launch: Launch, accumulator: Accumulator) -> None:
        """`launch`: of these inputs, in that order, by `accumulator`. It may run on one stream."""
        self._profiled = [profiled for profiled, _, _ in kept]
        self.rows = {p.row for p in self._profiled}
        self.extent = launch.extent
        self._index = self._profiled[0].queue.index
        self._launch, self._scratch = launch, launch.new_scratch()
        self._accumulator, self._epoch = accumulator, accumulator.epoch
        self._no_versions = [None] * len(kept)
        residuals = [x for profiled, x, _ in kept if profiled.is_residual]
        self._residuals, self._inputs = (
            [p.is_residual is which for p in self._profiled] for which in (True, False)
        )
        self._residual_like = {_form(x) for x in residuals}
        self._has_residuals = bool(residuals)
        self._residual_extent = max((x.nbytes for x in residuals), default=0)
        self._count = len(kept) - len(residuals)

    def addresses_of(self, kept: list[Kept], layout: TokenLayout) -> list[int] | None:
        """Addresses of the inputs, then of the streams; None if one was changed, or the launch may not serve them."""
        of_residuals: list[int] = []
        profiled, inputs, versions = map(list, zip(*kept, strict=True))
        if profiled != self._profiled or layout.cu_seqlens is not None:
            return None
        if versions != self._no_versions and (None in versions or versions != list(map(_VERSION, inputs))):
            return None
        if self._has_residuals:
            residuals = list(compress(inputs, self._residuals))
            if set(map(_form, residuals)) != self._residual_like:
                return None
            of_residuals = list(map(Tensor.data_ptr, residuals))
            if _overlap(of_residuals, self._residual_extent):
                return None
            inputs = list(compress(inputs, self._inputs))
        if layout.tokens != inputs[0].shape[:2] or self._accumulator.epoch != self._epoch:
            return None
        addresses = self._launch.matches(
            inputs, layout.valid, layout.skip_first, has_ratio=self._has_residuals
        )
        if addresses is None or _overlap(addresses, self.extent):
            return None  # one may lie where another lay
        return addresses + of_residuals

    def spans(self, addresses: list[int]) -> list[tuple[int, int]]:
        """Return (start, stop) of what lies at these addresses, of inputs and then of streams."""
        return [
            (start, start + (self.extent if place < self._count else self._residual_extent))
            for place, start in enumerate(addresses)
        ]

    def run(
        self, addresses: list[int], kept: list[Kept], moments: RunningMoments, valid: Tensor | None
    ) -> bool:
        """Measure what `addresses_of` gave; False, and nothing was done, where the moments or the mask cannot be read."""
        self._accumulator.follow_stream(self._index)
        ratio = None
        if self._has_residuals:
            ratio = inverse_norms([x for profiled, x, _ in kept if profiled.is_residual])
        return run_again(
            self._launch, addresses[: self._count], moments, valid, ratio=ratio, scratch=self._scratch
        )


def _form(x: Tensor) -> tuple[Any, ...]:
    return type(x), x.shape, x.dtype, x.get_device()


def _overlap(addresses: Iterable[int], extent: int) -> bool:
    """True if two of these, each the first of `extent` bytes, may have bytes in common."""
    ordered = sorted(addresses)
    return len(ordered) > 1 and min(map(sub, ordered[1:], ordered)) < extent
