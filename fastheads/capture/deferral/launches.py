"""Measure the deferred forwards (`backlog.DeferredForwards`) of all devices.

Deferred forwards count. So an error in their late measurement is not one of the forward in which it shows: from then on results
are refused, until a reset.
"""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from fastheads.backends.accumulator import Accumulator
from fastheads.backends.residual_norms import inverse_norms
from fastheads.capture.deferral.backlog import EndedForward
from fastheads.capture.memory import REUSED, check_unchanged, is_changed, overlap
from fastheads.capture.profiled import Kept
from fastheads.capture.queue import DeviceQueues, ManagerQueue
from fastheads.capture.stats import LaunchCounter
from fastheads.errors import ForwardError, ResultsError
from fastheads.stats.state import PendingState
from fastheads.stats.token_layout import TokenLayout


class DeferredLaunches:
    """The deferred forwards of all devices."""

    def __init__(
        self,
        queues: DeviceQueues,
        accumulator: Accumulator,
        is_used_elsewhere: Callable[[], bool],
        counter: LaunchCounter,
    ) -> None:
        """`queues` may grow. Only inputs that `accumulator` alone measures may be deferred. `is_used_elsewhere` returns True if a
        forward in another thread uses the pending moments.
        """
        self._queues, self._accumulator, self._counter = queues, accumulator, counter
        self._is_used_elsewhere = is_used_elsewhere
        self._lost = 0  # forwards that ended, and that an error kept from being measured

    def waiting(self) -> int:
        """Count the deferred forwards; one with inputs on several devices is one."""
        waiting = [ended for queue in list(self._queues) for ended in [*queue.deferred.forwards]]
        return len({id(ended.layout) for ended in waiting})  # its forward's own

    def takes(self, queue: ManagerQueue, kept: list[Kept], layout: TokenLayout) -> bool:
        """Defer the kept inputs of a small forward that is like the one before. Returns False if they must be measured now."""
        kept_launch = queue.kept_launch
        if kept_launch is None or not queue.deferred.may_take() or queue.off_stream():
            return False
        addresses = kept_launch.addresses_of(kept, layout)
        return addresses is not None and queue.deferred.offer(
            EndedForward(kept_launch, kept, addresses, layout)
        )

    def check_not_overwritten(self, queue: ManagerQueue, inputs: Iterable[Tensor]) -> None:
        """Check inputs that are about to be measured. Raises ForwardError if one lies in the memory of a deferred one."""
        if queue.deferred.overwritten_by(inputs):
            self._lose(queue)
            raise ForwardError(REUSED)

    def withdraw(self, queue: ManagerQueue) -> None:
        """Drop the inputs of the forward under way, which failed. Deferred forwards whose memory they overwrote are lost."""
        left = queue.deferred.withdraw() + [x for _, x, _ in queue.kept]
        if left and queue.deferred.overwritten_by(left):
            self._lose(queue)

    def _lose(self, queue: ManagerQueue) -> None:
        self._lost += len(queue.deferred.forwards)
        queue.deferred.take()

    def catch_up(self, queue: ManagerQueue) -> None:
        """Measure the deferred forwards of the queue, into the committed moments and into the pending ones, which a forward may
        be using. Raises ForwardError while a CUDA graph is captured, and if memory was reused or has run out.
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
            queue.state.distrust()
            if isinstance(error, torch.OutOfMemoryError):  # else a caller would run the last batch again
                raise ForwardError(f"{len(forwards)} forwards could not be measured: {error}") from error
            raise

    def catch_up_all(self) -> None:
        """Measure the deferred forwards of every device."""
        for queue in self._queues:
            self.catch_up(queue)

    def weights_changed(self) -> None:
        """Measure the deferred forwards before the factors follow a change of the weights: they ran with the old ones."""
        for queue in self._queues:
            queue.deferred.interrupted()
        self.catch_up_all()

    def weights_changed_in_graph(self) -> None:
        """Raise ForwardError if forwards are deferred when a graph meets changed weights: it began without their samples."""
        if any(queue.deferred.forwards for queue in self._queues):
            raise ForwardError(
                "a weight changed between eager forwards and compiled ones: call get_results() or reset() after such a change"
            )

    def check_complete(self) -> None:
        """Raise ResultsError if forwards that count could not be measured."""
        if self._lost:
            raise ResultsError(
                f"an error ended the measurement of {self._lost} forwards that had ended: reset() starts afresh"
            )

    def clear(self) -> None:
        """Forget everything, as a reset does."""
        self._lost = 0
        self.clear_backlogs()

    def clear_backlogs(self) -> None:
        """Drop all inputs of deferred forwards."""
        for queue in self._queues:
            queue.deferred.clear()

    def _measure(self, queue: ManagerQueue, forwards: list[EndedForward]) -> None:
        for ended in forwards:
            if is_changed(ended.kept):
                check_unchanged(ended.kept)  # which says of what
            if ended.addresses_now() != ended.addresses:  # somebody freed or replaced its data
                raise ForwardError(REUSED)
        if overlap([span for ended in forwards for span in ended.spans()]):
            raise ForwardError(REUSED)
        state = queue.state
        with torch.no_grad(), queue.as_current_device(), queue.on_own_stream():
            # Most often nothing is pending that is not committed: then a copy does for the second time.
            is_even = state.is_even()
            apart: PendingState | None = None
            if is_even:
                targets = state.pending[:1]
            elif self._is_used_elsewhere():
                apart = state.like()
                targets = apart.pending[:1]
            else:
                targets = [state.pending[0], state.committed[0]]
            for target in targets:
                for kept_launch, kept, addresses, layout in forwards:
                    if kept_launch.run(addresses, kept, target, layout.valid):
                        self._counter.count(repeated=True)
                        continue
                    inputs = [entry for entry in kept if not entry[0].is_residual]
                    residuals = [x for profiled, x, _ in kept if profiled.is_residual]
                    repeated = self._accumulator.record(
                        [profiled.row for profiled, _, _ in inputs],
                        [x for _, x, _ in inputs],
                        layout,
                        target,
                        ratio=inverse_norms(residuals) if residuals else None,
                    )
                    self._counter.count(repeated=repeated)
                    self._accumulator.finish(target)
            if is_even:
                state.commit()
            elif apart is not None:
                state.add(apart.pending_buffer)
