"""Take inputs in plain Python: keep them for one launch at the end of the decoder's call, or measure them at once."""

from collections.abc import Sequence

import torch
from torch import Tensor

from fastheads.backends.residual_norms import inverse_norm, inverse_norms
from fastheads.capture.forward import Forward
from fastheads.capture.graphs import GraphSink
from fastheads.capture.memory import check_unchanged
from fastheads.capture.profiled import Kept, KeptLaunch, Profiled
from fastheads.capture.queue import DeviceQueue, Scaled, factors_of, grouped
from fastheads.capture.residual_stream import Pairing, check_shape, missing
from fastheads.capture.sink import Sink, SinkParts
from fastheads.models.residual import OutputNorms


class EagerSink(Sink):
    """Takes inputs in plain Python: `put` and `put_scaled` during the decoder's call, `flush` at its end."""

    def __init__(self, parts: SinkParts, graph: GraphSink) -> None:
        """`graph` takes the inputs that come between the graphs of a compiled decoder, where `flush` is not called."""
        super().__init__(parts)
        self._graph = graph

    def queue_of(self, forward: Forward, device: torch.device) -> DeviceQueue:
        """Return the forward's queue on `device`; makes one if there is none."""
        if not self._forwards.is_beside(forward):
            return self._queues.on(device)
        if device not in forward.queues:
            queue = forward.queues[device] = self._queues.beside(device)
            if forward.layout is not None:
                queue.open(forward.thread)
        return forward.queues[device]

    def put(self, forward: Forward, profiled: Profiled, x: Tensor) -> None:
        """Keep an input `[batch, seq, width]`; measure it now if it is large or the current stream is another one."""
        self._inputs.check(forward, profiled, x)
        x = x.detach()  # what is kept would hold autograd's graph
        if forward.decoder_traced:
            forward.ran.add(profiled.row)
            self._graph.put_eagerly(forward, profiled, x)
            return
        queue = self.queue_of(forward, x.device)
        size = x.nbytes
        if size > queue.largest or queue.off_stream():
            forward.ran.add(profiled.row)
            self._deferred.check_not_overwritten(self._queues.on(x.device), [x])
            self._record(
                forward, queue, [profiled.row], [x], [self._residual_of(forward, queue, profiled, x)]
            )
            return
        if size > queue.room:
            self._flush(forward, queue)
        queue.room -= size
        queue.kept.append((profiled, x, _version(x)))

    def put_residual(
        self, forward: Forward, profiled: Profiled, residual: Tensor, *, is_overwritten: bool
    ) -> None:
        """Take the residual stream r `[batch, seq, hidden]` of the input that comes next; `profiled` marks it as one. What cannot
        wait (`is_overwritten`: the model writes into it) is reduced to 1/‖r‖.
        """
        residual = residual.detach()
        if forward.decoder_traced or profiled.row not in self._paired:
            forward.inverse_norms[profiled.row] = inverse_norm(residual)
            return
        queue = self.queue_of(forward, residual.device)
        if is_overwritten or residual.nbytes > min(queue.largest, queue.room) or queue.off_stream():
            with queue.on_its_stream():
                residual = inverse_norm(residual)
        queue.room -= residual.nbytes
        queue.kept.append((profiled, residual, _version(residual)))

    def put_scaled(self, forward: Forward, profiled: Profiled, x: Tensor, norms: OutputNorms) -> None:
        """Take an input again, with the norms of the projection's output, after `put` has taken it."""
        scaled_by = norms, self._inverse_norm_of(forward, profiled, x)
        if forward.decoder_traced:
            self._graph.put_scaled_eagerly(forward, profiled, x, scaled_by)
            return
        queue = self.queue_of(forward, x.device)
        if x.nbytes <= queue.largest and not queue.off_stream():
            queue.scaled.append((profiled, x, scaled_by))
        else:
            self._record_scaled(forward, queue, [(profiled, x, scaled_by)])

    def flush(self, forward: Forward) -> None:
        """Measure the kept inputs at the end of the decoder's call, or defer them."""
        may_defer = (
            forward is self._forwards.main
            and not self._coverage.captured_since_reset
            and not forward.in_graphs
        )
        for queue in forward.queues.values():
            self._flush(forward, queue, may_defer=may_defer)
            queue.close()
            for channel in self._scope.channels:
                channel.accumulator.finish(queue.state.pending[channel.index])

    def _flush(self, forward: Forward, queue: DeviceQueue, may_defer: bool = False) -> None:
        kept, scaled = queue.take()
        if not kept:
            return
        assert forward.layout is not None  # within a decoder's call
        if may_defer and not scaled and self._deferred.takes(queue, kept, forward.layout):
            assert queue.kept_launch is not None  # which serves it
            forward.ran |= queue.kept_launch.rows
            return
        # A generator: it is drawn only where something waits.
        self._deferred.check_not_overwritten(self._queues.on(queue.device), (x for _, x, _ in kept))
        if self._launched_again(forward, queue, kept):
            if scaled:
                self._record_scaled(forward, queue, scaled)
            return
        pairs = Pairing(kept)
        queue.kept = pairs.left
        queue.room -= sum(residual.nbytes for _, residual, _ in pairs.left)
        if pairs.inputs:
            self._measure_kept(forward, queue, kept, pairs, may_remember=not pairs.left, may_defer=not scaled)
        if scaled:
            self._record_scaled(forward, queue, scaled)

    def _measure_kept(
        self,
        forward: Forward,
        queue: DeviceQueue,
        kept: list[Kept],
        pairs: Pairing,
        *,
        may_remember: bool,
        may_defer: bool,
    ) -> None:
        """Measure kept inputs, `pairs` in order, by one launch if they are alike."""
        rows, inputs = [profiled.row for profiled, _, _ in pairs.inputs], [x for _, x, _ in pairs.inputs]
        kinds = {
            (type(x), x.shape, x.stride(), x.dtype, profiled.width, profiled.head_dim, residual is None)
            for (profiled, x, _), residual in zip(pairs.inputs, pairs.residuals, strict=True)
        }
        # Most often so: each of these lines is paid for at each token.
        batch, seq = inputs[0].shape[:2] if inputs[0].dim() > 1 else (1, 0)
        if len(kinds) == 1 and (batch != seq or seq == 1) and not self._inputs.unknown:
            self._inputs.check(forward, *pairs.inputs[0][:2])
        else:
            for profiled, x, _ in pairs.inputs:
                self._inputs.check(forward, profiled, x)
        check_unchanged([*pairs.inputs, *pairs.used])
        if forward.epoch == self._forwards.epoch:  # else a reset dropped residual streams, and nothing counts
            pairs.check(self._paired)
        ran = set(rows)
        forward.ran |= ran
        if len(kinds) == 1 and len(ran) == len(rows):
            self._record(forward, queue, rows, inputs, pairs.residuals)
            if may_remember:
                self._remember(forward, queue, kept, rows, inputs[0], may_defer=may_defer)
            return
        for group in grouped(
            (profiled, x, residual)
            for (profiled, x, _), residual in zip(pairs.inputs, pairs.residuals, strict=True)
        ):
            self._record(forward, queue, group.rows, group.inputs, group.extras)

    def _launched_again(self, forward: Forward, queue: DeviceQueue, kept: list[Kept]) -> bool:
        """Measure inputs by repeating the last forward's launch. Returns False if they do not fit it."""
        kept_launch, layout = queue.kept_launch, forward.layout
        if kept_launch is None or layout is None or forward.capturing:
            return False
        if not queue.off_stream():
            addresses = kept_launch.addresses_of(kept, layout)
            moments = queue.state.pending[0]
            if addresses is not None and kept_launch.run(addresses, kept, moments, layout.valid):
                forward.ran |= kept_launch.rows
                queue.recorded = True
                self._counter.count(repeated=True)
                return True
        queue.kept_launch = None
        return False

    def _remember(
        self,
        forward: Forward,
        queue: DeviceQueue,
        kept: list[Kept],
        rows: list[int],
        x: Tensor,
        *,
        may_defer: bool,
    ) -> None:
        """Keep the launch that was just made of inputs like `x`, to repeat it in forwards like this one."""
        if len(self._scope.at_input) > 1 or queue.off_stream() or self._queues.is_capturing():
            return
        if forward is not self._forwards.main or forward.layout is None:
            return
        if x.shape[0] == x.shape[1] > 1:  # each time it is asked whether the batch is known
            return
        accumulator, has_ratio = self._scope.accumulator, any(profiled.is_residual for profiled, _, _ in kept)
        launch = accumulator.launch_of(rows, x, forward.layout, has_ratio=has_ratio)
        if launch is None or forward.layout.cu_seqlens is not None:
            return
        queue.kept_launch = KeptLaunch(kept, launch, accumulator)
        if may_defer:
            queue.deferred.watch(kept, queue.budget)

    def _residual_of(
        self, forward: Forward, queue: DeviceQueue, profiled: Profiled, x: Tensor
    ) -> Tensor | None:
        """Remove and return the residual stream, or its inverse norms, of an input that is measured now."""
        if profiled.row not in self._paired:
            return None
        for place in reversed(range(len(queue.kept))):
            mark, residual, _ = queue.kept[place]
            if mark.is_residual and mark.row == profiled.row:
                check_unchanged([queue.kept.pop(place)])
                check_shape(profiled, x, residual)
                return residual
        self._check_not_missing(forward, profiled)
        return None

    def _check_not_missing(self, forward: Forward, profiled: Profiled) -> None:
        """Raise ForwardError for an input without its residual stream, unless a reset dropped that: then nothing counts."""
        if forward.epoch == self._forwards.epoch:
            raise missing(profiled)

    def _inverse_norm_of(self, forward: Forward, profiled: Profiled, x: Tensor) -> Tensor | None:
        """Remove and return 1/‖r‖ `[batch, seq]` of an input that is measured behind its projection."""
        if profiled.row not in self._sourced:
            return None
        norms = forward.inverse_norms.pop(profiled.row, None)
        if norms is None:
            self._check_not_missing(forward, profiled)
            return None
        check_shape(profiled, x, norms)
        return norms

    def _record(
        self,
        forward: Forward,
        queue: DeviceQueue,
        rows: list[int],
        inputs: list[Tensor],
        residuals: Sequence[Tensor | None],
    ) -> None:
        assert forward.layout is not None  # within a decoder's call
        queue.recorded = True
        with torch.no_grad(), queue.on_its_stream():
            given = [residual for residual in residuals if residual is not None]
            inverse = inverse_norms(given) if given else None
            for channel in self._scope.at_input:
                pending = queue.state.pending[channel.index]
                ratio = channel.ratio(inverse)
                repeated = channel.accumulator.record(rows, inputs, forward.layout, pending, ratio=ratio)
                self._counter.count(repeated=repeated)
            if self._scope.streaming is not None:
                self._record_losses(forward, queue, rows, inputs, ratio=inverse)

    def _record_scaled(self, forward: Forward, queue: DeviceQueue, scaled: list[Scaled]) -> None:
        assert forward.layout is not None  # within a decoder's call
        channel, streaming = self._scope.channels[-1], self._scope.streaming
        queue.recorded = True
        pending = queue.state.pending[channel.index]
        with torch.no_grad(), queue.on_its_stream():
            for group in grouped(scaled):
                scale, ratio = factors_of(group.extras)
                repeated = channel.accumulator.record(
                    group.rows, group.inputs, forward.layout, pending, scale=scale, ratio=ratio
                )
                self._counter.count(repeated=repeated)
                if streaming is not None:
                    self._record_losses(forward, queue, group.rows, group.inputs, ratio=ratio, scale=scale)

    def _record_losses(
        self,
        forward: Forward,
        queue: DeviceQueue,
        rows: list[int],
        inputs: list[Tensor],
        *,
        ratio: Tensor | None,
        scale: Tensor | None = None,
    ) -> None:
        """Measure the streaming errors of these inputs; with `scale`, behind their projections."""
        streaming = self._scope.streaming
        assert streaming is not None
        for place, (row, x) in enumerate(zip(rows, inputs, strict=True)):
            if not (streaming.at_input(row) if scale is None else streaming.behind(row)):
                continue
            difference = streaming.take(forward, row, x)
            if difference is None or ratio is None:
                continue
            layout, here = streaming.layout(forward, x), slice(place, place + 1)
            for channel in streaming.channels:
                repeated = channel.accumulator.record(
                    [row],
                    [difference],
                    layout,
                    queue.state.pending[channel.index],
                    scale=None if scale is None else scale[here],
                    ratio=ratio[here],
                )
                self._counter.count(repeated=repeated)


def _version(x: Tensor) -> int | None:
    return None if x.is_inference() else x._version
