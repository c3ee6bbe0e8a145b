"""The custom ops in compiled graphs: `begin` sets up the pending moments, `record` merges samples into them.

The graph holds the inputs, the valid tokens and the state; all else (factors, backends) stays in Python behind a handle, so that
nothing of it is guarded, copied or retraced.
"""

import itertools
from typing import Any, Protocol
from weakref import ref

import torch
from torch import Tensor, nn


class Recorder(Protocol):
    """The methods that are called while Dynamo traces, and by the ops while a graph runs: `recorder.Recorder`."""

    def trace(self, module: nn.Module, args: tuple[Any, ...], site: Any) -> None:
        """Take the input of a projection while Dynamo traces its call; `site` comes from `projection_hook.add_tap`."""

    def trace_residual(self, row: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Take the residual stream of a site from a module's arguments while Dynamo traces its call."""

    def begin_in_graph(self, pending: Tensor, committed: Tensor) -> None:
        """Begin a forward that one graph holds as a whole: copy the committed moments to the pending ones."""

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
        """Merge the samples of `inputs` into the channel's part of `state`."""


# Not a WeakValueDictionary: Dynamo could not read it.
_recorders: dict[int, "ref[Recorder]"] = {}
_handles = itertools.count(1)


def register(recorder: Recorder) -> int:
    """Return a handle of the recorder for graphs. It does not keep it alive: once it is freed, the ops do nothing."""
    handle = next(_handles)
    _recorders[handle] = ref(recorder, lambda _: release(handle))
    return handle


def release(handle: int) -> None:
    """Invalidate the handle: ops of graphs that hold it do nothing from now on."""
    _recorders.pop(handle, None)


def recorder_of(handle: int) -> Recorder | None:
    """Return the recorder of the handle; None if it was released or freed."""
    found = _recorders.get(handle)
    return None if found is None else found()


def record(
    inputs: list[Tensor],
    state: Tensor,
    rows: list[int],
    channel: int,
    handle: int,
    *,
    valid: Tensor | None,
    cu_seqlens: Tensor | None,
    scale: Tensor | None,
    ratio: Tensor | None,
) -> None:
    """Merge the samples of a group of layers into `state`: the buffer of the recorder's pending moments, or a copy that a
    compiler made of it and copies back.
    """
    recorder = recorder_of(handle)
    if recorder is not None:
        recorder.record_in_graph(
            channel=channel,
            rows=rows,
            inputs=inputs,
            valid=valid,
            cu_seqlens=cu_seqlens,
            scale=scale,
            ratio=ratio,
            state=state,
        )


def begin(pending: Tensor, committed: Tensor, handle: int) -> None:
    """Begin a forward that one graph holds as a whole. Raises ForwardError if another one is under way."""
    recorder = recorder_of(handle)
    if recorder is not None:
        recorder.begin_in_graph(pending, committed)


# Not by torch.library.custom_op, which wraps each call in 16 µs of Python that serve autograd: the inputs are detached.
_library = torch.library.Library("fastheads", "FRAGMENT")
_library.define(
    "record(Tensor[] inputs, Tensor(a!) state, int[] rows, int channel, int handle, *, "
    "Tensor? valid, Tensor? cu_seqlens, Tensor? scale, Tensor? ratio) -> ()"
)
_library.impl("record", record, "CompositeExplicitAutograd")
_library.define("begin(Tensor(a!) pending, Tensor committed, int handle) -> ()")
_library.impl("begin", begin, "CompositeExplicitAutograd")


torch.library.register_fake("fastheads::record", lambda *_, **__: None, lib=_library)
torch.library.register_fake("fastheads::begin", lambda *_: None, lib=_library)
