"""The sites that are measured, and the launches that may be made again for the inputs of the next forward."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import reduce
from operator import attrgetter, or_, sub
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastheads.models.sites import HeadSite
from fastheads.stats.token_layout import TokenLayout


@dataclass(eq=False)
class Profiled:
    """A site that is profiled: its row in the results, and the queue of its weight's device."""

    row: int
    site: HeadSite
    queue: Any  # `capture.queue.DeviceQueue`

    def __post_init__(self) -> None:
        self.name = self.site.name
        self.head_dim = self.site.head_dim
        self.width = self.site.num_heads * self.head_dim  # of its input

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
# has none, so that nothing shows whether it was changed).
Kept = tuple[Profiled, Tensor, int | None]

_DTYPE, _SHAPE, _VERSION = attrgetter("dtype"), attrgetter("shape"), attrgetter("_version")


class CachedLaunch:
    """The launches that served all inputs of a forward (one, up to 32 layers), to be made again for those of the next: decode
    steps differ in nothing but addresses, and what is looked at here is all that the time of such a step allows.
    """

    def __init__(
        self,
        profiled: tuple[Profiled, ...],
        inputs: Sequence[Tensor],
        layout: TokenLayout,
        launch: Callable[[list[int], Tensor, Tensor | None], bool],
        valid_while: Callable[[], bool],
    ) -> None:
        """`inputs`: all of one type, shape, strides and dtype, on the current GPU; of `profiled`, where they were kept. `launch`
        takes their addresses, the moments and which tokens are valid; False, and it did nothing, where the kernel cannot read
        these. `valid_while` tells whether it still may be made.
        """
        x = inputs[0]
        self.rows = {p.row for p in profiled}
        self._profiled = list(profiled)
        self._shape, self._strides, self._is_contiguous = x.shape, x.stride(), x.is_contiguous()
        self._count, self._dtypes, self._types = len(inputs), {x.dtype}, {type(x)}
        self._no_versions = [None] * len(inputs)
        # Bytes from the first to beyond the last.
        steps = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
        self.extent = x.element_size() * (1 + steps)
        self._device = x.device.index
        self._skip_first = layout.skip_first
        self._valid_like = None if layout.valid is None else (layout.valid.shape, layout.valid.device)
        self._launch, self._valid_while = launch, valid_while

    def addresses_of(self, kept: list[Kept], layout: TokenLayout) -> list[int] | None:
        """Addresses of the inputs; None if an input was changed, or these launches may not serve them."""
        profiled, inputs, versions = map(list, zip(*kept, strict=True))
        if profiled != self._profiled or not self._takes(layout.valid) or layout.cu_seqlens is not None:
            return None
        if layout.tokens != self._shape[:2]:
            return None
        if versions != self._no_versions and (None in versions or versions != list(map(_VERSION, inputs))):
            return None
        if (
            set(map(type, inputs)) != self._types
            or set(map(_DTYPE, inputs)) != self._dtypes
            or set(map(_SHAPE, inputs)) != {self._shape}
        ):
            return None
        addresses = self._addresses(inputs, layout.skip_first)
        if addresses is None:
            return None
        ordered = sorted(addresses)
        if len(ordered) > 1 and min(map(sub, ordered[1:], ordered)) < self.extent:
            return None  # one may lie where another lay
        return addresses

    def launch(self, addresses: list[int], state: Tensor, valid: Tensor | None) -> bool:
        """Measure what `addresses_of` gave; False, and nothing was done, where the kernel cannot read the state or the mask."""
        return self._launch(addresses, state, valid)

    def again_in_graph(
        self, inputs: Sequence[Tensor], skip_first: int, state: Tensor, valid: Tensor | None
    ) -> bool:
        """Launch for a compiled graph's inputs, of one type, shape and dtype; False if these launches do not serve them."""
        if (
            len(inputs) != self._count
            or inputs[0].dtype not in self._dtypes
            or inputs[0].shape != self._shape
            or not self._takes(valid)
        ):
            return False
        addresses = self._addresses(inputs, skip_first)
        if addresses is None or len(set(addresses)) < len(addresses):
            return False
        return self._launch(addresses, state, valid)

    def _takes(self, valid: Tensor | None) -> bool:
        if valid is None or self._valid_like is None:
            return valid is self._valid_like
        return (valid.shape, valid.device) == self._valid_like

    def _addresses(self, inputs: Sequence[Tensor], skip_first: int) -> list[int] | None:
        if skip_first != self._skip_first or not self._valid_while():
            return None
        if self._is_contiguous:
            if not all(map(Tensor.is_contiguous, inputs)):
                return None
        elif any(x.shape != self._shape or x.stride() != self._strides for x in inputs):
            return None
        addresses = list(map(Tensor.data_ptr, inputs))
        if reduce(or_, addresses) & 15:
            return None  # the kernel cannot read it there
        if self._device is not None and torch.cuda.current_device() != self._device:
            return None
        return addresses
