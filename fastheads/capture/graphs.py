"""Take inputs in compiled code: one custom op in the graph measures a group of them.

What Dynamo traces is here too: the start and the end of a forward, or of the decoder's call, inside a graph.
"""

from typing import Any

import torch
from torch import Tensor, nn

from fastheads.backends.residual_norms import inverse_norm
from fastheads.capture import custom_op
from fastheads.capture.channels import Channel
from fastheads.capture.forward import Forward
from fastheads.capture.memory import check_addresses
from fastheads.capture.profiled import Profiled, TracedSite
from fastheads.capture.projection_hook import SITE_ATTRIBUTE
from fastheads.capture.queue import ManagerQueue, ScaledBy, factors_of, grouped
from fastheads.capture.residual_stream import missing
from fastheads.capture.sink import Sink, SinkParts
from fastheads.errors import ForwardError
from fastheads.models.residual import OutputNorms
from fastheads.stats.token_layout import TokenLayout

# What a CUDA graph captured is read and written by each replay, whenever that is: it lives until the process ends.
_captured: list[Any] = []


class GraphSink(Sink):
    """Takes inputs while Dynamo makes a graph (`put`, `put_scaled`, `flush`), and measures them when it runs (`record`)."""

    def __init__(self, parts: SinkParts, handle: int) -> None:
        """`handle`: the recorder's, for the custom op (`custom_op.register`)."""
        super().__init__(parts)
        self._handle = handle

    # ------------------------------------------------------------------ while a graph is made

    def put(self, forward: Forward, module: nn.Module, site: TracedSite, x: Tensor) -> None:
        """Take an input while Dynamo traces. The groups, and so the memory they keep, are fixed here, when the graph is made."""
        self._inputs.check(forward, site, x)
        if x.device != torch.device(site.device):
            raise ForwardError(
                "the model was moved to another device after the hooks were attached: attach a new HookManager"
            )
        # Guarded: where layers are compiled one by one, each gets a graph of its own.
        getattr(module, SITE_ATTRIBUTE)
        queue = self._queues.by_device[x.device]
        size = x.numel() * x.element_size()
        inverse = self._inverse_norm_of(forward, site) if site.row in self._paired else None
        if not forward.decoder_traced or size > queue.largest:
            self._put_groups([(site, x, inverse)], forward)
            return
        if sum(y.numel() * y.element_size() for _, y, _ in forward.traced) + size > queue.budget:
            self.flush(forward)
        forward.traced.append((site, x, inverse))

    def put_residual(self, forward: Forward, row: int, residual: Tensor) -> None:
        """Take the residual stream `[batch, seq, hidden]` of the input that comes next, while Dynamo traces."""
        forward.inverse_norms[row] = inverse_norm(residual)

    def put_scaled(self, forward: Forward, site: TracedSite, x: Tensor, norms: OutputNorms) -> None:
        """Take an input again, with the norms of the projection's output, after `put` has taken it."""
        inverse = self._inverse_norm_of(forward, site) if site.row in self._sourced else None
        largest = self._queues.by_device[x.device].largest
        if not forward.decoder_traced or x.numel() * x.element_size() > largest:
            self._put_scaled_groups([(site, x, (norms, inverse))], forward)
        else:
            forward.traced_scaled.append((site, x, (norms, inverse)))

    def _inverse_norm_of(self, forward: Forward, site: TracedSite | Profiled) -> Tensor:
        inverse = forward.inverse_norms.pop(site.row, None)
        if inverse is None:
            raise missing(site)
        return inverse

    def flush(self, forward: Forward) -> None:
        """Put ops that measure the inputs taken so far into the graph."""
        self._put_groups(forward.traced, forward)
        self._put_scaled_groups(forward.traced_scaled, forward)
        forward.traced, forward.traced_scaled = [], []

    def put_eagerly(self, forward: Forward, profiled: Profiled, x: Tensor) -> None:
        """Measure an input that comes in plain Python between the graphs of a compiled decoder."""
        queue = self._queues.on(x.device)
        ratio = None
        if profiled.row in self._paired:
            ratio = self._inverse_norm_of(forward, profiled).unsqueeze(0)
        for channel in self._scope.at_input:
            self._call_op(forward, channel, [profiled.row], [x], queue=queue, ratio=channel.ratio(ratio))

    def put_scaled_eagerly(
        self, forward: Forward, profiled: Profiled, x: Tensor, scaled_by: ScaledBy
    ) -> None:
        """Measure such an input again, with what its contributions are multiplied with."""
        queue, channel = self._queues.on(x.device), self._scope.channels[-1]
        scale, ratio = factors_of([scaled_by])
        self._call_op(forward, channel, [profiled.row], [x], queue=queue, scale=scale, ratio=ratio)

    def _put_groups(self, inputs: list[tuple[TracedSite, Tensor, Tensor | None]], forward: Forward) -> None:
        for device, queue in self._queues.by_device.items():
            for group in grouped([item for item in inputs if item[1].device == device]):
                ratio = None if group.extras[0] is None else torch.stack(group.extras)
                for channel in self._scope.at_input:
                    self._call_op(
                        forward, channel, group.rows, group.inputs, queue=queue, ratio=channel.ratio(ratio)
                    )

    def _put_scaled_groups(self, inputs: list[tuple[TracedSite, Tensor, ScaledBy]], forward: Forward) -> None:
        channel = self._scope.channels[-1]
        for device, queue in self._queues.by_device.items():
            for group in grouped([item for item in inputs if item[1].device == device]):
                scale, ratio = factors_of(group.extras)
                self._call_op(
                    forward, channel, group.rows, group.inputs, queue=queue, scale=scale, ratio=ratio
                )

    def _call_op(
        self,
        forward: Forward,
        channel: Channel,
        rows: list[int],
        inputs: list[Tensor],
        *,
        queue: ManagerQueue,
        scale: Tensor | None = None,
        ratio: Tensor | None = None,
    ) -> None:
        assert forward.layout is not None  # within a decoder's call
        torch.ops.fastheads.record(
            inputs,
            queue.state.pending_buffer,
            rows,
            channel.index,
            self._handle,
            valid=forward.layout.valid,
            cu_seqlens=forward.layout.cu_seqlens,
            scale=scale,
            ratio=ratio,
        )

    def begin_whole(self, module: nn.Module) -> Forward:
        """Put the op that begins a forward into a graph that holds the whole forward, a call of `module`."""
        forward = self._forwards.whole
        forward.module = module
        for queue in self._queues.by_device.values():
            torch.ops.fastheads.begin(queue.state.pending_buffer, queue.state.committed_buffer, self._handle)
        return forward

    def end_whole(self) -> None:
        """Put the copy into the graph that commits the forward which it holds as a whole."""
        whole = self._forwards.whole
        whole.module = whole.frame = None
        for queue in self._queues.by_device.values():
            queue.state.committed_buffer.copy_(queue.state.pending_buffer)

    # ------------------------------------------------------------------ while a graph runs

    def record(
        self,
        channel: int,
        rows: list[int],
        inputs: list[Tensor],
        layout: TokenLayout,
        *,
        scale: Tensor | None,
        ratio: Tensor | None,
        state: Tensor,
    ) -> None:
        """Merge the samples of `inputs` into the channel's part of `state`: at each call of the custom op, or once while a CUDA
        graph is captured.
        """
        forward = self._forwards.current()
        if forward is not None:
            if self._forwards.is_beside(forward):
                raise ForwardError(
                    "compiled code of one model cannot be profiled in two forwards at once, or in one inside another: run it in "
                    "one thread at a time"
                )
            forward.in_graphs = True
            self._queues.on(inputs[0].device).recorded = True
        whole = self._forwards.whole
        (whole if forward is None else forward).ran.update(rows)
        accumulator = self._scope.channels[channel].accumulator
        capturing = inputs[0].is_cuda and torch.cuda.is_current_stream_capturing()
        if capturing:
            self._coverage.captured(rows)
            for row in rows:
                if row in accumulator.factors:
                    accumulator.factors[row].in_graph = True
            self.keep_for_graph()
        for queue in self._queues:
            self._deferred.check_not_overwritten(queue, inputs)
        if (forward is None or forward is whole) and not capturing:
            accumulator.refresh(before=self._deferred.weights_changed_in_graph)
        check_addresses([self._scope.sites[row].name for row in rows], inputs)
        moments = self._scope.layout.channel(state, channel)
        self._counter.count(
            repeated=accumulator.record(rows, inputs, layout, moments, scale=scale, ratio=ratio)
        )
        accumulator.finish(moments)

    def keep_for_graph(self) -> None:
        """Keep everything alive that replays of the CUDA graph being captured read and write."""
        if not any(kept is self._scope.channels for kept in _captured):
            _captured.append(self._scope.channels)
            _captured.extend(queue.state.buffers() for queue in self._queues)

    def release(self) -> None:
        """Make the ops of all graphs do nothing from now on."""
        custom_op.release(self._handle)
