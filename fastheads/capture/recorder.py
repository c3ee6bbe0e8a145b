"""The life of a forward: the methods that the hooks and the custom ops call.

A forward counts once or not at all. Its start copies the committed moments to pending ones, its samples go there, its normal end
copies them back; what an exception leaves in the pending moments, the next start overwrites. A small forward only leaves its
inputs, and once it has ended normally they wait for the next ones' (`deferral`). `phases.py` has the table of what may happen
when.

Under torch.compile the hooks are traced: the methods that end in `traced` run while Dynamo makes a graph, those that end in
`in_graph` when the graph runs.
"""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn

from fastheads.capture import custom_op
from fastheads.capture.coverage import Coverage
from fastheads.capture.deferral.launches import DeferredLaunches
from fastheads.capture.eager import EagerSink
from fastheads.capture.forward import Forward, frame_of_compiled_call, on_stack
from fastheads.capture.forwards import Forwards
from fastheads.capture.graphs import GraphSink
from fastheads.capture.input_check import InputCheck
from fastheads.capture.profiled import Profiled, TracedSite
from fastheads.capture.queue import DeviceQueue, DeviceQueues
from fastheads.capture.scope import Scope
from fastheads.capture.sink import SinkParts
from fastheads.capture.stats import LaunchCounter, LaunchStats
from fastheads.capture.verify import SelfCheck
from fastheads.errors import ForwardError
from fastheads.models.residual import OutputNorms
from fastheads.models.sites import HeadSite
from fastheads.stats.token_layout import TokenLayout


