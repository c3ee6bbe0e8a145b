"""Give each projection, and each module whose input is a residual stream, a fresh subclass of its class while hooks are on.

It makes code that torch.compile compiled before see hooks that came later. Dynamo does not guard on a module's hooks by default:
a graph that was compiled without them would go on without them, silently. It does guard on a module's class, and on attributes
that it reads: the site's name, without which layers that are compiled one by one would share the graph, and hook, of the first.

And it calls the hook of a plain linear layer, or of a decoder layer, from `forward`. A module with a pre-hook takes the long way
through torch's `__call__`: 7 to 9 µs a layer between the launches of a decode step. Pre-hooks of others come before it: it sees
what they made of the input.
"""

import functools
from collections.abc import Callable
from typing import Any, Literal
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from fastheads.capture.custom_op import recorder_of
from fastheads.capture.tracing import plain_or_traced
from fastheads.models.weight_formats import PLAIN_ATTRIBUTE

SITE_ATTRIBUTE = "_fastheads_site"
TAPS_ATTRIBUTE = "_fastheads_taps"
# What Dynamo reads in place of the taps: of each the handle of its recorder, and the site in constants. It checks a module in one
# look where all that a graph read of it, and of the modules in it, is constants; else it looks at each layer of the model anew.
# That is so in torch 2.11 (`use_recursive_dict_tags_for_guards`), no longer in 2.13.
TRACED_ATTRIBUTE = "_fastheads_traced"
ANY_ATTRIBUTE = "_fastheads_any"  # of a `forward` that calls taps with all its arguments
# Gates on the projection's input (`intervene.gates`), which are no part of a copy.
GATES_ATTRIBUTE = "_fastheads_gates"
# Of a pre-hook that measures, which must come after those that change the input.
MEASURES_ATTRIBUTE = "_fastheads_measures"

_Taps = Literal["linear", "residual"] | None

# As a forward pre-hook, but what it returns is not looked at. That of a residual stream takes keyword arguments too.
Tap = Callable[..., None]

# module -> (its own class, number of managers attached)
_attached: WeakKeyDictionary[nn.Module, tuple[type[nn.Module], int]] = WeakKeyDictionary()
# Dynamo knows a class by its address: one that was freed could give it to the next, and old code would run. A kilobyte each.
_made: set[type[nn.Module]] = set()


class RetraceHandle:
    """Makes compiled code that runs any of the modules compile anew at its next call; and once more when it is removed."""

    def __init__(
        self,
        modules: dict[str, nn.Module],
        residuals: dict[str, nn.Module] | None = None,
        *,
        classes: "Subclasses | None" = None,
    ) -> None:
        """`modules` by the names of their sites; `residuals`: by names, modules whose input is a residual stream.

        `classes` are for modules that no other handle holds: graphs that were compiled with one of them are used again.
        """
        residuals = {} if residuals is None else residuals
        self._modules = [*modules.values(), *residuals.values()]
        fresh = Subclasses()
        for name, module in (*modules.items(), *residuals.items()):
            own, count = _attached.get(module, (type(module), 0))
            _attached[module] = (own, count + 1)
            made = fresh if count or classes is None else classes
            module.__class__ = made[own, _tap_of(module, own, takes_any=name in residuals)]
            setattr(module, SITE_ATTRIBUTE, name)

    def remove(self) -> None:
        """Give each module its own class again, if this is the last manager on it."""
        fresh = Subclasses()
        for module in self._modules:
            own, count = _attached.pop(module, (None, 0))
            if own is None:
                continue  # the module is being freed, with the manager
            if type(module) not in _made:
                pass  # a parametrization, say, made a class of its own from ours: it needs it
            elif count > 1:
                _attached[module] = (own, count - 1)
                takes_any = getattr(type(module).forward, ANY_ATTRIBUTE, False)
                module.__class__ = fresh[own, _tap_of(module, own, takes_any=takes_any)]
            else:
                module.__class__ = own
            if count == 1:
                delattr(module, SITE_ATTRIBUTE)
        self._modules = []


def takes_taps(module: nn.Module) -> bool:
    """Return True if a module that a RetraceHandle holds can have taps; others need a pre-hook."""
    forward = type(module).forward
    return forward is _tapped_forward or (
        getattr(forward, ANY_ATTRIBUTE, False) and "forward" not in module.__dict__
    )


