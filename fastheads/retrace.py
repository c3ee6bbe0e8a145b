"""Makes code that torch.compile compiled before see hooks that came later.

Dynamo does not guard on a module's hooks by default: a graph that was compiled without them would go on without them, silently.
It does guard on a module's class, so a module gets a fresh subclass of its own class while hooks are attached, and its class back
after. It guards on attributes that it reads too: the site's name, without which layers that are compiled one by one would share
the graph, and the hook, of the first.
"""

from collections.abc import Callable
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

SITE_ATTRIBUTE = "_fastheads_site"

# module -> (its own class, number of managers attached)
_attached: WeakKeyDictionary[nn.Module, tuple[type[nn.Module], int]] = WeakKeyDictionary()
# Dynamo knows a class by its address: one that was freed could give it to the next, and old code would run. A kilobyte each.
_made: set[type[nn.Module]] = set()


class RetraceHandle:
    """Makes compiled code that runs any of the modules compile anew at its next call; and once more when it is removed."""

    def __init__(self, modules: dict[str, nn.Module]) -> None:
        """`modules` by the names of their sites."""
        self._modules = list(modules.values())
        fresh = _FreshSubclasses()
        for name, module in modules.items():
            own, count = _attached.get(module, (type(module), 0))
            _attached[module] = (own, count + 1)
            module.__class__ = fresh[own]
            setattr(module, SITE_ATTRIBUTE, name)

    def remove(self) -> None:
        """After the last manager each module has its own class again."""
        fresh = _FreshSubclasses()
        for module in self._modules:
            own, count = _attached.pop(module)
            if type(module) not in _made:
                pass  # a parametrization, say, made a class of its own from ours: it needs it
            elif count > 1:
                _attached[module] = (own, count - 1)
                module.__class__ = fresh[own]
            else:
                module.__class__ = own
            if count == 1:
                delattr(module, SITE_ATTRIBUTE)
        self._modules = []


class _FreshSubclasses(dict[type[nn.Module], type[nn.Module]]):
    """One new subclass of each class; one for all modules, since Python runs code that meets many classes slower."""

    def __missing__(self, own: type[nn.Module]) -> type[nn.Module]:
        names = {
            "__module__": own.__module__,
            "__qualname__": own.__qualname__,
            "__reduce_ex__": _reduce_to(own),
        }
        self[own] = type(own.__name__, (own,), names)
        _made.add(self[own])
        return self[own]


def _reduce_to(own: type[nn.Module]) -> Callable[..., Any]:
    """For copies and pickles of a module: they are of its own class."""

    def reduce(self: nn.Module, protocol: Any) -> Any:
        state = own.__reduce_ex__(self, max(protocol, 2))
        return (_new, (own,), *state[2:])  # type: ignore[misc]

    return reduce


def _new(own: type[nn.Module]) -> nn.Module:
    return own.__new__(own)
