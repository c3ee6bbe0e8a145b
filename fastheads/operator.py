"""The step under torch.compile: one opaque operator that mutates the pending moments.

The graph holds the inputs, the real tokens and the state; all else (factors, backends) stays in Python behind a handle, so that
nothing of it is guarded, copied or retraced.
"""

import itertools
from typing import Protocol
from weakref import WeakValueDictionary

import torch
from torch import Tensor


class Recorder(Protocol):
    """What the operator calls: a HookManager."""

    def record_in_graph(
        self,
        *,
        channel: int,
        rows: list[int],
        inputs: list[Tensor],
        valid: Tensor | None,
        bounds: Tensor | None,
        scale: Tensor | None,
        state: Tensor,
    ) -> None:
        """Merge the samples of `inputs` into the channel's part of `state`."""


_recorders: WeakValueDictionary[int, Recorder] = WeakValueDictionary()
_handles = itertools.count(1)


def register(recorder: Recorder) -> int:
    """A handle that a graph may hold. The recorder may go: the operator then does nothing."""
    handle = next(_handles)
    _recorders[handle] = recorder
    return handle


def release(handle: int) -> None:
    """The graphs that hold the handle do nothing from now on."""
    _recorders.pop(handle, None)


def record(
    inputs: list[Tensor],
    state: Tensor,
    rows: list[int],
    channel: int,
    handle: int,
    *,
    valid: Tensor | None,
    bounds: Tensor | None,
    scale: Tensor | None,
) -> None:
    """Merge the samples of a group of layers into `state`: the buffer of the recorder's pending moments, or a copy that a
    compiler made of it and copies back.
    """
    recorder = _recorders.get(handle)
    if recorder is not None:
        recorder.record_in_graph(
            channel=channel,
            rows=rows,
            inputs=inputs,
            valid=valid,
            bounds=bounds,
            scale=scale,
            state=state,
        )


# Not by torch.library.custom_op, which wraps each call in 16 µs of Python that serve autograd: the inputs are detached.
_library = torch.library.Library("fastheads", "FRAGMENT")
_library.define(
    "record(Tensor[] inputs, Tensor(a!) state, int[] rows, int channel, int handle, *, "
    "Tensor? valid, Tensor? bounds, Tensor? scale) -> ()"
)
_library.impl("record", record, "CompositeExplicitAutograd")


torch.library.register_fake("fastheads::record", lambda *_, **__: None, lib=_library)
