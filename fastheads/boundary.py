"""Hooks that run as plain Python between graphs, and are traced within them.

`torch.compile(model)` compiles the forward of a transformers model, but calls the hooks of the model itself outside that graph.
Left alone, Dynamo would make a small graph of each: guards, copies and launches that cost more than the hook.
"""

import sys
from collections.abc import Callable
from functools import partial
from typing import Any, Protocol

import torch
from torch import nn


class Boundary(Protocol):
    """What is told of a forward's start and end: a HookManager."""

    def start(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A call of the model or its decoder begins."""

    def finish(self, module: nn.Module) -> None:
        """It returned."""

    def abandon(self, module: nn.Module) -> None:
        """It returned or raised."""


class _Shared:
    """A reference that a copy of the model shares: a copy of the manager would count twice."""

    def __init__(self, boundary: Boundary) -> None:
        self.boundary = boundary

    def __deepcopy__(self, memo: Any) -> "_Shared":
        return self


def _start(shared: _Shared, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    shared.boundary.start(module, args, kwargs)


def _end(shared: _Shared, module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
    try:
        if not _raised():
            shared.boundary.finish(module)
    finally:
        shared.boundary.abandon(module)  # nothing, where it has just finished


def _end_in_graph(shared: _Shared, module: nn.Module, _args: tuple[Any, ...], _output: Any) -> None:
    shared.boundary.finish(module)


_CALL = nn.Module._call_impl.__code__
_INNER_CALL = f"{_CALL.co_qualname}.<locals>.inner"


def _raised() -> bool:
    """Whether torch calls this hook because the forward raised: it then does so outside the function that runs the others."""
    frame = sys._getframe(2)
    while frame.f_code is not _CALL:
        if frame.f_code.co_qualname == _INNER_CALL:
            return False
        assert frame.f_back is not None  # torch calls hooks from there alone
        frame = frame.f_back
    return True


def _plain_or_traced(hook: Callable[..., None], traced: Callable[..., None]) -> Callable[..., None]:
    """The hook with Dynamo off; where Dynamo traces a call of it, it traces the other in its place."""
    plain: Callable[..., None] = torch.compiler.disable(hook)
    torch.compiler.substitute_in_graph(plain, skip_signature_check=True)(traced)
    return plain


_plain_start, _plain_end = _plain_or_traced(_start, _start), _plain_or_traced(_end, _end_in_graph)


def register(boundary: Boundary, module: nn.Module) -> list[Any]:
    """Tell `boundary` of the calls of `module`: the handles of the hooks."""
    shared = _Shared(boundary)
    # partial and not a function around them: that would be a frame that Dynamo compiles.
    return [
        module.register_forward_pre_hook(partial(_plain_start, shared), with_kwargs=True),
        module.register_forward_hook(partial(_plain_end, shared), always_call=True),
    ]
