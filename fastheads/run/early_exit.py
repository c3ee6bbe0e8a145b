"""End a forward of the decoder after the last profiled projection, since the rest is not needed.

The first forward runs to its end and shows the order of the projections. From then on a hook on the last one ends the forward for
the HookManager, which counts it as ended normally, and raises an exception that `call()` catches.

Forwards run to their end if an early exit might be noticed: the model has other hooks, a projection runs more than once or not at
all, code is compiled, or accelerate moves weights.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from torch import nn

from fastheads.capture.manager import HookManager, recorder_of
from fastheads.capture.recorder import Recorder
from fastheads.models.sites import decoder_of


class _EnoughError(Exception):
    """Ends the forward, once all profiled projections have run."""


class EarlyExit:
    """Call a decoder up to the last profiled projection. Create it before the HookManager attaches, since it looks for hooks."""

    def __init__(self, model: nn.Module, *, allowed: bool = True) -> None:
        self.decoder = decoder_of(model)
        self._allowed = allowed and not any(
            m._forward_pre_hooks or m._forward_hooks or hasattr(m, "_hf_hook") for m in model.modules()
        )
        self._recorder: Recorder | None = None
        self._last: nn.Module | None = None
        self._handle: Any = None

    def follow(self, hooks: HookManager) -> None:
        """Set the manager whose forwards are to end."""
        self._recorder = recorder_of(hooks)
        self._sites = list(self._recorder.scope.chosen.values())

    def call(self, arguments: dict[str, Any]) -> None:
        """Run a forward of the decoder."""
        if not self._allowed:
            self.decoder(**arguments)
        elif self._last is None:
            with self._order() as order:
                self.decoder(**arguments)
            self._choose(order)
        else:
            with suppress(_EnoughError):
                self.decoder(**arguments)

    def remove(self) -> None:
        if self._handle is not None:
            self._handle.remove()
            self._handle = None

    @contextmanager
    def _order(self) -> Iterator[list[nn.Module]]:
        """Collect the projections in the order in which they run."""
        order: list[nn.Module] = []
        handles = [
            site.module.register_forward_pre_hook(lambda module, _: order.append(module))
            for site in self._sites
        ]
        try:
            yield order
        finally:
            for handle in handles:
                handle.remove()

    def _choose(self, order: list[nn.Module]) -> None:
        if len({id(module) for module in order}) == len(order) == len(self._sites):
            self._last = order[-1]
            self._handle = self._last.register_forward_hook(self._leave)
        else:
            self._allowed = False

    def _leave(self, module: nn.Module, _args: Any, _output: Any) -> None:
        if module is self._last and self._recorder is not None:  # not a copy of the module
            self._recorder.end_forward()
            raise _EnoughError
