"""Small forwards that ended wait until there are several (`grouping.Backlog`): when they may, and what then measures them.

They count. So an error in their late measurement must not pass for one of the forward in which it shows: from then on nobody gets
results, until a reset.
"""

from collections.abc import Mapping

import torch

from fastheads.dispatch import Dispatcher
from fastheads.grouping import DeviceQueue, Ended, Kept, check_form, check_unchanged, grouped
from fastheads.moments import RunningMoments
from fastheads.tokens import RealTokens


def is_capturing(queues: Mapping[torch.device, DeviceQueue]) -> bool:
    """Whether a CUDA graph is captured on the current stream."""
    on_gpu = any([queue.is_cuda for queue in queues.values()])
    return on_gpu and torch.cuda.is_current_stream_capturing()


class Waiting:
    """The forwards that wait, on every device."""

    def __init__(self, queues: Mapping[torch.device, DeviceQueue], dispatcher: Dispatcher) -> None:
        """`queues` may grow. Whoever else than `dispatcher` measures inputs lets none wait."""
        self._queues, self._dispatcher = queues, dispatcher
        self._lost = 0  # forwards that ended, and that an error kept from being measured

    def takes(self, queue: DeviceQueue, kept: list[Kept], real: RealTokens) -> bool:
        """Whether what was kept waits for the next forwards.

        So it is where a launch has just served a forward like this one: small, and all of it kept. Raises RuntimeError where one
        that cannot wait lies in the memory of one that waits.
        """
        repeat = queue.repeat
        if (
            repeat is not None
            and queue.backlog.may_take()
            and not queue.off_stream()
            and repeat.is_like(kept, real)
            and queue.backlog.offer(Ended(repeat, kept, real))
        ):
            return True
        self.check_not_overwritten(queue, kept)
        return False

    def check_not_overwritten(self, queue: DeviceQueue, kept: list[Kept]) -> None:
        """Before these are measured at once. Raises RuntimeError where one lies in the memory of one that waits."""
        if queue.backlog.forwards and queue.backlog.overwritten_by(kept):
            self._lost += len(queue.backlog.take())
            raise RuntimeError(_REUSED)

    def catch_up(self, queue: DeviceQueue) -> None:
        """Measure what waits of forwards that ended: into the committed moments, and into the pending ones of a forward that may
        be under way.
        """
        if not queue.backlog.forwards:
            return
        if is_capturing(self._queues):
            raise RuntimeError(
                "forwards before this CUDA graph's are not measured yet: call get_results() before its capture"
            )
        forwards = queue.backlog.take()
        try:
            self._measure(queue, forwards)
        except BaseException as error:
            self._lost += len(forwards)
            queue.moments.distrust()
            if isinstance(error, torch.OutOfMemoryError):  # else a caller would run the last batch again
                raise RuntimeError(f"{len(forwards)} forwards could not be measured: {error}") from error
            raise

    def catch_up_all(self) -> None:
        """The same on every device."""
        for queue in self._queues.values():
            self.catch_up(queue)

    def weights_changed(self) -> None:
        """Before the factors follow: what waits was made with the weights as they were."""
        for queue in self._queues.values():
            queue.backlog.interrupted()
        self.catch_up_all()

    def weights_changed_in_graph(self) -> None:
        """The same in compiled code, which has begun with the moments without them."""
        if any(queue.backlog.forwards for queue in self._queues.values()):
            raise RuntimeError(
                "a weight changed between eager forwards and compiled ones: call get_results() or reset() after such a change"
            )

    def check_complete(self) -> None:
        """Raises RuntimeError where forwards that count could not be measured."""
        if self._lost:
            raise RuntimeError(
                f"an error ended the measurement of {self._lost} forwards that had ended: reset() starts afresh"
            )

    def clear(self) -> None:
        """Forget everything, as a reset does."""
        self._lost = 0
        self.clear_backlogs()

    def clear_backlogs(self) -> None:
        """Hold no input any more."""
        for queue in self._queues.values():
            queue.backlog.clear()

    def _measure(self, queue: DeviceQueue, forwards: list[Ended]) -> None:
        moments = queue.moments
        with torch.no_grad(), queue.on_own_stream():
            addresses = [ended.repeat.addresses_of(ended.kept, ended.real.skip_first) for ended in forwards]
            _check_apart(forwards, addresses)
            # Most often nothing is pending that is not committed: then a copy does for the second time.
            is_even = moments.is_even()
            targets = moments.pending[:1] if is_even else [moments.pending[0], moments.committed[0]]
            for target in targets:
                for ended, places in zip(forwards, addresses, strict=True):
                    valid = ended.real.valid
                    if places is None or not ended.repeat.launch(places, target.buffer, valid):
                        self._measure_anew(ended, target)
            if is_even:
                moments.commit()

    def _measure_anew(self, ended: Ended, moments: RunningMoments) -> None:
        """Without what the forward before it showed."""
        check_unchanged(ended.kept)
        for profiled, x, _ in ended.kept:
            check_form(profiled, x)
        for group in grouped(ended.kept):
            self._dispatcher.record(group.rows, group.inputs, ended.real, moments)
        self._dispatcher.finish()


_REUSED = (
    "inputs of earlier forwards were overwritten before they were measured: the model reuses its memory. "
    "HookManager(..., group_bytes=0) measures each input at once"
)


def _check_apart(forwards: list[Ended], addresses: list[list[int] | None]) -> None:
    """Raises RuntimeError where an input lies where one of another forward lies."""
    seen: set[int] = set()
    for ended, places in zip(forwards, addresses, strict=True):
        here = set([x.data_ptr() for _, x, _ in ended.kept] if places is None else places)
        if not seen.isdisjoint(here):
            raise RuntimeError(_REUSED)
        seen |= here
