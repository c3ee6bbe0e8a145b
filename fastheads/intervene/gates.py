"""Replace heads in the input of output projections, by forward pre-hooks.

A gate acts after the pre-hooks that were there before it and ahead of those that measure, so that a HookManager measures what
acts. It selects (`torch.where`) and never multiplies: 0 · NaN would be NaN. Dynamo does not guard on hooks; a projection
therefore has another class while it is gated (`capture.projection_hook`), and masks and fills are inputs of compiled graphs.
"""

from collections.abc import Mapping
from threading import RLock
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from fastheads.capture.projection_hook import (
    GATES_ATTRIBUTE,
    MEASURES_ATTRIBUTE,
    RetraceHandle,
    Subclasses,
)
from fastheads.errors import ForwardError


class Gate(NamedTuple):
    """A mask of heads and their replacement, for one projection's input `[..., heads * head_dim]`."""

    mask: Tensor  # bool: True for heads that are replaced. [heads, 1], or of rows [batch, 1, heads, 1] or [1, batch, heads, 1]
    fill: Tensor | None  # [heads, head_dim] in the projection's dtype; None: zero
    exact: Tensor | None  # `fill` before it was rounded to that dtype
    heads: int
    head_dim: int
    rows: int | None  # length of the batch, if each row has a mask of its own
    batch_dim: int


_lock = RLock()
# module -> the handle of its pre-hook, one for all its gates
_hooks: WeakKeyDictionary[nn.Module, Any] = WeakKeyDictionary()
# The classes of gated modules that nothing else holds.
_classes = Subclasses()


class GateHandle:
    """Puts gates on modules; `remove()` takes them off again, in any order. Gates put on later act later."""

    def __init__(self, modules: Mapping[str, nn.Module], gates: Mapping[str, Gate]) -> None:
        """`modules` and their `gates` by the names of their sites."""
        self._gates: list[tuple[nn.Module, Gate]] = []
        self._retrace: RetraceHandle | None = None
        with _lock:
            try:
                for name, module in modules.items():
                    gate = gates[name]
                    setattr(module, GATES_ATTRIBUTE, (*getattr(module, GATES_ATTRIBUTE, ()), gate))
                    self._gates.append((module, gate))
                    if module not in _hooks:
                        _hooks[module] = _register(module)
                self._retrace = RetraceHandle(dict(modules), classes=_classes)
            except BaseException:
                self.remove()
                raise

    def remove(self) -> None:
        """Take the gates off. Calling it again does nothing."""
        with _lock:
            gates, self._gates = self._gates, []
            for module, gate in gates:
                left = tuple(other for other in getattr(module, GATES_ATTRIBUTE, ()) if other is not gate)
                if left:
                    setattr(module, GATES_ATTRIBUTE, left)
                    continue
                if GATES_ATTRIBUTE in module.__dict__:
                    delattr(module, GATES_ATTRIBUTE)
                handle = _hooks.pop(module, None)
                if handle is not None:
                    handle.remove()
            retrace, self._retrace = self._retrace, None
            if retrace is not None:
                retrace.remove()


def _register(module: nn.Module) -> Any:
    handle = module.register_forward_pre_hook(_gate_hook, with_kwargs=True)
    hooks: Any = module._forward_pre_hooks
    for key in [key for key, hook in hooks.items() if getattr(hook, MEASURES_ATTRIBUTE, False)]:
        hooks.move_to_end(key)
    return handle


def _gate_hook(
    module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
    gates = getattr(module, GATES_ATTRIBUTE, ())
    if not gates:
        return None  # a copy of a gated module, which has its hooks
    if args:
        x, *rest = args
        return (_gated(x, gates), *rest), kwargs
    name = next(iter(kwargs), "")
    return args, {**kwargs, name: _gated(kwargs.get(name), gates)}


def _gated(x: Any, gates: tuple[Gate, ...]) -> Tensor:
    if not isinstance(x, Tensor):
        raise ForwardError(
            f"the projection's first argument must be a tensor to ablate heads, not {type(x).__name__}"
        )
    for gate in gates:
        heads, head_dim = gate.heads, gate.head_dim
        if x.shape[-1] != heads * head_dim:
            raise ForwardError(
                f"the projection's input is {x.shape[-1]} wide where {heads} heads of {head_dim} were expected: "
                "enter ablate() once the model is as it runs"
            )
        if gate.rows is not None and (x.dim() != 3 or x.shape[gate.batch_dim] != gate.rows):
            raise ForwardError(
                f"the projection's input {list(x.shape)} has not {gate.rows} rows, each with heads of its own to ablate"
            )
        by_head, mask = x.unflatten(-1, (heads, head_dim)), gate.mask.to(x.device)
        if gate.fill is None or gate.exact is None:
            by_head = by_head.masked_fill(mask, 0.0)
        else:
            same = gate.fill.dtype == x.dtype and gate.fill.device == x.device
            fill = gate.fill if same else gate.exact.to(x.device, x.dtype)
            by_head = torch.where(mask, fill, by_head)
        x = by_head.flatten(-2)
    return x
