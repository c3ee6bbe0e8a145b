"""What one device holds for a manager: its moments, and the inputs that wait for one launch.

With small batches the time goes to launches, not to the GPU. So the hook of a small input only keeps a reference to it, and one
launch at the end of the decoder's call serves all layers. A byte budget bounds what is kept.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import reduce
from operator import attrgetter, or_, sub
from typing import Any

import torch
from torch import Tensor

from fastheads.moments import CommittedMoments
from fastheads.sites import HeadSite
from fastheads.tokens import RealTokens

# On a CPU a product over a few tokens costs less than its call; a larger one would only push the model's data out of the cache.
CPU_KEEP_BYTES = 256 * 2**10


@dataclass(eq=False)
class Profiled:
    """A site that is profiled: its row in the results, and the queue of its weight's device."""

    row: int
    site: HeadSite
    queue: "DeviceQueue"

    def __post_init__(self) -> None:
        self.head_dim = self.site.head_dim
        self.width = self.site.num_heads * self.head_dim  # of its input


# What the hook of a small input leaves behind: the site, its input, and the input's version (None for an inference tensor: it
# has none, so that nothing shows whether it was changed).
Kept = tuple[Profiled, Tensor, int | None]


# A site that is measured behind its projection too: its input, and a number for each token `[B, S]`.
Scaled = tuple[Profiled, Tensor, Tensor]


@dataclass(eq=False)
class Group:
    """Inputs of one shape and dtype, of different rows whose heads have one width: what one launch serves."""

    shape: torch.Size
    dtype: torch.dtype
    head_dim: int
    rows: list[int] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    extras: list[Any] = field(default_factory=list)


_DTYPE, _NBYTES, _VERSION = attrgetter("dtype"), attrgetter("nbytes"), attrgetter("_version")


class Repeat:
    """The launch that served all inputs of a forward, to be made again for those of the next: decode steps differ in nothing
    but addresses, and what is looked at here is all that the time of such a step allows.
    """

    def __init__(
        self,
        profiled: tuple[Profiled, ...],
        inputs: Sequence[Tensor],
        skip_first: int,
        launch: Callable[[list[int]], None],
        valid_while: Callable[[], bool],
    ) -> None:
        """`inputs`: all of one type, shape, strides and dtype, on the current GPU; of `profiled`, where they were kept. `launch`
        takes their addresses; `valid_while` tells whether it still may be made.
        """
        x = inputs[0]
        self.profiled, self.rows = profiled, {p.row for p in profiled}
        self._shape, self._strides, self._is_contiguous = x.shape, x.stride(), x.is_contiguous()
        self._count, self._dtypes, self._types = len(inputs), {x.dtype}, {type(x)}
        self._sizes, self._lengths = {x.nbytes}, {len(x)}
        self._no_versions = (None,) * len(inputs)
        # Bytes from the first to beyond the last.
        steps = sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
        self._extent = x.element_size() * (1 + steps)
        self._device = x.device.index
        self._skip_first, self._launch, self._valid_while = skip_first, launch, valid_while

    def of_kept(self, kept: list[Kept], real: RealTokens) -> bool:
        """Measure `kept`; False, and nothing was done, where it is not certain to be the same launch, or an input was changed."""
        profiled, inputs, versions = zip(*kept, strict=True)
        if profiled != self.profiled or real.valid is not None:
            return False
        if versions != self._no_versions and (None in versions or versions != tuple(map(_VERSION, inputs))):
            return False
        return self.again(inputs, real.skip_first)

    def again(self, inputs: Sequence[Tensor], skip_first: int) -> bool:
        """Measure `inputs`, of the same rows; False, and nothing was done, as above."""
        if not inputs or inputs[0].shape != self._shape or skip_first != self._skip_first:
            return False
        # Of the others less is enough: the last of their dimensions is the width of the projection's weight.
        if (
            len(inputs) != self._count
            or set(map(type, inputs)) != self._types
            or set(map(_DTYPE, inputs)) != self._dtypes
            or set(map(_NBYTES, inputs)) != self._sizes
            or set(map(len, inputs)) != self._lengths
        ):
            return False
        if self._is_contiguous:
            if not all(map(Tensor.is_contiguous, inputs)):
                return False
        elif any(x.shape != self._shape or x.stride() != self._strides for x in inputs):
            return False
        addresses = list(map(Tensor.data_ptr, inputs))
        if reduce(or_, addresses) & 15:
            return False  # the kernel cannot read it there
        ordered = sorted(addresses)
        if len(ordered) > 1 and min(map(sub, ordered[1:], ordered)) < self._extent:
            return False  # one may lie where another lay
        if self._device is not None and torch.cuda.current_device() != self._device:
            return False
        if not self._valid_while():
            return False
        self._launch(addresses)
        return True


