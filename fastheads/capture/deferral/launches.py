"""When a small forward that ended may wait for others (`backlog.DeferredForwards`), and what then measures them all.

They count. So an error in their late measurement must not pass for one of the forward in which it shows: from then on nobody gets
results, until a reset.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fastheads.backends.accumulator import Accumulator
from fastheads.backends.launch import Kept
from fastheads.capture.deferral.backlog import EndedForward
from fastheads.capture.memory import REUSED, check_unchanged, is_changed, overlap
from fastheads.capture.queue import DeviceQueues, ManagerQueue
from fastheads.capture.stats import LaunchCounter
from fastheads.errors import ForwardError, ResultsError
from fastheads.stats.moments import PendingMoments
from fastheads.stats.token_layout import TokenLayout


class DeferredLaunches:
    """The forwards that wait, on every device."""

    def __init__(
        self,
        queues: DeviceQueues,
        accumulator: Accumulator,
        is_used_elsewhere: Callable[[], bool],
        counter: LaunchCounter,
    ) -> None:
        """`queues` may grow. Whoever else than `accumulator` measures inputs lets none wait. `is_used_elsewhere` tells whether a
        forward in another thread uses the pending moments.
        """
        self._queues, self._accumulator, self._counter = queues, accumulator, counter
        self._is_used_elsewhere = is_used_elsewhere
        self._lost = 0  # forwards that ended, and that an error kept from being measured

    def waiting(self) -> int:
        """How many forwards wait; one whose inputs lie on several devices is one."""
        waiting = [ended for queue in list(self._queues) for ended in [*queue.deferred.forwards]]
        return len({id(ended.layout) for ended in waiting})  # its forward's own

    def takes(self, queue: ManagerQueue, kept: list[Kept], layout: TokenLayout) -> bool:
        """Whether what was kept waits for the next forwards: small ones, all of whose inputs were kept, like the one before."""
        cached_launch = queue.cached_launch
        if cached_launch is None or not queue.deferred.may_take() or queue.off_stream():
            return False
        addresses = cached_launch.addresses_of(kept, layout)
        return addresses is not None and queue.deferred.offer(
            EndedForward(cached_launch, kept, addresses, layout)
        )

    def check_not_overwritten(self, queue: ManagerQueue, inputs: Iterable[Tensor]) -> None:
        """Before these are measured at once. Raises ForwardError where one lies in the memory of one that waits."""
        if queue.deferred.overwritten_by(inputs):
            self._lose(queue)
            raise ForwardError(REUSED)

    def withdraw(self, queue: ManagerQueue) -> None:
        """The forward under way failed. What it left in the memory of those that wait is found by what it kept."""
        left = queue.deferred.withdraw() + [x for _, x, _ in queue.kept]
        if left and queue.deferred.overwritten_by(left):
            self._lose(queue)

    def _lose(self, queue: ManagerQueue) -> None:
        self._lost += len(queue.deferred.forwards)
        queue.deferred.take()

    def catch_up(self, queue: ManagerQueue) -> None:
        """Measure what waits of forwards that ended: into the committed moments, and into the pending ones of a forward that may
        be under way.
        """
        forwards = queue.deferred.forwards
        if not forwards:
            return
        if self._queues.is_capturing():
            raise ForwardError(
                "forwards before this CUDA graph's are not measured yet: call get_results() before its capture"
            )
        try:
            queue.deferred.take()
            self._measure(queue, forwards)
        except BaseException as error:
            self._lost += len(forwards)
            queue.deferred.take()
            queue.moments.distrust()
            if isinstance(error, torch.OutOfMemoryError):  # else a caller would run the last batch again
                raise ForwardError(f"{len(forwards)} forwards could not be measured: {error}") from error
            raise

    def catch_up_all(self) -> None:
        """The same on every device."""
        for queue in self._queues:
            self.catch_up(queue)

    def weights_changed(self) -> None:
        """Before the factors follow: what waits was made with the weights as they were."""
        for queue in self._queues:
            queue.deferred.interrupted()
        self.catch_up_all()

    def weights_changed_in_graph(self) -> None:
        """The same in compiled code, which has begun with the moments without them."""
        if any(queue.deferred.forwards for queue in self._queues):
            raise ForwardError(
                "a weight changed between eager forwards and compiled ones: call get_results() or reset() after such a change"
            )

    def check_complete(self) -> None:
        """Raises ResultsError where forwards that count could not be measured."""
        if self._lost:
            raise ResultsError(
                f"an error ended the measurement of {self._lost} forwards that had ended: reset() starts afresh"
            )

    def clear(self) -> None:
        """Forget everything, as a reset does."""
        self._lost = 0
        self.clear_backlogs()

    def clear_backlogs(self) -> None:
        """Hold no input any more."""
        for queue in self._queues:
            queue.deferred.clear()

    def _measure(self, queue: ManagerQueue, forwards: list[EndedForward]) -> None:
        for ended in forwards:
            if is_changed(ended.kept):
                check_unchanged(ended.kept)  # which says of what
            if [
                x.data_ptr() for _, x, _ in ended.kept
            ] != ended.addresses:  # somebody freed or replaced its data
                raise ForwardError(REUSED)
        if overlap([span for ended in forwards for span in ended.spans()]):
            raise ForwardError(REUSED)
        moments = queue.moments
        with torch.no_grad(), queue.as_current_device(), queue.on_own_stream():
            # Most often nothing is pending that is not committed: then a copy does for the second time.
            is_even = moments.is_even()
            apart: PendingMoments | None = None
            if is_even:
                targets = moments.pending[:1]
            elif self._is_used_elsewhere():
                apart = moments.like()
                targets = apart.pending[:1]
            else:
                targets = [moments.pending[0], moments.committed[0]]
            for target in targets:
                for cached_launch, kept, addresses, layout in forwards:
                    if cached_launch.launch(addresses, target.buffer, layout.valid):
                        self._counter.count_repeated()
                    else:
                        rows, inputs = [profiled.row for profiled, _, _ in kept], [x for _, x, _ in kept]
                        self._accumulator.record(rows, inputs, layout, target, alike=True)
                        self._accumulator.finish(target)
                        self._counter.launches += 1
            if is_even:
                moments.commit()
            elif apart is not None:
                moments.add(apart.pending_buffer)
