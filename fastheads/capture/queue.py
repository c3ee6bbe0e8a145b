"""What one device holds for a manager: its moments, and the inputs that wait to be measured.

With small batches the time goes to launches, not to the GPU. So the hook of a small input only keeps a reference to it, and one
launch at the end of the decoder's call serves all layers; the smallest wait until several forwards have ended. A byte budget
bounds what is kept.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

from fastheads.backends.launch import CachedLaunch, Kept, Profiled, TracedSite
from fastheads.errors import ForwardError
from fastheads.models.residual import OutputNorms
from fastheads.stats.moments import PendingMoments
from fastheads.stats.token_layout import TokenLayout

# On a CPU a product over a few tokens costs less than its call; a larger one would only push the model's data out of the cache.
CPU_KEEP_BYTES = 256 * 2**10


# Forwards that wait, at most; of how many the inputs must fit into the budget, and how many must come between changes of the
# weights, or it is not worth while.
FORWARDS_IN_BACKLOG = 32
LEAST_IN_BUDGET = 4
FEWEST_IN_BACKLOG = 4

# A site that is measured behind its projection too: its input, and the norms of its output.
Scaled = tuple[Profiled, Tensor, OutputNorms]


@dataclass(eq=False)
class Group:
    """Inputs of one shape and dtype, of different rows whose heads have one width: what one launch serves."""

    shape: torch.Size
    dtype: torch.dtype
    head_dim: int
    rows: list[int] = field(default_factory=list)
    inputs: list[Tensor] = field(default_factory=list)
    extras: list[Any] = field(default_factory=list)


class EndedForward(NamedTuple):
    """A forward that is measured once it has ended: its inputs and where they lie, the launches for them, its valid tokens."""

    cached_launch: CachedLaunch
    kept: list[Kept]
    addresses: list[int]
    layout: TokenLayout

    def spans(self) -> list[tuple[int, int]]:
        """From where to where each input reaches."""
        return [(start, start + self.cached_launch.extent) for start in self.addresses]


def overlap(spans: list[tuple[int, int]]) -> bool:
    """Whether any two of these have an address in common."""
    spans = sorted(spans)
    return any([stop > start for (_, stop), (start, _) in pairwise(spans)])


class DeferredForwards:
    """Inputs of forwards that ended, which wait: where a forward is a decode step, a launch between its kernels costs more of
    the host's time than all its hooks. Launches right after one another cost a fraction.
    """

    def __init__(self) -> None:
        self.forwards: list[EndedForward] = []
        self.size = 0  # bytes that these keep from being freed
        self._candidate: EndedForward | None = None  # of the forward under way, which may yet fail
        self._form_size = 0  # bytes of a forward of the form that was launched last
        # The inputs of a forward that was launched at once: where those of the next lie elsewhere, the model does not reuse their
        # memory, and they may wait.
        self._probe: list[Kept] | None = None
        self._is_safe = False
        self._pays = True

    def watch(self, kept: list[Kept], budget: int) -> None:
        """`kept` was just launched, and those that are like it may wait if that is safe."""
        self.forget_form()
        self._form_size = sum(x.untyped_storage().nbytes() for _, x, _ in kept)
        if self._pays and LEAST_IN_BUDGET * self._form_size <= budget:
            self._probe = kept

    def may_take(self) -> bool:
        """Whether the inputs of the forward under way might wait."""
        return (self._is_safe or self._probe is not None) and self._candidate is None

    def offer(self, ended: EndedForward) -> bool:
        """Keep inputs that are like those watched until the forward has ended; False where they have to be measured now."""
        if not self._is_safe:
            probe, self._probe = self._probe, None
            if probe is None or not _apart([x for _, x, _ in (*probe, *ended.kept)]):
                return False
            self._is_safe = True
        self._candidate = ended
        return True

    def overwritten_by(self, inputs: Iterable[Tensor]) -> bool:
        """Whether one of these may lie where one lies that waits, or of the forward under way will."""
        waiting = self.forwards if self._candidate is None else [*self.forwards, self._candidate]
        if not waiting:
            return False
        theirs = {x.untyped_storage().data_ptr() for ended in waiting for _, x, _ in ended.kept}
        return not theirs.isdisjoint([x.untyped_storage().data_ptr() for x in inputs])

    def confirm(self) -> bool:
        """The forward ended: whether something of it waits now."""
        if self._candidate is None:
            return False
        self.forwards.append(self._candidate)
        self.size += self._form_size
        self._candidate = None
        return True

    def withdraw(self) -> list[Tensor]:
        """The forward failed: what it left."""
        left, self._candidate = self._candidate, None
        return [] if left is None else [x for _, x, _ in left.kept]

    def is_full(self, budget: int) -> bool:
        """Whether it is time for the launches."""
        return len(self.forwards) >= FORWARDS_IN_BACKLOG or self.size + self._form_size > budget

    def take(self) -> list[EndedForward]:
        """What waited; nothing waits any more."""
        taken, self.forwards, self.size = self.forwards, [], 0
        return taken

    def interrupted(self) -> None:
        """A weight changed: where that happens every few forwards, as in training, waiting does not pay."""
        if 0 < len(self.forwards) < FEWEST_IN_BACKLOG:
            self._pays = False
            self.forget_form()

    def forget_form(self) -> None:
        """Nothing waits any more until `watch`."""
        self._is_safe, self._probe = False, None

    def held(self) -> list[EndedForward]:
        """All whose inputs are held: those that wait, and that of the forward under way."""
        candidate = self._candidate
        return [*self.forwards] if candidate is None else [*self.forwards, candidate]

    def clear(self) -> None:
        """Forget everything."""
        self.take()
        self.withdraw()
        self.forget_form()
        self._pays = True


M = TypeVar("M", bound=PendingMoments)


@dataclass(eq=False)
class DeviceQueue(Generic[M]):
    """The moments on one device, and the inputs kept there for the launch to come."""

    device: torch.device
    moments: M
    budget: int  # bytes; an input that does not fit is not kept
    kept: list[Kept] = field(default_factory=list)
    scaled: list[Scaled] = field(
        default_factory=list
    )  # of the kept ones, those that are measured with a scale too
    room: int = (
        -1
    )  # bytes that may still be kept; -1 while no call of the decoder is under way in plain Python
    thread: int = 0  # the one that runs the forward whose inputs are kept
    cached_launch: CachedLaunch | None = None
    deferred: DeferredForwards = field(default_factory=DeferredForwards)
    recorded: bool = False  # whether the forward under way has samples in the pending moments
    stream: torch.cuda.Stream | None = None  # where the forward under way began
    raw_stream: int = 0

    def __post_init__(self) -> None:
        self.is_cuda = self.device.type == "cuda"
        self.index = -1 if self.device.index is None else self.device.index
        # Bytes of the largest input worth keeping.
        self.largest = min(self.budget, CPU_KEEP_BYTES) if self.device.type == "cpu" else self.budget

    def open(self, thread: int) -> None:
        """From now on inputs of this thread may be kept."""
        self.room, self.thread = self.budget - self.deferred.size, thread

    def close(self) -> None:
        """No input may be kept until `open`; those that are go."""
        self.room = -1
        self.kept, self.scaled = [], []

    def take(self) -> tuple[list[Kept], list[Scaled]]:
        """What was kept; nothing is kept any more."""
        taken = self.kept, self.scaled
        self.kept, self.scaled, self.room = [], [], self.budget - self.deferred.size
        return taken

    def held(self) -> list[Tensor]:
        """All inputs held here: those kept for the launch to come, and those of forwards that ended."""
        kept = [x for _, x, _ in (*self.kept, *self.scaled)]
        return kept + [x for ended in self.deferred.held() for _, x, _ in ended.kept]

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
        self.cached_launch = None  # its scratch belongs to the other stream
        self.deferred.forget_form()

    def off_stream(self) -> bool:
        """Whether the current stream is another than the one the forward began on."""
        return self.is_cuda and torch._C._cuda_getCurrentRawStream(self.index) != self.raw_stream

    def as_current_device(self) -> AbstractContextManager[Any]:
        """A context in which this GPU is the current one."""
        return torch.cuda.device(self.device) if self.is_cuda else nullcontext()

    @contextmanager
    def on_own_stream(self) -> Iterator[None]:
        """A context whose launches are those of the forward's own stream, ordered with those on the current one."""
        if not self.off_stream() or self.stream is None:
            yield
            return
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            yield
        torch.cuda.current_stream(self.device).wait_stream(self.stream)

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


