"""Small forwards that ended wait for one launch (`grouping.Backlog`): when they may, and what then measures them.

They count. So an error in their late measurement must not pass for one of the forward in which it shows: from then on nobody gets
results, until a reset.
"""

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fastheads.dispatch import Dispatcher
from fastheads.grouping import DeviceQueue, Kept, check_form, check_unchanged, grouped
from fastheads.tokens import RealTokens


def is_capturing(queues: Mapping[torch.device, DeviceQueue]) -> bool:
    """Whether a CUDA graph is captured on the current stream."""
    on_gpu = any([queue.is_cuda for queue in queues.values()])
    return on_gpu and torch.cuda.is_current_stream_capturing()


class Waiting:
    """The forwards that wait, on every device."""

    def __init__(
        self, queues: Mapping[torch.device, DeviceQueue], dispatcher: Dispatcher, skip_first: int
    ) -> None:
        """`queues` may grow. Whoever else than `dispatcher` measures inputs lets none wait."""
        self._queues, self._dispatcher = queues, dispatcher
        self._real = RealTokens(None, skip_first)
        self._lost = 0  # forwards that ended, and that an error kept from being measured

    def takes(self, queue: DeviceQueue, kept: list[Kept], real: RealTokens | None) -> bool:
        """Whether what was kept waits for the next forwards; not where `real` is None.

        So it is where a launch has just served a forward like this one: small, without padding, and all of it kept. Raises
        RuntimeError where one of the inputs lies in the memory of one that waits.
        """
        repeat = queue.repeat
        fits = (
            real is not None
            and real.valid is None
            and repeat is not None
            and not queue.off_stream()
            and repeat.is_like(kept)
        )
        if not fits and not queue.backlog.forwards:
            return False
        places = {x.data_ptr() for _, x, _ in kept}
        if queue.backlog.overwritten_by(places):
            self._lost += len(queue.backlog.take())
            raise RuntimeError(
                "inputs of earlier forwards were overwritten before they were measured: the model reuses its memory. "
                "HookManager(..., group_bytes=0) measures each input at once"
            )
        return fits and queue.backlog.offer(kept, places)

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

    def _measure(self, queue: DeviceQueue, forwards: list[list[Kept]]) -> None:
        every = [item for forward in forwards for item in forward]
        check_unchanged(every)
        for profiled, x, _ in every:
            check_form(profiled, x)
        with torch.no_grad(), queue.on_own_stream():
            groups = stacked(forwards)
            for moments in (queue.moments.pending[0], queue.moments.committed[0]):
                for rows, inputs, alike in groups:
                    self._dispatcher.record(rows, inputs, self._real, moments, alike=alike)
                self._dispatcher.finish()


def stacked(forwards: list[list[Kept]]) -> list[tuple[list[int], Sequence[Tensor], bool]]:
    """The inputs of several forwards in groups that one launch serves: rows, an input for each, and whether these are all alike.

    Forwards that are alike become one group, with the batches of all: it copies their inputs.
    """
    groups: list[tuple[list[int], Sequence[Tensor], bool]] = []
    by_form: dict[tuple[Any, ...], list[list[Kept]]] = {}
    for forward in forwards:
        form = tuple([(p.row, x.shape, x.dtype) for p, x, _ in forward])
        by_form.setdefault(form, []).append(forward)
    for alike in by_form.values():
        kept = alike[0]
        kinds = {(type(x), x.shape, x.dtype, p.width, p.head_dim) for p, x, _ in kept}
        rows = [p.row for p, _, _ in kept]
        if len(alike) > 1 and len(kinds) == 1 and len(set(rows)) == len(rows):
            by_layer = [x for layer in zip(*alike, strict=True) for _, x, _ in layer]
            with contextlib.suppress(torch.OutOfMemoryError):  # one by one they need no copy
                together = torch.stack(by_layer).unflatten(0, (len(rows), len(alike))).flatten(1, 2)
                groups.append((rows, together.unbind(0), True))
                continue
        groups += [(group.rows, group.inputs, False) for forward in alike for group in grouped(forward)]
    return groups
