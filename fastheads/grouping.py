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
class DeviceQueue:
    """The moments on one device, and the inputs kept there for the launch to come."""

    device: torch.device
    moments: CommittedMoments
    budget: int  # bytes; an input that does not fit is not kept
    kept: list[tuple[Profiled, Tensor, int | None]] = field(default_factory=list)  # input, its version
    kept_bytes: int = 0
    stream: torch.cuda.Stream | None = None  # where the forward under way began
    raw_stream: int = 0

    @property
    def largest(self) -> int:
        """Bytes of the largest input worth keeping."""
        return min(self.budget, CPU_KEEP_BYTES) if self.device.type == "cpu" else self.budget

    def keep(self, profiled: Profiled, x: Tensor) -> None:
        """Remember x until `take`. An inference tensor has no version: that it is not changed cannot be checked."""
        self.kept.append((profiled, x, None if x.is_inference() else x._version))
        self.kept_bytes += x.numel() * x.element_size()

    def take(self) -> list[tuple[list[int], list[Tensor]]]:
        """What was kept, as groups of distinct rows of one shape and dtype, in order; nothing is kept any more.

        Raises RuntimeError where a kept input was changed, or may have been.
        """
        kept, self.kept, self.kept_bytes = self.kept, [], 0
        storages: set[int] = set()
        for profiled, x, version in kept:
            storage = x.untyped_storage().data_ptr()
            if (version is not None and x._version != version) or (storage in storages and x.numel()):
                what = "overwritten" if storage in storages else "modified in place"
                raise RuntimeError(
                    f"the input of {profiled.site.name} was {what} before it was measured: the model reuses its memory. "
                    "HookManager(..., group_bytes=0) measures each input at once"
                )
            storages.add(storage)
        return grouped([(profiled, x) for profiled, x, _ in kept])

    def follow_stream(self) -> None:
        """A forward begins on the current stream: it goes on with the moments where the one before left them."""
        if self.device.type != "cuda":
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
        return self.device.type == "cuda" and (
            torch._C._cuda_getCurrentRawStream(self.device.index) != self.raw_stream
        )

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


def grouped(inputs: list[tuple[Profiled, Tensor]]) -> list[tuple[list[int], list[Tensor]]]:
    """Groups of distinct rows whose inputs have one shape and dtype and whose heads have one width, in order."""
    groups: list[tuple[int, list[int], list[Tensor]]] = []
    for profiled, x in inputs:
        head_dim = profiled.site.head_dim
        for group_head_dim, rows, xs in groups:
            alike = group_head_dim == head_dim and xs[0].dtype == x.dtype and xs[0].shape == x.shape
            if alike and profiled.row not in rows:
                rows.append(profiled.row)
                xs.append(x)
                break
        else:
            groups.append((head_dim, [profiled.row], [x]))
    return [(rows, xs) for _, rows, xs in groups]
