"""What one device holds for a manager: its moments, and the inputs that wait for one launch.

With small batches the time goes to launches, not to the GPU. So the hook of a small input only keeps a reference to it, and one
launch at the end of the decoder's call serves all layers. A byte budget bounds what is kept.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from fastheads.moments import CommittedMoments
from fastheads.sites import HeadSite

# On a CPU a product over a few tokens costs less than its call; a larger one would only push the model's data out of the cache.
CPU_KEEP_BYTES = 256 * 2**10


@dataclass(eq=False)
class Profiled:
    """A site that is profiled: its row in the results, and the queue of its weight's device."""

    row: int
    site: HeadSite
    queue: "DeviceQueue"
    width: int  # of its input: num_heads * head_dim


@dataclass(eq=False)
class Group:
    """Inputs of one shape and dtype, of different rows whose heads have one width: what one launch serves."""

    head_dim: int
    shape: torch.Size
    dtype: torch.dtype
    rows: list[int] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    versions: list[int | None] = field(default_factory=list)  # of the inputs, when they were kept

    def takes(self, profiled: Profiled, x: Tensor) -> bool:
        """Whether x belongs here."""
        return (
            x.shape == self.shape
            and x.dtype == self.dtype
            and profiled.site.head_dim == self.head_dim
            and profiled.row not in self.rows
        )


@dataclass(eq=False)
class DeviceQueue:
    """The moments on one device, and the inputs kept there for the launch to come."""

    device: torch.device
    moments: CommittedMoments
    budget: int  # bytes; an input that does not fit is not kept
    kept: list[Group] = field(default_factory=list)
    kept_bytes: int = 0
    stream: torch.cuda.Stream | None = None  # where the forward under way began
    raw_stream: int = 0

    def __post_init__(self) -> None:
        self.is_cuda = self.device.type == "cuda"
        # Bytes of the largest input worth keeping.
        self.largest = min(self.budget, CPU_KEEP_BYTES) if self.device.type == "cpu" else self.budget

    def keep(self, profiled: Profiled, x: Tensor, size: int) -> None:
        """Remember x, of `size` bytes, until `take`."""
        for group in self.kept:
            if group.takes(profiled, x):
                break
        else:
            group = Group(profiled.site.head_dim, x.shape, x.dtype)
            self.kept.append(group)
        group.rows.append(profiled.row)
        group.inputs.append(x)
        # An inference tensor has no version: that it is not changed cannot be checked.
        group.versions.append(None if x.is_inference() else x._version)
        self.kept_bytes += size

    def take(self) -> list[Group]:
        """What was kept; nothing is kept any more. Check each group before its launch (`check_unchanged`)."""
        kept = self.kept
        self.kept, self.kept_bytes = [], 0
        return kept

    def follow_stream(self) -> None:
        """A forward begins on the current stream: it goes on with the moments where the one before left them."""
        if not self.is_cuda:
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
        return self.is_cuda and torch._C._cuda_getCurrentRawStream(self.device.index) != self.raw_stream

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

    def discard(self) -> None:
        """Forget what was kept: the forward it came from did not end."""
        self.kept, self.kept_bytes = [], 0


def check_unchanged(groups: list[Group], names: dict[int, str]) -> None:
    """Raises RuntimeError where a kept input was changed, or may have been; `names` of the sites, by row."""
    storages: set[int] = set()
    for group in groups:
        for row, x, version in zip(group.rows, group.inputs, group.versions, strict=True):
            storage = x.untyped_storage().data_ptr()
            changed = version is not None and x._version != version
            if changed or (storage in storages and x.numel()):
                what = "modified in place" if changed else "overwritten"
                raise RuntimeError(
                    f"the input of {names[row]} was {what} before it was measured: the model reuses its memory. "
                    "HookManager(..., group_bytes=0) measures each input at once"
                )
            storages.add(storage)


def grouped(inputs: list[tuple[Profiled, Tensor]]) -> list[Group]:
    """The inputs in groups, in order."""
    groups: list[Group] = []
    for profiled, x in inputs:
        for group in groups:
            if group.takes(profiled, x):
                break
        else:
            group = Group(profiled.site.head_dim, x.shape, x.dtype)
            groups.append(group)
        group.rows.append(profiled.row)
        group.inputs.append(x)
    return groups
