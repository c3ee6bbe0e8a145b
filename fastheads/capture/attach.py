"""Put hooks on a model: before each projection, behind it if its output is needed, and around the calls of model and decoder."""

from collections.abc import Callable
from threading import get_ident
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from fastheads.capture import forward_hooks
from fastheads.capture.profiled import Profiled
from fastheads.capture.projection_hook import MEASURES_ATTRIBUTE, RetraceHandle, Tap, add_tap, takes_taps
from fastheads.capture.recorder import Recorder
from fastheads.models.attention import tap_attention
from fastheads.models.residual import Update


def attach(recorder: Recorder, handles: list[Any]) -> None:
    """Put the hooks on the recorder's model. Appends the handle of each hook to `handles` as soon as the hook is on."""
    scope = recorder.scope
    residuals: dict[str, nn.Module] = {} if scope.residuals is None else scope.residuals.modules
    handles.append(RetraceHandle({p.site.name: p.site.module for p in recorder.profiled}, residuals))
    handles.append(register_optimizer_step_post_hook(_marking_changes(recorder)))
    for profiled in recorder.profiled:
        tap = _tap(recorder, profiled)
        module = profiled.site.module
        if takes_taps(module):
            handles.append(add_tap(module, tap, recorder.handle, profiled.traced()))
        else:
            handles.append(module.register_forward_pre_hook(_pre_hook(recorder, tap, profiled)))
        if scope.residuals is not None and profiled.row in scope.residuals.sources:
            handles.append(_add_residual_tap(recorder, profiled))
        update = scope.normed.get(profiled.row)
        if update is not None:
            hook = _output_hook(recorder, profiled, update)
            # Before hooks of others, which may change the output.
            handles.append(module.register_forward_hook(hook, prepend=True))
    if scope.streaming is not None:
        attentions = scope.streaming.attentions
        taps = {owner: scope.streaming.tap(row, recorder.forwards) for row, owner in attentions.items()}
        handles.append(tap_attention(taps))
    # Last, and from within: another thread may run the model meanwhile, and a forward that begins has all that is in it.
    for module in {id(m): m for m in (scope.engine.decoder, scope.model)}.values():
        handles.append(forward_hooks.register(recorder, module))


def _tap(recorder: Recorder, profiled: Profiled) -> Tap:
    """Make the function that is called with each input of the projection."""
    own, queue = profiled.site.module, profiled.queue
    raw_stream = torch._C._cuda_getCurrentRawStream if queue.is_cuda else None
    engine, row = recorder.engine, profiled.row
    as_is, measure = engine.as_is(row), recorder.measure

    def tap(module: nn.Module, args: tuple[Any, ...]) -> None:
        # A decode step's layer takes 100 µs on a GPU: here every look at the tensor counts.
        x = args[0] if as_is else engine.input(row, args[0])
        size = x.nbytes
        if (
            size <= queue.room  # never so outside a call of the decoder
            and size <= queue.largest
            and module is own
            and get_ident() == queue.thread
            and x.get_device() == queue.index
            and not x.requires_grad
            and (raw_stream is None or raw_stream(queue.index) == queue.raw_stream)
        ):
            queue.room -= size
            queue.kept.append((profiled, x, None if x.is_inference() else x._version))
        elif module is own:
            measure(profiled, x)
        # else a copy of the model

    return tap


def _pre_hook(recorder: Recorder, tap: Tap, profiled: Profiled) -> Tap:
    """Wrap the tap as a forward pre-hook, for modules whose `forward` is not `nn.Linear`'s."""
    own, traced = profiled.site.module, profiled.traced()

    def pre_hook(module: nn.Module, args: tuple[Any, ...]) -> None:
        if not torch.compiler.is_compiling():
            tap(module, args)
        elif module is own:
            recorder.trace(module, args, traced)

    _name_owner(pre_hook)
    setattr(pre_hook, MEASURES_ATTRIBUTE, True)
    return pre_hook


def _output_hook(recorder: Recorder, profiled: Profiled, update: Update) -> Callable[..., None]:
    """Make the forward hook of a projection whose output the layer normalizes."""
    own, traced = profiled.site.module, profiled.traced()
    engine, row = recorder.engine, profiled.row

    def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        compiling = torch.compiler.is_compiling()
        forward = recorder.forwards.traced() if compiling else recorder.forwards.current()
        if forward is None or not forward.counts or module is not own:
            return
        with torch.no_grad():
            norms = update.of_output(engine.output(row, output.detach()))
        x = engine.input(row, args[0].detach())
        if compiling:
            recorder.graph.put_scaled(forward, traced, x, norms)
        else:
            recorder.measure_scaled(forward, profiled, x, norms)

    _name_owner(hook)
    return hook


def _add_residual_tap(recorder: Recorder, profiled: Profiled) -> Any:
    """Look at the residual stream where a module's call shows it, which comes before the projection's, in the same forward."""
    residuals = recorder.scope.residuals
    assert residuals is not None
    source, cannot_wait = residuals.sources[profiled.row], residuals.cannot_wait(profiled.row)
    may_wait = profiled.row in residuals.at_input and not cannot_wait
    own, queue, mark, row = source.module, profiled.queue, profiled.residual(), profiled.row
    raw_stream = torch._C._cuda_getCurrentRawStream if queue.is_cuda else None
    engine, read = recorder.engine, source.read
    as_is = engine.as_is(row)

    def tap(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if module is not own:
            return  # a copy of the model
        residual = read(args, kwargs)
        if not as_is:
            residual = engine.output(row, residual)
        size = residual.nbytes
        if (
            may_wait
            and size <= queue.room
            and size <= queue.largest
            and get_ident() == queue.thread
            and residual.get_device() == queue.index
            and not residual.requires_grad
            and (raw_stream is None or raw_stream(queue.index) == queue.raw_stream)
        ):
            queue.room -= size
            queue.kept.append((mark, residual, None if residual.is_inference() else residual._version))
        else:
            recorder.measure_residual(mark, residual, is_overwritten=cannot_wait)

    def pre_hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if not torch.compiler.is_compiling():
            tap(module, args, kwargs)
        elif module is own:
            recorder.trace_residual(row, args, kwargs)

    _name_owner(pre_hook)
    if takes_taps(own):
        recorder.residual_hooks.append((own, pre_hook))
        return add_tap(own, tap, recorder.handle, row)
    return own.register_forward_pre_hook(pre_hook, with_kwargs=True)


def _name_owner(hook: Callable[..., None]) -> None:
    """Name HookManager in the closure's qualified name: pickle, which cannot pickle it, shows that name in its error."""
    hook.__qualname__ = f"HookManager.<locals>.{hook.__name__}"


def _marking_changes(recorder: Recorder) -> Callable[..., None]:
    """Make the hook that runs after each optimizer step: fused optimizers change weights without raising their version."""
    held = ref(recorder)  # torch keeps this hook for ever: it must not keep the model

    def step_hook(optimizer: torch.optim.Optimizer, *_: Any) -> None:
        recorder = held()
        if recorder is None:
            return
        own = {id(parameter) for p in recorder.profiled for parameter in p.site.module.parameters()}
        own |= {id(p) for update in recorder.scope.normed.values() for p in update.parameters()}
        if any(id(parameter) in own for group in optimizer.param_groups for parameter in group["params"]):
            for channel in recorder.scope.channels:
                channel.accumulator.mark_changed()

    return step_hook