def add_tap(module: nn.Module, tap: Tap, recorder: int, site: Any) -> Any:
    """Call `tap` before each forward of a module that takes taps, as a pre-hook would be called. While Dynamo traces, the `trace`
    method of the recorder with that handle (`custom_op`), or `trace_residual`, is called instead, with `site`, which holds
    constants only. Returns the handle that removes the tap.
    """
    return _TapHandle(module, tap, (recorder, site))


class _TapHandle:
    def __init__(self, module: nn.Module, tap: Tap, traced: tuple[int, Any]) -> None:
        self._module = module
        self._entries = {TAPS_ATTRIBUTE: tap, TRACED_ATTRIBUTE: traced}
        for name, entry in self._entries.items():
            setattr(module, name, (*getattr(module, name, ()), entry))

    def remove(self) -> None:
        for name, entry in self._entries.items():
            left = tuple(other for other in getattr(self._module, name, ()) if other is not entry)
            if left:
                setattr(self._module, name, left)
            elif hasattr(self._module, name):
                delattr(self._module, name)


def _tapped_forward(self: nn.Module, input: Tensor) -> Tensor:
    _run_taps(self, (input,))
    return nn.Linear.forward(self, input)  # type: ignore[arg-type]


_tapped_forward.__name__ = "forward"  # as which a bound one is pickled
setattr(_tapped_forward, PLAIN_ATTRIBUTE, nn.Linear.forward)


def _run_taps(module: nn.Module, args: tuple[Any, ...]) -> None:
    # No taps: a wrapper that somebody put around the bound method may outlive them.
    for tap in getattr(module, TAPS_ATTRIBUTE, ()):
        tap(module, args)


def _trace_taps(module: nn.Module, args: tuple[Any, ...]) -> None:
    for handle, site in getattr(module, TRACED_ATTRIBUTE, ()):
        recorder = recorder_of(handle)
        if recorder is not None:
            recorder.trace(module, args, site)


def _run_residual_taps(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for tap in getattr(module, TAPS_ATTRIBUTE, ()):
        tap(module, args, kwargs)


def _trace_residual_taps(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    for handle, row in getattr(module, TRACED_ATTRIBUTE, ()):
        recorder = recorder_of(handle)
        if recorder is not None:
            recorder.trace_residual(row, args, kwargs)


plain_or_traced(_run_taps, _trace_taps)
plain_or_traced(_run_residual_taps, _trace_residual_taps)


def _tap_of(module: nn.Module, own: type[nn.Module], *, takes_any: bool) -> _Taps:
    """Return how the module's `forward` can call taps: "linear" if it runs `nn.Linear.forward` itself, "residual" if it
    `takes_any` arguments and runs its class's, None if a hook must.
    """
    if "forward" in module.__dict__:
        return None
    if takes_any:
        return "residual"
    return "linear" if own.forward is nn.Linear.forward else None


def _residual_forward(own: type[nn.Module]) -> Callable[..., Any]:
    """Make the `forward` that shows the taps its arguments, after all pre-hooks, and runs that of the class."""
    original = own.forward

    @functools.wraps(original)
    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        _run_residual_taps(self, args, kwargs)
        return original(self, *args, **kwargs)

    setattr(forward, ANY_ATTRIBUTE, True)
    return forward


class Subclasses(dict[tuple[type[nn.Module], _Taps], type[nn.Module]]):
    """One new subclass of each class, with taps or without; one for all modules, since Python runs code that meets many classes
    slower.
    """

    def __missing__(self, key: tuple[type[nn.Module], _Taps]) -> type[nn.Module]:
        own, taps = key
        names: dict[str, Any] = {
            "__module__": own.__module__,
            "__qualname__": own.__qualname__,
            "__reduce_ex__": _reduce_to(own),
        }
        if taps == "linear":
            names["forward"] = _tapped_forward
        elif taps == "residual":
            names["forward"] = _residual_forward(own)
        self[key] = type(own.__name__, (own,), names)
        _made.add(self[key])
        return self[key]


def _reduce_to(own: type[nn.Module]) -> Callable[..., Any]:
    """Make the `__reduce_ex__` by which copies and pickles of a module have its own class."""

    def reduce(self: nn.Module, protocol: Any) -> Any:
        reduced: Any = own.__reduce_ex__(self, max(protocol, 2))
        ours = (SITE_ATTRIBUTE, TAPS_ATTRIBUTE, TRACED_ATTRIBUTE, GATES_ATTRIBUTE)
        state = {name: value for name, value in reduced[2].items() if name not in ours}
        return (_new, (own,), state, *reduced[3:])

    return reduce


def _new(own: type[nn.Module]) -> nn.Module:
    return own.__new__(own)
