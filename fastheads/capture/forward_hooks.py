"""The hooks at the start and end of a forward: plain Python between compiled graphs, and traced inside them.

`torch.compile(model)` compiles the forward of a transformers model, but calls the hooks of the model itself outside that graph.
Left alone, Dynamo would make a small graph of each: guards, copies and launches that cost more than the hook.

All managers on a module share one hook before it and one behind it, which stay the last ones: they see the arguments that the
forward is given, and a forward counts only when no hook of others can fail any more.
"""

import threading
from functools import partial
from types import FrameType
from typing import Any, NoReturn, Protocol
from weakref import WeakKeyDictionary, ref

from torch import Tensor, nn

from fastheads.capture.forward import frame_of_call, on_stack
from fastheads.capture.tracing import plain_or_traced
from fastheads.errors import ForwardError, NotCopyableError


class Boundary(Protocol):
    """The methods that these hooks call: `recorder.Recorder`."""

    def start(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], frame: FrameType | None
    ) -> None:
        """Begin a call of the model or its decoder; `frame` is torch's frame of that call."""

    def finish(self, module: nn.Module, frame: FrameType | None) -> bool:
        """Measure what is left after a call. Raises if the forward must not count; returns True if the call is the forward."""

    def commit(self) -> None:
        """End the innermost forward of this thread, and count it."""

    def abandon(self, module: nn.Module, frame: FrameType | None) -> None:
        """End the forward without counting it, if this call, which raised, is the forward."""

    def start_traced(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """`start`, as Dynamo traces it."""

    def finish_traced(self, module: nn.Module) -> None:
        """`finish` and `commit`, as Dynamo traces them."""


class _Shared:
    """The boundaries on one module. Copies of the module share it, and their calls are ignored, so that none counts twice."""

    def __init__(self, module: nn.Module) -> None:
        self.module = ref(module)
        self.boundaries: tuple[Boundary, ...] = ()
        self.handles: list[Any] = []
        self.before = self.behind = -1  # the ids of the two hooks
        # Arguments that hooks of others may yet change, by torch's frame of the call.
        self.given: dict[FrameType | None, _Snapshot] = {}

    def forget_ended(self) -> None:
        """Drop the arguments of calls that Ctrl-C ended: torch called no hook behind them."""
        for frame, snapshot in list(self.given.items()):
            if not on_stack(frame, snapshot.thread):
                self.given.pop(frame, None)

    def __deepcopy__(self, memo: Any) -> "_Shared":
        return self

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise NotCopyableError(
            "a model with the hooks of a HookManager on it cannot be pickled or saved whole: call the manager's remove() first, "
            "or save model.state_dict()"
        )


# The module's hooks hold it. Held here it would never be freed, nor the module: it leads to the recorder, and so to the model.
_shared: WeakKeyDictionary[nn.Module, "ref[_Shared]"] = WeakKeyDictionary()
_lock = threading.RLock()  # of `_shared` and of which managers are on a module


def _shared_of(module: nn.Module) -> _Shared | None:
    """Return the boundaries on the module; None if no manager is on it."""
    held = _shared.get(module)
    return None if held is None else held()


def _keep_last(hooks: Any, own: int) -> bool:
    """Move the hook to the end of torch's OrderedDict of hooks; True if it was there, or was taken off meanwhile."""
    if next(reversed(hooks), own) == own:
        return True
    try:
        hooks.move_to_end(own)
    except KeyError:
        return True
    return False


# Once the hooks are off, torch forgets that they take keyword arguments: a call that goes on then calls them without.
def _start(
    shared: _Shared, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any] | None = None
) -> None:
    if not shared.boundaries or kwargs is None:
        return
    if shared.module() is not module:
        _check_copy(module)
        return
    frame, _ = frame_of_call()
    if shared.given:
        shared.forget_ended()
    _keep_last(module._forward_hooks, shared.behind)
    if not _keep_last(module._forward_pre_hooks, shared.before):
        shared.given[frame] = _Snapshot(args, kwargs)  # those that come after it may change them
    for boundary in shared.boundaries:
        boundary.start(module, args, kwargs, frame)


