"""The HookManager: attach, the life of one forward, detach.

A forward counts once or not at all. Its start copies the committed moments to pending ones, its samples go there, its normal end
copies them back; what an exception leaves in the pending moments, the next start overwrites. A small forward only leaves its
inputs, and once it has ended normally they wait for the next ones' (`deferred.DeferredLaunches`).

Each thread has a stack of forwards (`forward.Forward`). The first one under way uses the manager's own queues and pending
moments; one that begins beside it, in another thread or called inside it, has its own, which are merged when it ends.

Under torch.compile the hooks are traced: `is_compiling` is then True, and they make one operator of each group of inputs.
"""

import threading
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager
from threading import get_ident
from types import FrameType, TracebackType
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastheads.backends import tensor_parallel as parallel
from fastheads.backends.accumulator import PRECISIONS
from fastheads.backends.factors import SiteFactor
from fastheads.backends.launch import CachedLaunch, Kept, Profiled, TracedSite
from fastheads.capture import custom_op as operator
from fastheads.capture import forward_hooks as boundary
from fastheads.capture.channels import (
    Channel,
    Updates,
    channel_of_heads,
    channel_of_kv_groups,
    channel_of_updates,
)
from fastheads.capture.deferred import DeferredLaunches, is_capturing
from fastheads.capture.forward import Forward, frame_of_compiled_call, on_stack
from fastheads.capture.projection_hook import SITE_ATTRIBUTE, RetraceHandle, Tap, add_tap, takes_taps
from fastheads.capture.queue import (
    OVERWRITTEN,
    DeviceQueue,
    Scaled,
    check_shape,
    check_unchanged,
    grouped,
)
from fastheads.capture.stats import LaunchCounter, LaunchStats
from fastheads.capture.verify import Finding, SelfCheck
from fastheads.errors import (
    CheckpointError,
    ForwardError,
    OptionError,
    ResultsError,
    StaleFactorError,
    TokensError,
)
from fastheads.models.fingerprint import fingerprint
from fastheads.models.metadata import describe
from fastheads.models.residual import OutputNorms, Update, scales
from fastheads.models.sites import (
    HeadSite,
    attention_of,
    checked_layers,
    decoder_of,
    find_sites,
    has_known_layout,
    is_sequence_first,
    sites_of_layers,
    unwrapped,
)
from fastheads.results.head_profile import HeadProfile, warn_where_empty
from fastheads.stats.metrics import METRICS, TOKEN_AGGS, UPDATE_METRIC
from fastheads.stats.moments import CommittedMoments, Moments, RunningMoments
from fastheads.stats.token_layout import DecoderArguments, TokenLayout, TokenMask

# The manager's own queues: those of a forward beside others hold its samples alone.
ManagerQueue = DeviceQueue[CommittedMoments]

# Launches of compiled code that are remembered: one for each group of layers of each graph.
_REPEATS = 256

GROUP_BYTES = 64 * 2**20

# What a CUDA graph captured is read and written by each replay, whenever that is: it lives until the process ends.
_captured: list[Any] = []