class Recorder:
    """Follows the forwards of a model: `forward_hooks.Boundary` for the hooks, `custom_op.Recorder` for the graphs."""

    def __init__(self, scope: Scope) -> None:
        """Puts no hook on the model (`attach` does)."""
        self.scope, self.engine = scope, scope.engine
        self.lock = threading.RLock()
        self.queues = DeviceQueues(scope.layout, largest=scope.group_bytes, budget=scope.kept_bytes)
        self.forwards = Forwards(self.queues.by_device, self._main_ended, self._main_failed)
        weights = scope.accumulator.weights
        self.profiled = [
            Profiled(row, site, self.queues.on(weights[row][0])) for row, site in scope.chosen.items()
        ]
        self.coverage = Coverage(self.profiled, allow_skipped=scope.options.allow_skipped)
        self.counter = LaunchCounter()
        self.deferred = DeferredLaunches(
            self.queues, scope.accumulator, self.forwards.main_is_elsewhere, self.counter
        )
        self.handle = custom_op.register(self)
        parts = SinkParts(
            scope=scope,
            queues=self.queues,
            forwards=self.forwards,
            deferred=self.deferred,
            coverage=self.coverage,
            inputs=InputCheck(scope.model, scope.sites, scope.chosen),
            counter=self.counter,
        )
        self.graph = GraphSink(parts, self.handle)
        self.sink = EagerSink(parts, self.graph)
        self.attached = False
        self.check: SelfCheck | None = None
        # Modules whose taps show residual streams, with the pre-hook that does where somebody replaces their `forward`.
        self.residual_hooks: list[tuple[nn.Module, Callable[..., None]]] = []
        self._late_handles: list[Any] = []
        self._projections = [_slot_of(scope.model, site) for site in scope.chosen.values()]

    # ------------------------------------------------------------------ a forward begins

    def start(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], frame: FrameType | None
    ) -> None:
        """Begin a call of the model or its decoder; `frame` is torch's frame of that call."""
        with self.lock:
            if not self.attached:
                return  # detached in another thread
            forward = self.forwards.innermost()
            if self.forwards.is_paused():
                self._start_paused(module, frame, forward)
                return
            if not self._is_decoder_of(forward, module):
                forward = self._begin(module, frame, forward)
            assert forward is not None
            if not forward.counts:
                return
            self.engine.check_call(kwargs)
            if module is not self.engine.decoder:
                return
            if forward.decoder_frame is not None:
                raise ForwardError(_CALLED_AGAIN)
            forward.decoder_frame = frame
        forward.inverse_norms.clear()
        if self.scope.streaming is not None:
            forward.own_layout = self.engine.own_layout(args, kwargs)
            forward.places, forward.beyond, forward.losses = {}, {}, {}
        # Without the lock: a function that somebody gave to `token_mask` may wait for other threads.
        forward.layout = self.engine.token_layout(args, kwargs)
        for queue in forward.queues.values():
            queue.open(forward.thread)

    def _start_paused(self, module: nn.Module, frame: FrameType | None, outer: Forward | None) -> None:
        if not self.queues.is_capturing():
            self.deferred.catch_up_all()  # nobody looks at what this forward does to their memory
        # Not the decoder's call of a paused forward.
        if outer is not None and (module is self.scope.model or outer.counts):
            self.forwards.push_paused(module, frame, outer)

    def _is_decoder_of(self, forward: Forward | None, module: nn.Module) -> bool:
        """Return True if this is the decoder's call in the forward, and not a forward of its own inside it."""
        if forward is None or module is not self.engine.decoder or forward.module is module:
            return False
        # Of a decoder's call that did not end `start` makes an error.
        return not forward.counts or not on_stack(forward.decoder_frame, forward.thread)

    def _begin(self, module: nn.Module, frame: FrameType | None, outer: Forward | None) -> Forward:
        """Begin a forward: on the manager's own queues if no other one is under way, else beside it."""
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise ForwardError("a forward under torch.func transforms (vmap, grad …) cannot be profiled")
        for modules, name, projection in self._projections:
            if modules.get(name) is not projection:
                raise ForwardError(
                    f"{name} of an attention module was replaced or wrapped while hooks were on it: attach a new HookManager"
                )
        replaced = [pair for pair in self.residual_hooks if "forward" in pair[0].__dict__]
        for pair in replaced:
            self._late_handles.append(pair[0].register_forward_pre_hook(pair[1], with_kwargs=True))
            self.residual_hooks.remove(pair)
        self.engine.follow_signature()
        self.scope.updates.look()
        capturing = self.queues.is_capturing()
        others = self.forwards.others()
        if others or self.forwards.whole.frame is not None:
            self._check_may_run_beside(others, capturing)
        if self.forwards.main is None:
            forward = self.forwards.push_main(module, frame, outer)
            self.queues.in_use = True
            self._prepare(forward, capturing)
        else:
            forward = self.forwards.push_beside(module, frame, outer)
            self._follow_weights()
            for device in list(self.queues.by_device):
                self.sink.queue_of(forward, device)
        forward.generations = [channel.accumulator.generation for channel in self.scope.channels]
        return forward

    def _check_may_run_beside(self, others: bool, capturing: bool) -> None:
        """Raise ForwardError if a forward cannot begin beside the one that is under way; `others`: in plain Python."""
        what, main = None, self.forwards.main
        if self.forwards.whole_is_under_way():
            what = "while one runs that was compiled as a whole"
        elif others and (capturing or self.coverage.in_captured or (main is not None and main.capturing)):
            what = "while one is captured as a CUDA graph, or parts of it were"
        elif not others:
            self.forwards.whole.idle()  # it failed
        elif self.scope.ranks is not None:
            what = "with tensor parallelism"
        elif self.check is not None and self.check.unchecked():
            what = "before the first one has been checked (verify=True)"
        if what is not None:
            raise ForwardError(
                f"two forwards of one model at once, or one inside another, cannot be profiled {what}"
            )

    def _prepare(self, forward: Forward, capturing: bool) -> None:
        """Prepare the manager's own queues for a forward."""
        forward.capturing = capturing
        for queue in self.queues:
            self.deferred.withdraw(queue)
            queue.close()
            queue.recorded = False
            if queue.deferred.forwards and queue.off_stream() and not capturing:
                self.deferred.catch_up(queue)
            queue.follow_stream()
            for moments in queue.state.pending:
                moments.batches.clear()
        self._follow_weights()
        if capturing:
            for factor in self.scope.factors():
                factor.in_graph = factor.in_own_graph = True
            self.graph.keep_for_graph()
            self.coverage.captured(self.coverage.rows)
        if self.check is not None:
            self.check.watch()
        for queue in self.queues:
            queue.state.begin(always=capturing)

    def _follow_weights(self) -> None:
        for channel in self.scope.channels:
            channel.accumulator.refresh(before=self.deferred.weights_changed)

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing that this thread runs within the context."""
        before = self.forwards.is_paused()
        self.forwards.here.paused = True
        try:
            yield
        finally:
            self.forwards.here.paused = before

    # ------------------------------------------------------------------ inputs come

    def measure(self, profiled: Profiled, x: Tensor) -> None:
        """Take the input `[batch, seq, width]` of a projection that its tap could not simply keep."""
        forward = self.forwards.current()
        if forward is None or not forward.counts:
            return  # not within a forward: a checkpoint's recomputation, a layer called alone
        with self.lock:
            if forward.module is not None:  # else detached in another thread
                self.sink.put(forward, profiled, x)

    def measure_residual(self, mark: Profiled, residual: Tensor, *, is_overwritten: bool) -> None:
        """Take the residual stream `[batch, seq, hidden]` of the input that comes next, if the hook could not simply keep it."""
        forward = self.forwards.current()
        if forward is None or not forward.counts or forward.layout is None:
            return
        with self.lock, torch.no_grad():
            if forward.module is not None:  # else detached in another thread
                self.sink.put_residual(forward, mark, residual, is_overwritten=is_overwritten)

    def measure_scaled(self, forward: Forward, profiled: Profiled, x: Tensor, norms: OutputNorms) -> None:
        """Take an input again behind the projection, with the norms of the projection's output."""
        with self.lock:
            if forward.module is not None:  # else detached in another thread
                self.sink.put_scaled(forward, profiled, x, norms)

    # ------------------------------------------------------------------ a forward ends

    def finish(self, module: nn.Module, frame: FrameType | None) -> bool:
        """Measure what is left after a call of the model or its decoder. Returns True if that call is the forward itself."""
        forward = self.forwards.current()
        if forward is None:
            return False
        is_outermost = self._is_outermost(forward, module, frame)
        if not forward.counts:
            return is_outermost
        with self.lock:
            if forward.module is None:
                return False  # detached in another thread
            if module is self.engine.decoder and (forward.decoder_frame is frame or forward.decoder_traced):
                self._finish_decoder(forward)
            if is_outermost:
                if forward.decoder_frame is not None:
                    raise ForwardError(
                        "a call of the decoder in this forward did not end: an error in it was caught, and what it measured is "
                        "not whole, so that the forward is not counted"
                    )
                if forward.ran:  # of a compiled decoder
                    forward.skipped.update(self.coverage.rows - forward.ran)
                for channel, generation in zip(self.scope.channels, forward.generations, strict=False):
                    channel.accumulator.check_unmoved(generation)
        return is_outermost

    def _is_outermost(self, forward: Forward, module: nn.Module, frame: FrameType | None) -> bool:
        """True if the call of `module` that ends is the forward itself."""
        # A graph that holds a whole forward has no frame for the call in it.
        return module is forward.module if forward is self.forwards.whole else forward.frame is frame

    def _finish_decoder(self, forward: Forward) -> None:
        if forward.decoder_traced:  # the graph broke before its end
            self.graph.flush(forward)
            forward.decoder_traced, forward.layout = False, None
            return
        self.sink.flush(forward)
        if len(forward.ran) < len(self.profiled):
            forward.skipped.update(self.coverage.rows - forward.ran)
        forward.ran.clear()
        forward.layout = forward.decoder_frame = None
        forward.places, forward.beyond, forward.losses = {}, {}, {}

    def commit(self) -> None:
        """End the innermost forward of this thread, and count it unless samples were reset meanwhile."""
        forward = self.forwards.current()
        assert forward is not None  # it has just finished
        with self.lock:
            if (
                forward.counts and forward.epoch == self.forwards.epoch
            ):  # else every sample was forgotten meanwhile
                self.coverage.skipped(forward.skipped)
                self._commit(forward)
            self.forwards.pop(forward)

    def _commit(self, forward: Forward) -> None:
        """Commit the forward's samples on every device, before anything else that may fail."""
        if self.forwards.is_beside(forward):
            for device, queue in forward.queues.items():
                self._commit_beside(queue, device)
            return
        any_waits = False
        for own in self.queues:
            waits = own.deferred.confirm()
            any_waits = any_waits or waits
            if waits and not own.recorded:
                own.state.leave()
            else:
                own.state.commit()
        self.counter.deferred += any_waits
        for own in self.queues:
            if own.deferred.is_full(own.budget):
                self.deferred.catch_up(own)

    def _commit_beside(self, queue: DeviceQueue[Any], device: torch.device) -> None:
        own = self.queues.on(device)
        if queue.recorded:
            with queue.as_current_device(), queue.on_its_stream(), own.on_its_stream():
                own.state.add(queue.state.pending_buffer)

    def end_forward(self) -> None:
        """End the decoder's call under way in this thread as if it returned now, for a caller who leaves it by an exception."""
        forward = self.forwards.current()
        if forward is None or forward.decoder_frame is None:
            return
        if self.finish(self.engine.decoder, forward.decoder_frame):
            self.commit()

    def abandon(self, module: nn.Module, frame: FrameType | None) -> None:
        """End the forward without counting it, if this call, which raised, is the forward itself."""
        forward = self.forwards.current()
        if forward is not None and self._is_outermost(forward, module, frame):
            with self.lock:
                self.forwards.drop(forward)

    def _main_failed(self) -> None:
        for queue in self.queues:
            self.deferred.withdraw(queue)
            queue.close()
            for moments in queue.state.pending:
                moments.batches.clear()

    def _main_ended(self) -> None:
        self.queues.in_use = False
        if self.check is not None:
            self.check.unwatch()

    # ------------------------------------------------------------------ compiled code

    def start_traced(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """`start`, as Dynamo traces it."""
        if self.forwards.is_paused():
            return
        forward: Forward | None = getattr(self.forwards.here, "forward", None)
        whole = self.forwards.whole
        if whole.module is not None:
            if module is not self.engine.decoder or module is whole.module:
                raise ForwardError("a forward inside another one cannot be profiled where both are compiled")
            forward = whole
        elif forward is None or module is self.scope.model:
            forward = self.graph.begin_whole(module)
        if not forward.counts:
            return
        self._check_not_streaming()
        self.engine.check_call(kwargs)
        if module is self.engine.decoder:
            if forward.layout is not None:
                raise ForwardError(_CALLED_AGAIN)
            forward.traced, forward.traced_scaled, forward.inverse_norms = [], [], {}
            forward.layout = self.engine.token_layout(args, kwargs)
            forward.decoder_traced = True

    def _check_not_streaming(self) -> None:
        """Raise ForwardError if streaming errors are asked for in compiled code."""
        if self.scope.streaming is not None:
            raise ForwardError(
                "streaming errors cannot be measured in compiled code: run without torch.compile"
            )

    def trace(self, module: nn.Module, args: tuple[Any, ...], site: TracedSite) -> None:
        """`measure`, as Dynamo traces it."""
        forward = self.forwards.traced()
        if forward is None or not forward.counts:
            return
        self._check_not_streaming()
        self.graph.put(forward, module, site, self.engine.input(site.row, args[0].detach()))

    def trace_residual(self, row: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """`measure_residual`, as Dynamo traces it; the arguments are those of the call that shows the residual stream."""
        forward = self.forwards.traced()
        if forward is not None and forward.counts and self.scope.residuals is not None:
            residual = self.scope.residuals.sources[row].read(args, kwargs)
            self.graph.put_residual(forward, row, self.engine.output(row, residual.detach()))

    def finish_traced(self, module: nn.Module) -> None:
        """`finish` and `commit`, as Dynamo traces them."""
        forward = self.forwards.traced()
        if forward is None or not forward.counts:
            return
        if module is self.engine.decoder:
            self.graph.flush(forward)
            forward.decoder_traced = False
            forward.layout = None
        if module is self.forwards.whole.module:
            self.graph.end_whole()

    def begin_in_graph(self, pending: Tensor, committed: Tensor) -> None:
        """Begin a forward that one graph holds as a whole; called by the custom op `fastheads::begin`."""
        with self.lock:
            whole = self.forwards.whole
            elsewhere = whole.thread != get_ident() and self.forwards.whole_is_under_way()
            if elsewhere or self.forwards.others():
                raise ForwardError(
                    "a forward that was compiled as a whole cannot be profiled while another one is under way, in another thread "
                    "or around it"
                )
            if self.queues.by_device[pending.device] is next(iter(self.queues)):  # one call for each device
                self.settle_whole()
            whole.frame, whole.thread = frame_of_compiled_call(), get_ident()
            whole.epoch = self.forwards.epoch
            capturing = pending.is_cuda and torch.cuda.is_current_stream_capturing()
            for queue in self.queues:
                if capturing:
                    queue.state.begun_in_graph()
                else:
                    queue.state.distrust()  # what a graph that fails leaves there
            pending.copy_(committed)

    def record_in_graph(
        self,
        *,
        channel: int,
        rows: list[int],
        inputs: list[Tensor],
        valid: Tensor | None,
        cu_seqlens: Tensor | None,
        scale: Tensor | None,
        ratio: Tensor | None,
        state: Tensor,
    ) -> None:
        """Measure a group of inputs in a graph; called by the custom op `fastheads::record`."""
        with self.lock:
            layout = TokenLayout(valid, self.scope.options.skip_first, cu_seqlens)
            self.graph.record(channel, rows, inputs, layout, scale=scale, ratio=ratio, state=state)

    def settle_whole(self) -> None:
        """Note the rows that the last whole-graph forward skipped; done late, since Python does not see its end."""
        whole = self.forwards.whole
        if whole.ran and whole.frame is None:  # else it failed
            self.coverage.skipped(self.coverage.rows - whole.ran)
        whole.ran.clear()

    def check_no_whole(self, error: type[Exception]) -> None:
        """Raise `error` while a graph holds a forward as a whole: it reads and writes the committed moments without the lock."""
        if self.forwards.whole_is_under_way():
            raise error("a forward that was compiled as a whole is under way: ask again when it has ended")

    # ------------------------------------------------------------------ between forwards

    def reset(self) -> None:
        """Forget every sample, those of forwards under way too, and take the weights as they are now."""
        self.check_no_whole(ForwardError)
        self.forwards.forget_all()
        for queue in self.queues:
            queue.close()
            with queue.on_its_stream():
                queue.state.clear()
        self.deferred.clear()
        self.counter.clear()
        self.coverage.clear()
        self.forwards.whole.ran.clear()
        for channel in self.scope.channels:
            channel.accumulator.rebuild()
            channel.accumulator.used.clear()
        self.scope.updates.renew()

    def stats(self) -> LaunchStats:
        """Read the counts of launches and the inputs held now. Takes no lock, and waits for nothing."""
        queues: list[DeviceQueue[Any]] = [*self.queues, *self.forwards.queues_beside()]
        return self.counter.read(self.deferred.waiting(), [x for queue in queues for x in queue.held()])

    def close(self, *, is_forgotten: bool = False) -> None:
        """End the forwards under way, after the hooks were removed, and move the moments to where no CUDA graph writes; if the
        manager `is_forgotten`, nobody will ask for them.
        """
        self.graph.release()
        for handle in self._late_handles:
            handle.remove()
        if is_forgotten:
            self.deferred.clear_backlogs()
            self.forwards.drop_all()
            return
        self.scope.updates.close()
        try:
            self.deferred.catch_up_all()
        finally:
            self.forwards.drop_all()
            for queue in self.queues:
                queue.kept_launch = None
                queue.state.freeze()
            self.deferred.clear_backlogs()


_CALLED_AGAIN = (
    "the decoder was called again after a call that did not end: what that one measured cannot be told apart"
)


def _slot_of(model: nn.Module, site: HeadSite) -> tuple[dict[str, nn.Module | None], str, nn.Module]:
    """Return the dict of the parent module's children, the projection's key in it, and the projection."""
    path, _, name = site.name.rpartition(".")
    return model.get_submodule(path)._modules, name, site.module