@dataclass(eq=False)
class DeviceQueue:
    """The moments on one device, and the inputs kept there for the launch to come."""

    device: torch.device
    moments: CommittedMoments
    budget: int  # bytes; an input that does not fit is not kept
    kept: list[Kept] = field(default_factory=list)
    scaled: list[Scaled] = field(
        default_factory=list
    )  # of the kept ones, those that are measured with a scale too
    room: int = (
        -1
    )  # bytes that may still be kept; -1 while no call of the decoder is under way in plain Python
    repeat: Repeat | None = None
    stream: torch.cuda.Stream | None = None  # where the forward under way began
    raw_stream: int = 0

    def __post_init__(self) -> None:
        self.is_cuda = self.device.type == "cuda"
        self.index = -1 if self.device.index is None else self.device.index
        # Bytes of the largest input worth keeping.
        self.largest = min(self.budget, CPU_KEEP_BYTES) if self.device.type == "cpu" else self.budget

    def open(self) -> None:
        """From now on inputs may be kept."""
        self.room = self.budget

    def close(self) -> None:
        """No input may be kept until `open`; those that are go."""
        self.room = -1
        self.kept, self.scaled = [], []

    def take(self) -> tuple[list[Kept], list[Scaled]]:
        """What was kept; nothing is kept any more."""
        taken = self.kept, self.scaled
        self.kept, self.scaled, self.room = [], [], self.budget
        return taken

    def follow_stream(self) -> None:
        """A forward begins on the current stream: it goes on with the moments where the one before left them."""
        if not self.is_cuda or (self.stream is not None and not self.off_stream()):
            return
        current = torch.cuda.current_stream(self.device)
        if (
            self.stream is not None
            and self.stream != current
            and not torch.cuda.is_current_stream_capturing()
        ):
            current.wait_stream(self.stream)
        self.stream, self.raw_stream = current, current.cuda_stream

    def off_stream(self) -> bool:
        """Whether the current stream is another than the one the forward began on."""
        return self.is_cuda and torch._C._cuda_getCurrentRawStream(self.index) != self.raw_stream

    @contextmanager
    def on_its_stream(self) -> Iterator[None]:
        """A context whose launches on the current stream are ordered with those on the forward's own."""
        if not self.off_stream() or self.stream is None:
            yield
            return
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)
        yield
        self.stream.wait_stream(current)


def check_unchanged(kept: list[Kept]) -> None:
    """Raises RuntimeError where a kept input was changed, or may have been: another one lies in the same memory."""
    if len({x.untyped_storage()._cdata for _, x, _ in kept}) == len(kept) and not any(
        version is not None and x._version != version for _, x, version in kept
    ):
        return
    storages: set[int] = set()
    for profiled, x, version in kept:
        storage = x.untyped_storage()._cdata
        changed = version is not None and x._version != version
        if changed or (storage in storages and x.numel()):
            what = "modified in place" if changed else "overwritten"
            raise RuntimeError(
                f"the input of {profiled.site.name} was {what} before it was measured: the model reuses its memory. "
                "HookManager(..., group_bytes=0) measures each input at once"
            )
        storages.add(storage)


def grouped(inputs: Iterable[tuple[Profiled, Tensor, Any]]) -> list[Group]:
    """The inputs in groups, in order, with what came with each; a row that comes twice is in two of them."""
    groups: list[Group] = []
    for profiled, x, extra in inputs:
        for group in groups:
            # Compared and not hashed: the shape may hold symbols that a hash would make numbers of.
            if (
                x.shape == group.shape
                and x.dtype == group.dtype
                and profiled.head_dim == group.head_dim
                and profiled.row not in group.rows
            ):
                break
        else:
            group = Group(x.shape, x.dtype, profiled.head_dim)
            groups.append(group)
        group.rows.append(profiled.row)
        group.inputs.append(x)
        group.extras.append(extra)
    return groups