class HookManager:
    """Profiles every attention head of `model` while it runs, without changing the run.

    Attaches in the constructor; `remove()`, or leaving the `with` block, detaches. Of a batch nothing is held but small
    inputs that are still to be measured (`group_bytes`).

    Of a tensor-parallel model (`from_pretrained(..., tp_plan="auto")`) each rank measures its own heads. Attaching, forwards,
    `reset()`, `get_results()` and `to_profile()` are then for every rank alike, as the model's own calls are: a rank that leaves
    one out lets the others wait until the process group's timeout. The results are the whole model's, the same on every rank.

    Args:
        model: a transformers model, or any module whose attention modules are called and built as theirs. DataParallel, DDP and
            torch.compile wrappers are looked through.
        token_agg: what one sample is. "last": a sequence's value at its last valid token; "all": the mean of the value over the
            sequence's valid tokens; "token": each valid token.
        layers: profile only the sites of these layers (None: all). Rows of the results are those of `find_sites(model)` all the
            same; the others have count 0.
        backend: "auto", "loop", "einsum", "factored" or "triton".
        precision: "exact" or "fast"; only "triton" has a faster way to be less exact.
        skip_first: leave out the first valid tokens of each sequence (1 leaves the attention sink out).
        group_bytes: inputs of up to so many bytes a device are kept until one launch at the end of the decoder's call serves them
            all; larger ones are measured at once. Where the kernel serves them, forwards of a quarter of that or less wait until
            up to 32 have ended. 0 measures every input at once, for models that reuse their memory.
        allow_skipped: accept that a site does not run in every forward (layer dropout, early exit); else `get_results` raises.
        kv_groups: measure `kv_group_residual_contribution_norm` too: the norm of what the query heads that share keys and values
            contribute together. In the results a "head" of that metric is a KV head.
        include: names of attention modules, as patterns, that are profiled though they are left out by default (`find_sites`).
        verify: check each site in the first batch, against what its projection really gives and what its attention made
            (`fastheads.capture.verify`). A forward that does not pass raises VerificationError and counts nothing. Not for
            tensor-parallel models.

    Raises:
        NoSitesError: the model has nothing to profile.
        UnsupportedWeightError: a projection's dense weight cannot be had with certainty.
        ValueError, RuntimeError: an option is unknown, or the backend asked for cannot work here, or the ranks of a
            tensor-parallel model have different options.
    """

    def __init__(
        self,
        model: nn.Module,
        token_agg: str = "last",
        *,
        layers: Iterable[int] | None = None,
        backend: str = "auto",
        precision: str = "exact",
        skip_first: int = 0,
        group_bytes: int = GROUP_BYTES,
        allow_skipped: bool = False,
        kv_groups: bool = False,
        include: str | Iterable[str] = (),
        verify: bool = False,
    ) -> None:
        if token_agg not in TOKEN_AGGS:
            raise OptionError(f"unknown token_agg {token_agg!r}: choose one of {', '.join(TOKEN_AGGS)}")
        if precision not in PRECISIONS:
            raise OptionError(f"unknown precision {precision!r}: choose one of {', '.join(PRECISIONS)}")
        for name, value in (("skip_first", skip_first), ("group_bytes", group_bytes)):
            if isinstance(value, bool) or not isinstance(value, int) or value < 0:
                raise OptionError(f"{name} must be a whole number, 0 or more, not {value!r}")
        self.model = unwrapped(model)
        self.token_agg, self.precision, self.skip_first = token_agg, precision, skip_first
        self.allow_skipped = allow_skipped
        self.sites = find_sites(self.model, include)
        self.layers = checked_layers(layers)
        chosen = sites_of_layers(self.sites, self.layers)
        self._ranks = parallel.ranks_of(chosen)
        if self._ranks is not None:
            if verify or kv_groups:
                name = "verify=True cannot check" if verify else "kv_groups=True cannot measure"
                raise OptionError(f"{name} tensor-parallel projections: no rank has all their heads")
            chosen = self._ranks.own(chosen)
        self._updates = Updates(self.model, chosen, self._ranks)
        how = {"backend": backend, "precision": precision, "token_agg": token_agg}
        self._channels = [channel_of_heads(chosen, self._ranks, **how)]
        if kv_groups:
            self._channels.append(channel_of_kv_groups(1, self.model, chosen, **how))
        self._at_input = tuple(self._channels)  # the others are measured behind the projection
        if self._updates.normed:
            self._channels.append(
                channel_of_updates(
                    len(self._channels), chosen, self._updates.normed, ranks=self._ranks, **how
                )
            )
        self._accumulator = self._channels[0].accumulator
        self._max_heads = max(site.num_heads for site in self.sites)
        # Backends without factors read the weight, and that has to be before any hook of others may change it.
        self._group_bytes = group_bytes if self._accumulator.factors else 0
        self._lock = threading.RLock()
        # Of this thread: `forward`, the innermost one under way, and `paused`. No subclass: Dynamo would not guard what it reads.
        self._here = threading.local()
        self._main: Forward | None = None  # the one under way that uses the manager's own queues
        self._beside: list[Forward] = []  # the others
        self._epoch = 0  # how often every sample was forgotten
        self._queues: dict[torch.device, ManagerQueue] = {}
        self._whole = Forward(self._queues)  # one that a graph holds as a whole
        self._counter = LaunchCounter()
        self._deferred = DeferredLaunches(
            self._queues,
            self._accumulator,
            lambda: self._main is not None and self._main.thread != get_ident(),
            self._counter,
        )
        self._profiled = [
            Profiled(row, site, self._queue_on(self._accumulator.weights[row][0]))
            for row, site in chosen.items()
        ]
        self._places = [_place(self.model, site) for site in chosen.values()]
        self._decoder = decoder_of(self.model)
        self._arguments = DecoderArguments(self._decoder)
        self._sequence_first = {row for row, site in chosen.items() if is_sequence_first(self.model, site)}
        # Rows whose layout [batch, seq] no table knows, and with which forward an input has shown it.
        self._unknown = {row for row, site in chosen.items() if not has_known_layout(self.model, site)}
        self._shown: dict[int, tuple[Any, Any]] = {}
        # Rows that did not run in a forward that ended; those of them that CUDA graphs measure, whose replays Python does not
        # see; and all that such graphs measure.
        self._missed: set[int] = set()
        self._unseen: set[int] = set()
        self._in_captured: set[int] = set()
        self._may_defer = True  # no CUDA graph was captured since the last reset
        self._cached_launches: dict[tuple[int, ...], CachedLaunch] = {}  # by channel, GPU, and rows
        self._warned = False
        self._check: SelfCheck | None = None
        self._handles: list[Any] = []
        self._handle = operator.register(self)
        try:
            self._weights = self._fingerprint()
            if verify:
                self._check = SelfCheck(self.model, list(chosen.values()))
            if self._ranks is not None:
                self._ranks.check_agreement(
                    self.sites, token_agg=token_agg, skip_first=skip_first, layers=self.layers
                )
            self._attach()
        except BaseException:
            self.remove()
            raise

    # ------------------------------------------------------------------ attach, detach

    def _attach(self) -> None:
        self._handles.append(RetraceHandle({p.site.name: p.site.module for p in self._profiled}))
        self._handles.append(register_optimizer_step_post_hook(self._after_optimizer_step))
        for profiled in self._profiled:
            tap = self._tap(profiled)
            if self._ranks is not None:
                tap = self._ranks.own_heads(profiled.row, tap)
            module = profiled.site.module
            if takes_taps(module):
                self._handles.append(add_tap(module, tap, self._handle, profiled.traced()))
            else:
                self._handles.append(module.register_forward_pre_hook(self._pre_hook(tap, profiled)))
            update = self._updates.normed.get(profiled.row)
            if update is not None:
                hook = self._output_hook(profiled, update)
                if self._ranks is not None:
                    hook = self._ranks.own_heads(profiled.row, hook)
                # Before hooks of others, which may change the output.
                self._handles.append(module.register_forward_hook(hook, prepend=True))
        # Last, and from within: another thread may run the model meanwhile, and a forward that begins has all that is in it.
        for module in {id(m): m for m in (self._decoder, self.model)}.values():
            self._handles.append(boundary.register(self, module))

    def _after_optimizer_step(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        """Fused optimizers write weights without a trace."""
        own = {id(parameter) for p in self._profiled for parameter in p.site.module.parameters()}
        own |= {id(p) for update in self._updates.normed.values() for p in update.parameters()}
        if any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
            for channel in self._channels:
                channel.accumulator.mark_changed()

    def remove(self) -> None:
        """Take every hook off the model. The results stay as they are, also if a CUDA graph that was captured with the hooks is
        replayed; calling it again does nothing.
        """
        with self._lock:
            self._remove()

    def _remove(self) -> None:
        if self._check is not None:
            self._check.close()
        if not self._handles:
            return
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        operator.release(self._handle)
        self._updates.close()
        try:
            self._deferred.catch_up_all()
        finally:
            self._epoch += 1  # what is under way in other threads does not count any more
            for forward in [*self._beside, self._main]:
                if forward is not None:
                    self._drop(forward)
            self._cached_launches.clear()
            for queue in self._queues.values():
                queue.cached_launch = None
                queue.moments.freeze()
            self._deferred.clear_backlogs()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    @property
    def profiled_sites(self) -> list[HeadSite]:
        """Those of `sites` that are measured."""
        return [profiled.site for profiled in self._profiled]

    @property
    def findings(self) -> dict[str, Finding]:
        """What `verify=True` found, by the names of the sites; filled while the first batch runs."""
        return {} if self._check is None else self._check.findings

    @property
    def stats(self) -> LaunchStats:
        """How the inputs were measured since the hooks were attached or reset, and how much of them is held now
        (`fastheads.capture.stats`). Never waits for a device, nor for another thread's forward.
        """
        queues = [*self._queues.values()]
        for forward in [*self._beside]:  # the main one's are the manager's own
            queues += forward.queues.values()
        return self._counter.read(self._deferred.waiting(), [x for queue in queues for x in queue.held()])

    @contextmanager
    def paused(self) -> Iterator[None]:
        """A context in which nothing is counted that this thread runs, for warm-ups."""
        before = getattr(self._here, "paused", False)
        self._here.paused = True
        try:
            yield
        finally:
            self._here.paused = before

    def token_mask(self, mask: TokenMask) -> AbstractContextManager[None]:
        """A context in which `mask` says which tokens are padding, in place of the arguments' masks: for callers who know better.
        It is for the calls of the thread that enters it.

        Sequences stay those of the call, and `skip_first` still leaves out the first valid tokens of each. Under torch.compile
        the mask is an input of the graph.

        Args:
            mask: bool `[batch, seq]`, True where a token is real: the tokens of the decoder's own call. Or a function, for calls
                that differ (a prompt and the steps after it): it is given the arguments of the decoder's call by name, and
                returns such a mask, or None where the arguments may speak for themselves.

        Raises:
            TokensError: here, `mask` is neither; in the forward, it is not bool or does not fit the call's tokens.
        """
        return self._arguments.overridden(mask)

    # ------------------------------------------------------------------ one forward

    def start(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], frame: FrameType | None
    ) -> None:
        """A call of the model, or of its decoder, begins; `frame` is torch's of that call."""
        with self._lock:
            if not self._handles:
                return  # `remove()` in another thread
            forward = self._innermost()
            if getattr(self._here, "paused", False):
                if not is_capturing(self._queues):
                    self._deferred.catch_up_all()  # nobody looks at what this forward does to their memory
                if forward is None:
                    return
                if module is self.model or forward.counts:  # else the decoder's call of a paused forward
                    self._push(module, frame, forward, {}).counts = False
                return
            if not self._is_decoder_of(forward, module):
                forward = self._begin(module, frame, forward)
            assert forward is not None
            if not forward.counts:
                return
            _check_arguments(kwargs)
            if module is not self._decoder:
                return
            if forward.decoder_frame is not None:
                raise ForwardError(
                    "the decoder was called again after a call that did not end: what that one measured cannot be told apart"
                )
            forward.decoder_frame = frame
        # Without the lock: a function that somebody gave to `token_mask` may wait for other threads.
        forward.layout = self._arguments.token_layout(args, kwargs, self.skip_first)
        for queue in forward.queues.values():
            queue.open(forward.thread)

    def _is_decoder_of(self, forward: Forward | None, module: nn.Module) -> bool:
        """True if this call is that of the decoder in the forward, and not a forward of its own that is called inside it."""
        if forward is None or module is not self._decoder or forward.module is module:
            return False
        # Of a decoder's call that did not end `start` makes an error.
        return not forward.counts or not on_stack(forward.decoder_frame, forward.thread)

    def _innermost(self) -> Forward | None:
        """The innermost forward of this thread that is under way. After Ctrl-C torch calls no hook that would have ended one."""
        forward: Forward | None = getattr(self._here, "forward", None)
        while forward is not None and not forward.is_live():
            forward = self._drop(forward)
        whole = self._whole
        if forward is None and whole.module is not None and whole.thread == get_ident():
            if whole.is_live():
                return whole  # its graph broke
            whole.idle()
        return forward

    def _current(self) -> Forward | None:
        """The innermost forward of this thread, without the look at the stack where none runs inside another."""
        forward: Forward | None = getattr(self._here, "forward", None)
        if forward is not None and forward.outer is not None:
            forward = self._innermost()
        if forward is None and self._whole.module is not None and self._whole.thread == get_ident():
            return self._whole
        return forward

    def _push(
        self,
        module: nn.Module,
        frame: FrameType | None,
        outer: Forward | None,
        queues: dict[torch.device, Any],
    ) -> Forward:
        """A new forward, the innermost one of this thread."""
        if outer is not None and outer.rooms is None:
            outer.suspend()
        forward = Forward(queues)
        forward.module, forward.frame, forward.outer = module, frame, outer
        forward.thread, forward.epoch = get_ident(), self._epoch
        self._here.forward = forward
        return forward

    def _others(self) -> bool:
        """True if another forward is under way, in whatever thread."""
        main = self._main
        if main is not None and not main.is_live():
            self._drop(main)  # Ctrl-C ended it, or its thread
        if self._beside:
            self._beside = [other for other in self._beside if other.is_live()]
        return self._main is not None or bool(self._beside)

    def _begin(self, module: nn.Module, frame: FrameType | None, outer: Forward | None) -> Forward:
        """Begin a forward: on the manager's own queues where no other one is under way, else beside those that are."""
        if torch._C._functorch.peek_interpreter_stack() is not None:
            raise ForwardError("a forward under torch.func transforms (vmap, grad …) cannot be profiled")
        for modules, name, projection in self._places:
            if modules.get(name) is not projection:
                raise ForwardError(
                    f"{name} of an attention module was replaced or wrapped while hooks were on it: attach a new HookManager"
                )
        self._arguments.follow_signature()
        self._updates.look()
        capturing = is_capturing(self._queues)
        if self._others() or self._whole.frame is not None:
            self._check_may_run_beside(capturing)
        if self._main is None:
            forward = self._main = self._push(module, frame, outer, self._queues)
            self._prepare(forward, capturing)
        else:
            forward = self._push(module, frame, outer, {})
            self._beside.append(forward)
            self._follow_weights()
            for device in list(self._queues):
                self._queue_of(forward, device)
        forward.generations = [channel.accumulator.generation for channel in self._channels]
        return forward

    def _check_may_run_beside(self, capturing: bool) -> None:
        """Raises ForwardError where a forward cannot begin while another is under way."""
        what, others = None, self._main is not None or self._beside
        if on_stack(self._whole.frame, self._whole.thread):
            what = "while one runs that was compiled as a whole"
        elif others and (capturing or self._in_captured or (self._main is not None and self._main.capturing)):
            what = "while one is captured as a CUDA graph, or parts of it were"
        elif not others:
            self._whole.idle()  # it failed
        elif self._ranks is not None:
            what = "with tensor parallelism"
        elif self._check is not None and self._check.unchecked():
            what = "before the first one has been checked (verify=True)"
        if what is not None:
            raise ForwardError(
                f"two forwards of one model at once, or one inside another, cannot be profiled {what}"
            )

    def _prepare(self, forward: Forward, capturing: bool) -> None:
        """Make the manager's own queues ready: no launch, no wait."""
        forward.capturing = capturing
        for queue in self._queues.values():
            self._deferred.withdraw(queue)
            queue.close()
            queue.recorded = False
            if queue.deferred.forwards and queue.off_stream() and not capturing:
                self._deferred.catch_up(queue)
            queue.follow_stream()
            for moments in queue.moments.pending:
                moments.batches.clear()
        self._follow_weights()
        if capturing:
            for factor in self._factors():
                factor.in_graph = factor.in_own_graph = True
            self._keep_for_graph()
            self._in_captured.update(profiled.row for profiled in self._profiled)
            self._may_defer = False
        if self._check is not None:
            self._check.watch()
        for queue in self._queues.values():
            queue.moments.begin(always=capturing)

    def _follow_weights(self) -> None:
        for channel in self._channels:
            channel.accumulator.refresh(before=self._deferred.weights_changed)

    def _factors(self) -> list[SiteFactor]:
        return [factor for channel in self._channels for factor in channel.accumulator.factors.values()]

    def _pre_hook(self, tap: Tap, profiled: Profiled) -> Tap:
        """The same as a hook; a method, for what cannot pickle the closure tells its name."""
        own, traced = profiled.site.module, profiled.traced()

        def pre_hook(module: nn.Module, args: tuple[Any, ...]) -> None:
            if not torch.compiler.is_compiling():
                tap(module, args)
            elif module is own:
                self.trace(module, args, traced)

        return pre_hook

    def _tap(self, profiled: Profiled) -> Tap:
        """What is called with each input of the projection."""
        own, queue = profiled.site.module, profiled.queue
        raw_stream = torch._C._cuda_getCurrentRawStream if queue.is_cuda else None
        transposed = profiled.row in self._sequence_first

        def tap(module: nn.Module, args: tuple[Any, ...]) -> None:
            # A decode step's layer takes 100 µs on a GPU: here every look at the tensor counts.
            x = args[0]
            size = x.nbytes
            if (
                size <= queue.room  # never so outside a call of the decoder
                and size <= queue.largest
                and module is own
                and get_ident() == queue.thread
                and x.get_device() == queue.index
                and not x.requires_grad
                and not transposed
                and (raw_stream is None or raw_stream(queue.index) == queue.raw_stream)
            ):
                queue.room -= size
                queue.kept.append((profiled, x, None if x.is_inference() else x._version))
            elif module is own:
                self._measure(profiled, x)
            # else a copy of the model

        return tap

    def _measure(self, profiled: Profiled, x: Tensor) -> None:
        """What the hook does with an input that it cannot simply keep."""
        forward = self._current()
        if forward is None or not forward.counts:
            return  # not within a forward: a checkpoint's recomputation, a layer called alone
        if profiled.row in self._sequence_first and x.dim() == 3:
            x = x.transpose(0, 1)
        with self._lock:
            if forward.module is None:
                return  # `remove()` in another thread
            self._check_input(forward, profiled, x)
            x = x.detach()  # what is kept would hold autograd's graph
            queue = self._queue_of(forward, x.device)
            if (
                forward.decoder_traced
            ):  # eager code inside a compiled decoder: nobody launches what is kept here
                forward.ran.add(profiled.row)
                for channel in self._at_input:
                    self._record_traced(
                        forward, channel, [profiled.row], [x], scale=None, queue=self._queue_on(x.device)
                    )
                return
            size = x.nbytes
            if size > queue.largest or queue.off_stream():
                forward.ran.add(profiled.row)
                self._deferred.check_not_overwritten(self._queue_on(x.device), [x])
                self._record(forward, queue, [profiled.row], [x])
                return
            if size > queue.room:
                self._record_kept(forward, queue)
            queue.room -= size
            queue.kept.append((profiled, x, None if x.is_inference() else x._version))

    def _output_hook(self, profiled: Profiled, update: Update) -> Callable[..., None]:
        own, traced = profiled.site.module, profiled.traced()
        transposed = profiled.row in self._sequence_first

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            compiling = torch.compiler.is_compiling()
            forward = self._traced_forward() if compiling else self._current()
            if forward is None or not forward.counts or module is not own:
                return
            x, output = args[0].detach(), output.detach()
            if transposed:
                x, output = x.transpose(0, 1), output.transpose(0, 1)
            with torch.no_grad():
                norms = update.of_output(output)
            if compiling:
                self._trace_scaled(forward, traced, x, norms)
                return
            with self._lock:
                if forward.module is None:
                    return  # `remove()` in another thread
                queue = self._queue_of(forward, x.device)
                if forward.decoder_traced:
                    scale = scales([norms])
                    own_queue = self._queue_on(x.device)
                    self._record_traced(
                        forward, self._channels[-1], [profiled.row], [x], scale=scale, queue=own_queue
                    )
                elif x.nbytes <= queue.largest and not queue.off_stream():
                    queue.scaled.append((profiled, x, norms))
                else:
                    self._record_scaled(forward, queue, [(profiled, x, norms)])

        return hook

    def _record_kept(self, forward: Forward, queue: DeviceQueue, may_defer: bool = False) -> None:
        """Measure what was kept, or leave it to wait for the next forwards."""
        kept, scaled = queue.take()
        if not kept:
            return
        assert forward.layout is not None  # within a decoder's call
        if may_defer and not scaled and self._deferred.takes(queue, kept, forward.layout):
            assert queue.cached_launch is not None  # which serves it
            forward.ran |= queue.cached_launch.rows
            return
        # A generator: it is drawn only where something waits.
        self._deferred.check_not_overwritten(self._queue_on(queue.device), (x for _, x, _ in kept))
        if self._launched_again(forward, queue, kept):
            if scaled:
                self._record_scaled(forward, queue, scaled)
            return
        rows, inputs = [profiled.row for profiled, _, _ in kept], [x for _, x, _ in kept]
        kinds = {
            (type(x), x.shape, x.stride(), x.dtype, profiled.width, profiled.head_dim)
            for profiled, x, _ in kept
        }
        # Most often so: each of these lines is paid for at each token.
        batch, seq = kept[0][1].shape[:2] if kept[0][1].dim() > 1 else (1, 0)
        if len(kinds) == 1 and (batch != seq or seq == 1) and not self._unknown:
            self._check_input(forward, *kept[0][:2])
        else:
            for profiled, x, _ in kept:
                self._check_input(forward, profiled, x)
        check_unchanged(kept)
        ran = set(rows)
        forward.ran |= ran
        if len(kinds) == 1 and len(ran) == len(rows):
            self._record(forward, queue, rows, inputs, alike=True)
            self._remember(forward, queue, kept, rows, inputs, may_defer=not scaled)
        else:
            for group in grouped(kept):
                self._record(forward, queue, group.rows, group.inputs)
        if scaled:
            self._record_scaled(forward, queue, scaled)

    def _launched_again(self, forward: Forward, queue: DeviceQueue, kept: list[Kept]) -> bool:
        """Measure them by the launch that served the last forward; False where it cannot."""
        cached_launch, layout = queue.cached_launch, forward.layout
        if cached_launch is None or layout is None or forward.capturing:
            return False
        if not queue.off_stream():
            addresses = cached_launch.addresses_of(kept, layout)
            state = queue.moments.pending[0].buffer
            if addresses is not None and cached_launch.launch(addresses, state, layout.valid):
                forward.ran |= cached_launch.rows
                queue.recorded = True
                self._counter.count_repeated()
                return True
        queue.cached_launch = None
        return False

    def _remember(
        self,
        forward: Forward,
        queue: DeviceQueue,
        kept: list[Kept],
        rows: list[int],
        inputs: list[Tensor],
        *,
        may_defer: bool,
    ) -> None:
        """The launch that was just made, for forwards like this one."""
        if len(self._at_input) > 1 or queue.off_stream() or is_capturing(self._queues):
            return
        if forward is not self._main or forward.layout is None:
            return
        if inputs[0].shape[0] == inputs[0].shape[1] > 1:  # each time it is asked whether the batch is known
            return
        profiled = tuple(item[0] for item in kept)
        pending = queue.moments.pending[0]
        queue.cached_launch = self._accumulator.cached_launch(
            profiled, rows, inputs, forward.layout, pending, keep_scratch=True
        )
        if queue.cached_launch is not None and may_defer:
            queue.deferred.watch(kept, queue.budget)

    def _record(
        self,
        forward: Forward,
        queue: DeviceQueue,
        rows: list[int],
        inputs: list[Tensor],
        alike: bool = False,
    ) -> None:
        assert forward.layout is not None  # within a decoder's call
        queue.recorded = True
        with queue.on_its_stream():
            for channel in self._at_input:
                pending = queue.moments.pending[channel.index]
                channel.accumulator.record(rows, inputs, forward.layout, pending, alike=alike)
                self._counter.launches += 1

    def _record_scaled(self, forward: Forward, queue: DeviceQueue, scaled: list[Scaled]) -> None:
        assert forward.layout is not None  # within a decoder's call
        channel = self._channels[-1]
        queue.recorded = True
        pending = queue.moments.pending[channel.index]
        with torch.no_grad(), queue.on_its_stream():
            for group in grouped(scaled):
                scale = scales(group.extras)
                channel.accumulator.record(group.rows, group.inputs, forward.layout, pending, scale=scale)
                self._counter.launches += 1

    def _check_input(self, forward: Forward, site: Profiled | TracedSite, x: Tensor) -> None:
        layout = forward.layout
        if layout is None:
            raise ForwardError(
                f"{site.name} ran outside the decoder's own call: its valid tokens are not known. "
                "Profile a tower as a model of its own"
            )
        if type(x) is not Tensor and not torch.compiler.is_compiling():
            raise ForwardError(f"{site.name}: an input of type {type(x).__name__} cannot be measured")
        if layout.tokens is None:
            layout = forward.layout = layout.settled(x.shape)
        check_shape(site, x, layout)
        if torch.compiler.is_compiling():  # of a layout that is known nothing is asked: it would be guarded
            known = site.row not in self._unknown or site.row in self._shown
        else:
            known = self._shows_layout(site.row, x)
        if not known and x.shape[0] == x.shape[1] > 1:
            raise ForwardError(
                f"{site.name}: its input is {list(x.shape[:2])}, so that rows and tokens cannot be told apart: its module "
                "is none of transformers, whose layouts are known. First run a batch with more tokens than rows, or fewer"
            )

    def _shows_layout(self, row: int, x: Tensor) -> bool:
        """True if it is known which dimension of `x` is the batch: by its shape, which is noted, or by what was known before."""
        is_square = x.shape[0] == x.shape[1] > 1
        if not is_square and row not in self._unknown:
            return True
        site = self.sites[row]
        owner = attention_of(self.model, site)
        forward = type(owner).forward, vars(owner).get("forward")
        if x.shape[0] != x.shape[1]:
            self._shown[row] = forward
        if not is_square or self._shown.get(row) == forward or has_known_layout(self.model, site):
            return True
        self._unknown.add(row)  # somebody replaced its forward since: from now on each input is looked at
        return False

    def trace(self, module: nn.Module, args: tuple[Any, ...], site: TracedSite) -> None:
        """`_measure` inside a graph. The budget is decided here, once, when the graph is made."""
        forward = self._traced_forward()
        if forward is None or not forward.counts:
            return
        x = args[0].detach()
        if self._ranks is not None:
            x = self._ranks.own_part(site.row, x)
        if site.row in self._sequence_first:
            x = x.transpose(0, 1)
        self._check_input(forward, site, x)
        if x.device != torch.device(site.device):
            raise ForwardError(
                "the model was moved to another device after the hooks were attached: attach a new HookManager"
            )
        # Guarded: where layers are compiled one by one, each gets a graph of its own.
        getattr(module, SITE_ATTRIBUTE)
        queue = self._queues[x.device]
        size = x.numel() * x.element_size()
        if not forward.decoder_traced or size > queue.largest:
            self._trace_groups(forward, [(site, x, None)])
            return
        if sum(y.numel() * y.element_size() for _, y, _ in forward.traced) + size > queue.budget:
            self._trace_kept(forward)
        forward.traced.append((site, x, None))

    def _traced_forward(self) -> Forward | None:
        """The forward that a graph belongs to while Dynamo makes it."""
        if self._whole.module is not None:
            return self._whole
        forward: Forward | None = getattr(self._here, "forward", None)
        return forward

    def _trace_scaled(self, forward: Forward, site: TracedSite, x: Tensor, norms: OutputNorms) -> None:
        """The same of what is measured behind the projection: `trace` has just had the input."""
        if not forward.decoder_traced or x.numel() * x.element_size() > self._queues[x.device].largest:
            self._trace_scaled_groups(forward, [(site, x, norms)])
        else:
            forward.traced_scaled.append((site, x, norms))

    def _trace_kept(self, forward: Forward) -> None:
        self._trace_groups(forward, forward.traced)
        self._trace_scaled_groups(forward, forward.traced_scaled)
        forward.traced, forward.traced_scaled = [], []

    def _trace_groups(self, forward: Forward, inputs: list[tuple[TracedSite, Tensor, None]]) -> None:
        for device, queue in self._queues.items():
            for group in grouped([item for item in inputs if item[1].device == device]):
                for channel in self._at_input:
                    self._record_traced(forward, channel, group.rows, group.inputs, scale=None, queue=queue)

    def _trace_scaled_groups(
        self, forward: Forward, inputs: list[tuple[TracedSite, Tensor, OutputNorms]]
    ) -> None:
        for device, queue in self._queues.items():
            for group in grouped([item for item in inputs if item[1].device == device]):
                scale = scales(group.extras)
                self._record_traced(
                    forward, self._channels[-1], group.rows, group.inputs, scale=scale, queue=queue
                )

    def _record_traced(
        self,
        forward: Forward,
        channel: Channel,
        rows: list[int],
        inputs: list[Tensor],
        *,
        scale: Tensor | None,
        queue: ManagerQueue,
    ) -> None:
        assert forward.layout is not None  # within a decoder's call
        torch.ops.fastheads.record(
            inputs,
            queue.moments.pending_buffer,
            rows,
            channel.index,
            self._handle,
            valid=forward.layout.valid,
            cu_seqlens=forward.layout.cu_seqlens,
            scale=scale,
        )

    def start_traced(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """`start` inside a graph."""
        if getattr(self._here, "paused", False):
            return
        forward: Forward | None = getattr(self._here, "forward", None)
        if self._whole.module is not None:
            if module is not self._decoder or module is self._whole.module:
                raise ForwardError("a forward inside another one cannot be profiled where both are compiled")
            forward = self._whole
        elif forward is None or module is self.model:
            # The graph holds the whole forward.
            forward = self._whole
            forward.module = module
            for queue in self._queues.values():
                torch.ops.fastheads.begin(
                    queue.moments.pending_buffer, queue.moments.committed_buffer, self._handle
                )
        if not forward.counts:
            return
        _check_arguments(kwargs)
        if module is self._decoder:
            if forward.layout is not None:
                raise ForwardError(
                    "the decoder was called again after a call that did not end: what that one measured cannot be told apart"
                )
            forward.traced, forward.traced_scaled = [], []
            forward.layout = self._arguments.token_layout(args, kwargs, self.skip_first)
            forward.decoder_traced = True

    def finish_traced(self, module: nn.Module) -> None:
        """`finish` and `commit` inside a graph."""
        forward = self._traced_forward()
        if forward is None or not forward.counts:
            return
        if module is self._decoder:
            self._trace_kept(forward)
            forward.decoder_traced = False
            forward.layout = None
        if module is self._whole.module:
            self._whole.module = self._whole.frame = None
            for queue in self._queues.values():
                queue.moments.committed_buffer.copy_(queue.moments.pending_buffer)

    def begin_in_graph(self, pending: Tensor, committed: Tensor) -> None:
        """What the operator `fastheads::begin` does: a graph begins a whole forward."""
        with self._lock:
            whole = self._whole
            elsewhere = whole.thread != get_ident() and on_stack(whole.frame, whole.thread)
            if elsewhere or self._others():
                raise ForwardError(
                    "a forward that was compiled as a whole cannot be profiled while another one is under way, in another thread "
                    "or around it"
                )
            if self._queues[pending.device] is next(iter(self._queues.values())):  # one call for each device
                self._settle_whole()
            whole.frame, whole.thread, whole.epoch = frame_of_compiled_call(), get_ident(), self._epoch
            capturing = pending.is_cuda and torch.cuda.is_current_stream_capturing()
            for queue in self._queues.values():
                if capturing:
                    queue.moments.begun_in_graph()
                else:
                    queue.moments.distrust()  # what a graph that fails leaves there
            pending.copy_(committed)

    def _settle_whole(self) -> None:
        """Note what the last forward that a graph held as a whole did not run: Python is not told of its end."""
        whole = self._whole
        if whole.ran and whole.frame is None:  # else it failed
            self._note_skipped({profiled.row for profiled in self._profiled} - whole.ran)
        whole.ran.clear()

    def _note_skipped(self, rows: set[int]) -> None:
        """These did not run in a forward that counts, as far as Python saw."""
        self._missed |= rows - self._in_captured
        self._unseen |= rows & self._in_captured

    def record_in_graph(
        self,
        *,
        channel: int,
        rows: list[int],
        inputs: list[Tensor],
        valid: Tensor | None,
        cu_seqlens: Tensor | None,
        scale: Tensor | None,
        state: Tensor,
    ) -> None:
        """What the operator `fastheads::record` does: at each call, or once while a CUDA graph is captured."""
        with self._lock:
            layout = TokenLayout(valid, self.skip_first, cu_seqlens)
            self._record_in_graph(channel, rows, inputs, layout, scale=scale, state=state)

    def _record_in_graph(
        self,
        channel: int,
        rows: list[int],
        inputs: list[Tensor],
        layout: TokenLayout,
        *,
        scale: Tensor | None,
        state: Tensor,
    ) -> None:
        forward = self._current()
        if forward is not None:
            if forward is not self._main and forward is not self._whole:
                raise ForwardError(
                    "compiled code of one model cannot be profiled in two forwards at once, or in one inside another: run it in "
                    "one thread at a time"
                )
            forward.in_graphs = True
            self._queue_on(inputs[0].device).recorded = True
        (self._whole if forward is None else forward).ran.update(rows)
        accumulator = self._channels[channel].accumulator
        capturing = inputs[0].is_cuda and torch.cuda.is_current_stream_capturing()
        if capturing:
            self._in_captured.update(rows)
            self._may_defer = False
            for row in rows:
                if row in accumulator.factors:
                    accumulator.factors[row].in_graph = True
            self._keep_for_graph()
        for queue in self._queues.values():
            self._deferred.check_not_overwritten(queue, inputs)
        if (forward is None or forward is self._whole) and not capturing:
            accumulator.refresh(before=self._deferred.weights_changed_in_graph)
        key = (channel, inputs[0].get_device(), *rows)
        simple = not capturing and layout.cu_seqlens is None and scale is None
        cached_launch = self._cached_launches.get(key) if simple else None
        if cached_launch is not None and cached_launch.again_in_graph(
            inputs, self.skip_first, state[channel], layout.valid
        ):
            self._counter.count_repeated()
            return
        if inputs[0].numel() and len({x.data_ptr() for x in inputs}) < len(inputs):
            names = ", ".join(self.sites[row].name for row in rows)
            raise ForwardError(f"the input of one of {names} {OVERWRITTEN.format('overwritten')}")
        moments = RunningMoments.over(state[channel])
        accumulator.record(rows, inputs, layout, moments, scale=scale)
        accumulator.finish(moments)
        self._counter.launches += 1
        if simple:
            self._remember_in_graph(key, rows, inputs, layout, moments)

    def _remember_in_graph(
        self,
        key: tuple[int, ...],
        rows: list[int],
        inputs: list[Tensor],
        layout: TokenLayout,
        moments: RunningMoments,
    ) -> None:
        """The launch that was just made, for the next call of the operator."""
        if len(self._cached_launches) >= _REPEATS:
            self._cached_launches.clear()
        self._cached_launches.pop(key, None)
        if len({(x.shape, x.stride(), x.dtype) for x in inputs}) == 1:
            accumulator = self._channels[key[0]].accumulator
            made = accumulator.cached_launch((), rows, inputs, layout, moments, keep_scratch=False)
            if made is not None:
                self._cached_launches[key] = made

    def finish(self, module: nn.Module, frame: FrameType | None) -> bool:
        """A call of the model, or of its decoder, returned: measure what it left. True if it was the forward itself."""
        forward = self._current()
        if forward is None:
            return False
        is_outermost = self._is_outermost(forward, module, frame)
        if not forward.counts:
            return is_outermost
        with self._lock:
            if forward.module is None:
                return False  # `remove()` in another thread
            if module is self._decoder and (forward.decoder_frame is frame or forward.decoder_traced):
                self._finish_decoder(forward)
            if is_outermost:
                if forward.decoder_frame is not None:
                    raise ForwardError(
                        "a call of the decoder in this forward did not end: an error in it was caught, and what it measured is "
                        "not whole, so that the forward is not counted"
                    )
                if forward.ran:  # of a compiled decoder
                    forward.skipped.update({p.row for p in self._profiled} - forward.ran)
                for channel, generation in zip(self._channels, forward.generations, strict=False):
                    channel.accumulator.check_unmoved(generation)
        return is_outermost

    def _is_outermost(self, forward: Forward, module: nn.Module, frame: FrameType | None) -> bool:
        """True if the call of `module` that ends is the forward itself."""
        # A graph that holds a whole forward has no frame for the call in it.
        return module is forward.module if forward is self._whole else forward.frame is frame

    def _finish_decoder(self, forward: Forward) -> None:
        if forward.decoder_traced:  # the graph broke before its end
            self._trace_kept(forward)
            forward.decoder_traced, forward.layout = False, None
            return
        may_defer = forward is self._main and self._may_defer and not forward.in_graphs
        for queue in forward.queues.values():
            self._record_kept(forward, queue, may_defer=may_defer)
            queue.close()
            for channel in self._channels:
                channel.accumulator.finish(queue.moments.pending[channel.index])
        if len(forward.ran) < len(self._profiled):
            forward.skipped.update({p.row for p in self._profiled} - forward.ran)
        forward.ran.clear()
        forward.layout = forward.decoder_frame = None

    def commit(self) -> None:
        """The innermost forward of this thread is over, and counts."""
        forward = self._current()
        assert forward is not None  # it has just finished
        with self._lock:
            if forward.counts and forward.epoch == self._epoch:  # else somebody forgot every sample meanwhile
                self._note_skipped(forward.skipped)
                self._commit(forward)
            self._pop(forward)

    def _commit(self, forward: Forward) -> None:
        """The forward counts: on every device, before anything else is done that may fail."""
        if forward is not self._main and forward is not self._whole:
            for device, queue in forward.queues.items():
                own = self._queue_on(device)
                if queue.recorded:
                    with queue.as_current_device(), queue.on_its_stream(), own.on_its_stream():
                        own.moments.add(queue.moments.pending_buffer)
            return
        any_waits = False
        for queue in self._queues.values():
            waits = queue.deferred.confirm()
            any_waits = any_waits or waits
            if waits and not queue.recorded:
                queue.moments.leave()
            else:
                queue.moments.commit()
        self._counter.deferred += any_waits
        for queue in self._queues.values():
            if queue.deferred.is_full(queue.budget):
                self._deferred.catch_up(queue)

    def end_forward(self) -> None:
        """End the decoder's call under way in this thread as if it returned now, for a caller who leaves it by an exception."""
        forward = self._current()
        if forward is None or forward.decoder_frame is None:
            return
        if self.finish(self._decoder, forward.decoder_frame):
            self.commit()

    def abandon(self, module: nn.Module, frame: FrameType | None) -> None:
        """A call of the model, or of its decoder, raised."""
        forward = self._current()
        if forward is not None and self._is_outermost(forward, module, frame):
            with self._lock:
                self._drop(forward)

    def _drop(self, forward: Forward) -> Forward | None:
        """The forward does not count; returns the one that it was called in."""
        if forward is self._main:
            for queue in self._queues.values():
                self._deferred.withdraw(queue)
                queue.close()
                for moments in queue.moments.pending:
                    moments.batches.clear()
        return self._pop(forward)

    def _pop(self, forward: Forward) -> Forward | None:
        """The forward is over; returns the one that it was called in."""
        outer = forward.outer
        if forward is self._whole:
            forward.idle()
            return None
        if forward is self._main:
            self._main = None
            if self._check is not None:
                self._check.unwatch()
        elif forward in self._beside:
            self._beside.remove(forward)
        if getattr(self._here, "forward", None) is forward:
            self._here.forward = outer
            if outer is not None:
                outer.resume()
        # Another thread may still hold it as its innermost.
        forward.module = forward.frame = forward.decoder_frame = forward.layout = None
        return outer

    def _queue_of(self, forward: Forward, device: torch.device) -> DeviceQueue:
        """Where the forward puts what lies on `device`."""
        own = self._queue_on(device)
        if forward is self._main:
            return own
        if device not in forward.queues:
            queue = forward.queues[device] = DeviceQueue(device, own.moments.like(), self._group_bytes)
            queue.follow_stream()
            if forward.layout is not None:
                queue.open(forward.thread)
        return forward.queues[device]

    def _queue_on(self, device: torch.device) -> ManagerQueue:
        if device not in self._queues:
            shape = (len(METRICS), len(self.sites), self._max_heads)
            moments = CommittedMoments(*shape, device, channels=len(self._channels))
            if self._main is not None:  # a forward is under way: if it fails, what it leaves here must go
                moments.begin(always=False)
            self._queues[device] = DeviceQueue(device, moments, self._group_bytes)
            self._queues[device].follow_stream()
        return self._queues[device]

    def _keep_for_graph(self) -> None:
        if not any(kept is self._channels for kept in _captured):
            _captured.append(self._channels)
            _captured.extend(queue.moments.buffers() for queue in self._queues.values())

    # ------------------------------------------------------------------ results

    def to_profile(self) -> HeadProfile:
        """What the forwards that ended normally gave so far, as a HeadProfile. Waits for the device.

        Raises StaleFactorError where a weight was changed in a way that showed only in its bits (`weight.data.mul_()`), or the
        number that a layer multiplies its attention's output with: what was measured since may be wrong, and `reset()` starts
        afresh.

        With tensor parallelism every rank must ask (it waits for the others), and each gets the whole model's profile. Raises
        RuntimeError, on every rank, where an error ended a forward on some ranks only, so that the counts differ, or where
        another rank could not give its results.
        """
        with self._lock:
            return self._to_profile()

    def _to_profile(self) -> HeadProfile:
        measured = self._measured() if self._ranks is None else self._ranks.whole(self._measured)
        by_channel = zip(*(plane.split(len(METRICS)) for plane in measured), strict=True)
        totals = [Moments(*planes) for planes in by_channel]
        self._check_that_all_ran(totals[0])
        self._check_that_all_verified(totals[0])
        by_metric = {
            name: Moments(*(plane[m].clone() for plane in total))
            for channel, total in zip(self._channels, totals, strict=True)
            for name, m in channel.metrics.items()
        }
        self._warn_of_nonfinite(by_metric.values())
        by_metric[UPDATE_METRIC] = self._updates.moments(by_metric)
        return HeadProfile(by_metric, self._metadata())

    def _measured(self) -> Moments:
        """The moments `[channels * metrics, rows, heads]` of the heads that are measured here, on the CPU. Raises
        StaleFactorError.
        """
        self._check_fresh()
        totals = [self._total(channel) for channel in self._channels]
        return Moments(*(torch.cat(planes) for planes in zip(*totals, strict=True)))

    def _check_no_whole(self, error: type[Exception]) -> None:
        """Raises `error` while a graph holds a forward as a whole: it reads and writes the committed moments without the lock."""
        if on_stack(self._whole.frame, self._whole.thread):
            raise error("a forward that was compiled as a whole is under way: ask again when it has ended")

    def _check_fresh(self) -> None:
        self._check_no_whole(ResultsError)
        self._deferred.catch_up_all()
        self._deferred.check_complete()
        stale = list(
            dict.fromkeys(name for channel in self._channels for name in channel.accumulator.stale())
        )
        if stale:
            raise StaleFactorError(
                f"the weight of {', '.join(stale)} was changed in place behind autograd's back while profiling: what was "
                "measured since may be wrong. Call reset() after such a change, or use backend='einsum', which reads it each time"
            )
        if changed := self._updates.changed():
            raise StaleFactorError(
                f"what the layer multiplies the output of {', '.join(changed)} with was changed while profiling: all samples of "
                f"{UPDATE_METRIC} are multiplied with one number. Call reset() after such a change"
            )

    def _total(self, channel: Channel) -> Moments:
        """The committed moments of a channel, on the CPU."""
        total: Moments | None = None
        for queue in self._queues.values():  # a layer that moved between devices has samples on both
            with queue.on_its_stream():
                here = Moments(*(plane.cpu() for plane in queue.moments.committed[channel.index].views()))
            total = here if total is None else total.merged(here)
        assert total is not None  # the constructor made one for each weight's device
        return total

    def get_results(self) -> dict[str, Any]:
        """`{metric: {statistic: tensor}, ..., "metadata": {...}}`; every tensor is on the CPU, `[num_layers, num_heads]`, float64
        (int64 for "count" and "nonfinite"); row i is `find_sites(model)[i]`. Raises as `to_profile` does, and warns where nothing
        was measured.
        """
        found = self.to_profile()
        warn_where_empty(found)
        return found.results()

    def reset(self) -> None:
        """Forget every sample, those of forwards under way too, and take the weights as they are now. Sets the counts of `stats`
        to zero.
        """
        with self._lock:
            self._reset()

    def _reset(self) -> None:
        self._check_no_whole(ForwardError)
        self._epoch += 1
        for queue in self._queues.values():
            queue.close()
            with queue.on_its_stream():
                queue.moments.clear()
        self._deferred.clear()
        self._counter.clear()
        self._missed.clear()
        self._unseen.clear()
        self._whole.ran.clear()
        self._may_defer = True
        for channel in self._channels:
            channel.accumulator.rebuild()
            channel.accumulator.used.clear()
        self._updates.renew()
        self._weights = self._fingerprint()
        self._warned = False

    def state(self) -> tuple[list[Tensor], dict[str, Any]]:
        """The committed moments bit for bit, float64 `[channels, 6, metrics, rows, heads]` on the CPU for each device that holds
        some, and what else belongs to them (JSON): for `load_state` of a manager on the same model with the same options.
        Raises StaleFactorError as `to_profile` does.
        """
        with self._lock:
            return self._state()

    def _state(self) -> tuple[list[Tensor], dict[str, Any]]:
        self._check_fresh()
        self._settle_whole()
        buffers = []
        for queue in self._queues.values():
            with queue.on_its_stream():
                buffers.append(queue.moments.committed_buffer.cpu().clone())
        used = [sorted(channel.accumulator.used) for channel in self._channels]
        return buffers, {"used": used, "missed": sorted(self._missed)}

    def load_state(self, buffers: list[Tensor], notes: dict[str, Any]) -> None:
        """Go on from what `state` gave. Raises CheckpointError where it does not fit this manager."""
        with self._lock:
            self._load_state(buffers, notes)

    def _load_state(self, buffers: list[Tensor], notes: dict[str, Any]) -> None:
        self._check_no_whole(ForwardError)
        self._epoch += 1
        here = [queue.moments.committed_buffer for queue in self._queues.values()]
        used, missed = notes.get("used"), notes.get("missed")
        if not (isinstance(used, list) and len(used) == len(self._channels) and isinstance(missed, list)):
            raise CheckpointError("the moments come without what belongs to them")
        if [(b.shape, b.dtype) for b in buffers] != [(b.shape, b.dtype) for b in here]:
            raise CheckpointError("the moments are those of another model or other options")
        for queue, buffer in zip(self._queues.values(), buffers, strict=True):
            queue.deferred.clear()
            with queue.on_its_stream():
                for own in queue.moments.buffers():
                    own.copy_(buffer)
        for channel, names in zip(self._channels, used, strict=True):
            channel.accumulator.used.update(map(str, names))
        self._missed.update(row for row in missed if type(row) is int)

    def _fingerprint(self) -> dict[str, Any] | None:
        """Of the weights as they are; None where each rank has only its own."""
        return fingerprint(self.model) if self._ranks is None else None

    def _metadata(self) -> dict[str, Any]:
        used = sorted(self._accumulator.used)
        return describe(
            self.model,
            self.sites,
            token_agg=self.token_agg,
            skip_first=self.skip_first,
            backend="+".join(used) if used else self._accumulator.backend,
            precision=self.precision,
            layers=self.layers,
            residual_update=self._updates.describe(range(len(self.sites))),
            weights=self._weights,
        )

    def _check_that_all_ran(self, moments: Moments) -> None:
        """Raises ResultsError naming the sites that did not run in a forward that ran the decoder."""
        self._settle_whole()
        if self.allow_skipped:
            return
        given = (moments.count + moments.nonfinite)[0].amax(dim=-1)  # [rows]
        any_ran = any(given[p.row] for p in self._profiled)
        most = given.max()
        missed = [
            p.site.name
            for p in self._profiled
            if p.row in self._missed
            or (any_ran and not given[p.row])
            or (p.row in self._unseen and given[p.row] < most)  # replays are told of by their samples alone
        ]
        if missed:
            raise ResultsError(
                f"{', '.join(missed)} did not run in every forward: nothing, or too little, was measured there. Where the model "
                "skips layers by design, HookManager(..., allow_skipped=True) accepts it"
            )

    def _check_that_all_verified(self, moments: Moments) -> None:
        """Raises ResultsError naming the sites that were measured and not verified, where that was asked for."""
        unchecked = set() if self._check is None else set(self._check.unchecked())
        given = (moments.count + moments.nonfinite)[0].amax(dim=-1)  # [rows]
        missed = [p.site.name for p in self._profiled if p.site.name in unchecked and given[p.row]]
        if missed:
            raise ResultsError(
                f"verify=True could not check {', '.join(missed)}, which ran in compiled code or CUDA graphs only: run a "
                "batch before that"
            )

    def _warn_of_nonfinite(self, moments: Iterable[Moments]) -> None:
        number = sum(int(of_metric.nonfinite.sum()) for of_metric in moments)
        if number and not self._warned:
            self._warned = True
            warnings.warn(
                f"{number} samples were NaN or infinite: they are counted in 'nonfinite' and left out of all else",
                RuntimeWarning,
                stacklevel=4,
            )


def _check_arguments(kwargs: dict[str, Any]) -> None:
    if kwargs.get("adapter_names") is not None:
        raise TokensError(
            "a batch with an adapter for each row (adapter_names) has no one weight to measure with"
        )


def _place(model: nn.Module, site: HeadSite) -> tuple[dict[str, nn.Module | None], str, nn.Module]:
    """Where the projection hangs: its owner's children, its name among them, itself."""
    path, _, name = site.name.rpartition(".")
    return model.get_submodule(path)._modules, name, site.module