def check_shape(site: Profiled | TracedSite, x: Tensor, layout: TokenLayout) -> None:
    """Raises ForwardError for an input that is not `[batch, seq, width]` over the tokens of the decoder's call."""
    if x.dim() != 3 or x.shape[-1] != site.width:
        raise ForwardError(f"{site.name}: expected an input [batch, seq, {site.width}], got {list(x.shape)}")
    if layout.tokens != x.shape[:2]:
        raise ForwardError(
            f"{site.name}: its input is over {list(x.shape[:2])} tokens and the decoder's call over {layout.described()}: the "
            "model pads, shortens, splits or transposes its sequences on the way, so that its valid tokens are not known"
        )


def _apart(inputs: Sequence[Tensor]) -> bool:
    """Whether all lie in memory of their own."""
    # By address: of one memory there may be several storages, as a replayed CUDA graph makes them for its outputs.
    return len({x.untyped_storage().data_ptr() for x in inputs}) == len(inputs)


OVERWRITTEN = (
    "was {} before it was measured: the model reuses its memory. "
    "HookManager(..., group_bytes=0) measures each input at once"
)


def is_changed(kept: list[Kept]) -> bool:
    """Whether an input is known to have been changed in place."""
    return any([version is not None and x._version != version for _, x, version in kept])


def check_unchanged(kept: list[Kept]) -> None:
    """Raises ForwardError where a kept input was changed, or may have been: another one lies in the same memory."""
    if _apart([x for _, x, _ in kept]) and not is_changed(kept):
        return
    storages: set[int] = set()
    for profiled, x, version in kept:
        storage = x.untyped_storage().data_ptr()
        changed = version is not None and x._version != version
        if changed or (storage in storages and x.numel()):
            what = "modified in place" if changed else "overwritten"
            raise ForwardError(f"the input of {profiled.name} {OVERWRITTEN.format(what)}")
        storages.add(storage)


def grouped(inputs: Iterable[tuple[Profiled | TracedSite, Tensor, Any]]) -> list[Group]:
    """The inputs in groups, in order, with what came with each; a row that comes twice is in two of them."""
    groups: list[Group] = []
    for site, x, extra in inputs:
        for group in groups:
            # Compared and not hashed: the shape may hold symbols that a hash would make numbers of.
            if (
                x.shape == group.shape
                and x.dtype == group.dtype
                and site.head_dim == group.head_dim
                and site.row not in group.rows
            ):
                break
        else:
            group = Group(x.shape, x.dtype, site.head_dim)
            groups.append(group)
        group.rows.append(site.row)
        group.inputs.append(x)
        group.extras.append(extra)
    return groups