def _end(
    shared: _Shared, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], _output: Any = None
) -> None:
    if not shared.boundaries:
        return
    if shared.module() is not module:
        return
    frame, raised = frame_of_call()
    given = shared.given.pop(frame, None) if shared.given else None
    try:
        if raised:
            return  # the forward's own error goes on
        if given is not None and not given.is_of(args, kwargs):
            raise ForwardError(
                f"a forward pre-hook that was registered on {type(module).__name__} after the profiling hooks changed its "
                "arguments: this forward is not counted, later ones are"
            )
        if not _keep_last(module._forward_hooks, shared.behind):
            raise ForwardError(
                f"a forward hook was registered on {type(module).__name__} during its forward, and may yet fail: this one is not "
                "counted, later ones are"
            )
        ended = [boundary for boundary in shared.boundaries if boundary.finish(module, frame)]
        for boundary in ended:
            boundary.commit()
    except BaseException:
        raised = True
        raise
    finally:
        if raised:
            for boundary in shared.boundaries:
                boundary.abandon(module, frame)


def _check_copy(module: nn.Module) -> None:
    """Raise ForwardError if the copy is a replica of DataParallel, whose forwards the user expects to count."""
    if getattr(module, "_is_replica", False):
        raise ForwardError(
            "DataParallel's replicas cannot be profiled: use DistributedDataParallel, or the model itself on one device"
        )


class _Snapshot:
    """The arguments of a call, to detect later that one was replaced or changed."""

    def __init__(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self._names, self._values = list(kwargs), [*args, *kwargs.values()]
        self._versions = list(map(_version, self._values))
        self.thread = threading.get_ident()

    def is_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
        """True if these are the same ones, unchanged."""
        values = [*args, *kwargs.values()]
        return (
            list(kwargs) == self._names
            and len(values) == len(self._values)
            and all(one is other for one, other in zip(values, self._values, strict=True))
            and list(map(_version, values)) == self._versions
        )


def _version(value: Any) -> int | None:
    return value._version if isinstance(value, Tensor) and not value.is_inference() else None


def _start_in_graph(
    shared: _Shared, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> None:
    if shared.module() is module:
        for boundary in shared.boundaries:
            boundary.start_traced(module, args, kwargs)


def _end_in_graph(
    shared: _Shared, module: nn.Module, _args: tuple[Any, ...], _kwargs: dict[str, Any], _output: Any
) -> None:
    if shared.module() is module:
        for boundary in shared.boundaries:
            boundary.finish_traced(module)


plain_or_traced(_start, _start_in_graph)
plain_or_traced(_end, _end_in_graph)


class _Handle:
    def __init__(self, boundary: Boundary, module: nn.Module) -> None:
        self._boundary, self._module = boundary, module

    def remove(self) -> None:
        with _lock:
            shared = _shared_of(self._module)
            if shared is None:
                return
            shared.boundaries = tuple(other for other in shared.boundaries if other is not self._boundary)
            if not shared.boundaries:
                for handle in shared.handles:
                    handle.remove()
                shared.handles = []
                shared.given.clear()
                _shared.pop(self._module, None)


def register(boundary: Boundary, module: nn.Module) -> _Handle:
    """Call `boundary` at the start and end of each call of `module`, until the returned handle is removed."""
    with _lock:
        shared = _shared_of(module)
        if shared is None:
            shared = _Shared(module)
            _shared[module] = ref(shared)
            # partial and not a function around them: that would be a frame that Dynamo compiles.
            shared.handles = [
                module.register_forward_pre_hook(partial(_start, shared), with_kwargs=True),
                module.register_forward_hook(partial(_end, shared), with_kwargs=True, always_call=True),
            ]
            shared.before, shared.behind = (handle.id for handle in shared.handles)
        shared.boundaries += (boundary,)
    return _Handle(boundary, module)
